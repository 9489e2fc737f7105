"""The lm_head of prime-rl's trainers on fastpg: the same arguments, results and gradients as its FusedOutputLinear.

from fastpg.integrations.prime_rl import use_fastpg
use_fastpg()     # before prime-rl's main() builds the model
"""

from __future__ import annotations

import functools

import torch

from ..linear.linear_logprobs import linear_logprobs
from ..lm_head import LMHead
from ..validation import kind
from .versions import check_version

OLDEST = NEWEST = "0.8.0"  # of prime-rl; its main branch of August 2026 bears the same number


def use_fastpg(*, workspace: int | None = None, check: bool = True) -> None:
    """In this process, models that prime-rl sets up get a `FastpgOutputLinear` as their lm_head.

    workspace, check: as in `linear_logprobs`.

    Wraps prime_rl.trainer.model.inject_prime_lm_head: prime-rl still decides on the forward of the model and on its softcap,
    and the layer that it has put in is replaced. A model without its fused layer (fused_lm_head_token_chunk_size = "disabled")
    is a ValueError then. The size of chunks is not used: fastpg plans by its workspace.

    Raises ImportError where prime-rl is absent. Warns (UserWarning) of a version that was not tested.
    """
    check_version("prime-rl", OLDEST, NEWEST)
    from prime_rl.trainer import model as setup

    theirs = setup.inject_prime_lm_head
    if hasattr(theirs, "__wrapped__"):  # by an earlier call
        theirs = theirs.__wrapped__

    @functools.wraps(theirs)
    def inject(model: torch.nn.Module, chunk_size: int | None = None) -> None:
        if chunk_size is None:
            raise ValueError(
                'model.fused_lm_head_token_chunk_size must be a number, which fastpg does not use; "disabled" asks for logits, '
                "of which fastpg has none"
            )
        theirs(model, chunk_size=chunk_size)
        model.lm_head = FastpgOutputLinear.of(model.lm_head, workspace=workspace, check=check)

    setup.inject_prime_lm_head = inject


class FastpgOutputLinear(torch.nn.Linear):
    """A linear layer without bias, called with hidden states, labels and temperatures, that returns log-probabilities."""

    def __init__(
        self,
        weight: torch.nn.Parameter,  # (V, H)
        *,
        softcap: float | None = None,
        workspace: int | None = None,
        check: bool = True,
    ) -> None:
        """weight becomes the layer's own parameter, tied or not. softcap: as in `LMHead`. workspace, check: as in
        `linear_logprobs`."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self.softcap, self.workspace, self.check = weight, softcap, workspace, check

    @classmethod
    def of(cls, layer: torch.nn.Linear, *, workspace: int | None = None, check: bool = True) -> FastpgOutputLinear:
        """In the place of prime-rl's FusedOutputLinear or GemmaFusedOutputLinear, whose weight and softcap it takes."""
        name = type(layer).__name__
        if name not in ("FusedOutputLinear", "GemmaFusedOutputLinear"):
            raise ValueError(f"layer must be prime-rl's FusedOutputLinear or GemmaFusedOutputLinear; got {name}")
        return cls(layer.weight, softcap=getattr(layer, "softcap", None), workspace=workspace, check=check)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, S, H)
        labels: torch.Tensor | None = None,  # (B, S)
        temperature: torch.Tensor | None = None,  # (B, S)
    ) -> dict[str, torch.Tensor]:
        """{"logprobs": (B, S), "entropy": (B, S)}, float32: prime-rl's PrimeLmOutput, which is a plain dict.

        labels[:, t] is the token that the state at t predicts: prime-rl has shifted them. A label of -100 has log-probability
        and entropy 0, and gradient 0. Where prime-rl's layer raises for a gradient of the entropy, this one has it.

        Raises TypeError where labels or temperature are missing, and as `linear_logprobs` does.
        """
        for name, given in (("labels", labels), ("temperature", temperature)):
            if not isinstance(given, torch.Tensor):
                raise TypeError(
                    f"{name} must be a tensor (B, S): this layer computes log-probabilities, and no logits; got {kind(given)}"
                )
        head = LMHead(self.weight, softcap=self.softcap)
        logprobs, entropy = linear_logprobs(
            hidden_states, head, labels, temperature=temperature, entropy=True, workspace=self.workspace, check=self.check
        )  # fmt: skip
        return {"logprobs": logprobs, "entropy": entropy}
