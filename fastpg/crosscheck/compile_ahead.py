"""Before `fastpg check` runs on a GPU: its kernels are compiled by several processes at once.

The default cases need about 235 kernels, each half a second of one core. Workers run the cases once on the kernels and drop
what comes out. Triton keeps what it compiles on disk, where the check itself then finds it. The check runs case after case in
one process as ever, and a case that failed in a worker fails again there, where it is reported.

Processes and not threads: 55 kernels for sm_90 on two shared cores took 33 to 35 s one after the other, 33 to 34 s in two
threads and 18 to 30 s in two processes, their start included. A compiler that crashes takes a worker with it, not the check.
What this brings on a machine with a GPU is not measured.
"""

from __future__ import annotations

import contextlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from . import cases
from .cases import Case

_FEW = 24  # cases that are not worth the start of a process
_LARGEST_POOL = 16
_BYTES_OF_A_WORKER = 2 * 2**30  # of the GPU, most of it the driver's and the libraries'


def fill_cache(chosen: list[Case]) -> None:
    """Compiles what the cases need of the kernels, where several workers have room. Raises nothing: the check itself will."""
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
    """What the check does with the case on the kernels, and nothing else of it."""
    x = cases.inputs_of(case)
    logits = cases.ready_logits(x).to(device) if case.operation == "selective_logprobs" else None
    cases.outcome(case, x.to(device), "triton", logits)


def workers(tasks: int) -> int:
    """How many processes: what the cores and the free memory of the GPU allow; 0 for few cases."""
    if tasks < _FEW:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free, _ = torch.cuda.mem_get_info()
    return min(cores, tasks, _LARGEST_POOL, free // _BYTES_OF_A_WORKER)
