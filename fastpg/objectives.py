"""Policy-gradient objectives on token log-probabilities. A new loss is one small function.

An objective maps (logprobs, old_logprobs, advantages), three tensors of one shape, to a value l per token that is maximised,
differentiable in logprobs. Any such function can be passed where an `objective` is asked for; the classes here are the named
ones. `policy_loss` reduces it to a loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from . import validation
from .metrics import token_metrics
from .reductions import Reduction, check_reduction, token_weights


class Objective(ABC):
    """A named objective. `ratio_bounds` is what the clip_fraction metric counts against; (None, None) for no bounds."""

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        return None, None

    @abstractmethod
    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Reinforce(Objective):
    """l = A logp, dl/dlogp = A. On-policy; off-policy samples are not corrected. (Williams 1992)"""

    def __call__(self, logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return advantages * logprobs


@dataclass(frozen=True)
class ImportanceWeighted(Objective):
    """l = r A with r = exp(logp - old), dl/dlogp = r A: importance weighting without a clip.

    level: "token", one ratio per token.
    """

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

    ratio_max: float | None = 5.0
    ratio_min: float | None = None

    def __post_init__(self) -> None:
        low, high = self.ratio_bounds
        if high is not None and not high > 0:
            raise ValueError(f"ratio_max must be positive, a bound on the ratio itself, or None; got {high}")
        if low is not None and not low >= 0:
            raise ValueError(f"ratio_min must be >= 0, a bound on the ratio itself, or None; got {low}")
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


class PolicyLossOutput(NamedTuple):
    """loss (): to be minimised. logprobs (...): detached, 0 where masked. metrics: 0-d tensors, see `metrics`."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    metrics: dict[str, torch.Tensor]


def policy_loss(
    logprobs: torch.Tensor,  # (...)
    old_logprobs: torch.Tensor | None,  # (...)
    advantages: torch.Tensor,  # (...), or (B,) with (B, T) logprobs
    *,
    objective: Objective | Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    mask: torch.Tensor | None = None,  # (...)
    reduction: Reduction = "token-mean",
    denominator: float | torch.Tensor | None = None,
) -> PolicyLossOutput:
    """loss = -sum_n weight_n l_n / D over tokens with mask, from ready log-probabilities.

    Args:
        logprobs: (...) floating; the gradient flows through them. Computed in fp32 (float64 for float64).
        old_logprobs: (...) under the policy that sampled; None: on-policy, the ratio is exactly 1. Constants. At a kept
            position NaN or an infinity makes the loss NaN (a ratio of 0 or inf is never meant); > 0 is computed as given.
        advantages: (...) per token, or (B,) per sequence with (B, T) logprobs. Constants.
        objective: Reinforce(), ImportanceWeighted(), CISPO(...), or a function of (logprobs, old_logprobs, advantages).
        mask: (...) bool, True where a token counts. Values at masked positions never reach the arithmetic.
        reduction: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum" or "sum" (`reductions` has the table); the seq-
            forms need (B, T).
        denominator: a number or 0-d tensor that replaces the count D: pass the global count under gradient accumulation
            or data parallelism, and sum the losses.

    Returns PolicyLossOutput(loss, logprobs, metrics). Without any token the loss is 0 and differentiable.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit.
    """
    validation.check_policy_inputs(logprobs, old_logprobs, advantages, mask)
    check_reduction(reduction, logprobs.shape, denominator)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    if advantages.shape != logprobs.shape:
        advantages = advantages[:, None].expand(logprobs.shape)

    # masked before the exp: 0 * inf would be NaN in the forward and in the backward
    kept = torch.where(mask, logprobs, 0).to(dtype)
    old = kept.detach() if old_logprobs is None else torch.where(mask, old_logprobs.detach(), 0).to(dtype)
    values = objective(kept, old, torch.where(mask, advantages.detach(), 0).to(dtype))
    if not isinstance(values, torch.Tensor) or values.shape != kept.shape:
        given = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"objective must return one value per token, shape {tuple(kept.shape)}; got {given}")

    weights = token_weights(mask, reduction, denominator, dtype)
    weights = torch.where(old.isfinite(), weights, torch.nan)
    loss = -(torch.where(mask, values, 0) * weights).sum()

    bounds = objective.ratio_bounds if isinstance(objective, Objective) else (None, None)
    metrics = token_metrics(kept, old, mask, bounds)
    nothing = torch.zeros_like(metrics["tokens"])
    metrics |= {"skipped_tokens": nothing, "recomputed_tokens": nothing.clone()}
    return PolicyLossOutput(loss, kept.detach(), metrics)
