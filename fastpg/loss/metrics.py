"""Metrics of a policy-gradient step, each computed from the step's log-probabilities when it is looked at.

With d = logp - old and r = exp(d), over the tokens that count:

    ratio_mean     mean r
    ratio_max      max r; 0 without tokens
    clip_fraction  share of tokens whose ratio is outside the objective's bounds, whatever the sign of the advantage. The ratio
                   is the one that the objective clips (for GSPO that of the sequence)
    ess            (sum r)^2 / (n sum r^2), the effective sample size as a share of n; 1 without tokens
    kl_k1, kl_k3   mean(-d) and mean(r - 1 - d): estimates of KL(old, new) (Schulman, "Approximating KL divergence")
    tokens         the number of tokens
    entropy        their mean entropy in nats, if it was asked for
    entropy_loss   what the entropy bonus of `policy_loss` adds to the loss, -entropy_coef sum_n weight_n H_n / D

Counts of the one-pass loss (`linear_policy_loss`), which are 0 elsewhere:

    skipped_tokens     tokens that count and were not computed, because they add exactly 0
    recomputed_tokens  tokens whose sums had left their range
    repeated_products  1 where dW was computed a second time, to be rounded once with those tokens
    silenced_tokens    computed tokens whose gradient was seen to be 0, and which products 2 and 3 left out
    work_saved         the share of the three products of all tokens that skipped and silenced tokens have saved

With `rollout_logprobs` there are the metrics of `fastpg.rollout.mismatch_metrics` beside them, of single tokens (`Mismatch`).

They come from the step's vectors (`Step`). Where kernels have computed the loss, they have left sums of most of them
(`Summary`), so that nothing remains to be computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from ..kernels.limits import SUMMARY
from .metric_names import Library, names_in
from .mismatch import Mismatch
from .objectives import Objective
from .sequences import Sequences

_NAMES = (
    "ratio_mean",
    "ratio_max",
    "clip_fraction",
    "ess",
    "kl_k1",
    "kl_k3",
    "tokens",
    "skipped_tokens",
    "recomputed_tokens",
    "repeated_products",
    "silenced_tokens",
    "work_saved",
)

_OF_SWEEP = ("recomputed_tokens", "repeated_products", "silenced_tokens")


class Step(NamedTuple):
    """The tensors that metrics are computed from. They are detached copies, so that later changes of a caller's do not show."""

    logprobs: torch.Tensor  # (...), like old_logprobs
    old_logprobs: torch.Tensor
    mask: torch.Tensor | None  # (...) bool; None: every token counts
    objective: Objective | None  # None: a user's function, whose bounds are unknown
    sequences: Sequences | None
    entropies: torch.Tensor | None = None  # (...)
    numbers: torch.Tensor | None = None  # int64: how many tokens count, and how many of them were computed
    again: torch.Tensor | None = None  # (3,) int64, by `_OF_SWEEP`; None: none


class Summary(NamedTuple):
    """What kernels have left of a step."""

    metrics: torch.Tensor  # by `SUMMARY`
    has_entropy: bool
    numbers: torch.Tensor  # as in Step
    objective: object = None
    again: torch.Tensor | None = None  # as in Step


class Metrics(Mapping):
    """Name -> 0-d tensor, each computed when it is looked at. This needs no host read, which would wait for the GPU.

    A Mapping: `metrics["ess"]`, `dict(metrics)`, `metrics | {...}` (which does not compute them yet). `to_dict()` gives Python
    numbers, with one host read for all of them. `named("verl")` has the names of another library. Metrics may be copied,
    pickled, returned from a compiled function and made inside a CUDA graph: after a replay they show the step replayed.
    """

    def __init__(
        self, values: Mapping[str, torch.Tensor], step: Step | Summary | None = None, mismatch: Mismatch | None = None
    ) -> None:
        self._values = dict(values)  # they hide a metric of the step with the same name
        self._step, self._mismatch = step, mismatch

    def beside(self, mismatch: Mismatch | None) -> Metrics:
        """These, with the metrics of the mismatch, if there is one."""
        return self if mismatch is None else Metrics(self._values, self._step, mismatch)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._values:
            return self._values[name]
        if name not in self._names():
            raise KeyError(name)
        if self._mismatch is not None and name in self._mismatch.names():
            return self._mismatch.metric(name)
        return _summarised(self._step, name) if isinstance(self._step, Summary) else _metric(self._step, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __or__(self, other: Mapping[str, torch.Tensor]) -> Metrics:
        return Metrics(self._values | dict(other), self._step, self._mismatch)

    def __ror__(self, other: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(other) | dict(self)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self)})"

    def _names(self) -> list[str]:
        of_step: tuple[str, ...] = ()
        if isinstance(self._step, Summary):
            of_step = (*_NAMES, "entropy") if self._step.has_entropy else _NAMES
        elif self._step is not None:
            of_step = _NAMES if self._step.entropies is None else (*_NAMES, "entropy")
        if self._mismatch is not None:
            of_step = (*of_step, *self._mismatch.names())
        return [*of_step, *(name for name in self._values if name not in of_step)]

    def to_dict(self) -> dict[str, float]:
        """Python numbers, int for metrics that count. One host read."""
        return _to_dict(self)

    def named(self, library: Library) -> NamedMetrics:
        """The same numbers under the names that a trainer of this library logs them by: "trl" or "verl".

        It has the metrics that the library computes in the same way, and no others (docs/pages/objectives.md).
        """
        step = self._step
        return NamedMetrics(self, library, names_in(library, step and step.objective, known=step is not None))


