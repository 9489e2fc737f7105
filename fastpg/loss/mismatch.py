"""Two log-probabilities of each token, the trainer's p and the sampler's q: ratios, diagnostics, and the weights of a loss.

A decoupled objective has three policies (Hilton et al., arXiv 2110.00641; AReaL, arXiv 2505.24298). Ratios of the current one,
and their clips, refer to the proximal one, which has `old_logprobs`. The behaviour policy has sampled the tokens, and has
`rollout_logprobs`. Each l_n is multiplied by a constant, the importance weight of the proximal policy:

    w_n = exp(old_n - rollout_n) = pi_prox / pi_behav        r_n = exp(logp_n - old_n) = pi / pi_prox

`fastpg.rollout` has the functions that bound these weights, and more of their rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from ..validation import kind, require
from .sequences import Sequences, sequences_of

Level = Literal["token", "sequence", "geometric"]

# (old_logprobs, rollout_logprobs, mask=, sequence_ids=) -> constant weights, or a bool mask, of the shape of old_logprobs
RolloutCorrection = Callable[..., torch.Tensor]

LARGEST_LOG_RATIO = 20.0


# ---- one token's numbers, and a sequence's


class LogRatios(NamedTuple):
    """Constants, like the logprobs of a call."""

    logprobs: torch.Tensor  # 0 where not scored
    rollout_logprobs: torch.Tensor
    scored: torch.Tensor  # bool: counts, and the engine has a log-probability
    unscored: torch.Tensor  # bool: counts, and it has none
    sequences: Sequences | None  # of the scored tokens

    @property
    def log_ratio(self) -> torch.Tensor:
        return self.logprobs - self.rollout_logprobs

    def at_level(self, values: torch.Tensor, level: Level) -> torch.Tensor:
        """The values of tokens, or their sum or mean over each token's sequence."""
        if level == "token":
            return values
        return self.sequences.total(values) if level == "sequence" else self.sequences.mean(values)

    def ratio(self, level: Level) -> torch.Tensor:
        return clamped(self.at_level(self.log_ratio, level)).exp()


def log_ratios(
    logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, keep: torch.Tensor, sequence_ids: torch.Tensor | None
) -> LogRatios:
    """Of checked tensors (...), in fp32 or float64."""
    finite = rollout_logprobs.isfinite()
    scored = keep & finite
    dtype = torch.promote_types(torch.promote_types(logprobs.dtype, rollout_logprobs.dtype), torch.float32)
    trainer, engine = (torch.where(scored, x.detach().to(dtype), 0) for x in (logprobs, rollout_logprobs))
    return LogRatios(trainer, engine, scored, keep & ~finite, sequences_of(scored, sequence_ids))


def require_scored(rollout_logprobs: torch.Tensor, keep: torch.Tensor, otherwise: str) -> None:
    """Raises ValueError for a token that counts and that the engine did not score. The host waits for the device."""
    finite = rollout_logprobs.isfinite()
    require(
        finite | ~keep,
        lambda: (
            f"rollout_logprobs must be finite where a token counts; got {rollout_logprobs[keep & ~finite][0].item()} at "
            f"{tuple((keep & ~finite).nonzero()[0].tolist())}, a token that the engine did not score: mask it, or {otherwise}"
        ),
    )


