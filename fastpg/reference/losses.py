"""From log-probabilities to a loss: KL penalties, reductions, corrections, and masks of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .objectives import Objective


def kl_penalty(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    estimator: str,
    importance_weighted: bool,
    max_log_ratio: float | None = None,
) -> torch.Tensor:
    """k per token, from x = ref / pi at the sampled token (Schulman, "Approximating KL divergence", 2020):

    k1 = -log x,   k2 = (log x)^2 / 2,   k3 = (x - 1) - log x;   times r = pi / old if importance_weighted (DeepSeek-V3.2).

    max_log_ratio: log x is clamped to [-max_log_ratio, max_log_ratio]; where it leaves them pi is a constant, so also in r.
    """
    log_x = ref_logprobs - logprobs
    if max_log_ratio is not None:
        too_large, too_small = log_x > max_log_ratio, log_x < -max_log_ratio
        logprobs = torch.where(too_large | too_small, logprobs.detach(), logprobs)
        log_x = torch.where(too_large, max_log_ratio, torch.where(too_small, -max_log_ratio, log_x))
    k = {"k1": -log_x, "k2": log_x**2 / 2, "k3": torch.expm1(log_x) - log_x}[estimator]
    return torch.exp(logprobs - old_logprobs) * k if importance_weighted else k


def reduce(
    values: torch.Tensor,
    mask: torch.Tensor,
    reduction: str,
    denominator: float | None = None,
    sequence_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of per-token objectives `values` (...) over tokens with mask (...). It is minus

    token-mean           the mean over all tokens of the batch
    seq-mean-token-sum   the mean over sequences of the sum over their tokens
    seq-mean-token-mean  the mean over sequences of the mean over their tokens
    sum                  the sum over all tokens

    Sequences are rows, or tokens of equal ids; those without a token do not count. `denominator` replaces the number of tokens
    or sequences. Without tokens the loss is 0.
    """
    if reduction in ("token-mean", "sum"):
        total, count = values[mask].sum(), (mask.sum() if reduction == "token-mean" else 1)
    else:
        ids = _sequence_numbers(mask, sequence_ids)[mask]
        sequences = [values[mask][ids == number] for number in ids.unique()]
        per_sequence = [s.mean() if reduction == "seq-mean-token-mean" else s.sum() for s in sequences]
        total, count = sum(per_sequence, values.sum() * 0), len(sequences)
    if denominator is None:
        denominator = max(int(count), 1)
    return -total / denominator


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    objective: Objective,
    mask: torch.Tensor | None = None,
    reduction: str = "token-mean",
    denominator: float | None = None,
    kl: tuple[float, str, bool] | tuple[float, str, bool, float | None] | None = None,
    ref_logprobs: torch.Tensor | None = None,
    rollout_weights: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    rollout_correction: Callable[..., torch.Tensor] | None = None,
    sequence_ids: torch.Tensor | None = None,
    entropies: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
) -> torch.Tensor:
    """loss = -sum_n weight_n (rollout_n l_n - coef k_n + entropy_coef H_n) / D over tokens with mask.

    logprobs, old_logprobs, ref_logprobs, rollout_weights, entropies: (...). advantages: (...) or (B,). kl: (coef, estimator,
    importance_weighted), or these and max_log_ratio. `old_logprobs=None` is on-policy: old = logp, detached, so that every
    ratio is 1.

    With rollout_logprobs (...) there are three policies (Hilton et al., arXiv 2110.00641; AReaL, arXiv 2505.24298). rollout_n
    is the constant pi_prox / pi_behav = exp(old_n - rollout_n), or what rollout_correction makes of the two and the numbers of
    sequences, all (n,) over kept tokens.
    """
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    if advantages.shape != logprobs.shape:
        advantages = advantages[:, None].expand_as(logprobs)
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    arguments = [logprobs[mask], old[mask], advantages[mask]]
    if getattr(objective, "takes_sequences", False):
        arguments.append(_sequence_numbers(mask, sequence_ids)[mask])
    value = objective(*arguments)
    if rollout_weights is not None:
        value = rollout_weights[mask] * value
    if rollout_logprobs is not None:
        proximal, behaviour = old[mask].detach(), rollout_logprobs[mask].detach()
        if rollout_correction is None:
            weights = torch.exp(proximal - behaviour)
        else:
            weights = rollout_correction(proximal, behaviour, _sequence_numbers(mask, sequence_ids)[mask])
        value = weights * value
    if kl is not None:
        coef, *settings = kl
        value = value - coef * kl_penalty(logprobs[mask], old[mask], ref_logprobs[mask], *settings)
    if entropies is not None:
        value = value + entropy_coef * entropies[mask]
    return reduce(torch.zeros_like(logprobs).masked_scatter(mask, value), mask, reduction, denominator, sequence_ids)


def off_policy_sequence_mask(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, threshold: float, sequences: torch.Tensor
) -> torch.Tensor:
    """M of DeepSeek-V3.2 (arXiv 2512.02556, eq. 9) for kept tokens (n,) and the numbers of their sequences."""
    keep = torch.ones_like(sequences, dtype=torch.bool)
    for number in sequences.unique():
        tokens = sequences == number
        divergence = (old_logprobs - logprobs)[tokens].mean()
        keep = keep.masked_scatter(tokens, (advantages[tokens] >= 0) | (divergence <= threshold))
    return keep


def top_entropy_mask(entropies: torch.Tensor, fraction: float) -> torch.Tensor:
    """H >= quantile of order 1 - fraction, of the entropies of kept tokens (n,) (arXiv 2506.01939)."""
    return entropies >= torch.quantile(entropies, 1 - fraction)


def _sequence_numbers(mask: torch.Tensor, sequence_ids: torch.Tensor | None) -> torch.Tensor:
    """The sequence of every token, (...): its id, or its row in (B, T)."""
    return torch.arange(len(mask), device=mask.device)[:, None].expand(mask.shape) if sequence_ids is None else sequence_ids
