"""Host time of a step: what Python, torch's dispatcher and the launchers cost before a device has done anything.

    python bench/host_time.py                        this checkout
    python bench/host_time.py --against FOLDER       and another checkout, measured in turns with it

On a GPU the host queues a step's kernels while the device works; where the host is slower, the device waits. Here the products
are so small (64 tokens, H = 16, V = 64) that the host is all there is, and launches of Triton kernels are replaced: the first
step is done for real and what each launch wrote is kept, later ones copy that to where it belongs. The time of these copies is
left out, and so is Triton's own binding of arguments. With CPU tensors the products, reductions and so on of torch run here and
are part of the figures; only ratios between checkouts mean something.

Only public names of fastpg are used, so that any checkout since 0.1 can be measured. Each has processes of its own; the figure
is the least median of them, as whatever disturbs makes a step slower. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
ROWS, SIZE, VOCAB = 64, 16, 64
_UNTIMED = 5  # steps of each kind before those that count


class Launches:
    """Replaces `run` of Triton's functions: records what each launch of the first step writes, and in later steps copies that.

    A write is found by comparing memory before and after the launch. So new memory is filled while a step is recorded. Without
    that, a result of 0 in memory that happened to hold 0 would not be seen, and later steps would read whatever was there.
    """

    def __init__(self) -> None:
        self.recorded: list[list[tuple[int, object]]] = []
        self.records = True
        self.place = 0
        self.seconds = 0.0  # spent in the replaced launches

    def replaced(self, run: Callable) -> Callable:
        def launch(kernel, *args, grid, warmup, **kwargs):
            start = perf_counter()
            tensors = _tensors((args, tuple(kwargs.values())))
            if self.records:
                self.recorded.append(_written(tensors, lambda: run(kernel, *args, grid=grid, warmup=warmup, **kwargs)))
            else:
                for index, value in self.recorded[self.place]:
                    tensors[index].copy_(value)
            self.place += 1
            self.seconds += perf_counter() - start

        return launch

    def step(self, call: Callable[[], None]) -> float:
        """Seconds of a step, without those spent in the replaced launches. The first step is recorded."""
        import torch

        self.place, self.seconds = 0, 0.0
        # in this mode torch fills the memory that it allocates
        torch.use_deterministic_algorithms(self.records, warn_only=True)
        start = perf_counter()
        call()
        seconds = perf_counter() - start - self.seconds
        torch.use_deterministic_algorithms(False)
        if self.place != len(self.recorded):
            raise RuntimeError(f"a step of {len(self.recorded)} launches had {self.place}: it did not see what was recorded")
        self.records = False
        return seconds


def _tensors(x: object) -> list:
    import torch

    if isinstance(x, torch.Tensor):
        return [x.detach()]
    if hasattr(x, "base") and isinstance(x.base, torch.Tensor):  # a descriptor
        return [x.base.detach()]
    return [t for item in x for t in _tensors(item)] if isinstance(x, tuple) else []


def _written(tensors: list, run: Callable) -> list[tuple[int, object]]:
    """(index, new values) of each tensor that `run` changes."""
    before = [x.clone() for x in tensors]
    run()
    return [(i, x.clone()) for i, (x, y) in enumerate(zip(tensors, before, strict=True)) if not _same_bytes(x, y)]


def _same_bytes(x, y) -> bool:
    import torch

    return torch.equal(x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8))


def steps() -> dict[str, Callable[[], None]]:
    """The timed steps: functions without arguments, on tensors that every call reuses."""
    import torch
    from endings import plain_cispo_loss

    import fastpg

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, SIZE, device=device).requires_grad_()
    weight = torch.randn(VOCAB, SIZE, device=device).requires_grad_()
    tokens, mask = torch.randint(0, VOCAB, (ROWS,), device=device), torch.rand(ROWS, device=device) > 0.25
    advantages = torch.randn(ROWS, device=device)
    with torch.no_grad():
        old = torch.log_softmax(hidden @ weight.T, -1).gather(1, tokens[:, None])[:, 0]
        old += 0.01 * torch.randn(ROWS, device=device)
    options = {"mask": mask, "backend": "triton"}

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        hidden.grad = weight.grad = None

    def one_pass(objective: object, **more: object) -> Callable[[], None]:
        return lambda: backward(
            fastpg.linear_policy_loss(hidden, weight, tokens, old, advantages, objective=objective, **options, **more).loss
        )

    def two_passes() -> None:
        logprobs = fastpg.linear_logprobs(hidden, weight, tokens, **options).logprobs
        backward(fastpg.policy_loss(logprobs, old, advantages, objective=fastpg.CISPO(), mask=mask).loss)

    def scoring() -> None:
        with torch.no_grad():
            fastpg.linear_logprobs(hidden, weight, tokens, **options)

    def before() -> None:
        """The full logits and the lines that a trainer would write itself."""
        logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(1, tokens[:, None])[:, 0]
        backward(plain_cispo_loss(logprobs, old, advantages, mask))

    return {
        "one pass, CISPO": one_pass(fastpg.CISPO()),
        "one pass, CISPO, check=False": one_pass(fastpg.CISPO(), check=False),
        "one pass, PPO": one_pass(fastpg.PPOClip()),
        "two passes and policy_loss": two_passes,
        "scoring": scoring,
        "full logits": before,
    }


def measured(repeats: int) -> dict[str, float]:
    """Seconds of each step: the median of `repeats`, taken in turns."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    torch.set_num_threads(1)
    run_of = {cls: cls.run for cls in (InterpretedFunction, JITFunction)}
    every = steps()
    launches = {name: Launches() for name in every}
    times: dict[str, list[float]] = {name: [] for name in every}
    try:
        for _ in range(_UNTIMED + repeats):
            for name, step in every.items():
                for cls, run in run_of.items():
                    cls.run = launches[name].replaced(run)
                times[name].append(launches[name].step(step))
    finally:
        for cls, run in run_of.items():
            cls.run = run
    return {name: statistics.median(t[_UNTIMED:]) for name, t in times.items()}