def clamped(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def outside(values: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """NaN is not outside: it must reach the loss."""
    is_outside = torch.zeros_like(values, dtype=torch.bool)
    if low is not None:
        is_outside = is_outside | (values < low)
    if high is not None:
        is_outside = is_outside | (values > high)
    return is_outside


# ---- diagnostics; `fastpg.rollout.mismatch_metrics` says what they are


def mismatch_names(has_sequences: bool, has_band: bool = False) -> tuple[str, ...]:
    names = ("mismatch_kl_k1", "mismatch_kl_k3", "mismatch_abs_mean", "mismatch_abs_max")
    names = (*names, "mismatch_ratio_mean", "mismatch_ratio_max", "mismatch_ess")
    names = (*names, *(("mismatch_outside_band",) if has_band else ()), "mismatch_chi2")
    return (*names, *(("mismatch_chi2_seq",) if has_sequences else ()), "scored_tokens", "unscored_tokens")


def mismatch_metric(
    name: str, tokens: LogRatios, level: Level = "token", low: float | None = None, high: float | None = None
) -> torch.Tensor:
    """One of `mismatch_names`, ()."""
    scored, log_ratio, count = tokens.scored, tokens.log_ratio, tokens.scored.sum()
    d = clamped(log_ratio)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(scored, values, 0).sum() / count.clamp(min=1)

    if name == "scored_tokens":
        return count
    if name == "unscored_tokens":
        return tokens.unscored.sum()
    if name == "mismatch_kl_k1":
        return mean(-log_ratio)
    if name == "mismatch_kl_k3":
        return mean(d.expm1() - d)
    if name == "mismatch_abs_mean":
        return mean(log_ratio.abs())
    if name == "mismatch_abs_max":
        return _largest(log_ratio.abs())  # 0 where not scored
    if name == "mismatch_chi2":
        return mean((2 * d).expm1())
    if name == "mismatch_chi2_seq":
        chi2 = (2 * clamped(tokens.sequences.total(log_ratio))).expm1() / tokens.sequences.lengths(d.dtype)
        return torch.where(scored, chi2, 0).sum() / tokens.sequences.count().clamp(min=1)
    rho = torch.where(scored, tokens.ratio(level), 0)
    if name == "mismatch_ratio_mean":
        return mean(rho)
    if name == "mismatch_ratio_max":
        return _largest(rho)
    if name == "mismatch_outside_band":
        return mean(outside(rho, low, high).to(rho.dtype))
    ess = rho.sum().square() / (count.clamp(min=1) * rho.square().sum())
    return torch.where(count > 0, ess, 1.0)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """0 without tokens."""
    return torch.cat([values.reshape(-1), values.new_zeros(1)]).amax()


class Mismatch(NamedTuple):
    """Copies of a step's tensors that its mismatch is computed from, when it is looked at."""

    pair: torch.Tensor  # (2, ...): old_logprobs, rollout_logprobs
    keep: torch.Tensor  # (...) bool
    sequence_ids: torch.Tensor | None  # (N,)

    def names(self) -> tuple[str, ...]:
        return mismatch_names(self.keep.dim() == 2 or self.sequence_ids is not None)

    def to(self, device: torch.device) -> Mismatch:
        return Mismatch(*(x if x is None else x.to(device) for x in self))

    def metric(self, name: str) -> torch.Tensor:
        return mismatch_metric(name, log_ratios(*self.pair, self.keep, self.sequence_ids))


# ---- the weights of a loss that has three policies


def decoupled_weights(
    old_logprobs: torch.Tensor | None,
    rollout_logprobs: torch.Tensor | None,
    correction: RolloutCorrection | None,
    rollout_weights: torch.Tensor | None,
    keep: torch.Tensor,
    sequence_ids: torch.Tensor | None,
    *,
    check: bool,
) -> tuple[torch.Tensor | None, Mismatch | None]:
    """The constant weights w (...) of checked tensors (...), and what the metrics are computed from.

    Without rollout_logprobs they are the given ones. With them they are made of all tokens, before any is left out, and so do
    not depend on which are computed. sequence_ids (N,), or (B, T) of packed rows, which a correction then gets as (B T,).
    check: whether a token that counts and was not scored raises an error, for which the host waits. Without it w is NaN there.
    """
    if rollout_logprobs is None:
        return rollout_weights, None
    shape, old, rollout = old_logprobs.shape, old_logprobs.detach(), rollout_logprobs.detach()
    if check and correction is None:
        plain = 'functools.partial(fastpg.rollout.truncated_weights, high=None, unscored="zero")'
        require_scored(rollout, keep, f"give it the weight 0 by rollout_correction={plain}")
    if sequence_ids is not None:
        old, rollout, keep, sequence_ids = (x.flatten() for x in (old, rollout, keep, sequence_ids))
    ids = None if sequence_ids is None else sequence_ids.clone()
    mismatch = Mismatch(torch.stack([old, rollout]), keep.clone(), ids)
    if correction is None:
        tokens = log_ratios(old, rollout, keep, None)
        weights = torch.where(tokens.scored, tokens.ratio("token"), 0).masked_fill(tokens.unscored, torch.nan)
    else:
        with torch.no_grad():
            weights = correction(old, rollout, mask=keep, sequence_ids=sequence_ids)
        _check_weights(weights, old)
        weights = weights.detach() if weights.is_floating_point() else weights.to(old.dtype)
    return weights.view(shape), mismatch


def _check_weights(weights: torch.Tensor, old: torch.Tensor) -> None:
    wanted = f"rollout_correction must return weights, a floating-point or bool tensor of the shape {tuple(old.shape)}"
    if not isinstance(weights, torch.Tensor) or not (weights.is_floating_point() or weights.dtype == torch.bool):
        raise TypeError(f"{wanted}; got {kind(weights)}")
    if weights.shape != old.shape:
        raise ValueError(f"{wanted}; got {tuple(weights.shape)}")
    if weights.device != old.device:
        raise ValueError(f"rollout_correction must return weights on {old.device}, as old_logprobs; got {weights.device}")
