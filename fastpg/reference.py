"""The oracle: every formula of the library on full logits, written to be compared with its paper.

It is slow and large on purpose: all [N, V] logits exist, masked tokens are deleted rather than weighted, gradients are left to
autograd. It computes in the dtype of its inputs (bf16 and fp16 are widened to fp32 first). The tests feed it float64.

Notation
    z_nv  = softcap(logit_scale * (x_n . (w_v + lora_scale B_v A) + b_v)) / T_n,   softcap(u) = c tanh(u / c)
    p_nv  = exp(z_nv) / sum_w exp(z_nw)
    t_n   = logsumexp_{v != y_n} z_nv - z_n,y                 the log-odds against the sampled token y_n
    logp_n = log p_n,y = -log(1 + exp(t_n)) = logsigmoid(-t_n)
    H_n   = -sum_v p_nv log p_nv

Confident tokens stay exact because the sum leaves the target out: 1 - p_y = sigmoid(t) has full relative accuracy down to the
smallest float. `1 - exp(logp)` and `z_y - logsumexp(z)` are rounding noise beyond p_y = 0.9999 in fp32.

The gradient is the same for all losses. Let L be any function of the log-probabilities and entropies, with g_n = dL/dlogp_n and
h_n = dL/dH_n:

    dlogp_n / dz_nv = [v = y_n] - p_nv                        since d logsumexp / dz_v = p_v
    dH_n / dz_nv    = -p_nv (log p_nv + H_n)                  since dp_w / dz_v = p_w ([v = w] - p_v)
    dL / dz_nv      = g_n ([v = y_n] - p_nv) - h_n p_nv (log p_nv + H_n)

In the target column 1 - p_y is sigmoid(t). There log p_y + H equals -(1 - p_y)(t - Ho), where Ho is the entropy of the
distribution over the other tokens alone: H = p_y softplus(t) + (1 - p_y)(Ho + softplus(-t)). Then, by the chain rule,

    dL / du_nv = dL/dz_nv * (1 - tanh^2(u_nv / c)) / T_n,     u = logit_scale * (x . w + b)
    dX = logit_scale * dL/du @ W,   dW = logit_scale * dL/du^T @ X,   db = logit_scale * sum_n dL/du_n

A row of the gradient is, in essence, one number times a softmax. The whole library is about not storing that softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .lm_head import LMHead, as_head

# (logprobs, old_logprobs, advantages), all (n,) over kept tokens -> the per-token objective to be maximised, (n,). Objectives
# of whole sequences are marked by `of_sequences`. They take a fourth argument (n,): the number of each token's sequence.
Objective = Callable[..., torch.Tensor]


def softcap(u: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`cap * tanh(u / cap)`; identity for None.

    With q = exp(-2 |u / cap|), tanh = sign(u) (1 - q) / (1 + q). Its derivative is 4 q / (1 + q)^2, which autograd forms as a
    sum of terms of one sign. `1 - tanh^2` would cancel: it is wrong by 100 % beyond |u / cap| = 10 in fp32. Only the value
    1 - q cancels, at small u. There it is computed as -expm1, whose derivative (formed as 1 + expm1) is exact at small u.
    """
    if cap is None:
        return u
    magnitude = torch.where(u < 0, -u, u) / cap
    q = torch.exp(-2 * magnitude)
    tanh = torch.where(magnitude < 0.5, -torch.expm1(-2 * magnitude), 1 - q) / (1 + q)
    return cap * torch.where(u < 0, -tanh, tanh)


