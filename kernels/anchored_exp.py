"""Kernel 2: product 1 of the one-pass schedule, with the exponential in its epilogue.

    E_nv = exp(z_nv - anchor_n)        0 in the target's column (v = y_n), capped at 2^100
    S_n  = sum_v E_nv                  one partial per row and column tile, Q_n likewise

anchor_n = z_n,y - clamp(old_n) estimates the row's logsumexp before the row is known, so no maximum is needed, nothing is
rescaled, and this is the only time that a tile of logits exists: in fp32 registers. Only E leaves them, in the dtype in which
products 2 and 3 will multiply it. The target's column is left out of the sum because 1 - p_y is that sum over all of it:
formed as S - E_y it would be rounding noise where p_y is close to 1.

Two things belong to the stored entries and not to the sums. The softcap's slope 1 - tanh^2, which is a factor of dz/dscore.
And the rounding of a 16-bit E: what it takes from a row, R_n = sum_v (E_nv - stored_nv), goes back in fp32 at the target's row
of W, since rows of E sum to 0 and what the rows of W have in common must cancel in E @ W.

No atomics; a row's sum is added up by kernel 3, in an order that knows neither C nor the row's place.
"""

import torch
import triton
import triton.language as tl

from .blocks import Blocks
from .logits import (
    EXP_IS_ZERO,
    LN2,
    LOG2E,
    add_bias,
    add_lora,
    halves,
    logits,
    operands,
    part_columns,
    product_tile,
    round_to,
    tile_position,
)


@triton.jit
def _epilogue(
    score,  # (ROWS, COLUMNS)
    start,  # its first column
    rows,
    C,
    V,
    token,
    scale,
    anchor,
    BIAS,
    E,
    Q,
    R,
    inner,
    stride_e,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Stores E of a tile, or of each of its parts; returns its sums of E, E log E and E - stored, (ROWS,) each."""
    if PARTS > 1:
        left, right = halves(score, GROUPS)
        s, q, r = _epilogue(
            left, start, rows, C, V, token, scale, anchor, BIAS, E, Q, R, inner, stride_e,
            SOFTCAP, PARTS // 2, RUN, GROUPS, WIDEN,
        )  # fmt: skip
        s_right, q_right, r_right = _epilogue(
            right, start + right.shape[1] // GROUPS, rows, C, V, token, scale, anchor, BIAS, E, Q, R, inner, stride_e,
            SOFTCAP, PARTS // 2, RUN, GROUPS, WIDEN,
        )  # fmt: skip
        return s + s_right, q + q_right, r + r_right
    columns = part_columns(start, score.shape[1], RUN, GROUPS)
    z, slope = logits(add_bias(score, BIAS, columns, V), scale[:, None], inner, SOFTCAP)
    log2_e = tl.minimum((z - anchor[:, None]) * LOG2E, 100.0, propagate_nan=tl.PropagateNan.ALL)
    counts = (columns < V)[None, :] & (columns[None, :] != token[:, None])
    e = tl.where(counts, tl.exp2(log2_e), 0.0)
    s = tl.sum(e, 1)
    q = s
    r = s
    if Q is not None:
        q = LN2 * tl.sum(e * tl.maximum(log2_e, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL), 1)
    if E is not None:
        if SOFTCAP:
            e = e * slope
        stored = round_to(e, E.dtype.element_ty, WIDEN)
        if R is not None:
            r = tl.sum(e - stored.to(tl.float32), 1)
        pointers = E + rows.to(tl.int64)[:, None] * stride_e + columns[None, :]
        tl.store(pointers, stored, mask=(rows < C)[:, None] & (columns < V)[None, :])
    return s, q, r


@triton.jit
def anchored_exp_kernel(
    X,  # (C, H)
    W,  # (V, H)
    L,  # (C, rank) or None: of LoRA
    B,  # (V, rank) or None
    BIAS,  # (V,) or None
    TOKENS,  # (C,)
    SCALE,  # (C,)
    ANCHOR,  # (C,)
    E,  # (C, V) out, or None
    S,  # (C, column tiles) out
    Q,  # (C, column tiles) out, or None
    R,  # (C, column tiles) out, or None where E is not rounded
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
    stride_e,
    SOFTCAP: tl.constexpr,
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
    column_tiles = tl.cdiv(V, COLUMNS)
    row_tile, column_tile = tile_position(tl.program_id(0), tl.cdiv(C, ROWS), column_tiles)
    score = product_tile(
        X, W, row_tile * ROWS, column_tile * COLUMNS, C, V, H, stride_x, stride_w, stride_h,
        ROWS, COLUMNS, DEPTH, EVEN_H, DESCRIPTORS, WIDEN,
    )  # fmt: skip
    score = add_lora(score, L, B, row_tile * ROWS, column_tile * COLUMNS, C, V, rank, stride_l, stride_b, RANK, WIDEN)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    in_chunk = rows < C
    token = tl.load(TOKENS + rows, mask=in_chunk, other=-1).to(tl.int32)
    scale = tl.load(SCALE + rows, mask=in_chunk, other=0.0)
    anchor = tl.load(ANCHOR + rows, mask=in_chunk, other=0.0)
    s, q, r = _epilogue(
        score, column_tile * COLUMNS, rows, C, V, token, scale, anchor, BIAS, E, Q, R, inner, stride_e,
        SOFTCAP, PARTS, COLUMNS // GROUPS, GROUPS, WIDEN,
    )  # fmt: skip
    partial = rows.to(tl.int64) * column_tiles + column_tile
    tl.store(S + partial, s, mask=in_chunk)
    if Q is not None:
        tl.store(Q + partial, q, mask=in_chunk)
    if R is not None:
        tl.store(R + partial, r, mask=in_chunk)


def anchored_exp(
    hidden: torch.Tensor,  # (C, H)
    weight: torch.Tensor,  # (V, H)
    lora: tuple[torch.Tensor, torch.Tensor] | None,  # l (C, rank) fp32 with contiguous rows, B (V, rank)
    bias: torch.Tensor | None,  # (V,)
    tokens: torch.Tensor,  # (C,)
    scale: torch.Tensor,  # (C,) fp32
    inner: float | None,
    anchor: torch.Tensor,  # (C,) fp32
    entropy: bool,
    scores: torch.Tensor | None,  # (C, V) out
    blocks: Blocks,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Writes E into `scores` if given; returns the partial sums (C, column tiles) of E, E log E and what rounding took."""
    shape = len(tokens), triton.cdiv(len(weight), blocks.columns)
    sums = scale.new_empty(shape)
    weighted = scale.new_empty(shape) if entropy else None
    residual = scale.new_empty(shape) if scores is not None and scores.dtype != scale.dtype else None
    if len(tokens):
        anchored_exp_kernel[(triton.cdiv(shape[0], blocks.rows) * shape[1],)](
            BIAS=bias, TOKENS=tokens, SCALE=scale, ANCHOR=anchor, E=scores, S=sums, Q=weighted, R=residual,
            inner=inner or 1.0, stride_e=0 if scores is None else scores.stride(0), SOFTCAP=inner is not None,
            **operands(hidden, weight, lora, blocks), **blocks.options(),
        )  # fmt: skip
    return sums, weighted, residual
