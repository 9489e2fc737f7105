"""Large tensors on a CPU, in large pages.

The first touch of a page costs an interrupt. Of E's 400 MiB in pages of 4 KiB these are a tenth of a second of processor time,
6 % of a step at SmolLM2's size; in pages of 2 MiB a quarter of that. Linux gives them to who asks (madvise, where
/sys/kernel/mm/transparent_hugepage/enabled says so); elsewhere and on failure nothing changes.
"""

from __future__ import annotations

import ctypes
import sys

import torch

_MADV_HUGEPAGE = 14
_PAGE = 2**21
_WORTH_IT = 16 * _PAGE


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty`."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and x.nbytes >= _WORTH_IT and sys.platform == "linux" and not torch.compiler.is_compiling():
        _ask_for_large_pages(x)
    return x


def _ask_for_large_pages(x: torch.Tensor) -> None:
    start = -(-x.data_ptr() // _PAGE) * _PAGE
    length = (x.data_ptr() + x.nbytes - start) // _PAGE * _PAGE
    if x.data_ptr() == 0:  # a fake tensor
        return
    try:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    except (OSError, AttributeError):
        return