def in_process(folder: Path, repeats: int) -> dict[str, float]:
    """`measured` of the checkout in `folder`, in a process of its own."""
    import torch

    with tempfile.TemporaryDirectory() as path:
        package = Path(path, "fastpg")
        package.mkdir()
        for part in (folder / "fastpg").iterdir():
            (package / part.name).symlink_to(part)
        (package / "kernels").symlink_to(folder / "kernels")
        paths = os.pathsep.join((path, str(Path(__file__).parent)))  # modules beside this file are always of this checkout
        settings = {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "FASTPG_BACKEND": "triton"}
        if not torch.cuda.is_available():
            settings["TRITON_INTERPRET"] = "1"
        command = [sys.executable, __file__, "--worker", "--repeats", str(repeats)]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the root of another checkout, such as a git worktree")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each checkout")
    parser.add_argument("--repeats", type=int, default=200, help="timed steps of a process")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measured(options.repeats)))
        return
    folders = [ROOT] + ([options.against.resolve()] if options.against else [])
    least: list[dict[str, float]] = [{} for _ in folders]
    for _ in range(options.rounds):
        for folder, best in zip(folders, least, strict=True):
            for name, seconds in in_process(folder, options.repeats).items():
                best[name] = min(best.get(name, seconds), seconds)
    _print(least, options.against)


def _print(least: list[dict[str, float]], against: Path | None) -> None:
    from measure import machine
    from rich.console import Console
    from rich.table import Table

    table = Table("step", title=f"host time of a step on {machine('cpu')['machine']}, microseconds")
    table.add_column("here", justify="right")
    if against:
        table.add_column(str(against), justify="right")
        table.add_column("ratio", justify="right")
    for name, seconds in least[0].items():
        cells = [f"{times[name] * 1e6:.0f}" for times in least]
        if against:
            cells.append(f"{seconds / least[1][name]:.2f}")
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
