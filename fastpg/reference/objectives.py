"""The objectives: their values per token, to be maximised."""

from __future__ import annotations

from collections.abc import Callable

import torch

# (logprobs, old_logprobs, advantages), all (n,) over kept tokens -> the per-token objective to be maximised, (n,). Objectives
# of whole sequences are marked by `of_sequences`. They take a fourth argument (n,): the number of each token's sequence.
Objective = Callable[..., torch.Tensor]


def reinforce(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """l = A logp: REINFORCE with any advantage, on-policy (Williams 1992; Sutton and Barto, chapter 13)."""
    return advantages * logprobs


def importance_weighted(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """l = r A, r = exp(logp - old): the per-token importance-weighted objective, whose gradient is r A dlogp."""
    return torch.exp(logprobs - old_logprobs) * advantages


def cispo(ratio_max: float | None = 5.0, ratio_min: float | None = None) -> Objective:
    """l = sg(clip(r, ratio_min, ratio_max)) A logp (MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

    The bounds are on the ratio itself: ratio_max is the paper's 1 + eps_high. The paper sets no lower bound. None: unbounded.
    """

    def value(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        ratio = torch.exp(logprobs - old_logprobs)
        if ratio_min is not None:
            ratio = torch.where(ratio < ratio_min, ratio_min, ratio)
        if ratio_max is not None:
            ratio = torch.where(ratio > ratio_max, ratio_max, ratio)
        return ratio.detach() * advantages * logprobs

    return value


def ppo_clip(eps_low: float, eps_high: float, dual_clip: float | None = None) -> Objective:
    """l = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) (PPO, arXiv 1707.06347, eq. 7; asymmetric: DAPO, 2503.14476).

    With dual_clip c, where A < 0: max(that minimum, c A) (arXiv 1912.09729).
    """

    def value(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return _ppo(torch.exp(logprobs - old_logprobs), advantages, eps_low, eps_high, dual_clip)

    return value


def _ppo(ratio: torch.Tensor, advantages: torch.Tensor, eps_low: float, eps_high: float, dual_clip: float | None):
    # The sign of A decides which of the three terms the minimum and the maximum choose; here it is written case by case.
    inside = ratio * advantages
    positive = torch.where(ratio > 1 + eps_high, (1 + eps_high) * advantages, inside)
    negative = torch.where(ratio < 1 - eps_low, (1 - eps_low) * advantages, inside)
    if dual_clip is not None:
        negative = torch.where(ratio > dual_clip, dual_clip * advantages, negative)
    return torch.where(advantages >= 0, positive, negative)


def sapo(tau_pos: float = 1.0, tau_neg: float = 1.05) -> Objective:
    """l = (4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos where A > 0 and tau_neg elsewhere (SAPO, arXiv 2511.20347)."""

    def value(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        ratio = torch.exp(logprobs - old_logprobs)
        soft = {tau: 4 / tau / (1 + torch.exp(-tau * (ratio - 1))) for tau in (tau_pos, tau_neg)}
        return torch.where(advantages > 0, soft[tau_pos], soft[tau_neg]) * advantages

    return value


def dppo_tv(
    delta_low: float = 0.2, delta_high: float = 0.2, ratio_max: float | None = None, two_sided: bool = False
) -> Objective:
    """l = M r A, with M = 0 where A > 0 and p - q > delta_high, or A < 0 and q - p > delta_low, and else 1.

    p and q are the probabilities of the token, new and old (DPPO-Binary-TV, arXiv 2602.04879, eq. 13). With ratio_max
    l = M sg(min(r, ratio_max)) A logp. two_sided: M = 0 beyond either bound, whatever A is.
    """

    def value(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        p, q = torch.exp(logprobs), torch.exp(old_logprobs)
        up = (p - q > delta_high) & ((advantages > 0) | two_sided)
        down = (q - p > delta_low) & ((advantages < 0) | two_sided)
        return _weighted(logprobs, old_logprobs, advantages, up | down, ratio_max)

    return value


def dppo_kl(delta_low: float = 0.05, delta_high: float = 0.05, ratio_max: float | None = None) -> Objective:
    """The same with KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p)) for |p - q| (DPPO-Binary-KL, eq. 14)."""

    def value(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        p, q = torch.exp(logprobs), torch.exp(old_logprobs)
        rest_p, rest_q = (torch.where(x < 0, -torch.expm1(x), 0) for x in (logprobs, old_logprobs))
        of_rest = torch.where(rest_q > 0, rest_q * (torch.log(rest_q) - torch.log(rest_p)), 0)
        kl = q * (old_logprobs - logprobs) + of_rest
        up, down = (kl > delta_high) & (advantages > 0) & (p > q), (kl > delta_low) & (advantages < 0) & (p < q)
        return _weighted(logprobs, old_logprobs, advantages, up | down, ratio_max)

    return value


def icepop(ratio_max: float | None = 5.0, ratio_min: float | None = 0.5) -> Objective:
    """l = sg(r) A logp where ratio_min < r < ratio_max, else 0 (GLM-5, arXiv 2602.15763, section 4.1.2)."""

    def value(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        ratio = torch.exp(logprobs - old_logprobs)
        too_small = torch.zeros_like(ratio, dtype=torch.bool) if ratio_min is None else ratio <= ratio_min
        too_large = torch.zeros_like(ratio, dtype=torch.bool) if ratio_max is None else ratio >= ratio_max
        return _weighted(logprobs, old_logprobs, advantages, too_small | too_large, torch.inf)

    return value


def _weighted(logprobs, old_logprobs, advantages, left_out, ratio_max: float | None) -> torch.Tensor:
    """r A, or with ratio_max sg(min(r, ratio_max)) A logp; 0 where left out."""
    ratio = torch.exp(logprobs - old_logprobs)
    if ratio_max is not None:
        ratio = torch.where(ratio > ratio_max, ratio_max, ratio).detach() * logprobs
    return torch.where((left_out & ~advantages.isnan()) | (advantages == 0), 0, ratio * advantages)


def of_sequences(value: Objective) -> Objective:
    """Marks an objective that takes sequence numbers as its fourth argument."""
    value.takes_sequences = True
    return value


def importance_weighted_by(level: str) -> Objective:
    """ "sequence": l = rho A, rho = exp(mean_t d_t) (the ratio of GSPO); "trajectory": l = w A / T, w = exp(sum_t d_t)."""

    @of_sequences
    def value(logprobs, old_logprobs, advantages, sequences):
        values = torch.zeros_like(logprobs)
        for number in sequences.unique():
            tokens = sequences == number
            d = (logprobs - old_logprobs)[tokens]
            ratio = d.mean().exp() if level == "sequence" else d.sum().exp() / len(d)
            values = values.masked_scatter(tokens, ratio * advantages[tokens])
        return values

    return value


def gspo(eps_low: float, eps_high: float) -> Objective:
    """PPO's clipped objective with rho = exp(mean_t d_t) of the sequence for r (GSPO, arXiv 2507.18071, eq. 5-7)."""

    @of_sequences
    def value(logprobs, old_logprobs, advantages, sequences):
        values = torch.zeros_like(logprobs)
        for number in sequences.unique():
            tokens = sequences == number
            rho = (logprobs - old_logprobs)[tokens].mean().exp()
            values = values.masked_scatter(
                tokens, _ppo(rho.expand(int(tokens.sum())), advantages[tokens], eps_low, eps_high, None)
            )
        return values

    return value


def vespo(k_pos: float, lambda_pos: float, k_neg: float, lambda_neg: float) -> Objective:
    """l = sg(phi(W)) A logp, phi(W) = W^k exp(lambda (1 - W)), W = prod_t exp(d_t) (VESPO, arXiv 2602.10693)."""

    @of_sequences
    def value(logprobs, old_logprobs, advantages, sequences):
        values = torch.zeros_like(logprobs)
        for number in sequences.unique():
            tokens = sequences == number
            w = torch.exp(logprobs - old_logprobs)[tokens].prod().detach()
            positive, negative = w**k_pos * torch.exp(lambda_pos * (1 - w)), w**k_neg * torch.exp(lambda_neg * (1 - w))
            phi = torch.where(advantages[tokens] >= 0, positive, negative)
            values = values.masked_scatter(tokens, phi * advantages[tokens] * logprobs[tokens])
        return values

    return value


def covariances(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """(A - mean A) (logp - mean logp) over all tokens (n,), whose mean is the covariance (arXiv 2505.22617)."""
    return ((advantages - advantages.mean()) * (logprobs - logprobs.mean())).detach()


def clip_cov(eps_low: float, eps_high: float, fraction: float, cov_min: float, cov_max: float) -> Objective:
    """PPO's clipped objective, but 0 for max(int(fraction n), 1) tokens drawn from those with cov_min < cov < cov_max that the
    clip does not hold (Clip-Cov, arXiv 2505.22617, and the authors' code). All of these, if they are no more than that."""

    def value(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        cov, ratio = covariances(logprobs, advantages), torch.exp(logprobs - old_logprobs)
        values = _ppo(ratio, advantages, eps_low, eps_high, None)
        (places,) = torch.where((cov > cov_min) & (cov < cov_max) & (values == ratio * advantages))
        drawn = places[torch.randperm(len(places))[: max(int(fraction * len(cov)), 1)]]
        return values.index_fill(0, drawn, 0)

    return value


def kl_cov(coef: float, fraction: float) -> Objective:
    """l = r A - coef |d| for the max(int(fraction n), 1) tokens of largest cov, else r A (KL-Cov, arXiv 2505.22617)."""

    def value(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        d = logprobs - old_logprobs
        number = min(max(int(fraction * len(d)), 1), len(d))
        chosen = torch.zeros_like(d).index_fill(0, torch.topk(covariances(logprobs, advantages), number).indices, 1)
        return torch.exp(d) * advantages - coef * chosen * d.abs()

    return value
