"""Policy-gradient objectives on token log-probabilities. A new loss is one small function.

An objective maps (logprobs, old_logprobs, advantages), three tensors of one shape, to a value l per token. l is maximised and
must be differentiable in logprobs. Any such function serves as an `objective` if it is elementwise: it may be called on any
subset of the tokens, in any shape, with zeros at masked ones. The classes here are the named objectives. `policy_loss` and
`reductions` make a loss of their values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F

from ..tiles.structures import DeviceLoss, Numbers
from ..validation import is_nonnegative_number, is_positive_number
from .sequences import Sequences

# (logprobs, old_logprobs, advantages) -> value per token, all of one shape
ObjectiveFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Objective(ABC):
    """A named objective.

    ratio_bounds: (low, high); the clip_fraction metric counts ratios outside. None for no bound.
    zero_at_zero_advantage: A = 0 makes value and gradient 0, so that such tokens need not be computed.
    needs_sequences: its ratio is that of a whole sequence. It is then called with the batch's `Sequences` as a fourth
        argument. The one-pass loss cannot compute it, since it works token by token.
    needs_batch: it compares a token with the others of the batch, as `batch_objectives` do. It is then called with the mask of
        the tokens that count as a fourth argument. The one-pass loss cannot compute it either.
    device_function: the name of its device function (one that kernels call) in `fastpg.kernels.objectives`, which is given
        `device_numbers`. A subclass does not inherit it, as its formula may differ: it is computed by its `__call__`.
    """

    zero_at_zero_advantage: ClassVar[bool] = False
    device_function: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "device_function" not in vars(cls):
            cls.device_function = None

    @property
    def device_numbers(self) -> Numbers:
        """What the device function is given."""
        return Numbers()

    @property
    def needs_sequences(self) -> bool:
        """Whether its ratio is that of a whole sequence."""
        return False

    @property
    def needs_batch(self) -> bool:
        """Whether it compares a token with the others of the batch."""
        return False

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        """(low, high) of the ratio; None for no bound."""
        return None, None

    def log_ratio(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, sequences: Sequences | None = None) -> torch.Tensor:
        """The logarithm of the ratio that `ratio_bounds` are bounds of."""
        return logprobs - old_logprobs

    @abstractmethod
    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Reinforce(Objective):
    """l = A logp, dl/dlogp = A. It is on-policy: off-policy samples are not corrected. (Williams 1992)"""

    zero_at_zero_advantage: ClassVar[bool] = True
    device_function: ClassVar[str | None] = "reinforce"

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return advantages * logprobs


@dataclass(frozen=True)
class ImportanceWeighted(Objective):
    """Importance weighting without a clip, with d = logp - old:

    level="token"       l = r A,      r = exp(d)                 dl/dlogp = r A
    level="sequence"    l = rho A,    rho = exp(mean_t d_t)      the length-normalised ratio of GSPO, without its clip
    level="trajectory"  l = w A / T,  w = exp(sum_t d_t)         T tokens; their sum is w A, and its gradient w A sum_t dlogp_t

    "trajectory" is the exact off-policy correction (summed over a sequence's tokens); its variance grows with T. "token" is its
    approximation that ignores past and future ratios. "sequence" and "trajectory" need `linear_logprobs` and `policy_loss`.
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    device_function: ClassVar[str | None] = "importance_weighted"
    level: Literal["token", "sequence", "trajectory"] = "token"

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence", "trajectory"):
            raise ValueError(f'level must be "token", "sequence" or "trajectory"; got {self.level!r}')

    @property
    def needs_sequences(self) -> bool:
        return self.level != "token"

    def log_ratio(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, sequences: Sequences | None = None) -> torch.Tensor:
        d = logprobs - old_logprobs
        if self.level == "token":
            return d
        return sequences.mean(d) if self.level == "sequence" else sequences.total(d)

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        sequences: Sequences | None = None,
    ) -> torch.Tensor:
        values = self.log_ratio(logprobs, old_logprobs, sequences).exp() * advantages
        return values / sequences.lengths(values.dtype) if self.level == "trajectory" else values


