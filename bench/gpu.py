"""What a machine with a GPU shows in four minutes: tests of the kernels, a check of a large head, and the bench of three heads.

    make gpu                                  or: python bench/gpu.py [--out gpu-out] [--seconds 215]

Uses the Python it runs in where that has pytest and a torch that finds a GPU, else .venv; installs nothing. Every part runs in
a process of its own, which is ended when its share of the time is over. The last line is the result, whatever happens. Logs and
results go into --out. Exit status: 0 all passed, 1 something did not, 2 there is no GPU, or no Python to use it with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HEADS = ("smollm2-135m", "llama3.2-1b", "qwen3-8b")
# the bench's methods that need no other library; the compilers of those libraries take most of their time
METHODS = (
    "fastpg one pass", "fastpg two passes", "fastpg one pass, half zero weights", "fastpg one pass, frozen weight",
    "fastpg one pass, one chunk", "full logits", "full logits, compiled",
)  # fmt: skip
TESTS = (
    "kernels/test_kernels",
    "kernels/test_finish_kernel",
    "kernels/test_gradient_rows",
    "kernels/test_keep_kernel",
    "kernels/test_loss_kernels",
    "kernels/test_scale_kernel",
    "linear/test_cuda_graph",
    "linear/test_parity",
)
SHARES = {"tests": 0.34, "check": 0.26, "bench": 0.40}  # of the seconds

# The probe that each candidate Python runs. It prints one line of JSON and imports nothing of fastpg.
_PROBE = """
import importlib.util, json
found = {"missing": [n for n in ("torch", "triton", "numpy", "rich", "tqdm", "pytest") if not importlib.util.find_spec(n)]}
found["xdist"], found["gpu"] = importlib.util.find_spec("xdist") is not None, None
if "torch" not in found["missing"]:
    import torch
    found["torch"], found["gpu"] = torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else None
if "triton" not in found["missing"]:
    import triton
    found["triton"] = triton.__version__
