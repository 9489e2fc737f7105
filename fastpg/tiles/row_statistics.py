"""What the vocabulary is reduced to, row by row: the two-pass forward's statistics, and the formulas that finish them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

# An anchored sum beyond it has overflowed, or is about to.
LARGEST_SUM = 2.0**99


class Partials(NamedTuple):
    """What one pass over some columns leaves of each row, (C,) in the accumulation dtype: over the columns v != y,

    m = max z_v, s = sum exp(z_v - m), q = sum exp(z_v - m) (z_v - m) (None unless an entropy is wanted), and z_y.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor | None
    target: torch.Tensor  # NaN for a token that is not among the columns


class RowStatistics(NamedTuple):
    """What is known of each row after a pass over all columns; all (C,) in the accumulation dtype. Defined in `finish_rows`."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    t: torch.Tensor
    logsumexp: torch.Tensor
    others_entropy: torch.Tensor | None

    def select(self, rows: slice) -> RowStatistics:
        return RowStatistics(*(None if x is None else x[rows] for x in self))


class Incoming(NamedTuple):
    """Incoming gradients of rows, (C,) each."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None

    def select(self, rows: slice) -> Incoming:
        return Incoming(self.logprobs[rows], None if self.entropy is None else self.entropy[rows])


class Target(NamedTuple):
    """Of each row's own token, (C,) each."""

    logit: torch.Tensor  # z_y; NaN for a token that is not among the columns
    slope: torch.Tensor | None  # the softcap's slope there; None without one: 1


class RowSums(NamedTuple):
    """Anchored sums of rows: S and Q (C,), Q None unless an entropy is wanted, and what rounding took from the rows of E."""

    total: torch.Tensor
    weighted: torch.Tensor | None
    residual: torch.Tensor | None  # of the rows that are stored; None where E is not rounded


class ScoredRows(NamedTuple):
    """Rows with their loss, (C,) each."""

    logprobs: torch.Tensor
    losses: torch.Tensor
    entropy: torch.Tensor | None
    factor: torch.Tensor | None  # u; None where no gradient is wanted
    state: torch.Tensor  # int8: 0 in range, 1 the factor is not, 2 the sum is not
    residual: torch.Tensor | None  # as in RowSums


class Given(NamedTuple):
    """Ready logits (N, V), and what belongs to their rows."""

    logits: torch.Tensor
    tokens: torch.Tensor  # (N,) int64
    temperature: torch.Tensor | None  # (N, 1) in the accumulation dtype; None is 1
    keep: torch.Tensor  # (N,) bool


def finish_rows(partials: Partials, entropy: bool) -> RowStatistics:
    """From m, s, q of all other columns and z_y:

        t    = (m - z_y) + log s               log-odds against the target; the differences first, for small 1 - p_y
        logp = logsigmoid(-t)
        Ho   = log s - q / s                   entropy of the others alone; 0 where there are none
        H    = p_y softplus(t) + (1 - p_y) (Ho + softplus(-t))
        logsumexp over all columns, from the side that does not cancel

    V = 1, or all others banned: s = 0, t = -inf, logp = 0, H = 0.
    """
    maximum, total, weighted, target = partials
    # +inf against others of -inf is no certainty: softmax has no value there
    target = torch.where(target == torch.inf, torch.nan, target)
    pivot = torch.where(maximum == -torch.inf, 0, maximum)
    log_total = total.log()
    t = (pivot - target) + log_total
    log_p, log_1mp = F.logsigmoid(-t), F.logsigmoid(t)
    logsumexp = torch.where(t < 0, target - log_p, (pivot + log_total) - log_1mp)
    if not entropy:
        return RowStatistics(log_p, None, t, logsumexp, None)
    others = torch.where(total == 0, 0, log_total - weighted / total)
    return RowStatistics(log_p, _entropy(t, others), t, logsumexp, others)


def entropy_of(t: torch.Tensor, log_total: torch.Tensor, total: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
    """H (C,) from t, log S, S and Q of the anchored sums: Ho = log S - Q / S, 0 where S = 0."""
    return _entropy(t, torch.where(total == 0, 0, log_total - weighted / total))


def _entropy(t: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """H = p_y softplus(t) + (1 - p_y) (Ho + softplus(-t)), where exp(-inf) * inf is 0 in both shares."""
    log_p, log_1mp = F.logsigmoid(-t), F.logsigmoid(t)
    target_share = torch.where(t == torch.inf, 0, log_p.exp() * -log_p)
    others_share = torch.where(t == -torch.inf, 0, log_1mp.exp() * (others - log_1mp))
    return target_share + others_share
