"""Kernel 6: log-probabilities of ready logits, for callers who already hold them.

The two kernels are kernels 4 and 5 with a load in the place of the matrix product.

    z_nv = logits_nv scale_n                       read in their dtype, widened in registers; no fp32 copy of them exists

Masked rows are read as zeros, whatever they hold, and their gradient is exactly 0. A split of a row is a fixed number of
columns, so that a row's bits do not depend on the batch.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import cdiv
from .dlogits import Incoming, Statistics, gradient_entries, row_terms
from .logsumexp import Finished, Running, finished, fold, store_running
from .tile import INTERPRETED, in_sets, others_only, round_to

_ROWS = 64 if INTERPRETED else 4
_COLUMNS = 1024
_TILES_PER_SPLIT = 16


class ReadyLogits(NamedTuple):
    """Ready logits (C, V) with contiguous rows, and the token, mask and scale of each row."""

    LOGITS: Any
    KEEP: Any  # (C,) bool; masked rows have no gradient
    TOKENS: Any  # (C,)
    SCALE: Any  # (C,) fp32, or None: 1
    C: Any
    V: Any
    stride_z: Any
    SETS: Any = None  # bytes (C, ceil(V / 8)), as in `operands.Rows`, or None
    stride_s: Any = None


@triton.jit
def _load(ready, r, start, COLUMNS: tl.constexpr):
    """A tile of logits, fp32; zeros in rows that are masked or out of range."""
    columns = start + tl.arange(0, COLUMNS)
    inside = r < ready.C
    keep = tl.load(ready.KEEP + r, mask=inside, other=0) != 0
    mask = (inside & keep)[:, None] & (columns < ready.V)[None, :]
    return tl.load(ready.LOGITS + r[:, None] * ready.stride_z + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _scale(ready, r, inside):
    if ready.SCALE is not None:
        scale = tl.load(ready.SCALE + r, mask=inside, other=0.0)
    else:
        scale = tl.where(inside, 1.0, 0.0)
    return scale


@triton.jit
def selective_logsumexp_kernel(ready, out, TARGET, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """out: Running of (C, splits). TARGET (C,): z_y, NaN for a token outside the vocabulary."""
    splits = tl.cdiv(ready.V, COLUMNS * TILES)
    r = (tl.program_id(0) // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(0) % splits
    in_chunk = r < ready.C
    # in 32 bits a token far outside the vocabulary could wrap around to one inside
    column = tl.load(ready.TOKENS + r, mask=in_chunk, other=-1).to(tl.int64)
    scale = _scale(ready, r, in_chunk)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    q = tl.zeros((ROWS,), tl.float32)
    if split == 0:
        inside = (column >= 0) & (column < ready.V)
        keep = tl.load(ready.KEEP + r, mask=in_chunk, other=0) != 0
        z_y = tl.load(ready.LOGITS + r * ready.stride_z + column, mask=in_chunk & keep & inside, other=0.0).to(tl.float32)
        tl.store(TARGET + r, tl.where(inside, z_y * scale, float("nan")), mask=in_chunk)
    for tile in range(0, tl.minimum(TILES, tl.cdiv(ready.V, COLUMNS) - split * TILES)):
        start = (split * TILES + tile) * COLUMNS
        z = _load(ready, r, start, COLUMNS) * scale[:, None]
        z = others_only(z, start + tl.arange(0, COLUMNS), column, ready.V)
        if ready.SETS is not None:
            z = tl.where(in_sets(ready, r, start + tl.arange(0, COLUMNS), ready.V), z, float("-inf"))
        m, s, q = fold(z, m, s, q, out.Q is not None)
    store_running(out, r * splits + split, in_chunk, m, s, q)


@triton.jit
def selective_dlogits_kernel(
    ready, statistics, incoming, D, stride_d, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr
):
    """D (C, V) out."""
    tiles = tl.cdiv(ready.V, COLUMNS)
    r = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = (tl.program_id(0) % tiles) * COLUMNS
    in_chunk = r < ready.C
    columns = start + tl.arange(0, COLUMNS)
    token = tl.load(ready.TOKENS + r, mask=in_chunk, other=-1).to(tl.int64)
    keep = in_chunk & (tl.load(ready.KEEP + r, mask=in_chunk, other=0) != 0)
    scale = _scale(ready, r, in_chunk)
    mine = row_terms(r, keep, token, scale, scale, statistics, incoming)
    d = gradient_entries(_load(ready, r, start, COLUMNS) * scale[:, None], columns, mine, incoming)
    d = tl.where(keep[:, None], d, 0.0)
    if ready.SETS is not None:
        d = tl.where(in_sets(ready, r, columns, ready.V), d, 0.0)
    pointers = D + r[:, None] * stride_d + columns[None, :]
    tl.store(pointers, round_to(d, D.dtype.element_ty, WIDEN), mask=in_chunk[:, None] & (columns < ready.V)[None, :])


def ready_logits(
    logits: torch.Tensor,  # (C, V), rows contiguous
    keep: torch.Tensor,  # (C,) bool
    tokens: torch.Tensor,  # (C,)
    scale: torch.Tensor | None,  # (C,) fp32
    sets: torch.Tensor | None,  # (C, ceil(V / 8)) uint8
) -> ReadyLogits:
    stride = None if sets is None else sets.stride(0)
    return ReadyLogits(logits, keep.view(torch.uint8), tokens, scale, *logits.shape, logits.stride(0), sets, stride)


def selective_logsumexp(ready: ReadyLogits, entropy: bool) -> Finished:
    """The statistics of each row, (C,) fp32 each."""
    splits = cdiv(ready.V, _COLUMNS * _TILES_PER_SPLIT)
    m, s, q = (ready.LOGITS.new_empty(ready.C, splits, dtype=torch.float32) if wanted else None for wanted in (1, 1, entropy))
    target, out = ready.LOGITS.new_empty(ready.C, dtype=torch.float32), Running(m, s, q)
    if ready.C:
        selective_logsumexp_kernel[(cdiv(ready.C, _ROWS) * splits,)](
            ready, out, target, ROWS=_ROWS, COLUMNS=_COLUMNS, TILES=_TILES_PER_SPLIT
        )
    return finished(out, target)


def selective_dlogits(ready: ReadyLogits, statistics: Statistics, incoming: Incoming, out: torch.Tensor) -> None:
    """Writes the gradient into `out` (C, V). It is exactly 0 in masked rows, whatever their incoming gradient."""
    if ready.C:
        selective_dlogits_kernel[(cdiv(ready.C, _ROWS) * cdiv(ready.V, _COLUMNS),)](
            ready, statistics, incoming, out, out.stride(0), ROWS=_ROWS, COLUMNS=_COLUMNS, WIDEN=INTERPRETED
        )
