"""The measurements of the bench: a gate for correctness, interleaved timings, transient memory."""

from __future__ import annotations

import contextlib
import gc
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from cases import Batch
from peers import METHODS, Method, bare_products

from fastpg import reference
from fastpg.crosscheck.accuracy import logprob_tolerance
from fastpg.tools.memory import transient_bytes

_GATE_ROWS = 64


class Errors(NamedTuple):
    """Errors against float64 on some rows of a batch: absolute of log-probabilities, relative of gradients.

    None where a method does not return the quantity, or does not have it.
    """

    logprobs: float | None
    dhidden: float | None
    dweight: float | None
    dlogprobs: float | None = None  # of a loss alone


def errors_of(method: Method, b: Batch) -> Errors:
    """The errors of a method against the oracle.

    The oracle shares no code with any method; fastpg's own `policy_loss` is part of a method and cannot be the judge.

    dW (V, H) is compared through its product with a random vector, so that no float64 copy of it is made.
    """
    b = method.variant(b.some(_GATE_ROWS)).leaves()
    logprobs = method.step(b)
    if method.is_loss_alone:
        exact = b.logprobs.detach().double().requires_grad_()
        _exact_loss(exact, b).backward()
        return Errors(None, None, None, _relative(b.logprobs.grad.double(), exact.grad))
    logits = torch.cat([b.hidden.detach().double() @ w.double().T for w in b.weight.detach().split(32768)], 1)
    logits.requires_grad_()
    z = logits if b.softcap is None else b.softcap * torch.tanh(logits / b.softcap)
    exact = z.log_softmax(-1).gather(1, b.tokens[:, None])[:, 0]
    _exact_loss(exact, b).backward()
    d, probe = logits.grad, torch.randn(b.hidden.shape[1], dtype=torch.float64, device=b.hidden.device)
    columns = b.weight.detach().split(32768)
    dhidden = sum(part @ w.double() for part, w in zip(d.split(32768, 1), columns, strict=True))
    of_logprobs = None
    if logprobs is not None:  # fastpg's one pass skips tokens of weight zero and returns NaN for them
        computed = b.advantages != 0 if method.is_ours else torch.ones_like(b.tokens, dtype=torch.bool)
        of_logprobs = (logprobs.double() - exact.detach())[computed].abs().max().item()
    of_weight = None
    if not b.frozen:
        got = torch.cat([g.double() @ probe for g in b.weight.grad.split(32768)])
        of_weight = _relative(got, d.T @ (b.hidden.detach().double() @ probe))
    return Errors(of_logprobs, _relative(b.hidden.grad.double(), dhidden), of_weight)


def _exact_loss(logprobs: torch.Tensor, b: Batch) -> torch.Tensor:
    old, advantages = b.old_logprobs.double(), b.advantages.double()
    return reference.policy_loss(logprobs, old, advantages, objective=reference.cispo(), mask=b.mask)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def is_wrong(method: Method, errors: Errors, b: Batch) -> str | None:
    """The first error that is beyond rounding, in words, or None.

    fastpg is held to its promise, and the others to logits rounded to the dtype of the model.
    """
    eps = torch.finfo(b.hidden.dtype).eps
    size = 12.0 if b.softcap is None else b.softcap  # about the largest logit of these batches
    promised = logprob_tolerance(size, b.hidden.dtype, b.hidden.shape[1], b.hidden.device)
    limit = promised if method.is_ours else max(promised, 4 * eps * size)
    if errors.logprobs is not None and not errors.logprobs <= limit:
        return f"log-probabilities are off by {errors.logprobs:.1e}, limit {limit:.1e}"
    for name, error in (("dX", errors.dhidden), ("dW", errors.dweight)):
        # rounded logits move every probability by eps times their size
        if error is not None and not error <= (2 * eps if method.is_ours else 4 * eps * size) + 1e-5:
            return f"{name} is off by {error:.1e}"
    limit = 8 * torch.finfo(b.logprobs.dtype).eps  # a subtraction, an exponential and a few products, rounded
    if errors.dlogprobs is not None and not errors.dlogprobs <= limit:
        return f"the gradient of the log-probabilities is off by {errors.dlogprobs:.1e}, limit {limit:.1e}"
    return None


class Runs(NamedTuple):
    seconds: list[float]
    peak_bytes: int


def attempt(call: Callable[[], object], device: str) -> tuple[object, str | None]:
    """(the result of the call, None), or (None, its error in one line).

    An error of a method must not end the run. Compilers, launchers and libraries raise errors of every class, so all of them
    are caught. Only KeyboardInterrupt and its like end the run.
    """
    try:
        return call(), None
    except Exception as error:
        why_not = _in_one_line(error)
    # By now the error is gone, and with its frames the tensors that they held. Tensors in reference cycles go here.
    gc.collect()
    if device == "cuda":
        with contextlib.suppress(Exception):  # a broken context refuses this too, and every method after it says so
            torch.cuda.empty_cache()
    return None, why_not


def _in_one_line(error: Exception) -> str:
    lines = "".join(traceback.format_exception_only(error)).splitlines()
    line = next((line.strip() for line in lines if line.strip()), type(error).__name__)
    # torch's class, Python's, and the words of torch's allocator on a CPU
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in line:
        return "out of memory"
    return f"failed: {line[:120]}"


