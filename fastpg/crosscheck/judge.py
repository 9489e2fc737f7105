"""Compares results with the float64 oracle, in multiples of the promised tolerance.

`assert_matches_oracle` does so on a user's own tensors, `check` on the cases of `fastpg check`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

import torch

from .. import reference
from ..lm_head import LMHead, as_head
from ..loss.objectives import CISPO, KLPenalty, Objective, ObjectiveFunction
from ..loss.reductions import Reduction
from . import cases
from .accuracy import LOSS_TOLERANCE, ROW_TOLERANCE, WEIGHT_TOLERANCE, logprob_tolerance
from .cases import Case, Inputs, Outcome, Settings

# Rows of a smaller norm are compared absolutely, on this scale. fp16 rounds to multiples of 2^-24, an error of up to half that.
SMALLEST_ROW, FP16_ROUNDING = 2.0**-100, 2.0**-25


class Deviation(NamedTuple):
    """A quantity at its worst place: the error there, and the tolerance there."""

    quantity: str
    error: float
    tolerance: float

    @property
    def multiple(self) -> float:
        if self.error == 0:
            return 0.0
        return self.error / self.tolerance if self.tolerance > 0 and math.isfinite(self.error) else math.inf

    def __str__(self) -> str:
        return f"{self.quantity} is off by {self.error:.3g}, tolerance {self.tolerance:.3g} ({self.multiple:.3g} times)"


def assert_matches_oracle(
    hidden: torch.Tensor,  # (..., H)
    head: torch.Tensor | LMHead,  # (V, H), or an LMHead
    tokens: torch.Tensor,  # (...)
    old_logprobs: torch.Tensor | None,  # (...)
    advantages: torch.Tensor,  # (...), or one per sequence
    *,
    objective: Objective | ObjectiveFunction | None = None,
    mask: torch.Tensor | None = None,  # (...)
    temperature: float | torch.Tensor = 1.0,  # number or (...)
    reduction: Reduction = "token-mean",
    kl: KLPenalty | None = None,
    ref_logprobs: torch.Tensor | None = None,  # (...)
    rollout_weights: torch.Tensor | None = None,  # (...)
    backend: str | None = None,
) -> None:
    """Compares the one-pass and the two-pass schedule on these tensors with full logits in float64.

    Log-probabilities, loss and the gradients of hidden, weight, bias and LoRA factors must match, whether or not these require
    a gradient. The tensors themselves, their `.grad` included, stay as they are.
    Arguments are as in `linear_policy_loss`; objective None is CISPO().
    Objectives that need other tokens, of the sequence (GSPO) or of the batch (KLCov), are checked in two passes alone. Keep
    ratios 1e-3 away from jumps of the objective's derivative, and covariances from the choices of ClipCov and KLCov. ClipCov
    has to choose all of its candidates (fraction=1): what is drawn at random differs from call to call.

    The oracle holds the logits (N, V) and the weight and its gradient (V, H) in float64: give it a few hundred tokens.

    Raises AssertionError naming the schedule, and each quantity's error and tolerance.
    """
    numbers = (old_logprobs, advantages, mask, temperature, ref_logprobs, rollout_weights)
    x = Inputs(hidden, as_head(head), tokens, *numbers)
    settings = Settings(CISPO() if objective is None else objective, reduction, kl)
    schedules = {"two passes (linear_logprobs, policy_loss)": cases.two_pass}
    objective = settings.objective
    if not getattr(objective, "needs_sequences", False) and not getattr(objective, "needs_batch", False):
        schedules["one pass (linear_policy_loss)"] = cases.one_pass
    missed = []
    outcomes = {name: schedule(x, settings, backend) for name, schedule in schedules.items()}  # raises before the oracle works
    want = cases.oracle(x, settings)
    for name, got in outcomes.items():
        found = deviations(x, settings, got, want, x.hidden.device)
        missed += [f"{name}: {d}" for d in found if d.multiple > 1]
    if missed:
        raise AssertionError("fastpg does not match the float64 oracle\n" + "\n".join(missed))


def deviations(
    x: Inputs, settings: Settings, got: Outcome, want: Outcome, device: torch.device | str = "cpu"
) -> list[Deviation]:
    """How far each quantity of `got` is from the oracle's `want`, at its worst place. device: the one that computed `got`."""
    if got.keys() != want.keys() - {"scale"}:
        raise AssertionError(f"expected {sorted(want.keys() - {'scale'})}; got {sorted(got)}")
    dtype, keep = x.hidden.dtype, x.keep().flatten()
    logprobs = want["logp"].flatten()
    tolerance = _logprob_tolerance(x, keep, device)
    # relative to a small |logp|, down to the smallest normal number of the dtype that it is reported in
    smallest = torch.finfo(dtype if dtype == torch.float64 else torch.float32).tiny
    of_logprobs = tolerance * logprobs.abs().clamp(max=1) + smallest
    row_limit = 2 * tolerance if "entropy" in want else tolerance  # dX then has two terms
    row_limit = torch.full_like(tolerance, ROW_TOLERANCE[dtype]) if dtype in ROW_TOLERANCE else row_limit
    if settings.objective is not None:
        coefficient, slope = _coefficient(want["logp"], x, settings, of_logprobs)
        # a coefficient that is steeper than the ratio amplifies an error of the log-probability
        row_limit = row_limit + (slope / coefficient.clamp(min=SMALLEST_ROW) - of_logprobs).clamp(min=0)
    found = []
    for name, value in got.items():
        value, exact = value.to(logprobs), want[name].to(logprobs)
        if name == "logp":
            value = torch.where(_skipped(x, settings), exact, value)  # not computed, and reported as NaN
            found.append(_worst(name, (value - exact).abs().flatten(), of_logprobs))
        elif name == "entropy":
            found.append(_worst(name, (value - exact).abs().flatten(), tolerance))
        elif name == "loss":
            terms = absolute_loss(want["logp"], x, settings)
            limit = tolerance.amax() * terms + (coefficient * of_logprobs).sum() if len(tolerance) else terms
            limit = limit + smallest
            found.append(_worst(name, (value - exact).abs()[None], limit[None]))
        elif name in ("dX", "dlogits"):
            value, exact = value.flatten(0, -2), exact.flatten(0, -2)
            rows = exact.norm(dim=1).maximum(want.get("scale", exact.new_zeros(()))).clamp(min=SMALLEST_ROW)
            floor = FP16_ROUNDING * exact.shape[1] ** 0.5 if dtype == torch.float16 else 0.0
            found.append(_worst(f"{name}, a row", (value - exact).norm(dim=1) / rows, row_limit + floor / rows))
        else:
            norm = exact.norm().clamp(min=SMALLEST_ROW)
            floor = FP16_ROUNDING * exact.numel() ** 0.5 if dtype == torch.float16 else 0.0
            limit = max(WEIGHT_TOLERANCE[dtype], *tolerance.tolist(), 0.0) + floor / norm
            found.append(_worst(name, ((value - exact).norm() / norm)[None], limit[None]))
    return found


