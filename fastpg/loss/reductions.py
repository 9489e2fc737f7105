"""How per-token objectives become a loss: loss = -sum_n weight_n l_n / D over tokens with mask.

| reduction           | weight                     | D                                         | also known as              |
|---------------------|----------------------------|-------------------------------------------|----------------------------|
| token-mean          | 1                          | number of tokens                          | DAPO, CISPO                |
| seq-mean-token-sum  | 1                          | number of sequences with at least 1 token | REINFORCE (lecture notes)  |
| seq-mean-token-mean | 1 / tokens of its sequence | number of sequences with at least 1 token | GRPO                       |
| sum                 | 1                          | 1                                         |                            |

`denominator` replaces D: by the global count under gradient accumulation or data parallelism, or by the constant of Dr. GRPO.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ..validation import check_mask, is_positive_number, kind, require
from .sequences import Sequences

Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"]


def check_reduction(
    reduction: str, shape: torch.Size, denominator: float | torch.Tensor | None, sequence_ids: torch.Tensor | None = None
) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}; got {reduction!r}")
    if reduction.startswith("seq-") and len(shape) != 2 and sequence_ids is None:
        raise ValueError(
            f'reduction="{reduction}" needs sequences: packed tokens (N,) with sequence_ids=, or (B, T); got shape '
            f"{tuple(shape)}"
        )
    check_denominator(denominator)


def check_denominator(denominator: float | torch.Tensor | None) -> None:
    if isinstance(denominator, torch.Tensor):
        if denominator.dim() != 0 or denominator.dtype == torch.bool or denominator.is_complex():
            raise ValueError(
                f"denominator must be a positive number or a real 0-d tensor; got shape {tuple(denominator.shape)}, "
                f"{kind(denominator)}"
            )
        if not torch.compiler.is_compiling():
            positive = (denominator > 0) & denominator.isfinite()
            require(
                positive,
                lambda: (
                    f"denominator must be positive and finite; got {denominator.item()} (where no rank may have a token, "
                    "pass count.clamp(min=1): the loss is then 0)"
                ),
            )
    elif denominator is not None and not is_positive_number(denominator):
        raise ValueError(f"denominator must be a positive number or a 0-d tensor; got {denominator!r}")


def token_weights(
    mask: torch.Tensor,  # (...) bool
    reduction: Reduction,
    denominator: float | torch.Tensor | None,
    dtype: torch.dtype,
    sequences: Sequences | None = None,
) -> torch.Tensor:
    """weight_n / D of every token, (...); exactly 0 where masked, whatever D is. Needs no host read.

    A denominator of 0 gives kept tokens the weight inf. The seq-mean reductions need `sequences`.
    """
    weights = mask.to(dtype)
    if reduction == "seq-mean-token-mean":
        weights = weights / sequences.lengths(dtype)
    if denominator is not None:
        if isinstance(denominator, torch.Tensor):
            denominator = denominator.detach()  # documented as a constant
        return torch.where(mask, weights / denominator, 0).to(dtype)  # D may be 0 if it was not checked; 0 / D is NaN
    if reduction == "sum":
        return weights
    count = weights.sum() if reduction == "token-mean" else sequences.count().to(dtype)
    return weights / count.clamp(min=1)


def masked_mean(
    values: torch.Tensor,  # (...)
    mask: torch.Tensor,  # (...) bool
    denominator: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """sum(values[mask]) / D, D = max(number of True in mask, 1). If nothing is kept it is 0; values[mask].mean() would be NaN.

        loss = policy_loss(...).loss - 0.01 * masked_mean(entropy, mask)

    Args:
        values: (...) floating. Those at masked positions, NaN and inf included, reach neither the result nor the gradient,
            which is exactly 0 there; NaN at a kept position is not hidden.
        mask: (...) bool, True where a value counts.
        denominator: a number or 0-d tensor that replaces D, as in `policy_loss`: with the global count the means of
            micro-batches or ranks add up to that of the whole. Must be positive; for a count that may be 0 pass
            count.clamp(min=1).

    Returns () float32, or float64 for float64 values; 16-bit values are summed in float32. The value of a denominator tensor is
    read only if it is on a CPU, and never under torch.compile.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit.
    """
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        raise TypeError(f"values must be a floating-point tensor; got {kind(values)}")
    if mask is None:
        raise TypeError("mask must be a bool tensor, True where a value counts; got None (the mean of all is values.mean())")
    check_mask(mask, "values", values)
    check_denominator(denominator)
    return mean_of_kept(values, mask, denominator)


def mean_of_kept(values: torch.Tensor, mask: torch.Tensor, denominator: float | torch.Tensor | None) -> torch.Tensor:
    """`masked_mean` without checks. A denominator of 0 gives 0 if nothing is kept, else inf or NaN."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    # Every value has its own factor. One division of sums could be 0 / 0, NaN, and its gradient NaN behind a torch.where.
    return (torch.where(mask, values, 0).to(dtype) * token_weights(mask, "token-mean", denominator, dtype)).sum()
