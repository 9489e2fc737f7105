"""How per-token objectives become a loss: loss = -sum_n weight_n l_n / D over tokens with mask.

| reduction           | weight                     | D                                         | also known as              |
|---------------------|----------------------------|-------------------------------------------|----------------------------|
| token-mean          | 1                          | number of tokens                          | DAPO, CISPO                |
| seq-mean-token-sum  | 1                          | number of sequences with at least 1 token | REINFORCE (lecture notes)  |
| seq-mean-token-mean | 1 / tokens of its sequence | number of sequences with at least 1 token | GRPO                       |
| sum                 | 1                          | 1                                         |                            |

`denominator` replaces D: the global count under gradient accumulation or data parallelism, the constant of Dr. GRPO.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from .sequences import Sequences
from .validation import is_positive_number, kind, require

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
    """weight_n / D of every token, (...); 0 where masked. No tokens at all: all 0. Never reads the host.

    The seq-mean reductions need `sequences`.
    """
    weights = mask.to(dtype)
    if reduction == "token-mean":
        count = weights.sum()
    elif reduction == "sum":
        count = weights.new_ones(())
    else:
        count = sequences.count().to(dtype)
        if reduction == "seq-mean-token-mean":
            weights = weights / sequences.lengths(dtype)
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.detach()  # a constant, as the documents say
    return (weights / (count.clamp(min=1) if denominator is None else denominator)).to(dtype)
