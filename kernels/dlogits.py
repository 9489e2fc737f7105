"""Kernel 5: one slice of the gradient of the logits, from logits recomputed in registers: the two-pass schedule's backward.

For incoming g (of logp) and h (of the entropy H), with log p_v = z_v - logsumexp and t the log-odds against the target:

    v = y   g sigmoid(t) + h p_y (1 - p_y) (t - Ho)           Ho: entropy of the others alone; the h part is 0 at infinite t
    else    -g p_v - h p_v (log p_v + H)                      0 where p_v = 0

times d z / d score (scale_n; with a softcap also inner and its slope). The target's column is not p_y - 1, which cancels.

A 16-bit slice is rounded entry by entry; what rounding takes from a row is returned, to be given back at the target's row of
W (see kernel 2). An fp16 slice is stored times unit_n, a power of two that brings the row's largest entry to fp16's range.
"""

import torch
import triton
import triton.language as tl

from .blocks import Blocks
from .logits import (
    EXP_IS_ZERO,
    LOG2E,
    add_bias,
    add_lora,
    halves,
    log_sigmoid,
    logits,
    operands,
    part_columns,
    product_tile,
    round_to,
    tile_position,
)


@triton.jit
def store_gradient(
    score,  # (ROWS, COLUMNS)
    start,  # its first column
    rows,
    C,
    V,
    token,
    scale,
    lse,
    g,  # (ROWS,), as the next two: of the score and not of z
    h,
    at_target,
    entropy,
    BIAS,
    D,
    R,
    inner,
    stride_d,
    HAS_ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Stores the gradient of a tile, or of each of its parts; returns what rounding took from its rows, (ROWS,)."""
    if PARTS > 1:
        left, right = halves(score, GROUPS)
        r = store_gradient(
            left, start, rows, C, V, token, scale, lse, g, h, at_target, entropy, BIAS, D, R, inner, stride_d,
            HAS_ENTROPY, SOFTCAP, PARTS // 2, RUN, GROUPS, WIDEN,
        )  # fmt: skip
        return r + store_gradient(
            right, start + right.shape[1] // GROUPS, rows, C, V, token, scale, lse, g, h, at_target, entropy, BIAS, D, R,
            inner, stride_d, HAS_ENTROPY, SOFTCAP, PARTS // 2, RUN, GROUPS, WIDEN,
        )  # fmt: skip
    columns = part_columns(start, score.shape[1], RUN, GROUPS)
    z, slope = logits(add_bias(score, BIAS, columns, V), scale[:, None], inner, SOFTCAP)
    log_p = z - lse[:, None]
    p = tl.exp2(log_p * LOG2E)
    if HAS_ENTROPY:
        # log p = -inf only where p = 0
        surprise = tl.maximum(log_p, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL) + entropy[:, None]
        d = (-h[:, None] * surprise - g[:, None]) * p
    else:
        d = -g[:, None] * p
    d = tl.where(columns[None, :] == token[:, None], at_target[:, None], d)
    if SOFTCAP:
        d = d * slope
    stored = round_to(d, D.dtype.element_ty, WIDEN)
    r = g
    if R is not None:
        r = tl.sum(tl.where((columns < V)[None, :], d - stored.to(tl.float32), 0.0), 1)
    pointers = D + rows.to(tl.int64)[:, None] * stride_d + columns[None, :]
    tl.store(pointers, stored, mask=(rows < C)[:, None] & (columns < V)[None, :])
    return r


@triton.jit
def row_terms(rows, in_chunk, factor, LOGP, T, G, H_GRAD, ENTROPY, OTHERS):
    """(ROWS,) each: g and h of the score, H, and the gradient in the target's column."""
    g = tl.load(G + rows, mask=in_chunk, other=0.0) * factor
    t = tl.load(T + rows, mask=in_chunk, other=0.0)
    log_1mp = log_sigmoid(t)
    at_target = g * tl.exp(log_1mp)
    h = g
    entropy = g
    if H_GRAD is not None:
        h = tl.load(H_GRAD + rows, mask=in_chunk, other=0.0) * factor
        entropy = tl.load(ENTROPY + rows, mask=in_chunk, other=0.0)
        p_q = tl.exp(tl.load(LOGP + rows, mask=in_chunk, other=0.0) + log_1mp)
        from_entropy = h * p_q * (t - tl.load(OTHERS + rows, mask=in_chunk, other=0.0))
        at_target += tl.where(tl.abs(t) == float("inf"), 0.0, from_entropy)
    return g, h, entropy, at_target


@triton.jit
def dlogits_kernel(
    X,  # (C, H)
    W,  # (V, H): the slice's rows of the weight
    L,  # (C, rank) or None: of LoRA
    B,  # (V, rank) or None: the slice's rows
    BIAS,  # (V,) the slice's, or None
    TOKENS,  # (C,) as positions in the slice
    SCALE,  # (C,)
    LOGP,  # (C,), as the next five
    T,
    LOGSUMEXP,
    G,
    H_GRAD,  # or None
    ENTROPY,  # or None
    OTHERS,  # or None
    UNIT,  # (C,) or None
    D,  # (C, V) out
    R,  # (C, column tiles) out, or None where D is not rounded
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
    stride_d,
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
    lse = tl.load(LOGSUMEXP + rows, mask=in_chunk, other=0.0)
    factor = scale
    if SOFTCAP:
        factor = factor * inner
    if UNIT is not None:
        factor = factor * tl.load(UNIT + rows, mask=in_chunk, other=0.0)
    g, h, entropy, at_target = row_terms(rows, in_chunk, factor, LOGP, T, G, H_GRAD, ENTROPY, OTHERS)
    r = store_gradient(
        score, column_tile * COLUMNS, rows, C, V, token, scale, lse, g, h, at_target, entropy, BIAS, D, R, inner, stride_d,
        H_GRAD is not None, SOFTCAP, PARTS, COLUMNS // GROUPS, GROUPS, WIDEN,
    )  # fmt: skip
    if R is not None:
        tl.store(R + rows.to(tl.int64) * column_tiles + column_tile, r, mask=in_chunk)


def dlogits(
    hidden: torch.Tensor,  # (C, H)
    weight: torch.Tensor,  # (width, H): the slice's rows
    lora: tuple[torch.Tensor, torch.Tensor] | None,  # l (C, rank) fp32 with contiguous rows, B (width, rank)
    bias: torch.Tensor | None,  # (width,)
    tokens: torch.Tensor,  # (C,), as positions in the slice; anything outside [0, width) has no column there
    scale: torch.Tensor,  # (C,) fp32, as the next five
    inner: float | None,
    logprobs: torch.Tensor,
    t: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_logprobs: torch.Tensor,
    for_entropy: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,  # incoming gradient, H, Ho: (C,) each
    unit: torch.Tensor | None,  # (C,)
    out: torch.Tensor,  # (C, width)
    blocks: Blocks,
) -> torch.Tensor:
    """Writes the slice into `out`; returns what rounding took from each row of it, (C,), or (0,) where it is not rounded."""
    shape = len(tokens), triton.cdiv(len(weight), blocks.columns)
    residual = scale.new_empty(shape) if out.dtype != scale.dtype else None
    h, entropy, others = (None, None, None) if for_entropy is None else for_entropy
    if len(tokens):
        dlogits_kernel[(triton.cdiv(shape[0], blocks.rows) * shape[1],)](
            BIAS=bias, TOKENS=tokens, SCALE=scale, LOGP=logprobs, T=t, LOGSUMEXP=logsumexp, G=grad_logprobs, H_GRAD=h,
            ENTROPY=entropy, OTHERS=others, UNIT=unit, D=out, R=residual, inner=inner or 1.0, stride_d=out.stride(0),
            SOFTCAP=inner is not None, **operands(hidden, weight, lora, blocks), **blocks.options(),
        )  # fmt: skip
    return scale.new_empty(0) if residual is None else residual.sum(1)
