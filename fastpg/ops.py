"""Registration of the schedules as `torch.ops.fastpg.*`, opaque to torch.compile, and the choice of a backend.

Operators take tensors and numbers one by one; here they are put together into the structures the schedules use.
"""

import torch

from . import tile_ops, two_pass_schedule
from .lm_head import LMHead
from .products import accumulation_dtype
from .rows import Chunk, Rows, Wanted
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
    """RowStatistics of the rows that `rows.Rows` describes; entropy and others_entropy are (0,) unless asked for."""
    rows = Rows(hidden, indices, keep, tokens, temperature)
    return tuple(two_pass_schedule.two_pass_forward(rows, LMHead(weight, bias, softcap, logit_scale), entropy, workspace))


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
        two_pass_schedule.two_pass_backward(
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


@torch.library.custom_op("fastpg::anchored_scores", mutates_args={"scores"})
def anchored_scores(
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    log_anchor: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    scores: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Product 1 of the one-pass schedule, for a chunk (C, H): `tile_ops.anchored_exp`. Writes scores (C, V) if given."""
    head = LMHead(weight, bias, softcap, logit_scale)
    return tile_ops.anchored_exp(Chunk(hidden, tokens, temperature), head, log_anchor, entropy, scores)


@anchored_scores.register_fake
def _(hidden, tokens, temperature, log_anchor, weight, bias, softcap, logit_scale, entropy, scores):
    total = torch.empty_like(log_anchor)
    is_rounded = scores is not None and scores.dtype != total.dtype
    return total, total.new_empty(len(log_anchor) if entropy else 0), total.new_empty(len(scores) if is_rounded else 0)


@torch.library.custom_op("fastpg::gradient_products", mutates_args={"scores", "dhidden", "dweight", "dbias"})
def gradient_products(
    scores: torch.Tensor,
    factor: torch.Tensor,
    residual: torch.Tensor,
    dropped: torch.Tensor | None,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    dhidden: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    accumulate: bool,
) -> None:
    """Products 2 and 3 of a chunk (`tile_ops.gradient_products`), without the rows that are `dropped` (C,)."""
    if dropped is not None:
        tile_ops.zero_rows_(scores, dropped)
        residual = torch.where(dropped, 0, residual) if len(residual) else residual
    tile_ops.gradient_products(scores, factor, residual, hidden, tokens, weight, dhidden, dweight, dbias, accumulate)
