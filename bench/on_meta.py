"""Bytes that a call would allocate on a GPU, counted without one.

Tensors of torch's meta device have sizes and no memory. On them the schedules run as they are, but for kernels and products,
which are left out. Every tensor that is made is counted for as long as it is alive.
"""

from __future__ import annotations

import importlib
import pkgutil
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpg import kernels
from fastpg.tiles import backend, products, triton_tiles


class Allocations(TorchDispatchMode):
    """The largest number of bytes alive at a time, of tensors made inside."""

    def __init__(self, inputs) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in inputs}
        self.alive = self.peak = 0

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or x.untyped_storage()._cdata in self.known:
                continue
            storage = x.untyped_storage()
            self.known.add(storage._cdata)
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
            self.peak = max(self.peak, self.alive)
        return out


class NoKernel:
    """Stands for a Triton kernel, and launches nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **named: None


def _no_product(a, b, out=None, accumulate=False, dtype=None):
    return a.new_empty(len(a), b.shape[1], dtype=dtype) if out is None else out


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the context the Triton backend takes meta tensors, plans as for sm_90, and launches and multiplies nothing."""
    replaced = [(triton_tiles, "target_of", lambda device: "cuda:90"), (products, "_multiply", _no_product)]
    replaced += [(backend, "_check_triton", lambda *arguments: None), (backend, "_ENVIRONMENT", "triton")]
    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        replaced += [(module, name, NoKernel()) for name in vars(module) if name.endswith("_kernel")]
        if hasattr(module, "tile_arguments"):
            replaced.append((module, "tile_arguments", lambda *arguments: (None,) * 5))
    with ExitStack() as stack:
        for module, name, stand_in in replaced:
            stack.enter_context(mock.patch.object(module, name, stand_in))
        yield