@dataclass(frozen=True)
class CISPO(Objective):
    """l = sg(clip(r, ratio_min, ratio_max)) A logp, dl/dlogp = clip(r) A. (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5)

    sg is stop-gradient: the ratio is only a weight. Clipping it never removes a token's gradient, unlike PPO's clip.

    ratio_max, ratio_min: bounds of the ratio r = exp(logp - old) itself; None for no bound. The paper has no lower bound and
    an undisclosed upper one, 1 + eps_high; 5.0 is ScaleRL's (arXiv 2510.13786). TRL's and Liger's `epsilon_high` is this
    ratio_max; verl's, SkyRL's and NeMo-RL's is ratio_max - 1. With ratio_max=None this is the form without a clip.
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    device_function: ClassVar[str | None] = "cispo"
    ratio_max: float | None = 5.0
    ratio_min: float | None = None

    def __post_init__(self) -> None:
        check_ratio_bounds(*self.ratio_bounds)

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return self.ratio_min, self.ratio_max

    @property
    def device_numbers(self) -> Numbers:
        return Numbers(self.ratio_min, self.ratio_max)

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        ratio = (logprobs.detach() - old_logprobs).exp()
        if self.ratio_bounds != (None, None):
            ratio = ratio.clamp(self.ratio_min, self.ratio_max)
        return ratio * advantages * logprobs


@dataclass(frozen=True)
class PPOClip(Objective):
    """l = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(logp - old). (PPO, arXiv 1707.06347, eq. 7)

    dl/dlogp is r A where the unclipped term is the smaller one, and 0 where the clip holds: such tokens teach nothing.
    eps_high > eps_low is DAPO's clip-higher (arXiv 2503.14476, eq. 10).
    dual_clip: c > 1, or None. Where A < 0, l = max(min(...), c A). This bounds the loss of a bad action that has become likely
        (arXiv 1912.09729, eq. 4).
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    device_function: ClassVar[str | None] = "ppo_clip"
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        _check_clip(self.eps_low, self.eps_high)
        if self.dual_clip is not None and not (is_positive_number(self.dual_clip) and self.dual_clip > 1):
            raise ValueError(f"dual_clip must be > 1, a bound on the ratio where A < 0, or None; got {self.dual_clip!r}")

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return 1 - self.eps_low, 1 + self.eps_high

    @property
    def device_numbers(self) -> Numbers:
        return Numbers(*self.ratio_bounds, self.dual_clip)

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return _clipped_surrogate(self.log_ratio(logprobs, old_logprobs), advantages, *self.ratio_bounds, self.dual_clip)


