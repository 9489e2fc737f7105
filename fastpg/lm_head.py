"""What turns hidden states into logits: the weight, and the few numbers some models put around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .validation import FLOATING_DTYPES, is_positive_number, kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What model configurations call the pieces of `softcap(logit_scale * (x . w + b))`.
_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIER_NAMES = ("logit_scale", "lm_head_multiplier", "output_multiplier")


@dataclass(frozen=True, eq=False)
class LMHead:
    """An lm_head: `logits = softcap(logit_scale * (hidden @ weight.T + bias))`, `softcap(u) = c tanh(u / c)`.

    weight: (V, H) 16-, 32- or 64-bit floating; the Parameter itself, so that gradients reach it (tied embeddings too).
    bias: (V,) in the weight's dtype, or None. An entry of -inf bans a token (under a softcap its logit is only -c).
    softcap: c > 0, or None for no cap (Gemma 2: 30).
    logit_scale: > 0, multiplies after the bias, before the cap (Cohere: logit_scale, Granite: 1 / logits_scaling).

    Raises TypeError or ValueError naming the field that does not fit.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATING_DTYPES:
            raise TypeError(f"head.weight must be a floating-point tensor (V, H); got {kind(weight)}")
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"head.weight must be (V, H) with V >= 1 and H >= 1; got shape {tuple(weight.shape)}")
        if bias is not None:
            if not isinstance(bias, torch.Tensor) or bias.dtype != weight.dtype or bias.device != weight.device:
                raise TypeError(
                    f"head.bias must be a tensor with the weight's dtype and device ({weight.dtype}, {weight.device}); "
                    f"got {kind(bias)}{f' on {bias.device}' if isinstance(bias, torch.Tensor) else ''}"
                )
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"head.bias must be (V,) = ({weight.shape[0]},); got shape {tuple(bias.shape)}")
        if self.softcap is not None and not is_positive_number(self.softcap):
            raise ValueError(f"head.softcap must be a positive number or None; got {self.softcap!r}")
        if not is_positive_number(self.logit_scale):
            raise ValueError(f"head.logit_scale must be a positive number; got {self.logit_scale!r}")

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> LMHead:
        """The head of a transformers causal language model, read from its output embeddings and its configuration.

        Understands final logit soft-capping (Gemma 2 and 3, RecurrentGemma, xLSTM) and logit scales (Cohere, Granite,
        Falcon-H1, HyperCLOVA X). Raises ValueError where the model has no output embeddings.
        """
        output = model.get_output_embeddings()
        if output is None or getattr(output, "weight", None) is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings with a weight; pass LMHead(weight, ...) instead of "
                "LMHead.from_model(model)"
            )
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        softcap = next((cap for name in _SOFTCAP_NAMES if (cap := getattr(config, name, None))), None)
        return cls(output.weight, getattr(output, "bias", None), softcap, _config_scale(config))


def as_head(head: torch.Tensor | LMHead) -> LMHead:
    """A bare (V, H) weight is a head without bias, cap or scale."""
    return head if isinstance(head, LMHead) else LMHead(head)


def _config_scale(config) -> float:
    scale = 1.0
    for name in _MULTIPLIER_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, (int, float)):  # MPT's logit_scale may be a string that transformers ignores
            scale *= value
    # The same name means opposite things: Granite's models divide by it, HyperCLOVA X multiplies.
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        multiplies = getattr(config, "model_type", "").startswith("hyperclovax")
        scale = scale * scaling if multiplies else scale / scaling
    return float(scale)
