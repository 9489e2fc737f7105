"""`fastpg check`: every operation on every backend that is here against the float64 oracle, for a user's CI; and the same
check on a user's own tensors, `assert_matches_oracle`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from .. import lm_head, reference
from ..lm_head import LMHead, as_head
from ..loss.objectives import CISPO, KLPenalty, Objective, ObjectiveFunction
from ..loss.reductions import Reduction
from ..tiles.backend import tiles_of
from ..tools.threads import one_thread
from . import cases, compile_ahead
from .accuracy import LOSS_TOLERANCE, ROW_TOLERANCE, WEIGHT_TOLERANCE, logprob_tolerance
from .cases import Case, Inputs, Outcome, Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}

# Rows below are compared absolutely, on this scale; and fp16 rounds to multiples of 2^-24, half of which is an error.
SMALLEST_ROW, FP16_ROUNDING = 2.0**-100, 2.0**-25


class Deviation(NamedTuple):
    """The worst of a quantity: its error there, and what is promised there."""

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
    """Both schedules on these tensors against full logits in float64: log-probabilities, loss and every gradient.

    Arguments as of `linear_policy_loss`; objective None is CISPO(). All of hidden, weight, bias and LoRA factors get a
    gradient, whether or not they require one; the tensors themselves, their `.grad` included, stay as they are. Ratios of
    whole sequences (GSPO) are checked in two passes. Keep ratios 1e-3 away from jumps of the objective's derivative.

    The oracle holds the logits (N, V) and the weight and its gradient (V, H) in float64: give it a few hundred tokens.

    Raises AssertionError naming the schedule, and each quantity's error and tolerance.
    """
    numbers = (old_logprobs, advantages, mask, temperature, ref_logprobs, rollout_weights)
    x = Inputs(hidden, as_head(head), tokens, *numbers)
    settings = Settings(CISPO() if objective is None else objective, reduction, kl)
    schedules = {"two passes (linear_logprobs, policy_loss)": cases.two_pass}
    if not getattr(settings.objective, "needs_sequences", False):
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
    """Of each quantity of `got` from the oracle's, where it is worst in units of its tolerance. device: where `got` is from."""
    if got.keys() != want.keys() - {"scale"}:
        raise AssertionError(f"expected {sorted(want.keys() - {'scale'})}; got {sorted(got)}")
    dtype, keep = x.hidden.dtype, x.keep().flatten()
    logprobs = want["logp"].flatten()
    tolerance = _logprob_tolerance(x, keep, device)
    # relative to a small |logp|, down to where it is no number of the dtype that it is reported in
    smallest = torch.finfo(dtype if dtype == torch.float64 else torch.float32).tiny
    of_logprobs = tolerance * logprobs.abs().clamp(max=1) + smallest
    row_limit = 2 * tolerance if "entropy" in want else tolerance  # of two terms
    row_limit = torch.full_like(tolerance, ROW_TOLERANCE[dtype]) if dtype in ROW_TOLERANCE else row_limit
    if settings.objective is not None:
        coefficient, slope = _coefficient(want["logp"], x, settings, of_logprobs)
        # an error of the log-probability is amplified where the coefficient is steep
        row_limit = row_limit + slope / coefficient.clamp(min=SMALLEST_ROW)
    found = []
    for name, value in got.items():
        value, exact = value.to(logprobs), want[name].to(logprobs)
        if name == "logp":
            value = torch.where(_skipped(x, settings), exact, value)  # reported as NaN: not computed
            found.append(_worst(name, (value - exact).abs().flatten(), of_logprobs))
        elif name == "entropy":
            found.append(_worst(name, (value - exact).abs().flatten(), tolerance))
        elif name == "loss":
            terms = _absolute_loss(want["logp"], x, settings)
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
    """(N,) float64, for log-probabilities that were computed on `device`."""
    largest, dtype = _largest_logits(x, keep), x.hidden.dtype
    if x.head is None:  # ready logits: no product
        return logprob_tolerance(largest, dtype, 1, device)
    multiplied = torch.float32 if x.head.fp32_head and dtype != torch.float64 else dtype
    return logprob_tolerance(largest, multiplied, x.head.hidden_size, device)


