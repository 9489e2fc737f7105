"""The statistics of a row after the sums over the vocabulary, and the formulas that complete them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .structures import Asked, Further, FurtherPartials, Partials, RowStatistics


def finish_rows(partials: Partials, entropy: bool) -> RowStatistics:
    """The statistics of rows, from z_y and from m, s, q of all other columns (see `Partials`):

        t    = (m - z_y) + log s               log-odds against the target; the difference first, for small 1 - p_y
        logp = logsigmoid(-t)
        Ho   = log s - q / s                   entropy of the others alone; 0 where there are none
        H    = p_y softplus(t) + (1 - p_y) (Ho + softplus(-t))
        logsumexp over all columns, from the side that does not cancel

    V = 1, or all others banned: s = 0, t = -inf, logp = 0, H = 0.
    """
    maximum, total, weighted, target, _ = partials
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


def finish_further(
    partials: FurtherPartials, statistics: RowStatistics, tokens: torch.Tensor, columns: int | torch.Tensor, asked: Asked
) -> Further:
    """The further statistics of rows over all `columns`, from their partials and from what `finish_rows` found:

        argmax              the column of the largest logit, the first one among equal ones
        mean_logits         sum_v z_v / V
        log_sum_sq_probs    log sum_v p_v^2 = log(p_y^2 + (1 - p_y)^2 sum_{v != y} q_v^2), each term by its logarithm
        rank                0 where the token is the argmax, else the number of larger logits, but at least 1
        top_logprobs        z_v - logsumexp of the k largest logits, in descending order; the token's own is logp

    tokens (C,) count as the ids of the partials do. The logits of a row are those of the matrix product, but z_y is a dot
    product: so a token that is not the argmax may be found with no logit above its own.
    """
    values, ids, total, squares, above = partials
    logprobs, mean, log_sum_sq, rank, top, top_ids = statistics.logprobs, None, None, None, None, None
    if total is not None:
        mean = torch.where(logprobs.isnan(), torch.nan, total / columns)
    if squares is not None:
        own, others = 2 * logprobs, squares + 2 * F.logsigmoid(statistics.t)
        # log(e^a + e^b), as the bits of torch.logaddexp depend on a row's place in the vector
        log_sum_sq = torch.maximum(own, others) - F.logsigmoid((own - others).abs())
    if above is not None:
        rank = torch.where(ids[:, 0] == tokens, 0, above.clamp(min=1))
    if asked.top_k:
        top_ids = ids[:, : asked.top_k]
        # rounding can make the difference positive, and lift it above that of a larger logit
        top = (values[:, : asked.top_k] - statistics.logsumexp[:, None]).clamp(max=0)
        top = torch.where(top_ids == tokens[:, None], logprobs[:, None], top).cummin(1).values
    argmax = ids[:, 0].clone() if asked.argmax else None  # results of an operator share no memory
    return Further(argmax, mean, log_sum_sq, rank, top, top_ids)


def largest_of(values: torch.Tensor, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of the values (C, n) in descending order, with their ids; of equal ones, those that come first."""
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return values.gather(1, order), ids.gather(1, order)


def target_gradient(
    statistics: RowStatistics, g: torch.Tensor, h: torch.Tensor | None, ell: torch.Tensor | None = None
) -> torch.Tensor:
    """dL/dz in the target's column, (C,)."""
    log_1mp = F.logsigmoid(statistics.t)
    at_target = g * log_1mp.exp()
    if ell is not None:  # not (g - l) sigmoid(t) + l, which cancels at a small p_y
        at_target = at_target + ell * statistics.logprobs.exp()
    if h is None:
        return at_target
    p_q = (statistics.logprobs + log_1mp).exp()
    return at_target + torch.where(statistics.t.isinf(), 0, h * p_q * (statistics.t - statistics.others_entropy))