def _worst(name: str, errors: torch.Tensor, tolerances: torch.Tensor) -> Deviation:
    if not len(errors):
        return Deviation(name, 0.0, 0.0)
    errors = torch.where(errors.isnan(), torch.inf, errors)
    multiples = torch.where(errors == 0, 0, errors / tolerances)
    place = int(multiples.argmax())
    return Deviation(name, float(errors[place]), float(tolerances[place]))


def _logprob_tolerance(x: Inputs, keep: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tolerance of log-probabilities that were computed on `device`, (N,) float64."""
    largest, dtype = _largest_logits(x, keep), x.hidden.dtype
    if x.head is None:  # ready logits: no product
        return logprob_tolerance(largest, dtype, 1, device)
    multiplied = torch.float32 if x.head.fp32_head and dtype != torch.float64 else dtype
    return logprob_tolerance(largest, multiplied, x.head.hidden_size, device)


def _largest_logits(x: Inputs, keep: torch.Tensor) -> torch.Tensor:
    """The largest finite |logit| of each row, (N,) float64. Errors of logits are proportional to it."""
    with torch.no_grad():
        hidden = torch.where(keep[:, None], x.hidden.flatten(0, -2).double(), 0)
        T = x.temperature
        T = T.double().expand(x.tokens.shape).flatten() if isinstance(T, torch.Tensor) else torch.full_like(hidden[:, 0], T)
        # ready logits have no head, since one that leaves them as they are would be (V, V)
        z = hidden / T[:, None] if x.head is None else reference.logits(hidden, x.leaves(torch.float64).head, T)
        z = z.abs()
        return torch.where(z.isfinite(), z, 0).amax(1)


def _skipped(x: Inputs, settings: Settings) -> torch.Tensor:
    """(...) bool: tokens of zero weight, whose log-probability the one-pass schedule does not compute."""
    advantages = x.advantages if x.advantages.shape == x.tokens.shape else x.advantages[:, None].expand(x.tokens.shape)
    weight = advantages if x.rollout_weights is None else advantages * x.rollout_weights
    skips = settings.kl is None and getattr(settings.objective, "zero_at_zero_advantage", False)
    return (weight == 0) & x.keep() if skips else torch.zeros_like(x.keep())


def _coefficient(
    logprobs: torch.Tensor, x: Inputs, settings: Settings, tolerance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """|c| with c = dloss/dlogp, (N,), and the change of c when log-probabilities change by their tolerance, (N,)."""
    wide = x.leaves(torch.float64)

    def at(logprobs: torch.Tensor) -> torch.Tensor:
        leaf = logprobs.detach().requires_grad_()
        return torch.autograd.grad(cases.reference_loss(leaf, wide, settings), leaf)[0].flatten()

    c, step = at(logprobs), tolerance.view_as(logprobs)
    return c.abs(), torch.maximum((at(logprobs + step) - c).abs(), (at(logprobs - step) - c).abs())


def absolute_loss(logprobs: torch.Tensor, x: Inputs, settings: Settings) -> torch.Tensor:
    """The loss with every term of its sum replaced by its absolute value."""
    wide, keep = x.leaves(torch.float64), x.keep()
    objective, kl = cases.reference_objective(settings.objective), settings.kl

    def absolute(logprobs, old, *others):
        value = objective(logprobs, old, *others).abs()
        if wide.rollout_weights is not None:
            value = value * wide.rollout_weights[keep].abs()
        if kl is not None:
            ref = wide.ref_logprobs[keep]
            coef, *settings_of_kl = astuple(kl)
            value = value + coef * reference.kl_penalty(logprobs, old, ref, *settings_of_kl).abs()
        return value

    if getattr(objective, "takes_sequences", False):
        reference.of_sequences(absolute)
    options = {"objective": absolute, "mask": keep, "reduction": settings.reduction}
    return reference.policy_loss(logprobs, wide.old_logprobs, wide.advantages, **options).abs()


@dataclass(frozen=True)
class Checked:
    """One line of the table: a case on a backend. full_logits: deviations of plain code with full logits."""

    case: Case
    backend: str
    deviations: list[Deviation]
    full_logits: list[Deviation]

    @property
    def dtype(self) -> str:
        return str(self.case.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.case.operation}, {self.backend}, {self.dtype} ({self.case.describe()})"

    def misses(self) -> Iterator[str]:
        yield from (f"{self.name}: {d}" for d in self.deviations if not d.multiple <= 1)

    def as_json(self) -> dict:
        case = self.case
        numbers = {
            name: {
                d.quantity: {"error": _finite(d.error), "tolerance": d.tolerance, "multiple": _finite(d.multiple)} for d in ds
            }
            for name, ds in (("deviations", self.deviations), ("full_logits", self.full_logits))
        }
        fields = {"operation": case.operation, "backend": self.backend, "dtype": self.dtype, "features": case.describe()}
        return fields | numbers


def _finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def check(case: Case, places: dict[str, str]) -> Iterator[Checked]:
    """Checks the case on each backend of `places` (backend -> device). The oracle works once for all of them.

    It works on the CPU, or on the GPU if all backends are there, since a large head would take it minutes on a CPU.
    """
    home = "cuda" if set(places.values()) == {"cuda"} else "cpu"
    x, settings, entropy = cases.inputs_of(case, home), case.settings(), "entropy" in case.features
    wanted = [(b, d) for b, d in places.items() if case.runs_on(b.split()[0])]
    if not wanted:
        return
    if case.operation == "policy_loss":
        yield _check_policy_loss(case, x, settings)
        return
    x, logits = x.to(home), None
    if case.operation == "selective_logprobs":
        logits = cases.ready_logits(x)
        judged = replace(x, hidden=logits, head=None)
        want = cases.oracle_of_logits(logits, x, entropy)
        plain = cases.log_softmax_of_logits(logits, x, entropy)
    else:
        judged, want, plain = x, cases.oracle(x, settings, entropy), cases.full_logits(x, settings, entropy)
    beside = deviations(judged, settings, plain, want)
    for name, device in wanted:
        got = cases.outcome(case, x.to(device), name.split()[0], None if logits is None else logits.to(device))
        got = {quantity: value.to(home) for quantity, value in got.items()}
        yield Checked(case, name, deviations(judged, settings, got, want, device), beside)


def _check_policy_loss(case: Case, x: Inputs, settings: Settings) -> Checked:
    """Checks the loss of ready log-probabilities, six sequences of ten tokens, and its elementwise gradient."""
    wide = x.leaves(torch.float64)
    with torch.no_grad():
        ready = reference.linear_logprobs(wide.hidden, wide.head, x.tokens, mask=x.mask)[0].to(case.dtype).view(6, -1)
    names = ("tokens", "old_logprobs", "advantages", "mask", "ref_logprobs", "rollout_weights")
    shaped = {name: value.view(6, -1) for name in names if (value := getattr(x, name)) is not None}
    x, tolerance = replace(x, **shaped), LOSS_TOLERANCE[case.dtype]
    got = cases.loss_only(ready, x, settings, cases.policy_loss)
    wide = x.leaves(torch.float64)
    want = cases.loss_only(ready.double(), wide, settings, reference.policy_loss)
    terms, size = absolute_loss(ready.double(), x, settings), want["dlogp"].abs().clamp(min=SMALLEST_ROW)
    errors = (got["dlogp"].double() - want["dlogp"]).abs() / size
    found = [
        _worst("loss", (got["loss"].double() - want["loss"]).abs()[None], tolerance * terms[None]),
        _worst("dlogp", errors.flatten(), torch.full_like(errors.flatten(), tolerance)),
    ]
    return Checked(case, "torch cpu", found, [])