def logits(hidden: torch.Tensor, head: torch.Tensor | LMHead, temperature: float | torch.Tensor = 1.0) -> torch.Tensor:
    """hidden (N, H) -> z (N, V), with the head's bias, scale and cap, divided by the temperature (scalar or (N,))."""
    head = as_head(head)
    if head.group is not None:
        raise ValueError("head.group: the oracle computes on one process; give it the whole weight")
    scores = _wide(hidden) @ _wide(head.weight).T
    if head.lora is not None:
        a, b, scale = head.lora
        scores = scores + scale * (_wide(hidden) @ _wide(a).T) @ _wide(b).T
    if head.bias is not None:
        scores = scores + _wide(head.bias)
    capped = softcap(head.logit_scale * scores, head.softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(capped.dtype).reshape(-1, 1)
    return capped / temperature


def token_distribution(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (N, V), tokens (N,) -> (logprobs (N,), entropies (N,)), accurate for confident tokens too."""
    rows, vocab = logits.shape
    is_target = F.one_hot(tokens, vocab).bool()
    target = logits[is_target]
    others = logits[~is_target].reshape(rows, vocab - 1)
    certain = (others == -torch.inf).all(-1)  # V = 1, or every other token banned by a bias of -inf
    others = torch.where(certain[:, None], 0, others)

    lse = torch.where(certain, -torch.inf, torch.logsumexp(others, -1))
    t = lse - target
    logprobs = F.logsigmoid(-t)

    log_q = torch.log_softmax(others, -1)
    log_q = torch.where(log_q == -torch.inf, 0, log_q)  # a banned token contributes 0 log 0 = 0
    others_entropy = torch.where(certain, 0, -(torch.softmax(others, -1) * log_q).sum(-1))
    finite_t = torch.where(t.isinf(), 0, t)  # at infinite t the entropy of "the target or not" is 0
    surprise, other_surprise = -F.logsigmoid(-finite_t), -F.logsigmoid(finite_t)  # -log p_y and -log(1 - p_y)
    binary_entropy = torch.exp(-surprise) * surprise + torch.exp(-other_surprise) * other_surprise
    # exp(logsigmoid), not sigmoid: the derivative of the latter, y (1 - y), is rounding noise where y is close to 1
    return logprobs, torch.where(t.isinf(), 0, binary_entropy) + F.logsigmoid(t).exp() * others_entropy


class Statistics(NamedTuple):
    """The fields of `fastpg.TokenStatistics`; None where not asked for."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    logsumexp: torch.Tensor | None
    is_top1: torch.Tensor | None
    argmax: torch.Tensor | None
    mean_logits: torch.Tensor | None
    log_sum_sq_probs: torch.Tensor | None
    rank: torch.Tensor | None
    top_logprobs: torch.Tensor | None
    top_ids: torch.Tensor | None


def token_statistics(
    logits: torch.Tensor, tokens: torch.Tensor, top_k: int = 0, support: torch.Tensor | None = None
) -> Statistics:
    """Every statistic of logits (N, V) and tokens (N,). With support (N, V) bool, v runs over the tokens where it is True.

        lse_n = log sum_v exp z_nv        mean_n = sum_v z_nv / V        log sum_v p_nv^2 = logsumexp_v 2 log p_nv
        rank_n = 0 if y_n = argmax_v z_nv, else max(1, |{v != y_n: z_nv > z_n,y}|)

    Of equal logits the smaller id comes first, in the argmax and in the top_k largest. Where a support has fewer than top_k
    tokens, the rest have log-probability -inf and id -1.
    """
    members = torch.ones_like(logits, dtype=torch.bool) if support is None else support
    mean = torch.where(members, logits, 0).sum(-1) / members.sum(-1)
    logits = torch.where(members, logits, -torch.inf)
    logprobs, entropies = token_distribution(logits, tokens)
    lse, argmax = torch.logsumexp(logits, -1), logits.argmax(-1)
    larger = (logits > logits.gather(1, tokens[:, None])).sum(-1)
    rank = torch.where(argmax == tokens, 0, torch.where(larger < 1, 1, larger))
    log_p = logits - lse[:, None]
    others = log_p.masked_fill(F.one_hot(tokens, logits.shape[1]).bool(), -torch.inf)
    log_sum_sq = torch.logaddexp(2 * logprobs, torch.logsumexp(2 * others, -1))  # accurate for confident tokens too
    top_ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    top_logprobs = log_p.gather(1, top_ids)
    top_ids = torch.where(members.gather(1, top_ids), top_ids, -1)
    return Statistics(
        logprobs, entropies, lse, argmax == tokens, argmax, mean, log_sum_sq, rank, top_logprobs, top_ids
    )  # fmt: skip


def linear_logprobs(
    hidden: torch.Tensor,
    head: torch.Tensor | LMHead,
    tokens: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    support: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    outputs: Sequence[str] = (),
    top_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor] | Statistics:
    """hidden (..., H), tokens (...) -> (logprobs (...), entropies (...)); 0 where masked or where the token is -100.

    support (..., V) bool: the softmax is over the tokens where it is True, as where a sampler has kept only these; see
    `fastpg.Support`. Its logits outside of these are -inf: they have no probability, and no gradient.
    With outputs (names of fields of `Statistics`) or top_k (how many of the largest log-probabilities) -> Statistics, where
    masked ids and ranks are -1.
    """
    keep = tokens != -100 if mask is None else (tokens != -100) & mask
    per_token = isinstance(temperature, torch.Tensor) and temperature.dim() > 0
    kept_temperature = temperature.expand(tokens.shape)[keep] if per_token else temperature
    z = logits(hidden[keep], head, kept_temperature)

    def placed(name: str, kept: torch.Tensor) -> torch.Tensor:
        masked = -1 if name in ("argmax", "rank", "top_ids") else 0
        whole = torch.full((*tokens.shape, *kept.shape[1:]), masked, dtype=kept.dtype, device=kept.device)
        return whole.masked_scatter(keep.view(*keep.shape, *(1,) * (kept.dim() - 1)), kept)

    members = None if support is None else support[keep]
    if not outputs and not top_k:
        z = z if members is None else torch.where(members, z, -torch.inf)
        logprobs, entropies = (placed("", kept) for kept in token_distribution(z, tokens[keep]))
        return logprobs, entropies
    asked = {"logprobs", *outputs} | ({"top_logprobs", "top_ids"} if top_k else set())
    found = token_statistics(z, tokens[keep], top_k, members)._asdict()
    return Statistics(**{name: placed(name, kept) if name in asked else None for name, kept in found.items()})


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


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
