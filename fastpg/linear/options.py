"""The keyword arguments of the one-pass functions, and what they return with `outputs` or `top_k`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch

from ..loss.metrics import Metrics
from ..loss.mismatch import RolloutCorrection
from ..loss.objectives import KLPenalty
from ..loss.reductions import Reduction
from .kept import Kept
from .outputs import TokenStatistics
from .support import Support


class PolicyLossStatistics(NamedTuple):
    """What `linear_policy_loss` returns with `outputs` or `top_k`: a `PolicyLossOutput`, and statistics of its tokens."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    metrics: Metrics
    statistics: TokenStatistics  # detached


class CallOptions(TypedDict, total=False):
    """Keyword arguments of `linear_policy_loss` that belong to a batch."""

    mask: torch.Tensor | Kept | None
    support: Support | None
    sequence_ids: torch.Tensor | None
    denominator: float | torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    rollout_weights: torch.Tensor | None
    rollout_logprobs: torch.Tensor | None


class LossOptions(TypedDict, total=False):
    """Keyword arguments of `linear_policy_loss` that stay the same from step to step, without the objective.

    A test holds this class and `CallOptions` to its signature.
    """

    temperature: float | torch.Tensor
    reduction: Reduction
    kl: KLPenalty | None
    rollout_correction: RolloutCorrection | None
    entropy: bool
    entropy_coef: float
    skip_zero_weight: bool
    skip_silenced: bool | None
    workspace: int | None
    backend: str | None
    check: bool


class PolicyLossOptions(CallOptions, LossOptions, total=False):
    """All keyword arguments of `linear_policy_loss` except the objective, and those that decide what it returns."""


class ModuleOptions(LossOptions, total=False):
    """Those of `LinearPolicyLoss` except the objective."""

    outputs: Sequence[str]
    top_k: int
