"""The statistics of a row after the sums over the vocabulary, and the formulas that complete them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .structures import Partials, RowStatistics


def finish_rows(partials: Partials, entropy: bool) -> RowStatistics:
    """The statistics of rows, from z_y and from m, s, q of all other columns (see `Partials`):

        t    = (m - z_y) + log s               log-odds against the target; the difference first, for small 1 - p_y
        logp = logsigmoid(-t)
        Ho   = log s - q / s                   entropy of the others alone; 0 where there are none
        H    = p_y softplus(t) + (1 - p_y) (Ho + softplus(-t))
        logsumexp over all columns, from the side that does not cancel

    V = 1, or all others banned: s = 0, t = -inf, logp = 0, H = 0.
    """
    maximum, total, weighted, target = partials
    # a target logit of +inf is no certainty, even where all others are -inf: softmax has no value there
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
    """H = p_y softplus(t) + (1 - p_y) (Ho + softplus(-t)). In both terms exp(-inf) * inf counts as 0."""
    log_p, log_1mp = F.logsigmoid(-t), F.logsigmoid(t)
    target_share = torch.where(t == torch.inf, 0, log_p.exp() * -log_p)
    others_share = torch.where(t == -torch.inf, 0, log_1mp.exp() * (others - log_1mp))
    return target_share + others_share