class Timings(NamedTuple):
    runs: dict[str, Runs]
    failed: dict[str, str]  # calls that raised, with their errors


def runs_of(calls: dict[str, Callable[[], object]], rounds: int, device: str, budget_s: float) -> Timings:
    """Seconds of each call, and the memory that it takes.

    Every round visits the calls in turn, so that a drift of the machine's speed affects all alike. It runs each call once
    untimed and twice timed (once where that took budget_s). Memory is read in the first untimed run. A call is not visited
    again once its timed runs have taken budget_s, or once it has raised an error.

    The untimed run matters in every round: a virtual machine may give freed memory back to its host within seconds, and the
    first run after a pause then pays for every page (seen here: 0.3 s of 1.4). For the same reason medians are lower medians.
    """
    runs: dict[str, Runs] = {}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            if name in failed or (name in runs and sum(runs[name].seconds) >= budget_s):
                continue
            visited, why_not = attempt(lambda name=name, call=call: _visit(call, runs.get(name), device, budget_s), device)
            if why_not is None:
                runs[name] = visited
            else:
                failed[name] = why_not
                runs.pop(name, None)
    return Timings(runs, failed)


def _visit(call: Callable[[], object], before: Runs | None, device: str, budget_s: float) -> Runs:
    """One round of one call in `runs_of`. before: the runs of its earlier rounds, or None in the first."""
    if before is None:
        peak_bytes, seconds = transient_bytes(call, device), []
    else:
        peak_bytes, seconds = before.peak_bytes, list(before.seconds)
        call()
    for _ in range(2):
        if not seconds or seconds[-1] < budget_s:
            seconds.append(_event_seconds(call) if device == "cuda" else _wall_seconds(call))
    return Runs(seconds, peak_bytes)


def _wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _event_seconds(call: Callable[[], object]) -> float:
    """Seconds between two events, after the L2 cache was overwritten, as in triton.testing.do_bench."""
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    cache.zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def of_the_host(call: Callable[[], object]) -> dict[str, float]:
    """On a GPU: what a call costs the host, which queues its launches while the device works, and how many these are.

    host_seconds: from the call to its return, with an empty queue before it, the least of five. A call that waits for the
    device has the device's time in it.
    """
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        seconds.append(_wall_seconds(call))
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return {"host_seconds": min(seconds), "launches": launches}


def measure(b: Batch, names: tuple[str, ...], rounds: int, device: str, budget_s: float) -> list[dict]:
    """One row per method: seconds, ratio to the bare products, peak bytes, errors; or why there are none.

    If the bare products fail there is nothing to compare with: then theirs is the only row, and says why.
    """
    _, why_not = attempt(lambda: bare_products(b), device)  # before the others spend their time on the gate
    if why_not is not None:
        return [{"method": "bare products", "why_not": why_not}]
    rows, calls = [], {"bare products": lambda: bare_products(b)}
    for name in names:
        method = METHODS[name]
        gated, why_not = attempt(lambda method=method: _gated(method, b), device)
        row = {"method": name, "ends_in": method.ends_in} | (gated or {"why_not": why_not})
        if "why_not" not in row:
            own = row.pop("batch")
            gradient_bytes = own.logprobs.nbytes if method.is_loss_alone else own.gradient_bytes()
            row |= {"gradient_bytes": gradient_bytes, "workspace": own.workspace}
            calls[name] = lambda step=method.step, own=own: step(own.leaves())
        rows.append(row)
    runs, failed = runs_of(calls, rounds, device, budget_s)
    bare = {"method": "bare products"}
    if "bare products" in failed:
        return [bare | {"why_not": failed["bare products"]}]
    floor = statistics.median_low(runs["bare products"].seconds)
    for row in (bare, *rows):
        if row["method"] in runs:
            seconds, peak_bytes = runs[row["method"]]
            taken = statistics.median_low(seconds)
            row |= {"runs": len(seconds), "seconds": taken, "over_products": taken / floor, "peak_bytes": peak_bytes}
        elif row["method"] in failed:
            row["why_not"] = failed[row["method"]]
        if device == "cuda" and "seconds" in row:
            row |= attempt(lambda name=row["method"]: of_the_host(calls[name]), device)[0] or {}
    return [bare, *rows]


def _gated(method: Method, b: Batch) -> dict:
    """The errors of a method that may be timed, and the batch it runs on; or why_not."""
    why_not = method.why_not(b)
    if why_not is not None:
        return {"why_not": why_not}
    errors = errors_of(method, b)
    found = dict(zip(("logp_error", "dx_error", "dw_error", "dlogp_error"), errors, strict=True))
    wrong = is_wrong(method, errors, b)
    return found | ({"batch": method.variant(b)} if wrong is None else {"why_not": f"wrong: {wrong}"})


def machine(device: str) -> dict[str, object]:
    """The date, machine and versions of a run."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = (
        "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels", "fastpg-lm",
    )  # fmt: skip
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "date": date.today().isoformat(),
        "device": device,
        "machine": name,
        "capability": torch.backends.cpu.get_cpu_capability() if device == "cpu" else str(torch.cuda.get_device_capability()),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in packages},
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
