"""From full logits to log-probabilities, entropies and the statistics of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..lm_head import LMHead, as_head


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


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
