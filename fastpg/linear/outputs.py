"""What a call may be asked for beside log-probabilities: names, their checks, and how results reach the tokens."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..lm_head import LMHead
from ..tiles.structures import Asked, RowResults
from .rows import Rows

OUTPUTS = ("entropy", "logsumexp", "is_top1", "argmax", "mean_logits", "log_sum_sq_probs", "rank")
MOST_TOP = 8  # of top_k: the kernels keep this many in registers


class TokenStatistics(NamedTuple):
    """Statistics of each token's distribution p = softmax(z), None where not asked for.

    Floats are float32, or float64 for float64 inputs; natural logarithms. At masked positions floats are 0, `is_top1` is False,
    and ids and ranks are -1.
    """

    logprobs: torch.Tensor  # (...): log p of the token
    entropy: torch.Tensor | None  # (...): -sum_v p_v log p_v
    logsumexp: torch.Tensor | None  # (...): log sum_v exp z_v
    is_top1: torch.Tensor | None  # (...) bool: the token is the argmax
    argmax: torch.Tensor | None  # (...) int64: the id of the largest logit, the smallest one of equal logits
    mean_logits: torch.Tensor | None  # (...): sum_v z_v / V
    log_sum_sq_probs: torch.Tensor | None  # (...): log sum_v p_v^2, minus the Renyi entropy of order 2
    rank: torch.Tensor | None  # (...) int64: 0 for the argmax, else how many logits are larger than the token's, at least 1
    top_logprobs: torch.Tensor | None  # (..., top_k): the largest log p_v, in descending order
    top_ids: torch.Tensor | None  # (..., top_k) int64: their ids; of equal ones the smallest comes first


def asked_of(entropy: bool, outputs: Sequence[str], top_k: int) -> Asked:
    """Raises TypeError or ValueError for names that there are not, or that are repeated, and for a top_k out of range."""
    if type(outputs) is tuple and not outputs and type(top_k) is int and top_k == 0:  # most calls, which no check should cost
        return Asked(bool(entropy))
    known = ", ".join(OUTPUTS)
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        given = repr(outputs) if isinstance(outputs, str) else type(outputs).__name__
        raise TypeError(f'outputs must be a sequence of names, such as ("rank",), out of: {known}; got {given}')
    for name in outputs:
        if not isinstance(name, str) or name not in OUTPUTS:
            raise ValueError(f"outputs must have names out of: {known}; got {name!r}")
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"outputs must name each statistic once; got {tuple(outputs)!r}")
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral):
        raise TypeError(f"top_k must be an int from 0 to {MOST_TOP}; got {top_k!r}")
    if not 0 <= top_k <= MOST_TOP:
        raise ValueError(f"top_k must be an int from 0 to {MOST_TOP}; got {top_k}")
    needs_argmax = "argmax" in outputs or "is_top1" in outputs or "rank" in outputs
    return Asked(
        bool(entropy) or "entropy" in outputs, "logsumexp" in outputs, needs_argmax, "mean_logits" in outputs,
        "log_sum_sq_probs" in outputs, "rank" in outputs, int(top_k),
    )  # fmt: skip


def check_top_k(top_k: int, head: LMHead) -> None:
    """Of a head on one rank: the ranks of a group learn V when they compare their arguments (`agreement`)."""
    if top_k and head.group is None and top_k > head.vocab_size:
        raise ValueError(f"top_k must be at most V = {head.vocab_size}, the number of tokens in the vocabulary; got {top_k}")


def token_statistics(
    found: RowResults, rows: Rows, shape: torch.Size, first_column: int, outputs: Sequence[str]
) -> TokenStatistics:
    """The results of the rows (K, ...) at the places of their tokens (..., ...). first_column: the id of rows' token 0."""
    statistics, further = found

    def placed(values: torch.Tensor | None, fill: int = 0) -> torch.Tensor | None:
        return None if values is None else rows.scatter(values, fill).reshape(*shape, *values.shape[1:])

    argmax, is_top1 = further.argmax, None
    if "is_top1" in outputs:
        is_top1 = argmax == (rows.tokens + first_column if first_column else rows.tokens)
    return TokenStatistics(
        placed(statistics.logprobs), placed(statistics.entropy),
        placed(statistics.logsumexp) if "logsumexp" in outputs else None,
        placed(is_top1), placed(argmax, -1) if "argmax" in outputs else None,
        placed(further.mean_logits), placed(further.log_sum_sq_probs), placed(further.rank, -1),
        placed(further.top_logprobs), placed(further.top_ids, -1),
    )  # fmt: skip
