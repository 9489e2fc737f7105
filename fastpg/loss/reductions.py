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

from ..validation import check_mask, check_plain, is_positive_number, kind, require
from .sequences import Sequences

Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"]


def check_reduction(
    reduction: str,
    shape: torch.Size,
    denominator: float | torch.Tensor | None,
    sequence_ids: torch.Tensor | None = None,
    *,
    check: bool = True,
) -> None:
    """check: whether the host may wait for the value of a denominator that is on a GPU."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}; got {reduction!r}")
    if reduction.startswith("seq-") and len(shape) != 2 and sequence_ids is None:
        raise ValueError(
            f'reduction="{reduction}" needs sequences: packed tokens (N,) with sequence_ids=, or (B, T); got shape '
            f"{tuple(shape)}"
        )
    check_denominator(denominator, check=check)


def check_denominator(denominator: float | torch.Tensor | None, *, check: bool = True) -> None:
    if isinstance(denominator, torch.Tensor):
        check_plain("denominator", denominator)
        if denominator.dim() != 0 or denominator.dtype == torch.bool or denominator.is_complex():
            raise ValueError(
                f"denominator must be a positive number or a real 0-d tensor; got shape {tuple(denominator.shape)}, "
                f"{kind(denominator)}"
            )
        if not torch.compiler.is_compiling() and (check or denominator.device.type == "cpu"):
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
    count: torch.Tensor,  # () int: tokens that count
    reduction: Reduction,
    denominator: float | torch.Tensor | None,
    dtype: torch.dtype,
    sequences: Sequences | None = None,
) -> torch.Tensor:
    """weight_n / D of every token that counts: (), or (...) where sequences have weights of their own. Needs no host read.

    A denominator of 0 gives the weight inf. The seq-mean reductions need `sequences`.
    """
    if denominator is None:
        if reduction == "sum":
            return torch.ones((), dtype=dtype, device=count.device)
        count = (count if reduction == "token-mean" else sequences.count()).clamp(min=1)
        # the reciprocal of an int has torch's default dtype, without an operation that casts
        inverse = (count if dtype == torch.get_default_dtype() else count.to(dtype)).reciprocal()
    else:
        inverse = inverse_denominator(denominator, dtype, count.device)
    return inverse / sequences.lengths(dtype) if reduction == "seq-mean-token-mean" else inverse


def inverse_denominator(denominator: float | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """1 / D, ()."""
    if not isinstance(denominator, torch.Tensor):
        denominator = torch.full((), denominator, dtype=dtype, device=device)
    return denominator.detach().to(device, dtype).reciprocal()  # (a denominator is documented as a constant)


def masked_mean(
    values: torch.Tensor,  # (...)
    mask: torch.Tensor,  # (...) bool
    denominator: float | torch.Tensor | None = None,
    *,
    check: bool = True,
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
        check: True checks the value of a denominator tensor, for which the host waits. False does not where the tensor is on
            a GPU (for CUDA graphs). It is never read under torch.compile.

    Returns () float32, or float64 for float64 values; 16-bit values are summed in float32.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit.
    """
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        raise TypeError(f"values must be a floating-point tensor; got {kind(values)}")
    check_plain("values", values)
    if mask is None:
        raise TypeError("mask must be a bool tensor, True where a value counts; got None (the mean of all is values.mean())")
    check_mask(mask, "values", values)
    check_denominator(denominator, check=check)
    return mean_of_kept(values, mask, denominator)


def mean_of_kept(values: torch.Tensor, mask: torch.Tensor, denominator: float | torch.Tensor | None) -> torch.Tensor:
    """`masked_mean` without checks. A denominator of 0 gives 0 if nothing is kept, else inf or NaN."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    # Every value has its own factor. One division of sums could be 0 / 0, NaN, and its gradient NaN behind a torch.where.
    factor = torch.where(mask, token_weights(mask.sum(), "token-mean", denominator, dtype), 0)
    return (torch.where(mask, values, 0).to(dtype) * factor).sum()
