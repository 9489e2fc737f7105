"""Runs a function on several ranks of a torch.distributed group: processes of their own, gloo, and a file to meet at."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

# A rank that has failed leaves the others waiting for it; they get this long to fail as well, so that all can be read.
_GRACE = 3.0


def run_on_ranks(function: Callable, ranks: int, *arguments: object, timeout: float = 60.0) -> list:
    """function(rank, *arguments) on every rank, in rank order; it must be at the top level of its module.

    Raises AssertionError with what the ranks printed where one fails or has not returned within `timeout` seconds: then
    with the stack of every thread that hangs. Starting a rank takes seconds: give it many things to do.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call = function.__code__.co_filename, function.__name__, ranks, timeout, arguments
        (folder / "call").write_bytes(pickle.dumps(call))
        # One thread each, as everywhere in these tests; the kernels run in Triton's interpreter.
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        processes = []
        for rank in range(ranks):
            command = [sys.executable, __file__, str(folder), str(rank)]
            with (folder / f"output{rank}").open("wb") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        _wait(processes, timeout)
        codes = [p.returncode for p in processes]
        if any(codes):
            said = [f"rank {r}, exit status {c}:\n{(folder / f'output{r}').read_text()}" for r, c in enumerate(codes)]
            raise AssertionError(f"{function.__name__} on {ranks} ranks failed\n" + "\n".join(said))
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(ranks)]


def _wait(processes: list[subprocess.Popen], timeout: float) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end and any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes):  # one has failed
            end = min(end, time.monotonic() + _GRACE)
        time.sleep(0.02)
    for p in processes:
        if p.poll() is None:
            p.kill()
        p.wait()


def _run_rank(folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    file, name, ranks, timeout, arguments = pickle.loads((folder / "call").read_bytes())
    faulthandler.dump_traceback_later(max(timeout - 2, 1))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as conftest: NaN in torch.empty
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    result = getattr(_module(Path(file)), name)(rank, *arguments)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()  # whoever leaves first would close the connections of the others
    dist.destroy_process_group()


def _module(path: Path) -> ModuleType:
    """The file as a module. Its folder stays off sys.path: folders of tests have names that packages have too."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _run_rank(Path(sys.argv[1]), int(sys.argv[2]))
