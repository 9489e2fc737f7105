"""Compiles the kernels of `fastpg check` in several processes, before it runs on a GPU.

The default cases need about 235 kernels, each half a second of one core. Workers run the cases once on the kernels and drop the
results. Triton keeps compiled kernels on disk, where the check itself then finds them. The check still runs case after case in
one process. A case that failed in a worker fails there again, and is reported there.

Workers are processes, not threads: 55 kernels for sm_90 on two shared cores took 33 to 35 s one after the other, 33 to 34 s in
two threads and 18 to 30 s in two processes, their start included. A compiler that crashes ends a worker, not the check. The
gain on a machine with a GPU is not measured.
"""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from ..tools.threads import cores
from . import cases
from .cases import Case

_FEW = 24  # fewer cases are not worth the start of a process
_LARGEST_POOL = 16
_BYTES_OF_A_WORKER = 2 * 2**30  # of GPU memory, most of it for the driver and the libraries


def fill_cache(chosen: list[Case]) -> None:
    """Compiles the kernels of the cases, if there is room for several workers. Raises nothing: the check itself will."""
    wanted = [case for case in chosen if case.runs_on("triton")]
    count = workers(len(wanted))
    if count < 2:
        return
    from tqdm import tqdm

    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    with pool, contextlib.suppress(BrokenProcessPool, OSError):  # a worker died, or could not be started
        running = [pool.submit(run_case, case, "cuda") for case in wanted]
        shown = {"unit": "case", "desc": f"compiling in {count} processes", "leave": False, "disable": not sys.stderr.isatty()}
        for future in tqdm(as_completed(running), total=len(running), **shown):
            future.exception()


def run_case(case: Case, device: str) -> None:
    """The part of the check that runs the case on the kernels, and no other."""
    x = cases.inputs_of(case)
    logits = cases.ready_logits(x).to(device) if case.operation == "selective_logprobs" else None
    cases.outcome(case, x.to(device), "triton", logits)


def workers(tasks: int) -> int:
    """The number of processes that the cores and the free GPU memory allow; 0 for few cases."""
    if tasks < _FEW:
        return 0
    free, _ = torch.cuda.mem_get_info()
    return min(cores(), tasks, _LARGEST_POOL, free // _BYTES_OF_A_WORKER)
