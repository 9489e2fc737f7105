"""Runs a function on several ranks of a torch.distributed group: processes of their own, gloo, and a file to meet at.

A rank is forked from a process that has imported what every rank needs and has done nothing else: importing takes seconds, and
a suite starts dozens of ranks. That process imports the module of the function as well, and what the module names in
`IMPORTED_BY_FUNCTIONS`: modules that its functions import, where they are installed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import ModuleType

# A rank that has failed leaves the others waiting for it; they get this long to fail as well, so that all can be read.
_GRACE = 3.0


def run_on_ranks(function: Callable, ranks: int, *arguments: object, timeout: float = 60.0) -> list:
    """function(rank, *arguments) on every rank, in rank order; it must be at the top level of its module.

    Raises AssertionError with what the ranks printed where one fails or has not returned within `timeout` seconds: then
    with the stack of every thread that hangs.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = function.__code__.co_filename
        (folder / "call").write_bytes(pickle.dumps((file, function.__name__, ranks, timeout, arguments)))
        server = _server()
        server.stdin.write(json.dumps([name, ranks, timeout, file]) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline() or "[1]")
        if any(codes):
            outputs = [folder / f"output{rank}" for rank in range(len(codes))]
            printed = [output.read_text() if output.exists() else "no such process" for output in outputs]
            said = [f"rank {r}, exit status {c}:\n{text}" for r, (c, text) in enumerate(zip(codes, printed, strict=True))]
            raise AssertionError(f"{function.__name__} on {ranks} ranks failed\n" + "\n".join(said))
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(ranks)]


def run_jobs(jobs: dict[object, tuple], *leading: object) -> dict:
    """What each job, (function, *arguments), returns on this rank, by name; of one that raises, its traceback.

    A suite starts its ranks once and looks at one job in each test (`results_of`). leading: arguments before a job's own.
    """
    results = {}
    for name, (job, *arguments) in jobs.items():
        try:
            results[name] = job(*leading, *arguments)
        except Exception:
            results[name] = traceback.format_exc()
    return results


def results_of(done: list[dict], name: object) -> list:
    """What one job returned on every rank, of the results of `run_jobs` on each of them."""
    results = [of_rank[name] for of_rank in done]
    failed = [r for r in results if isinstance(r, str)]
    assert not failed, failed[0]
    return results


@cache
def _server() -> subprocess.Popen:
    """Of this process; it ends when its input does."""
    # One thread each, as everywhere in these tests; the kernels run in Triton's interpreter.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__], env=environment, **pipes)


def _serve() -> None:
    """A line of input is a folder, a number of ranks, a time limit and a file; its answer is the ranks' exit statuses."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer

    import fast_interpreter
    import forks
    import interpreted_products
    import pytest  # noqa: F401 - for the modules that functions are in
    import torch
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

    import fastpg.kernels.tile  # noqa: F401

    torch.set_num_threads(1)
    interpreted_products.use_one_order()  # as conftest
    fast_interpreter.use()
    torch.use_deterministic_algorithms(True)  # likewise: NaN in torch.empty
    for line in sys.stdin:
        folder, ranks, timeout, file = json.loads(line)
        with contextlib.suppress(Exception):  # a rank does it again then, and its traceback is shown
            for name in getattr(_module(Path(file)), "IMPORTED_BY_FUNCTIONS", ()):
                if importlib.util.find_spec(name.partition(".")[0]):
                    importlib.import_module(name)
        gc.freeze()  # a rank's garbage collector would copy every page of what is imported
        outputs = [Path(folder) / f"output{rank}" for rank in range(ranks)]
        processes = [forks.start(partial(_run_rank, Path(folder), r), out, out) for r, out in enumerate(outputs)]
        answers.write(json.dumps(forks.statuses_of(processes, timeout, _GRACE)) + "\n")
        answers.flush()


def _run_rank(folder: Path, rank: int) -> None:
    import torch.distributed as dist

    file, name, ranks, timeout, arguments = pickle.loads((folder / "call").read_bytes())
    faulthandler.dump_traceback_later(max(timeout - 2, 1))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    result = getattr(_module(Path(file)), name)(rank, *arguments)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()  # whoever leaves first would close the connections of the others
    dist.destroy_process_group()


def _module(path: Path) -> ModuleType:
    """The file as a module. Its folder stays off sys.path: folders of tests have names that packages have too."""
    known = sys.modules.get(path.stem)
    if known and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve()
