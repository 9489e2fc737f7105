"""Kernel 9: rows of dX from their product with W, and in one pass also u x, the operand of product 3: one launch for both.

    dX_n = u_n ((E @ W)_n + R_n w_y)                          rounded once, and stored where row n of the gradient is
    (u x)_n = u_n x_n                                         in the dtype of E

R is the rounding error of the row of E. It is added back at the target's row of W, because the component that all rows of W
share must cancel in E @ W. A token on another rank takes any row of this rank's W, which has that component too.

In two passes D stands in the place of E, for all rows and slices of the vocabulary, and u is 1 (for fp16, 1 / unit).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import cdiv
from .tile import INTERPRETED, ROWS_PER_PROGRAM, round_to

_BLOCK = 512


class HiddenRows(NamedTuple):
    """Rows of dX; all None where hidden is frozen."""

    PRODUCT: Any = None  # E @ W (C, H), contiguous fp32
    RESIDUAL: Any = None  # R (C,), or None where E is not rounded
    TOKENS: Any = None  # (C,)
    W: Any = None  # (V, H)
    V: Any = None
    stride_w: Any = None
    stride_h: Any = None
    PLACES: Any = None  # (C,) int64: rows of OUT; None: the first C
    OUT: Any = None  # (C or more, H)
    stride_out: Any = None


class WeightedRows(NamedTuple):
    """u x; all None where the weight is frozen."""

    X: Any = None  # (C, H)
    stride_x: Any = None
    OUT: Any = None  # (C, H), contiguous


@triton.jit
def gradient_rows_kernel(FACTOR, hidden, weighted, C, H, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    blocks = tl.cdiv(H, BLOCK)
    r = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h = ((tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    in_chunk = r < C
    mask = in_chunk[:, None] & (h < H)
    factor = 1.0
    if FACTOR is not None:
        factor = tl.load(FACTOR + r, mask=in_chunk, other=0.0)[:, None]
    if hidden.OUT is not None:
        d = tl.load(hidden.PRODUCT + r[:, None] * H + h, mask=mask, other=0.0)
        if hidden.RESIDUAL is not None:
            token = tl.load(hidden.TOKENS + r, mask=in_chunk, other=0).to(tl.int64)
            token = tl.minimum(tl.maximum(token, 0), hidden.V - 1)
            w = tl.load(hidden.W + token[:, None] * hidden.stride_w + h.to(tl.int64) * hidden.stride_h, mask=mask, other=0.0)
            d += tl.load(hidden.RESIDUAL + r, mask=in_chunk, other=0.0)[:, None] * w.to(tl.float32)
        place = r
        if hidden.PLACES is not None:
            place = tl.load(hidden.PLACES + r, mask=in_chunk, other=0)
        out = round_to(d * factor, hidden.OUT.dtype.element_ty, WIDEN)
        tl.store(hidden.OUT + place[:, None] * hidden.stride_out + h, out, mask=mask)
    if weighted.OUT is not None:
        x = tl.load(weighted.X + r[:, None] * weighted.stride_x + h, mask=mask, other=0.0).to(tl.float32)
        tl.store(weighted.OUT + r[:, None] * H + h, round_to(x * factor, weighted.OUT.dtype.element_ty, WIDEN), mask=mask)


def gradient_rows(factor: torch.Tensor | None, hidden: HiddenRows, weighted: WeightedRows, count: int, size: int) -> None:
    """factor: u (C,) fp32, or None where it is 1. count: C. size: H. Writes the OUT of both."""
    if count:
        grid = (cdiv(count, ROWS_PER_PROGRAM) * cdiv(size, _BLOCK),)
        gradient_rows_kernel[grid](
            factor, hidden, weighted, count, size, ROWS=ROWS_PER_PROGRAM, BLOCK=_BLOCK, WIDEN=INTERPRETED
        )
