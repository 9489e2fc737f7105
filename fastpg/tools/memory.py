"""The memory that a call takes at its peak, on top of what was there before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def transient_bytes(call: Callable[[], object], device: torch.device | str | None = None) -> int:
    """The largest number of bytes allocated at a time on a device during `call()`, minus those allocated at its start.

    Every tensor that the call allocates is counted, its results included. Keep the results outside to count them once. The
    numbers come from the caching allocator on CUDA (the default if torch finds it), from the profiler's events on a CPU.
    """
    if torch.cuda.is_available() if device is None else torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():
        profiler.start()
    try:
        call()
    finally:
        with _quiet_stderr():
            profiler.stop()
    current = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hides file descriptor 2, on which the profiler's C++ side announces its start and stop at any log level."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