def _largest_logits(x: Inputs, keep: torch.Tensor) -> torch.Tensor:
    """The largest finite |logit| of each row, (N,) float64: what errors of logits are proportional to."""
    with torch.no_grad():
        hidden = torch.where(keep[:, None], x.hidden.flatten(0, -2).double(), 0)
        T = x.temperature
        T = T.double().expand(x.tokens.shape).flatten() if isinstance(T, torch.Tensor) else torch.full_like(hidden[:, 0], T)
        # ready logits have no head: a matrix that leaves them as they are would be (V, V)
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
    """|c|, c = dloss/dlogp (N,), and how far c moves where log-probabilities move by their tolerance."""
    wide = x.leaves(torch.float64)

    def at(logprobs: torch.Tensor) -> torch.Tensor:
        leaf = logprobs.detach().requires_grad_()
        return torch.autograd.grad(cases.reference_loss(leaf, wide, settings), leaf)[0].flatten()

    c, step = at(logprobs), tolerance.view_as(logprobs)
    return c.abs(), torch.maximum((at(logprobs + step) - c).abs(), (at(logprobs - step) - c).abs())


def _absolute_loss(logprobs: torch.Tensor, x: Inputs, settings: Settings) -> torch.Tensor:
    """The loss with the absolute value of every term of its sum."""
    wide, keep = x.leaves(torch.float64), x.keep()
    objective, kl = cases.reference_objective(settings.objective), settings.kl

    def absolute(logprobs, old, *others):
        value = objective(logprobs, old, *others).abs()
        if wide.rollout_weights is not None:
            value = value * wide.rollout_weights[keep].abs()
        if kl is not None:
            ref = wide.ref_logprobs[keep]
            value = value + abs(kl.coef) * reference.kl_penalty(logprobs, old, ref, kl.estimator, kl.importance_weighted).abs()
        return value

    if getattr(objective, "takes_sequences", False):
        reference.of_sequences(absolute)
    options = {"objective": absolute, "mask": keep, "reduction": settings.reduction}
    return reference.policy_loss(logprobs, wide.old_logprobs, wide.advantages, **options).abs()


