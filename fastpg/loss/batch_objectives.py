"""Objectives whose value of a token depends on others, beside GSPO: on its sequence (VESPO), on the batch (ClipCov, KLCov).

They take two passes: `linear_logprobs`, then `policy_loss`. ClipCov and KLCov compare a token with all tokens of the call that
count. A micro-batch, or a rank's share, is a call of its own: its means, its ranks and the number of tokens that it chooses are
its own, as in verl and SkyRL. For those of a whole batch give `policy_loss` the log-probabilities of all of it.

LUSPO (arXiv 2602.05261) has no class. It is GSPO with the sum over a sequence in the place of the mean over it:
objective=GSPO(...), reduction="seq-mean-token-sum".
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field

import torch

from ..validation import is_nonnegative_number, is_positive_number, kind
from .objectives import Objective, PPOClip
from .sequences import Sequences


@dataclass(frozen=True)
class VESPO(Objective):
    """l = sg(phi(W)) A logp with W = exp(sum_t (logp_t - old_t)) of the whole sequence. (VESPO, arXiv 2602.10693)

        phi(W) = W^k exp(lambda (1 - W)),   dl/dlogp = phi(W) A

    phi is 1 at W = 1. It has its maximum at W = k / lambda and, with k > 0, falls to 0 on both sides: a soft trust region of
    sequences. It is only a weight (sg is stop-gradient), so that no token loses its gradient to a clip.

    k_pos, lambda_pos: where A >= 0; k_neg, lambda_neg: where A < 0. The defaults are TRL's. `rollout_weights` multiply l. To
        correct for a separate sampler inside W, pass the sampler's log-probabilities as old_logprobs.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        for name, k in (("k_pos", self.k_pos), ("k_neg", self.k_neg)):
            if not is_nonnegative_number(k):
                raise ValueError(f"{name} must be >= 0 and finite, an exponent of the ratio; got {k!r}")
        for name, decay in (("lambda_pos", self.lambda_pos), ("lambda_neg", self.lambda_neg)):
            if not is_positive_number(decay):
                raise ValueError(f"{name} must be positive and finite, so that large ratios weigh nothing; got {decay!r}")

    @property
    def needs_sequences(self) -> bool:
        return True

    def log_ratio(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, sequences: Sequences | None = None) -> torch.Tensor:
        return sequences.total(logprobs - old_logprobs)

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        sequences: Sequences | None = None,
    ) -> torch.Tensor:
        log_ratio = self.log_ratio(logprobs.detach(), old_logprobs, sequences)
        negative = advantages < 0
        k = torch.full_like(advantages, self.k_pos).masked_fill(negative, self.k_neg)
        decay = torch.full_like(advantages, self.lambda_pos).masked_fill(negative, self.lambda_neg)
        # one exponential: W^k may overflow where the product is 0
        phi = (k * log_ratio + decay - decay * log_ratio.exp()).exp()
        return phi * advantages * logprobs


