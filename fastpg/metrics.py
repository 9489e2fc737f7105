"""What a policy-gradient step says about itself, from numbers already at hand. All 0-d tensors, detached, no host read."""

from __future__ import annotations

import torch


def token_metrics(
    logprobs: torch.Tensor,  # (...)
    old_logprobs: torch.Tensor,  # (...)
    mask: torch.Tensor,  # (...) bool
    ratio_bounds: tuple[float | None, float | None],
    bounded_log_ratio: torch.Tensor | None = None,  # (...); None: logp - old
) -> dict[str, torch.Tensor]:
    """Means over tokens with mask, with d = logp - old and r = exp(d):

    ratio_mean     mean r
    ratio_max      max r; 0 without tokens
    clip_fraction  share of tokens whose ratio is outside `ratio_bounds`, whatever the sign of the advantage; the ratio is the
                   objective's own (that of the sequence for GSPO), exp(bounded_log_ratio)
    ess            (sum r)^2 / (n sum r^2), the effective sample size as a share of n; 1 without tokens
    kl_k1, kl_k3   mean(-d) and mean(r - 1 - d): estimates of KL(old, new) (Schulman, "Approximating KL divergence")
    tokens         the number of tokens
    """
    d = torch.where(mask, logprobs.detach() - old_logprobs, 0)
    ratio = d.exp()
    tokens = mask.sum()
    n = tokens.clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values, 0).sum() / n

    bounded = ratio if bounded_log_ratio is None else torch.where(mask, bounded_log_ratio, 0).exp()
    low, high = ratio_bounds
    outside = torch.zeros_like(mask)
    if low is not None:
        outside = outside | (bounded < low)
    if high is not None:
        outside = outside | (bounded > high)
    return {
        "ratio_mean": mean(ratio),
        "ratio_max": _masked_max(ratio, mask, 0.0),
        "clip_fraction": mean(outside.to(d.dtype)),
        "ess": _effective_sample_size(d, mask, n),
        "kl_k1": mean(-d),
        "kl_k3": mean(d.expm1() - d),
        "tokens": tokens,
    }


def _effective_sample_size(d: torch.Tensor, mask: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    # invariant under scaling r, so the largest ratio is made 1: squares of e^60 would leave fp32
    r = torch.where(mask, (d - _masked_max(d, mask, -torch.inf)).exp(), 0)
    ess = r.sum().square() / (n * r.square().sum())
    return torch.where(mask.any(), ess, 1.0)


def _masked_max(values: torch.Tensor, mask: torch.Tensor, empty: float) -> torch.Tensor:
    kept = torch.where(mask, values, empty).reshape(-1)
    return torch.cat([kept, kept.new_full((1,), empty)]).amax()
