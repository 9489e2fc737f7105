"""Kernel 7: products over chosen columns alone, for rows whose softmax is over few tokens.

An entry m is one token of one row's set. Two kernels serve the forward and the backward:

    dots        d_m = x[place_m] . w[index_m]                                   one entry after the other
    run sums    out[key] = sum_m c_m source[index_m], over a run of equal keys  dX: keys are rows, source is W
                                                                               dW: keys are tokens, source is X

The keys of a run sum ascend. A program stands at every entry, and only the one at the first entry of a run has work. So the
host need not know how many runs there are. The program adds its entries one after the other, in fp32, and rounds the sum once.
There are no atomics, so results have the same bits every time.
"""

import torch
import triton
import triton.language as tl

from .blocks import cdiv
from .tile import INTERPRETED, round_to

# entries of a program, and columns of a block
_ENTRIES = 256 if INTERPRETED else 16
_COLUMNS = 128
_WIDTH = 1024 if INTERPRETED else 256


@triton.jit
def gathered_dots_kernel(
    X, PLACE, TABLE, INDEX, OUT, M, H, stride_x, stride_t, stride_h, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    """OUT (M,) fp32. X (N, H) has contiguous rows; stride_h is that of the table along H."""
    m = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = m < M
    x_rows = X + tl.load(PLACE + m, mask=inside, other=0)[:, None] * stride_x
    t_rows = TABLE + tl.load(INDEX + m, mask=inside, other=0)[:, None] * stride_t
    products = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for start in range(0, H, COLUMNS):
        h = (start + tl.arange(0, COLUMNS))[None, :]
        mask = inside[:, None] & (h < H)
        x = tl.load(x_rows + h, mask=mask, other=0.0).to(tl.float32)
        products += x * tl.load(t_rows + h.to(tl.int64) * stride_h, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + m, tl.sum(products, 1), mask=inside)


@triton.jit
def run_sums_kernel(
    FACTOR, KEYS, SOURCE, INDEX, OUT, M, H, stride_s, stride_h, stride_o,
    ADD: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """OUT (T, H) with contiguous rows; stride_h is that of the source along H."""
    m = tl.program_id(0).to(tl.int64)
    key = tl.load(KEYS + m)
    before = tl.load(KEYS + m - 1, mask=m > 0, other=-1)
    if key != before:
        h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float32)
        at = m
        current = key
        while current == key:
            row = SOURCE + tl.load(INDEX + at) * stride_s
            total += tl.load(FACTOR + at) * tl.load(row + h.to(tl.int64) * stride_h, mask=h < H, other=0.0).to(tl.float32)
            at += 1
            current = tl.load(KEYS + at, mask=at < M, other=-1)
        places = OUT + key * stride_o + h
        if ADD:
            total += tl.load(places, mask=h < H, other=0.0).to(tl.float32)
        tl.store(places, round_to(total, OUT.dtype.element_ty, WIDEN), mask=h < H)


def gathered_dots(
    x: torch.Tensor,  # (N, H)
    place: torch.Tensor,  # (M,) int64
    table: torch.Tensor,  # (V, H)
    index: torch.Tensor,  # (M,) int64
) -> torch.Tensor:
    """x[place_m] . table[index_m], (M,) fp32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(len(index), dtype=torch.float32)
    if len(index):
        gathered_dots_kernel[(cdiv(len(index), _ENTRIES),)](
            x, place, table, index, out, len(index), x.shape[1], x.stride(0), *table.stride(),
            ENTRIES=_ENTRIES, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return out


def run_sums(
    factor: torch.Tensor,  # (M,) fp32
    keys: torch.Tensor,  # (M,) int64, ascending
    source: torch.Tensor,  # (R, H)
    index: torch.Tensor,  # (M,) int64
    out: torch.Tensor,  # (T, H), rows contiguous
    add: bool,
) -> None:
    """out[key] (+)= sum_m factor_m source[index_m] over each run of equal keys; other rows of out stay as they are."""
    if len(keys):
        size = source.shape[1]
        width = min(_WIDTH, max(16, triton.next_power_of_2(size)))
        run_sums_kernel[(len(keys), cdiv(size, width))](
            factor, keys, source, index, out, len(keys), size, *source.stride(), out.stride(0),
            ADD=add, COLUMNS=width, WIDEN=INTERPRETED,
        )  # fmt: skip
