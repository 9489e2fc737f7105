"""How much memory a call takes at its peak, on top of what was there before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def transient_bytes(call: Callable[[], object]) -> int:
    """The largest number of bytes allocated at a time during `call()`, above those allocated at its start.

    Counts every tensor the call allocates, its results included; hold on to the results outside to count them once. On CUDA
    read from the caching allocator, on a CPU from the profiler's allocation events.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    current = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
