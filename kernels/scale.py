"""Kernel 8: finished gradients times the incoming factor, in place. It leaves them alone where that factor is 1.

    g = g f                                                   f: one fp32 number, read on the device; rounded once

A loss is usually the last value of a step, so that f is 1. Reading and writing dX and dW to multiply them by 1 took 1.9 ms of a
step of Qwen3-8B's head (H100, N = 8192). Here every program reads f, and ends if it is 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import cdiv
from .tile import INTERPRETED, round_to

# The interpreter's time goes into the number of programs and of operations.
_BLOCK = 4096 if INTERPRETED else 2048
# Few, since all of them start even where there is nothing to do; on NVIDIA's largest GPUs they still fill every multiprocessor.
_PROGRAMS = 4 if INTERPRETED else 2048


class Gradient(NamedTuple):
    """A contiguous gradient as one row of numbers."""

    G: Any
    size: Any
    blocks: Any  # ceil(size / BLOCK)


class Gradients(NamedTuple):
    """Up to five, or None: those of hidden, LoRA's hidden states, weight, LoRA's B and bias."""

    first: Any
    second: Any = None
    third: Any = None
    fourth: Any = None
    fifth: Any = None


@triton.jit
def _scale(gradient, factor, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(tl.program_id(0), gradient.blocks, tl.num_programs(0)):
        inside = place < gradient.size
        g = tl.load(gradient.G + place, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(gradient.G + place, round_to(g, gradient.G.dtype.element_ty, WIDEN), mask=inside)
        place += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit
def scale_kernel(gradients, FACTOR, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    factor = tl.load(FACTOR)
    if factor != 1.0:
        _scale(gradients.first, factor, BLOCK, WIDEN)
        if gradients.second is not None:
            _scale(gradients.second, factor, BLOCK, WIDEN)
        if gradients.third is not None:
            _scale(gradients.third, factor, BLOCK, WIDEN)
        if gradients.fourth is not None:
            _scale(gradients.fourth, factor, BLOCK, WIDEN)
        if gradients.fifth is not None:
            _scale(gradients.fifth, factor, BLOCK, WIDEN)


def scale(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """gradients: up to five contiguous tensors of any dtype of the kernels, multiplied in place. factor (): fp32."""
    described = [Gradient(g.view(-1), g.numel(), cdiv(g.numel(), _BLOCK)) for g in gradients if g.numel()]
    if described:
        programs = min(_PROGRAMS, max(g.blocks for g in described))
        scale_kernel[(programs,)](Gradients(*described), factor, BLOCK=_BLOCK, WIDEN=INTERPRETED)