print(json.dumps(found))
"""


class Part(NamedTuple):
    name: str
    command: list[str]
    judge: Callable[[str, int | None], tuple[bool, str]]  # (its output, exit status or None) -> (passed, in a few words)


class Outcome(NamedTuple):
    name: str
    passed: bool
    said: str
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder of logs and results")
    parser.add_argument("--seconds", type=float, default=215.0, help="of all parts together")
    options = parser.parse_args(arguments)
    python, found = chosen_python([sys.executable, str(ROOT / ".venv" / "bin" / "python")])
    if python is None:
        say(found)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"{found['gpu']}, torch {found['torch']}, triton {found['triton']}, {python}")
    out = options.out.resolve()
    with importable_package() as folder:
        outcomes = run_parts(parts(python, found, out), folder, out, options.seconds)
    passed, line = summary(outcomes, found, commit())
    whole = {"passed": passed, "about": found, "parts": [outcome._asdict() for outcome in outcomes], "line": line}
    try:
        (out / "summary.json").write_text(json.dumps(whole, indent=1) + "\n")
        say(f"logs and results: {options.out}/")
    except OSError as error:
        say(f"summary.json: {error}")
    say(line)
    return 0 if passed else 1


def say(text: str) -> None:
    print(text, flush=True)


def chosen_python(candidates: list[str]) -> tuple[str | None, dict | str]:
    """The first candidate with a GPU and every package that is needed, and its answer; or None, and why none will do."""
    why_not = []
    for python in candidates:
        found = probe(python)
        if isinstance(found, str):
            why_not.append(f"{python}: {found}")
        elif "torch" in found["missing"]:
            why_not.append(f"{python} has no torch")
        elif found["gpu"] is None:
            why_not.append(f"{python} has torch {found['torch']}, which finds no GPU")
        elif found["missing"]:
            packages = " ".join(found["missing"])
            why_not.append(f"{python} finds {found['gpu']} and misses {packages}: {python} -m pip install {packages}")
        else:
            return python, found
    return None, "make gpu: needs a GPU, and a Python with torch, triton and pytest\n" + "\n".join(f"  {w}" for w in why_not)


def probe(python: str) -> dict | str:
    if not Path(python).exists():
        return "is not there"
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not answer: {error}"
    if done.returncode:
        return f"fails: {(done.stderr.splitlines() or [''])[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def importable_package() -> Iterator[Path]:
    """A folder for sys.path that holds fastpg as if it were installed: links to this checkout, with kernels/ inside fastpg/.

    The checkout itself must stay off sys.path: its kernels/ would be found in the place of Hugging Face's `kernels`.
    """
    with tempfile.TemporaryDirectory(prefix="fastpg-gpu-") as name:
        package = Path(name, "fastpg")
        package.mkdir()
        for path in (ROOT / "fastpg").iterdir():
            if path.name != "__pycache__":
                (package / path.name).symlink_to(path)
        (package / "kernels").symlink_to(ROOT / "kernels")
        yield Path(name)


def parts(python: str, found: dict, out: Path) -> list[Part]:
    tests = [python, "-m", "pytest", "-v", "-rN", "--tb=short", "--color=no", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    tests += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    whole = " or ".join(Path(name).name for name in TESTS if name != "linear/test_parity")
    tests += ["-k", f"({whole} or triton or fp16) and not worst"]
    tests += [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
    if found["xdist"]:
        tests += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"]
    check = [python, "-m", "fastpg", "check", "--device", "cuda", "--hidden", "4096", "--vocab", "151936", "--dtype", "bf16"]
    check += ["--tokens", "64", "--operation", "linear_cispo_loss", "--operation", "linear_logprobs"]
    bench = [python, str(ROOT / "bench" / "run.py"), "--device", "cuda", "--section", "step", "--out", str(out / "bench")]
    bench += [word for head in HEADS for word in ("--head", head)]
    bench += [word for method in METHODS for word in ("--method", method)]
    return [
        Part("tests", tests, of_tests),
        Part("check", check, of_check),
        Part("bench", bench, lambda said, status: of_bench(one_pass_ratios(out), status)),
    ]


def run_parts(chosen: list[Part], folder: Path, out: Path, seconds: float) -> list[Outcome]:
    """Runs the parts one after the other, each for at most its share of the seconds. After an interrupt the rest is not run."""
    (out / "bench" / "results.json").unlink(missing_ok=True)  # an older run's
    outcomes: list[Outcome] = []
    interrupted = False
    for part in chosen:
        if interrupted:
            outcomes.append(Outcome(part.name, False, "not run", 0.0))
            continue
        start, log = time.monotonic(), out / f"{part.name}.log"
        try:
            status, interrupted = run_part(part, folder, log, SHARES[part.name] * seconds)
            passed, said = part.judge(log.read_text(errors="replace"), status)
        except Exception as error:  # the summary is printed whatever a part does
            passed, said, status = False, f"{type(error).__name__}: {error}", 0
        took = time.monotonic() - start
        if status is None:
            said += ", interrupted" if interrupted else f", stopped after {took:.0f} s"
        outcomes.append(Outcome(part.name, passed and not interrupted, said, round(took, 1)))
        say(f"{part.name}: {said} ({took:.0f} s; {part.name}.log)")
    return outcomes


def run_part(part: Part, folder: Path, log: Path, limit: float) -> tuple[int | None, bool]:
    """Runs a part: (its exit status, False), or (None, whether it was interrupted) where it did not end by itself.

    Either way, every process that it started is killed.
    """
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if part.name == "bench":
        del environment["PYTHONSAFEPATH"]  # run.py imports the modules beside it; that folder holds no `kernels`
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit), False
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            return None, isinstance(error, KeyboardInterrupt)
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Kills the process and its session, which includes workers of pytest and compilers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)
    except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        pass  # all of it has ended, or hangs in the driver: the summary does not wait for that


def of_tests(said: str, status: int | None) -> tuple[bool, str]:
    """Counts the lines of `pytest -v`, which are there even if pytest was stopped."""
    outcome = r"(PASSED|FAILED|ERROR|SKIPPED)"
    lines = re.findall(rf"^(?:\[gw\d+\] \[ *\d+%\] {outcome} |\S*tests/\S+?::.* {outcome}\b)", said, re.MULTILINE)
    found = [parallel or alone for parallel, alone in lines]
    passed, failed = found.count("PASSED"), found.count("FAILED") + found.count("ERROR")
    said = f"{passed} passed, {failed} failed, {found.count('SKIPPED')} skipped"
    if status not in (None, 0, 1):  # 1: some failed
        said += f", pytest ended with {status}"
    return passed > 0 and failed == 0 and status in (None, 0), said


def of_check(said: str, status: int | None) -> tuple[bool, str]:
    if status is None:
        return False, "no result"
    results = re.findall(r"^(?:all \d+ comparisons hold|FAILED: \d+ of \d+ comparisons) [^;\n]*", said, re.MULTILINE)
    return status == 0 and bool(results), results[-1] if results else f"ended with {status}"


def of_bench(ratios: dict[str, float], status: int | None) -> tuple[bool, str]:
    said = ", ".join(f"{head} {ratios[head]:.2f} x" if head in ratios else f"{head} not measured" for head in HEADS)
    return len(ratios) == len(HEADS) and status in (None, 0), f"one pass over the bare products: {said}"


def one_pass_ratios(out: Path) -> dict[str, float]:
    """One pass over the bare products, for each head that was measured. run.py writes its results after each head."""
    try:
        rows = json.loads((out / "bench" / "results.json").read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return {}
    ours = [row for row in rows if row["method"] == "fastpg one pass" and "over_products" in row]
    return {head: row["over_products"] for head in HEADS for row in ours if row["name"].startswith(head)}


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def summary(outcomes: list[Outcome], found: dict, code: str) -> tuple[bool, str]:
    """Whether all parts passed, and the last line of the output."""
    passed = bool(outcomes) and all(outcome.passed for outcome in outcomes)
    bad = [outcome.name for outcome in outcomes if not outcome.passed]
    verdict = "PASS" if passed else f"FAIL ({', '.join(bad)})"
    about = f"{found['gpu']}, torch {found['torch']}, triton {found['triton']}, fastpg {code}"
    return passed, f"{verdict}: {about}: " + "; ".join(f"{o.name}: {o.said}" for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())
