"""Registration of the schedules as `torch.ops.fastpg.*`, opaque to torch.compile, and the choice of a backend.

Operators take tensors and numbers one by one; here they are put together into the structures the schedules use.
"""

import torch

from . import schedules
from .lm_head import LMHead
from .products import accumulation_dtype
from .schedules import Rows, Wanted
from .tile_ops import RowStatistics


@torch.library.custom_op("fastpg::two_pass_forward", mutates_args=())
def two_pass_forward(
    hidden: torch.Tensor,
    indices: torch.Tensor | None,
    keep: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    workspace: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """RowStatistics of the rows that `schedules.Rows` describes; entropy and others_entropy are (0,) unless asked for."""
    rows = Rows(hidden, indices, keep, tokens, temperature)
    return tuple(schedules.two_pass_forward(rows, LMHead(weight, bias, softcap, logit_scale), entropy, workspace))


@two_pass_forward.register_fake
def _(hidden, indices, keep, tokens, temperature, weight, bias, softcap, logit_scale, entropy, workspace):
    def per_row(present: bool) -> torch.Tensor:
        return weight.new_empty(tokens.shape[0] if present else 0, dtype=accumulation_dtype(weight.dtype))

    return per_row(True), per_row(entropy), per_row(True), per_row(True), per_row(entropy)


@torch.library.custom_op("fastpg::two_pass_backward", mutates_args=())
def two_pass_backward(
    hidden: torch.Tensor,
    indices: torch.Tensor | None,
    keep: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    statistics: list[torch.Tensor],
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    wanted: list[bool],
    workspace: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (hidden, weight, bias), (0,) where not wanted."""
    rows = Rows(hidden, indices, keep, tokens, temperature)
    head = LMHead(weight, bias, softcap, logit_scale)
    return tuple(
        schedules.two_pass_backward(
            rows, head, RowStatistics(*statistics), grad_logprobs, grad_entropy, Wanted(*wanted), workspace
        )
    )


@two_pass_backward.register_fake
def _(
    hidden, indices, keep, tokens, temperature, weight, bias, softcap, logit_scale,
    statistics, grad_logprobs, grad_entropy, wanted, workspace,
):  # fmt: skip
    def like(x: torch.Tensor, present: bool) -> torch.Tensor:
        return x.new_empty(x.shape if present else (0,))

    return like(hidden, wanted[0]), like(weight, wanted[1]), weight.new_empty(len(weight) if wanted[2] else 0)
