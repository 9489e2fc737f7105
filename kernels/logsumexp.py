"""Kernel 4: the two-pass schedule's forward, one online pass over the vocabulary that stores nothing of its width.

For each row, over the columns v != y, split by split:

    m = max z_v        s = sum exp(z_v - m)        q = sum exp(z_v - m) (z_v - m)

z_y comes from kernel 1: the accumulators of tensor cores lose bits that its dot product keeps, and z_y enters a
log-probability alone. A split is a fixed number of column tiles, so a row's bits do not depend on the batch size; a program
keeps m, s, q of its rows in registers (Milakov and Gimelshein, arXiv 1805.02867). Moving the pivot from m to m' by
d = m - m' turns s into s e^d and q into e^d (q + s d). `combine` does the same across splits, in their order.

A column that counts for nothing (the target, or beyond the vocabulary) enters as z = -inf; while nothing has counted yet the
pivot is 0, since -inf - -inf would be NaN. NaN logits reach s, whatever the maximum makes of them.
"""

import torch
import triton
import triton.language as tl

from .blocks import Blocks
from .logits import (
    EXP_IS_ZERO,
    LOG2E,
    ROWS_PER_PROGRAM,
    add_bias,
    add_lora,
    halves,
    logits,
    operands,
    part_columns,
    product_tile,
    tile_position,
)

# column tiles of a split: few enough that 128 rows of a common vocabulary occupy a GPU, many enough that partials are few
_TILES_PER_SPLIT = 8
_BLOCK = 128


