"""Host reads that the host need not wait for at once."""

from __future__ import annotations

import torch


class HostRead:
    """One number of a tensor, on its way to the host, which goes on meanwhile. `item` waits until it is there.

    On a GPU the copy goes to page-locked memory, since others wait for the device. An event marks its end: what is enqueued
    after it need not be waited for.
    """

    def __init__(self, number: torch.Tensor) -> None:
        self._number, self._copied = number, None
        if number.is_cuda:
            self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
            self._copied = torch.cuda.current_stream(number.device).record_event()

    def item(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return self._number.item()