@dataclass(frozen=True)
class Checked:
    """One line of the table."""

    case: Case
    backend: str
    deviations: list[Deviation]
    full_logits: list[Deviation]

    @property
    def dtype(self) -> str:
        return str(self.case.dtype).removeprefix("torch.")

    def misses(self) -> Iterator[str]:
        name = f"{self.case.operation}, {self.backend}, {self.dtype} ({self.case.describe()})"
        yield from (f"{name}: {d}" for d in self.deviations if not d.multiple <= 1)

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
    """The case on each backend and device of `places`; the oracle's part of the work is done once.

    The oracle works on the CPU, and on a GPU where nothing else is checked: a large head would take it minutes on a CPU.
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
    """On ready log-probabilities, six sequences of ten tokens: loss and its gradient, which is elementwise."""
    wide = x.leaves(torch.float64)
    with torch.no_grad():
        ready = reference.linear_logprobs(wide.hidden, wide.head, x.tokens, mask=x.mask)[0].to(case.dtype).view(6, -1)
    names = ("tokens", "old_logprobs", "advantages", "mask", "ref_logprobs", "rollout_weights")
    shaped = {name: value.view(6, -1) for name in names if (value := getattr(x, name)) is not None}
    x, tolerance = replace(x, **shaped), LOSS_TOLERANCE[case.dtype]
    got = cases.loss_only(ready, x, settings, cases.policy_loss)
    wide = x.leaves(torch.float64)
    want = cases.loss_only(ready.double(), wide, settings, reference.policy_loss)
    terms, size = _absolute_loss(ready.double(), x, settings), want["dlogp"].abs().clamp(min=SMALLEST_ROW)
    errors = (got["dlogp"].double() - want["dlogp"]).abs() / size
    found = [
        _worst("loss", (got["loss"].double() - want["loss"]).abs()[None], tolerance * terms[None]),
        _worst("dlogp", errors.flatten(), torch.full_like(errors.flatten(), tolerance)),
    ]
    return Checked(case, "torch cpu", found, [])


def add_command(commands) -> None:
    """`fastpg check`, for the parser in __main__."""
    from ..tools.compile_report import TARGETS

    parser = commands.add_parser("check", help="every operation on every backend here against the float64 oracle, for CI")
    parser.add_argument("--interpret", action="store_true", help="the Triton kernels too, in Triton's interpreter on the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the backends of this device alone; default: all")
    parser.add_argument("--operation", action="append", choices=cases.OPERATIONS, help="repeatable; default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="small inputs, all features at once only")
    parser.add_argument("--hidden", type=_size, metavar="H", help="check a head of this hidden size, with --vocab")
    parser.add_argument("--vocab", type=_size, metavar="V", help="... and this vocabulary (about 40 H V bytes of memory)")
    parser.add_argument("--tokens", type=_size, metavar="N", help="... on so many tokens (64)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="the head of a transformers configuration in this directory")
    parser.add_argument(
        "--compile", nargs="+", choices=TARGETS, default=[], metavar="TARGET", help=f"compile report for {', '.join(TARGETS)}"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(run=run, parser=parser)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1; got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> None:
    places = _places(args)
    chosen = _cases(args, places)
    checked, small = [], args.hidden is None and args.model is None
    with one_thread() if small else nullcontext():
        if small and "triton gpu" in places:
            compile_ahead.fill_cache(chosen)
        for case in _progress(chosen):
            checked += check(case, places)
    compiled, compile_failed = _compile_report(args.compile)
    misses = [line for c in checked for line in c.misses()] + compile_failed
    versions = _versions()
    if args.json:
        found = [c.as_json() for c in checked]
        print(json.dumps({"checked": found, "misses": misses, "compiled": compiled, "versions": versions}, indent=1))  # noqa: T201
    else:
        _print_tables(checked, compiled, versions)
        for line in misses:
            print(f"MISS {line}", file=sys.stderr)  # noqa: T201
    if misses:
        raise SystemExit(1)


def _progress(chosen: list[Case]):
    from tqdm import tqdm

    return tqdm(chosen, unit="case", leave=False, disable=not sys.stderr.isatty())


def _cases(args: argparse.Namespace, places: dict[str, str]) -> list[Case]:
    error = args.parser.error
    dtypes, softcap, scale, hidden, vocab = args.dtype, None, 1.0, args.hidden, args.vocab
    if args.model is not None:
        if hidden is not None or vocab is not None:
            error("--model has the sizes already: leave --hidden and --vocab out")
        hidden, vocab, softcap, scale, dtype = _read_model(args)
        dtypes = dtypes or [dtype]
    if (hidden is None) != (vocab is None):
        error("--hidden and --vocab go together")
    if args.tokens is not None and hidden is None:
        error("--tokens needs --hidden and --vocab, or --model")
    chosen_dtypes = [DTYPES[name] for name in dict.fromkeys(dtypes or DTYPES)]
    if hidden is None:
        found = cases.cases(chosen_dtypes, args.quick, "triton interpreter" in places)
    else:
        found = cases.head_cases(chosen_dtypes, args.tokens or 64, hidden, vocab, softcap, scale)
    chosen = [case for case in found if not args.operation or case.operation in args.operation]
    if not chosen:
        error("no case of these operations with these dtypes and sizes")
    return chosen


def _read_model(args: argparse.Namespace) -> tuple[int, int, float | None, float, str]:
    """(hidden size, vocabulary, softcap, logit scale, dtype) of a configuration; no weights are read."""
    error = args.parser.error
    if not (args.model / "config.json").is_file():
        error(f"--model must be a directory with a config.json; got {args.model}")
    if importlib.util.find_spec("transformers") is None:
        error("--model needs transformers, which is not installed: pip install transformers")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(args.model, local_files_only=True)
    except (ValueError, OSError) as problem:
        error(f"--model: {problem}")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = next((cap for name in lm_head._SOFTCAP_NAMES if (cap := getattr(text, name, None))), None)
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    name = next((name for name, known in DTYPES.items() if known == dtype), "fp32")
    hidden, vocab = getattr(text, "hidden_size", None), getattr(text, "vocab_size", None)
    if not isinstance(hidden, int) or not isinstance(vocab, int):
        error(f"--model: {type(text).__name__} has no hidden_size or no vocab_size; use --hidden and --vocab")
    return hidden, vocab, softcap, lm_head._config_scale(text), name


def _places(args: argparse.Namespace) -> dict[str, str]:
    """The backends that can run here, each with its device."""
    triton = importlib.util.find_spec("triton") is not None
    if args.device == "cuda" and (args.interpret or not torch.cuda.is_available()):
        args.parser.error("--device cuda: " + ("--interpret is of the CPU" if args.interpret else "torch finds no GPU"))
    places = {"torch cpu": "cpu"}
    if args.interpret:
        if not triton:
            args.parser.error("--interpret needs triton, which is not installed: pip install triton")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    if os.environ.get("TRITON_INTERPRET") == "1" and triton:
        if not tiles_of("triton").INTERPRETED:
            args.parser.error("--interpret: the kernels were imported without the interpreter; start a new process")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")  # numpy's, of inf
        return places | {"triton interpreter": "cpu"}
    if torch.cuda.is_available() and args.device != "cpu":
        places = {} if args.device == "cuda" else places
        places["torch gpu"] = "cuda"
        if triton:
            places["triton gpu"] = "cuda"
    return places


def _compile_report(targets: list[str]) -> tuple[list[dict], list[str]]:
    """`fastpg compile-report` in a process without the interpreter: (what it says of each kernel, one line per problem)."""
    if not targets:
        return [], []
    command = [sys.executable, "-m", "fastpg", "compile-report", "--json"]
    command += [word for target in targets for word in ("--target", target)]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=inherited, capture_output=True, text=True)
    try:
        return json.loads(done.stdout), done.stderr.splitlines() if done.returncode else []
    except json.JSONDecodeError:
        return [], [f"compile-report: {(done.stderr.splitlines() or ['no output'])[-1]}"]


def _versions() -> dict[str, str]:
    from .. import __version__

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    others = {name: version(name) for name in ("triton", "transformers")}
    return {"fastpg": __version__, "python": platform.python_version(), "torch": torch.__version__, **others, "device": device}


def _print_tables(checked: list[Checked], compiled: list[dict], versions: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..tools import compile_report

    console = Console(width=None if sys.stdout.isatty() else 170)
    table = Table(
        "operation", "backend", "dtype", "tokens x H x V, features", title="fastpg check: worst errors, in tolerances"
    )
    columns = {"logp": ("logp",), "loss": ("loss",), "dX": ("dX, a row", "dlogits, a row", "dlogp"), "dW": ("dW",)}
    columns["others"] = ("entropy", "db", "dA", "dB")
    for name in (*columns, "full logits: logp", "dX"):
        table.add_column(name, justify="right")
    for c in checked:
        numbers = [_multiple(c.deviations, names) for names in columns.values()]
        beside = [_multiple(c.full_logits, columns[name]) for name in ("logp", "dX")]
        style = "bold red" if any(c.misses()) else None
        table.add_row(c.case.operation, c.backend, c.dtype, c.case.describe(), *numbers, *beside, style=style)
    console.print(table)
    if compiled:
        compile_report._print_table([compile_report.Compiled(**c) for c in compiled])
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()), highlight=False)
    lines = sum(any(c.misses()) for c in checked)
    console.print(f"{len(checked)} checks, {lines} with an error above 1", highlight=False)


def _multiple(found: list[Deviation], names: tuple[str, ...]) -> str:
    values = [d.multiple for d in found if d.quantity in names]
    if not values:
        return ""
    worst = max(values)
    return f"{worst:.2f}" if worst < 100 else f"{worst:.0e}"