@triton.jit
def fold(
    score,  # (ROWS, COLUMNS)
    start,  # its first column
    m,  # (ROWS,), as the next two: the running statistics
    s,
    q,
    V,
    token,
    scale,
    BIAS,
    inner,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The running statistics of the rows after a tile, or after each of its parts in turn."""
    if PARTS > 1:
        left, right = halves(score, GROUPS)
        m, s, q = fold(left, start, m, s, q, V, token, scale, BIAS, inner, ENTROPY, SOFTCAP, PARTS // 2, RUN, GROUPS)
        return fold(
            right, start + right.shape[1] // GROUPS, m, s, q, V, token, scale, BIAS, inner,
            ENTROPY, SOFTCAP, PARTS // 2, RUN, GROUPS,
        )  # fmt: skip
    columns = part_columns(start, score.shape[1], RUN, GROUPS)
    z, _ = logits(add_bias(score, BIAS, columns, V), scale[:, None], inner, SOFTCAP)
    z = tl.where((columns[None, :] == token[:, None]) | (columns >= V)[None, :], float("-inf"), z)

    larger = tl.maximum(m, tl.max(z, 1), propagate_nan=tl.PropagateNan.ALL)
    pivot = tl.where(larger == float("-inf"), 0.0, larger)
    shift = tl.maximum(m - pivot, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL)
    decay = tl.exp2(shift * LOG2E)
    z = z - pivot[:, None]
    e = tl.exp2(z * LOG2E)
    if ENTROPY:
        finite = tl.maximum(z, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL)
        q = decay * (q + s * shift) + tl.sum(e * finite, 1)
    return larger, s * decay + tl.sum(e, 1), q


@triton.jit
def store_partials(M, S, Q, place, in_chunk, m, s, q):
    tl.store(M + place, m, mask=in_chunk)
    tl.store(S + place, s, mask=in_chunk)
    if Q is not None:
        tl.store(Q + place, q, mask=in_chunk)


@triton.jit
def logsumexp_kernel(
    X,  # (C, H)
    W,  # (V, H)
    L,  # (C, rank) or None: of LoRA
    B,  # (V, rank) or None
    BIAS,  # (V,) or None
    TOKENS,  # (C,)
    SCALE,  # (C,)
    M,  # (C, splits) out
    S,  # (C, splits) out
    Q,  # (C, splits) out, or None
    inner,
    C,
    V,
    H,
    rank,
    stride_x,
    stride_w,
    stride_h,
    stride_l,
    stride_b,
    SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN_H: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,
    RANK: tl.constexpr,
):
    splits = tl.cdiv(V, COLUMNS * TILES)
    row_tile, split = tile_position(tl.program_id(0), tl.cdiv(C, ROWS), splits)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    in_chunk = rows < C
    token = tl.load(TOKENS + rows, mask=in_chunk, other=-1).to(tl.int32)
    scale = tl.load(SCALE + rows, mask=in_chunk, other=0.0)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    q = tl.zeros((ROWS,), tl.float32)
    for tile in range(0, tl.minimum(TILES, tl.cdiv(V, COLUMNS) - split * TILES)):
        start = (split * TILES + tile) * COLUMNS
        score = product_tile(
            X, W, row_tile * ROWS, start, C, V, H, stride_x, stride_w, stride_h,
            ROWS, COLUMNS, DEPTH, EVEN_H, DESCRIPTORS, WIDEN,
        )  # fmt: skip
        score = add_lora(score, L, B, row_tile * ROWS, start, C, V, rank, stride_l, stride_b, RANK, WIDEN)
        m, s, q = fold(
            score, start, m, s, q, V, token, scale, BIAS, inner,
            Q is not None, SOFTCAP, PARTS, COLUMNS // GROUPS, GROUPS,
        )  # fmt: skip

    store_partials(M, S, Q, rows.to(tl.int64) * splits + split, in_chunk, m, s, q)


@triton.jit
def combine_kernel(
    M,  # (C, splits), as the next two
    S,
    Q,  # or None
    MAXIMUM,  # (C,) out, as the next two
    TOTAL,
    WEIGHTED,  # or None
    C,
    splits,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_chunk = rows < C
    first = rows[:, None] * splits
    offsets = tl.arange(0, BLOCK)[None, :]
    largest = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    for start in range(0, splits, BLOCK):
        inside = in_chunk[:, None] & (start + offsets < splits)
        m = tl.load(M + first + start + offsets, mask=inside, other=float("-inf"))
        largest = tl.maximum(largest, m, propagate_nan=tl.PropagateNan.ALL)
    maximum = tl.max(largest, 1)
    pivot = tl.where(maximum == float("-inf"), 0.0, maximum)[:, None]

    s = tl.zeros((ROWS, BLOCK), tl.float32)
    q = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, splits, BLOCK):
        inside = in_chunk[:, None] & (start + offsets < splits)
        places = first + start + offsets
        part = tl.load(S + places, mask=inside, other=0.0)
        shift = tl.load(M + places, mask=inside, other=float("-inf")) - pivot
        shift = tl.maximum(shift, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL)
        decay = tl.exp2(shift * LOG2E)
        if Q is not None:
            q += decay * (tl.load(Q + places, mask=inside, other=0.0) + part * shift)
        s += decay * part
    tl.store(MAXIMUM + rows, maximum, mask=in_chunk)
    tl.store(TOTAL + rows, tl.sum(s, 1), mask=in_chunk)
    if Q is not None:
        tl.store(WEIGHTED + rows, tl.sum(q, 1), mask=in_chunk)


def split_count(vocab: int, columns: int) -> int:
    return triton.cdiv(vocab, columns * _TILES_PER_SPLIT)


def logsumexp(
    hidden: torch.Tensor,  # (C, H)
    weight: torch.Tensor,  # (V, H)
    lora: tuple[torch.Tensor, torch.Tensor] | None,  # l (C, rank) fp32 with contiguous rows, B (V, rank)
    bias: torch.Tensor | None,  # (V,)
    tokens: torch.Tensor,  # (C,)
    scale: torch.Tensor,  # (C,) fp32
    inner: float | None,
    entropy: bool,
    blocks: Blocks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """m, s, q (None unless `entropy`) of the other columns; each (C,) fp32."""
    count, splits = len(tokens), split_count(len(weight), blocks.columns)
    names = ("m", "s", "q") if entropy else ("m", "s")
    partials = {name: scale.new_empty(count, splits) for name in names}
    if count:
        logsumexp_kernel[(triton.cdiv(count, blocks.rows) * splits,)](
            BIAS=bias, TOKENS=tokens, SCALE=scale, M=partials["m"], S=partials["s"], Q=partials.get("q"),
            inner=inner or 1.0, SOFTCAP=inner is not None, TILES=_TILES_PER_SPLIT,
            **operands(hidden, weight, lora, blocks), **blocks.options(),
        )  # fmt: skip
    return combine(partials)


def combine(partials: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """m, s, q (None where there is none), (C,) each, from those of the splits, (C, splits) each."""
    count, splits = partials["m"].shape
    results = {name: partials["m"].new_empty(count) for name in partials}
    order = ("m", "s", "q")
    if count:
        combine_kernel[(triton.cdiv(count, ROWS_PER_PROGRAM),)](
            *(partials.get(name) for name in order), *(results.get(name) for name in order), count, splits,
            ROWS=ROWS_PER_PROGRAM, BLOCK=_BLOCK,
        )  # fmt: skip
    return results["m"], results["s"], results.get("q")