@dataclass(frozen=True)
class ClipCov(Objective):
    """PPO's clipped objective without a few tokens of large covariance. (Clip-Cov, arXiv 2505.22617)

        cov = (A - mean A) (logp - mean logp), means over the tokens that count
        l   = 0 for the chosen tokens, else min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

    Chosen are max(floor(fraction N), 1) of the N tokens, or all candidates if there are fewer, at random. Candidates have
    cov_min < cov < cov_max and are not held by PPO's clip already. Entropy falls fastest by tokens of large covariance. Chosen
    tokens have no gradient, and count in D.

    eps_low, eps_high: as in `PPOClip`. fraction, cov_min and cov_max have verl's defaults.
    generator: the torch.Generator that draws, on the device of logprobs; None: torch's own. Each call draws anew, so a call
        is repeated exactly by a generator in the same state. What is drawn depends on the device and on torch's version.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    fraction: float = 2e-4
    cov_min: float = 1.0
    cov_max: float = 5.0
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        PPOClip(self.eps_low, self.eps_high)  # checks them
        _check_fraction(self.fraction)
        for name, bound in (("cov_min", self.cov_min), ("cov_max", self.cov_max)):
            if not isinstance(bound, numbers.Real) or isinstance(bound, bool) or not math.isfinite(bound):
                raise ValueError(f"{name} must be a finite number, a bound on the covariance; got {bound!r}")
        if self.cov_min >= self.cov_max:
            raise ValueError(f"cov_min must be below cov_max; got cov_min={self.cov_min}, cov_max={self.cov_max}")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None; got {kind(self.generator)}")

    @property
    def needs_batch(self) -> bool:
        return True

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return 1 - self.eps_low, 1 + self.eps_high

    def __call__(
        self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        chosen = self._chosen(logprobs.detach(), old_logprobs, advantages, _every(logprobs) if mask is None else mask)
        # as without an advantage: value and slope are 0, however large the ratio is
        advantages = torch.where(chosen, 0, advantages)
        return PPOClip(self.eps_low, self.eps_high)(logprobs, old_logprobs, advantages)

    def _chosen(
        self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        if self.generator is not None and self.generator.device.type != logprobs.device.type:
            raise ValueError(f"generator is on {self.generator.device} but logprobs is on {logprobs.device}")
        cov, ratio = covariances(logprobs, advantages, mask), (logprobs - old_logprobs).exp()
        held = ratio * advantages > ratio.clamp(*self.ratio_bounds) * advantages
        candidates = mask & (cov > self.cov_min) & (cov < self.cov_max) & ~held
        order = torch.randperm(cov.numel(), generator=self.generator, device=cov.device)
        return _first(order, candidates, _number(self.fraction, mask))


@dataclass(frozen=True)
class KLCov(Objective):
    """The importance-weighted objective, with a penalty for the tokens of largest covariance. (KL-Cov, arXiv 2505.22617)

        cov = (A - mean A) (logp - mean logp), means over the tokens that count
        l   = r A - coef |logp - old| for the chosen tokens, else r A, with r = exp(logp - old)

    Chosen are the max(floor(fraction N), 1) tokens of largest cov; of equal ones the earlier. The paper's penalty is
    KL(old, pi); |logp - old| is what the authors' code, verl and SkyRL estimate it by. `rollout_weights` multiply it, as it is
    part of l. coef and fraction have verl's defaults (SkyRL's fraction is 0.2).
    """

    coef: float = 1.0
    fraction: float = 2e-4

    def __post_init__(self) -> None:
        if not is_nonnegative_number(self.coef):
            raise ValueError(f"coef must be a number >= 0; got {self.coef!r}")
        _check_fraction(self.fraction)

    @property
    def needs_batch(self) -> bool:
        return True

    def __call__(
        self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        mask = _every(logprobs) if mask is None else mask
        d = self.log_ratio(logprobs, old_logprobs)
        order = covariances(logprobs, advantages, mask).flatten().argsort(descending=True, stable=True)
        chosen = _first(order, mask, _number(self.fraction, mask))
        return d.exp() * advantages - torch.where(chosen, self.coef * d.abs(), 0)


def covariances(logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(A - mean A) (logp - mean logp), means over the tokens with mask. A constant; arbitrary where masked."""

    def centred(x: torch.Tensor) -> torch.Tensor:
        kept = torch.where(mask, x.detach(), 0)
        return kept - kept.sum() / mask.sum().clamp(min=1)

    return centred(advantages) * centred(logprobs)


def _every(logprobs: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(logprobs, dtype=torch.bool)


def _number(fraction: float, mask: torch.Tensor) -> torch.Tensor:
    """How many of the tokens with mask are chosen, (). In float64, as Python's int(fraction * N) is."""
    return (mask.sum().double() * fraction).floor().clamp(min=1)


def _first(order: torch.Tensor, candidates: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The first `number` candidates in this order of the flattened tokens, (...) bool. No host read."""
    wanted = candidates.flatten()[order]
    return torch.zeros_like(wanted).scatter(0, order, wanted & (wanted.cumsum(0) <= number)).view(candidates.shape)


def _check_fraction(fraction: float) -> None:
    if not is_positive_number(fraction) or fraction > 1:
        raise ValueError(f"fraction must be in (0, 1], a share of the tokens that count; got {fraction!r}")
