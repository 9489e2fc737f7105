"""Counts what a step asks of a device, from outside: aten operations that are neither views nor allocations, and launches.

Every such operation is a kernel, a copy or a fill on a GPU, which the host has to queue. They are counted on CPU tensors with
the Triton backend. A few branches are a CPU's, where a GPU has fewer operations: a product of 16-bit operands returns fp32 on a
GPU, where a CPU casts its operands or its result. Such casts are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelInterface

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
PRODUCTS = ("mm", "addmm")
READS = ("_local_scalar_dense", "_assert_async")  # return no tensor, and yet wait for the device or work on it
# reshapes that copy nothing, though their schema does not call them views
OTHER_VIEWS = ("_unsafe_view", "_reshape_alias", "lift_fresh")


class Operations(TorchDispatchMode):
    """What `counted` returns. counts: operation or kernel -> how often."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._widened: set[int] = set()  # storages of casts to fp32, whose reader may be a product
        self._products: set[int] = set()  # storages of results of products
        self._alive: list[torch.Tensor] = []  # so that no storage takes the place of another

    @property
    def total(self) -> int:
        return self.counts.total()

    def launches(self, getitem):
        """`kernel[grid]` of Triton, whose calls are counted; what an interpreter does inside is no operation of ours."""

        def with_grid(kernel, grid):
            def launch(*args, **kwargs):
                self.counts[f"launch of {kernel.fn.__name__}"] += 1
                with _disable_current_modes():
                    return getitem(kernel, grid)(*args, **kwargs)

            return launch

        return with_grid

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpg":  # a call of one of our operators is what it does inside
            with self:
                return _body_of(func)(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not _is_free(func, name):
            self.counts[name] += 1
            self._leave_out_casts(name, args, out)
        return out

    def _leave_out_casts(self, name: str, args: tuple, out: object) -> None:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        self._alive += [*tensors, *([out] if isinstance(out, torch.Tensor) else [])]
        if name in PRODUCTS:
            self._products.add(_storage(out))
            for x in tensors:
                if _storage(x) in self._widened:
                    self._widened.discard(_storage(x))
                    self.counts["_to_copy"] -= 1
        elif name == "_to_copy" and out.dtype == torch.float32 and tensors[0].dtype == torch.bfloat16:
            if _storage(tensors[0]) in self._products:
                self.counts[name] -= 1
            else:
                self._widened.add(_storage(out))
        elif name == "copy_" and tensors[1].dtype == torch.bfloat16 and _storage(tensors[1]) in self._products:
            self.counts[name] -= 1


@contextmanager
def counted() -> Iterator[Operations]:
    """`with counted() as step:` counts into step.counts what happens inside."""
    operations = Operations()
    with pytest.MonkeyPatch.context() as patch, operations:
        for owner in {KernelInterface, InterpretedFunction}:  # the latter is no KernelInterface in Triton 3.5
            if "__getitem__" in vars(owner):
                patch.setattr(owner, "__getitem__", operations.launches(owner.__getitem__))
        yield operations


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _is_free(func, name: str) -> bool:
    """Views, allocations and questions about shapes and dtypes, which reach no device."""
    returns = func._schema.returns
    if not any("Tensor" in str(value.type) for value in returns) and name not in READS:
        return True
    is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return is_view or name in ALLOCATIONS or name in OTHER_VIEWS


def _body_of(func):
    """The Python function behind an operator."""
    return OPDEFS[f"{func.namespace}::{func.overloadpacket.__name__}"]._init_fn
