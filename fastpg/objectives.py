"""Policy-gradient objectives on token log-probabilities. A new loss is one small function.

An objective maps (logprobs, old_logprobs, advantages), three tensors of one shape, to a value l per token that is maximised,
differentiable in logprobs. Any such function can be passed where an `objective` is asked for, if it is elementwise: it may be
called on any subset of the tokens, in any shape, with zeros at masked ones. The classes here are the named ones. `losses`
reduces them to a loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch

from .validation import is_positive_number

# (logprobs, old_logprobs, advantages) -> value per token, all of one shape
ObjectiveFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Objective(ABC):
    """A named objective. `ratio_bounds` is what the clip_fraction metric counts against; (None, None) for no bounds.

    zero_at_zero_advantage: A = 0 makes value and gradient 0, so that such tokens need not be computed.
    """

    zero_at_zero_advantage: ClassVar[bool] = False

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return None, None

    @abstractmethod
    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Reinforce(Objective):
    """l = A logp, dl/dlogp = A. On-policy; off-policy samples are not corrected. (Williams 1992)"""

    zero_at_zero_advantage: ClassVar[bool] = True

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return advantages * logprobs


@dataclass(frozen=True)
class ImportanceWeighted(Objective):
    """l = r A with r = exp(logp - old), dl/dlogp = r A: importance weighting without a clip.

    level: "token", one ratio per token.
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    level: Literal["token"] = "token"

    def __post_init__(self) -> None:
        if self.level != "token":
            raise ValueError(f'level must be "token"; got {self.level!r}')

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return (logprobs - old_logprobs).exp() * advantages


@dataclass(frozen=True)
class CISPO(Objective):
    """l = sg(clip(r, ratio_min, ratio_max)) A logp, dl/dlogp = clip(r) A. (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5)

    The ratio only weights: clipping it never removes a token's gradient, as PPO's clip does.

    ratio_max, ratio_min: bounds of the ratio r = exp(logp - old) itself; None for no bound. The paper has no lower bound and
    an undisclosed upper one, 1 + eps_high; 5.0 is ScaleRL's (arXiv 2510.13786). TRL's and Liger's `epsilon_high` is this
    ratio_max; verl's, SkyRL's and NeMo-RL's is ratio_max - 1. With ratio_max=None this is the form without a clip.
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    ratio_max: float | None = 5.0
    ratio_min: float | None = None

    def __post_init__(self) -> None:
        low, high = self.ratio_bounds
        if high is not None and not is_positive_number(high):
            raise ValueError(
                f"ratio_max must be positive and finite, a bound on the ratio itself, or None for no bound; got {high!r}"
            )
        if low is not None and low != 0 and not is_positive_number(low):
            raise ValueError(
                f"ratio_min must be >= 0 and finite, a bound on the ratio itself, or None for no bound; got {low!r}"
            )
        if low is not None and high is not None and low > high:
            raise ValueError(f"ratio_min must not exceed ratio_max; got ratio_min={low}, ratio_max={high}")

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return self.ratio_min, self.ratio_max

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        ratio = (logprobs.detach() - old_logprobs).exp()
        if self.ratio_bounds != (None, None):
            ratio = ratio.clamp(self.ratio_min, self.ratio_max)
        return ratio * advantages * logprobs


@dataclass(frozen=True)
class KLPenalty:
    """Subtracts coef * k per token from the objective, k an estimate of KL(pi, ref) from e = ref - logp at the sampled token.

    estimator: "k1": -e. "k2": e^2 / 2. "k3": exp(e) - 1 - e. (Schulman, "Approximating KL divergence", 2020) All estimate
        the same value, but on-policy the expected gradient of k2 is that of KL(pi, ref), of k3 that of KL(ref, pi), of k1 0.
    importance_weighted: r k with r = exp(logp - old), not detached (DeepSeek-V3.2): the gradient of KL(pi, ref) for k1 and k3,
        off-policy samples included.

    `rollout_weights` do not multiply it.
    """

    coef: float
    estimator: Literal["k1", "k2", "k3"] = "k3"
    importance_weighted: bool = False

    def __post_init__(self) -> None:
        if self.coef != 0 and not is_positive_number(self.coef):
            raise ValueError(f"coef must be a number >= 0; got {self.coef!r}")
        if self.estimator not in ("k1", "k2", "k3"):
            raise ValueError(f'estimator must be "k1", "k2" or "k3"; got {self.estimator!r}')

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
        e = ref_logprobs - logprobs
        if self.estimator == "k1":
            k = -e
        elif self.estimator == "k2":
            k = e * e / 2
        else:
            k = e.expm1() - e
        return (logprobs - old_logprobs).exp() * k if self.importance_weighted else k
