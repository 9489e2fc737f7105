"""Host reads that the host need not wait for at once."""

from __future__ import annotations

import torch


class HostRead:
    """The numbers of a tensor on their way to the host, which goes on meanwhile. `read` waits until they are there.

    On a GPU the copy goes to page-locked memory, since others wait for the device. An event marks its end: what is enqueued
    after it need not be waited for.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers, self._copied = numbers, None
        if numbers.is_cuda:
            memory = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._numbers = memory.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.current_stream(numbers.device).record_event()

    def read(self) -> float | list:
        """A number, or a list of them."""
        if torch.compiler.is_compiling():  # what depends on them runs as it is: torch 2.9 would trace on, and fail at a branch
            torch._dynamo.graph_break()
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()