@dataclass(frozen=True)
class GSPO(Objective):
    """PPO's clipped objective with one ratio for a sequence, rho = exp(mean_t (logp_t - old_t)):

        l = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)           (GSPO, arXiv 2507.18071, eq. 5 to 7)

    l is the same at all tokens of a sequence if they share A. With reduction="seq-mean-token-mean" this is the paper's loss.
    Its epsilons are small because rho is a mean: 3e-4 and 4e-4 (section 5.1). Needs `linear_logprobs` and `policy_loss`.
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    eps_low: float = 3e-4
    eps_high: float = 4e-4

    def __post_init__(self) -> None:
        _check_clip(self.eps_low, self.eps_high)

    @property
    def needs_sequences(self) -> bool:
        return True

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return 1 - self.eps_low, 1 + self.eps_high

    def log_ratio(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, sequences: Sequences | None = None) -> torch.Tensor:
        return sequences.mean(logprobs - old_logprobs)

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        sequences: Sequences | None = None,
    ) -> torch.Tensor:
        return _clipped_surrogate(self.log_ratio(logprobs, old_logprobs, sequences), advantages, *self.ratio_bounds)


@dataclass(frozen=True)
class SAPO(Objective):
    """l = (4 / tau) sigmoid(tau (r - 1)) A, r = exp(logp - old): a soft clip. (SAPO, arXiv 2511.20347)

    dl/dlogp = 4 s (1 - s) r A with s = sigmoid(tau (r - 1)). It is r A at r = 1, and its weight 4 s (1 - s) falls smoothly on
    both sides. tau is tau_pos where A > 0, tau_neg elsewhere (at A = 0 the value is 0 with either). A larger tau is closer to
    a hard clip.
    """

    zero_at_zero_advantage: ClassVar[bool] = True
    device_function: ClassVar[str | None] = "sapo"
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        for name, tau in (("tau_pos", self.tau_pos), ("tau_neg", self.tau_neg)):
            if not is_positive_number(tau):
                raise ValueError(f"{name} must be positive and finite; got {tau!r}")

    @property
    def device_numbers(self) -> Numbers:
        return Numbers(self.tau_pos, self.tau_neg)

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        tau = torch.full_like(advantages, self.tau_neg).masked_fill(advantages > 0, self.tau_pos)
        # The gradient has the product (1 - s) r, and 0 * inf would be NaN. So r ends at e^60, long after 1 - s has become 0.
        # exp() - 1, not expm1: the derivative of the latter, formed as expm1 + 1, is rounding noise where r is small.
        r_minus_1 = self.log_ratio(logprobs, old_logprobs).clamp(max=60).exp() - 1
        # exp(logsigmoid), not sigmoid: the derivative of the latter, s (1 - s), is rounding noise where s is close to 1
        return 4 / tau * F.logsigmoid(tau * r_minus_1).exp() * advantages


def check_ratio_bounds(low: float | None, high: float | None) -> None:
    if high is not None and not is_positive_number(high):
        raise ValueError(
            f"ratio_max must be positive and finite, a bound on the ratio itself, or None for no bound; got {high!r}"
        )
    if low is not None and not is_nonnegative_number(low):
        raise ValueError(f"ratio_min must be >= 0 and finite, a bound on the ratio itself, or None for no bound; got {low!r}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"ratio_min must not exceed ratio_max; got ratio_min={low}, ratio_max={high}")


def _check_clip(eps_low: float, eps_high: float) -> None:
    if not is_nonnegative_number(eps_low) or eps_low > 1:
        raise ValueError(f"eps_low must be in [0, 1], so that 1 - eps_low bounds a ratio; got {eps_low!r}")
    if not is_nonnegative_number(eps_high):
        raise ValueError(f"eps_high must be >= 0 and finite, so that 1 + eps_high bounds a ratio; got {eps_high!r}")


def _clipped_surrogate(
    log_ratio: torch.Tensor, advantages: torch.Tensor, ratio_min: float, ratio_max: float, dual_clip: float | None = None
) -> torch.Tensor:
    """min(r A, clip(r) A), and with dual_clip c, where A < 0, max(that, c A). The gradient is 0 where this is not r A.

    (torch.minimum would split the gradient at a tie.) Where a clip holds, and where A = 0, the differentiated expression does
    not contain r: it may be infinite, and 0 * inf would be NaN.
    """
    ratio = log_ratio.detach().exp()
    constant = ratio.clamp(ratio_min, ratio_max) * advantages
    is_constant = (ratio * advantages > constant) | (advantages == 0)  # False for NaN, which stays NaN
    if dual_clip is not None:
        beyond = (advantages < 0) & (ratio > dual_clip)
        constant = torch.where(beyond, dual_clip * advantages, constant)
        is_constant = is_constant | beyond
    surrogate = torch.where(is_constant, 0, log_ratio).exp() * advantages
    return torch.where(is_constant, torch.where(advantages == 0, 0, constant), surrogate)


@dataclass(frozen=True)
class KLPenalty:
    """Subtracts coef * k per token from the objective, where k estimates KL(pi, ref) from e = ref - logp at the sampled token.

        estimator   k                 expected gradient, on-policy
        "k1"        -e                0
        "k2"        e^2 / 2           that of KL(pi, ref)
        "k3"        exp(e) - 1 - e    that of KL(ref, pi)

    All estimate the same value (Schulman, "Approximating KL divergence", 2020).
    importance_weighted: r k with r = exp(logp - old), not detached (DeepSeek-V3.2). k1 and k3 then have the gradient of
        KL(pi, ref), for off-policy samples too.
    max_log_ratio: m > 0: e is clamped to [-m, m], so that one unlikely token cannot make k3 infinite; None does not clamp it.
        |k| is then at most m, m^2 / 2 or exp(m) - 1 - m. Beyond m the whole term is a constant, its r too: the gradient is 0.

    `rollout_weights` do not multiply it.
    """

    coef: float
    estimator: Literal["k1", "k2", "k3"] = "k3"
    importance_weighted: bool = False
    max_log_ratio: float | None = None

    def __post_init__(self) -> None:
        if not is_nonnegative_number(self.coef):
            raise ValueError(f"coef must be a number >= 0; got {self.coef!r}")
        if self.estimator not in ("k1", "k2", "k3"):
            raise ValueError(f'estimator must be "k1", "k2" or "k3"; got {self.estimator!r}')
        if self.max_log_ratio is not None and not is_positive_number(self.max_log_ratio):
            raise ValueError(
                "max_log_ratio must be positive and finite, a bound on |ref - logp|, or None for no bound; got "
                f"{self.max_log_ratio!r}"
            )

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
        e = ref_logprobs - logprobs
        if self.max_log_ratio is not None:
            beyond = e.detach().abs() > self.max_log_ratio  # False for NaN, which stays NaN
            logprobs = torch.where(beyond, logprobs.detach(), logprobs)
            e = torch.where(beyond, e.detach().clamp(-self.max_log_ratio, self.max_log_ratio), e)
        if self.estimator == "k1":
            k = -e
        elif self.estimator == "k2":
            k = e * e / 2
        else:
            k = e.expm1() - e
        return (logprobs - old_logprobs).exp() * k if self.importance_weighted else k


def device_loss(objective: object, kl: object | None, show_lost: bool) -> DeviceLoss | None:
    """The loss as device functions. None if one of its formulas is a user's, or needs other tokens."""
    name = type(objective).device_function if isinstance(objective, Objective) else None
    if name is None or objective.needs_sequences or objective.needs_batch:
        return None
    shared = show_lost, *(None if x is None else float(x) for x in objective.ratio_bounds)
    if kl is None:
        return DeviceLoss(name, objective.device_numbers, None, 0.0, False, None, *shared)
    if type(kl) is not KLPenalty:
        return None
    largest = None if kl.max_log_ratio is None else float(kl.max_log_ratio)
    of_kl = f"kl_{kl.estimator}", float(kl.coef), kl.importance_weighted, largest
    return DeviceLoss(name, objective.device_numbers, *of_kl, *shared)
