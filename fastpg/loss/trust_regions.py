"""Objectives that leave out tokens whose probability has moved too far, instead of clipping their ratio.

    l = M r A        M is 0 for a token that is left out, which then has no gradient, and 1 for any other; r = exp(logp - old)
    l = M sg(min(r, ratio_max)) A logp        the same with a bounded ratio, which is only a weight, as in CISPO

Both have the gradient M r A while r stays below ratio_max. M is a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..tiles.structures import Numbers
from ..validation import is_nonnegative_number
from .objectives import Objective, check_ratio_bounds


@dataclass(frozen=True)
class DPPOTV(Objective):
    """PPO with a bound on the change of the token's probability, not on its ratio. (DPPO, arXiv 2602.04879, eq. 13)

    With p = exp(logp) and q = exp(old): M = 0 where A > 0 and p - q > delta_high, and where A < 0 and q - p > delta_low.
    |p - q| is the total variation between the policies when all other tokens count as one. A ratio bound stops rare tokens
    after the smallest step, and lets likely ones go far; this bound treats them alike.

    delta_low, delta_high: >= 0. 0.2 is what SkyRL and prime-rl start from.
    ratio_max: bounds the ratio as a weight (section 5.4), see above; None: the ratio itself. verl's is its `clip_ratio_c`.
    two_sided: True leaves a token out beyond either bound, whatever the sign of A (the "ipo" of prime-rl).
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    device_function: ClassVar[str | None] = "dppo_tv"
    delta_low: float = 0.2
    delta_high: float = 0.2
    ratio_max: float | None = None
    two_sided: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self)
        if not isinstance(self.two_sided, bool):
            raise TypeError(f"two_sided must be True or False; got {self.two_sided!r}")

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return None, self.ratio_max

    @property
    def device_numbers(self) -> Numbers:
        return Numbers(self.delta_low, self.delta_high, self.ratio_max, 1.0 if self.two_sided else None)

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        change = logprobs.detach().exp() - old_logprobs.exp()
        rose, fell = change > self.delta_high, change < -self.delta_low  # False for NaN, which stays in the value
        dropped = rose | fell if self.two_sided else torch.where(advantages > 0, rose, fell)
        return _kept_surrogate(dropped, logprobs, old_logprobs, advantages, self.ratio_max)


@dataclass(frozen=True)
class DPPOKL(Objective):
    """The same with a bound on the KL divergence of "this token, or any other". (DPPO, arXiv 2602.04879, eq. 14)

    KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p)) in nats, with p = exp(logp) and q = exp(old). M = 0 where A > 0, p > q
    and KL > delta_high, and where A < 0, p < q and KL > delta_low.

    delta_low, delta_high: >= 0. SkyRL recommends 0.05. ratio_max: as in `DPPOTV`.
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    device_function: ClassVar[str | None] = "dppo_kl"
    delta_low: float = 0.05
    delta_high: float = 0.05
    ratio_max: float | None = None

    def __post_init__(self) -> None:
        _check_bounds(self)

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return None, self.ratio_max

    @property
    def device_numbers(self) -> Numbers:
        return Numbers(self.delta_low, self.delta_high, self.ratio_max)

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        new, old = logprobs.detach(), old_logprobs
        # 1 - p, accurate for likely tokens too
        others_new, others_old = (torch.expm1(x.clamp(max=0)).abs() for x in (new, old))
        of_others = torch.where(others_old == 0, 0, others_old * (others_old / others_new).log())
        divergence = old.exp() * (old - new) + of_others
        rose, fell = (new > old) & (divergence > self.delta_high), (new < old) & (divergence > self.delta_low)
        return _kept_surrogate(torch.where(advantages > 0, rose, fell), logprobs, old_logprobs, advantages, self.ratio_max)


@dataclass(frozen=True)
class IcePop(Objective):
    """l = sg(r) A logp where ratio_min < r < ratio_max, and 0 elsewhere: CISPO that leaves out what it would clip.

    GLM-5's loss of agents (arXiv 2602.15763, section 4.1.2), with old log-probabilities of the sampler. As a correction for the
    sampler on top of another objective, the same weights are `rollout_weights`; there they are known as IcePop.

    ratio_max, ratio_min: bounds of the ratio itself, as in `CISPO`; 0.5 and 5 are IcePop's. A ratio on a bound is left out.
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    device_function: ClassVar[str | None] = "icepop"
    ratio_max: float | None = 5.0
    ratio_min: float | None = 0.5

    def __post_init__(self) -> None:
        check_ratio_bounds(self.ratio_min, self.ratio_max)

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return self.ratio_min, self.ratio_max

    @property
    def device_numbers(self) -> Numbers:
        return Numbers(self.ratio_min, self.ratio_max)

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        ratio = (logprobs.detach() - old_logprobs).exp()
        dropped = torch.zeros_like(ratio, dtype=torch.bool)
        if self.ratio_min is not None:
            dropped = dropped | (ratio <= self.ratio_min)  # False for NaN, which stays in the value
        if self.ratio_max is not None:
            dropped = dropped | (ratio >= self.ratio_max)
        return _kept_surrogate(dropped, logprobs, old_logprobs, advantages, math.inf)


def _check_bounds(objective: DPPOTV | DPPOKL) -> None:
    for name in ("delta_low", "delta_high"):
        if not is_nonnegative_number(getattr(objective, name)):
            raise ValueError(f"{name} must be >= 0 and finite, a bound on a divergence; got {getattr(objective, name)!r}")
    check_ratio_bounds(None, objective.ratio_max)


def _kept_surrogate(
    dropped: torch.Tensor,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    ratio_max: float | None,
) -> torch.Tensor:
    """r A, or with ratio_max sg(min(r, ratio_max)) A logp. 0 without a gradient where dropped or A = 0; NaN where A is.

    There the differentiated expression does not contain r: it may be infinite, and 0 * inf would be NaN.
    """
    dropped = (dropped & ~advantages.isnan()) | (advantages == 0)
    log_ratio = torch.where(dropped, 0, logprobs - old_logprobs)
    if ratio_max is None:
        return torch.where(dropped, 0, log_ratio.exp() * advantages)
    weights = log_ratio.detach().exp().clamp(max=ratio_max) * advantages
    return torch.where(dropped, 0, weights * torch.where(dropped, 0, logprobs))