class NamedMetrics(Mapping):
    """`Metrics.named`: a library's name -> 0-d tensor, computed when it is looked at. `to_dict()` reads the host once."""

    def __init__(self, metrics: Metrics, library: str, names: dict[str, str]) -> None:
        self._metrics, self._library = metrics, library
        self._own_names = {name: own for name, own in names.items() if own in metrics}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._own_names:
            known = ", ".join(self._own_names) or "none"
            raise KeyError(f"{name!r} is not among the names of {self._library!r} that these metrics have: {known}")
        return self._metrics[self._own_names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._own_names

    def __iter__(self) -> Iterator[str]:
        return iter(self._own_names)

    def __len__(self) -> int:
        return len(self._own_names)

    def __repr__(self) -> str:
        return f"NamedMetrics({', '.join(self)})"

    def to_dict(self) -> dict[str, float]:
        """Python numbers. One host read."""
        return _to_dict(self)


def _to_dict(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    values = list(metrics.values())
    numbers = torch.stack([x.detach().double() for x in values]).tolist() if values else []
    return {
        name: number if value.is_floating_point() else int(number)
        for name, value, number in zip(metrics, values, numbers, strict=True)
    }


def _summarised(step: Summary, name: str) -> torch.Tensor:
    if name == "tokens":
        return step.numbers[1].clone()
    if name == "skipped_tokens":
        return step.numbers[0] - step.numbers[1]
    if name in _OF_SWEEP:
        return _of_sweep(step, name)
    if name == "work_saved":
        return _work_saved(step)
    return step.metrics[SUMMARY.index(name)].clone()


def _metric(step: Step, name: str) -> torch.Tensor:
    if name == "tokens":
        return _count(step)
    if name == "skipped_tokens":
        return torch.zeros_like(_count(step)) if step.numbers is None else step.numbers[0] - step.numbers[1]
    if name in _OF_SWEEP:
        return _of_sweep(step, name)
    if name == "work_saved":
        return _work_saved(step)
    if name == "entropy":
        return _mean(step, step.entropies)
    d = _kept(step, step.logprobs - step.old_logprobs)
    if name == "ratio_mean":
        return _mean(step, d.exp())
    if name == "ratio_max":
        return _largest(step, d.exp(), 0.0)
    if name == "clip_fraction":
        return _clip_fraction(step)
    if name == "ess":
        return _effective_sample_size(step, d)
    return _mean(step, -d if name == "kl_k1" else d.expm1() - d)


def _of_sweep(step: Step | Summary, name: str) -> torch.Tensor:
    if step.again is not None:
        return step.again[_OF_SWEEP.index(name)].clone()
    return torch.zeros_like(_count(step) if step.numbers is None else step.numbers[0])


def _work_saved(step: Step | Summary) -> torch.Tensor:
    if step.numbers is None:
        return torch.zeros_like(_count(step), dtype=torch.float32)
    tokens, computed = step.numbers[0], step.numbers[1]
    saved = 3 * (tokens - computed) + 2 * _of_sweep(step, "silenced_tokens")
    return saved.float() / (3 * tokens.clamp(min=1)).float()  # whatever torch's default dtype is


def _kept(step: Step, values: torch.Tensor) -> torch.Tensor:
    """values, 0 where masked."""
    return values if step.mask is None else torch.where(step.mask, values, 0)


def _count(step: Step) -> torch.Tensor:
    if step.mask is None:
        return torch.full((), step.logprobs.numel(), dtype=torch.int64, device=step.logprobs.device)
    return step.mask.sum()


def _mean(step: Step, values: torch.Tensor) -> torch.Tensor:
    return _kept(step, values).sum() / _count(step).clamp(min=1)


def _largest(step: Step, values: torch.Tensor, empty: float) -> torch.Tensor:
    kept = values if step.mask is None else torch.where(step.mask, values, empty)
    return torch.cat([kept.reshape(-1), kept.new_full((1,), empty)]).amax()


def _clip_fraction(step: Step) -> torch.Tensor:
    low, high = (None, None) if step.objective is None else step.objective.ratio_bounds
    outside = torch.zeros_like(step.logprobs, dtype=torch.bool)
    if low is not None or high is not None:
        bounded = _kept(step, step.objective.log_ratio(step.logprobs, step.old_logprobs, step.sequences)).exp()
        if low is not None:
            outside = outside | (bounded < low)
        if high is not None:
            outside = outside | (bounded > high)
    return _mean(step, outside.to(step.logprobs.dtype))


def _effective_sample_size(step: Step, d: torch.Tensor) -> torch.Tensor:
    # ess does not depend on the scale of r. So the largest ratio is made 1: squares of e^60 would leave fp32's range.
    r = _kept(step, (d - _largest(step, d, -torch.inf)).exp())
    tokens = _count(step)
    ess = r.sum().square() / (tokens.clamp(min=1) * r.square().sum())
    return torch.where(tokens > 0, ess, 1.0)
