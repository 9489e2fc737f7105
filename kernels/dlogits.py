"""Kernel 5, the backward of the two-pass schedule: one slice of the gradient of the logits, which are recomputed in registers.

The incoming gradients are g (of logp), h (of the entropy H), l (of the logsumexp) and m (of sum_v z_v). With
log p_v = z_v - logsumexp and t the log-odds against the target, the gradient of z_v is m plus

    v = y   g sigmoid(t) + h p_y (1 - p_y) (t - Ho) + l p_y   Ho: entropy of the others alone; the h part is 0 at infinite t
    else    -(g - l) p_v - h p_v (log p_v + H)                0 where p_v = 0

and the kernel stores it times d z / d score (scale_n; with a softcap also inner and its slope). The target's column takes
sigmoid(t), not p_y - 1, which cancels.

A 16-bit slice is rounded entry by entry. The rounding error of each row is returned; it is added back at the target's row of W
(see kernel 2). An fp16 row is stored times unit_n, a power of two that brings its largest entry into fp16's range.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import Blocks, cdiv, narrow_parts
from .operands import Operands, tile_arguments
from .tile import (
    EXP_IS_ZERO,
    LOG2E,
    add_bias,
    halves,
    in_sets,
    log_sigmoid,
    logits,
    part_columns,
    round_to,
    row_scale,
    row_token,
    tile_of,
)


class Statistics(NamedTuple):
    """The statistics of each row, (C,) each; `fastpg.tiles.row_statistics` defines them."""

    LOGP: Any
    ENTROPY: Any  # or None
    T: Any
    LOGSUMEXP: Any
    OTHERS: Any  # entropy of the others alone, or None


class Incoming(NamedTuple):
    """Incoming gradients, (C,) each, and the factor by which fp16 entries are stored."""

    G: Any  # of logp
    H: Any = None  # of the entropy, or None
    UNIT: Any = None  # (C,), or None
    L: Any = None  # of the logsumexp, or None
    M: Any = None  # of the sum of the row's logits, or None


class Slice(NamedTuple):
    D: Any  # (C, V) out
    stride_d: Any
    start: Any  # the slice's first column: tokens count from it
    R: Any = None  # rounding errors, (C, column tiles) out, or None where D is not rounded


class Lane(NamedTuple):
    """The numbers of each row that the epilogue needs, (ROWS,) each. Gradients are those of the score and not of z."""

    r: Any
    token: Any
    scale: Any
    lse: Any
    g: Any  # g - l
    h: Any
    entropy: Any
    at_target: Any
    of_sum: Any  # m, or 0


@triton.jit
def row_terms(r, inside, token, scale, factor, statistics, incoming):
    """The Lane of rows r. `factor` turns a gradient of z into one of the score."""
    g = tl.load(incoming.G + r, mask=inside, other=0.0) * factor
    t = tl.load(statistics.T + r, mask=inside, other=0.0)
    log_1mp = log_sigmoid(t)
    at_target = g * tl.exp(log_1mp)
    h = g
    entropy = g
    if incoming.H is not None:
        h = tl.load(incoming.H + r, mask=inside, other=0.0) * factor
        entropy = tl.load(statistics.ENTROPY + r, mask=inside, other=0.0)
        p_q = tl.exp(tl.load(statistics.LOGP + r, mask=inside, other=0.0) + log_1mp)
        from_entropy = h * p_q * (t - tl.load(statistics.OTHERS + r, mask=inside, other=0.0))
        at_target += tl.where(tl.abs(t) == float("inf"), 0.0, from_entropy)
    if incoming.L is not None:  # not (g - l) sigmoid(t) + l, which cancels at a small p_y
        of_lse = tl.load(incoming.L + r, mask=inside, other=0.0) * factor
        at_target += of_lse * tl.exp(tl.load(statistics.LOGP + r, mask=inside, other=0.0))
        g = g - of_lse
    of_sum = tl.zeros_like(g)  # (Triton 3.5 cannot return None in a structure)
    if incoming.M is not None:
        of_sum = tl.load(incoming.M + r, mask=inside, other=0.0) * factor
    lse = tl.load(statistics.LOGSUMEXP + r, mask=inside, other=0.0)
    return Lane(r, token, scale, lse, g, h, entropy, at_target, of_sum)


@triton.jit
def gradient_entries(z, columns, mine, incoming):
    """dL/dz of a tile, times the `factor` of `row_terms`. incoming: which gradients there are."""
    log_p = z - mine.lse[:, None]
    p = tl.exp2(log_p * LOG2E)
    if incoming.H is not None:
        # log p = -inf only where p = 0
        surprise = tl.maximum(log_p, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL) + mine.entropy[:, None]
        d = (-mine.h[:, None] * surprise - mine.g[:, None]) * p
    else:
        d = -mine.g[:, None] * p
    d = tl.where(columns[None, :] == mine.token[:, None], mine.at_target[:, None], d)
    if incoming.M is not None:
        d += mine.of_sum[:, None]
    return d


@triton.jit
def _epilogue(score, start, mine, rows, head, incoming, out, PARTS: tl.constexpr, TILE: tl.constexpr):
    """Stores the gradient of a tile (ROWS, COLUMNS), part by part; returns the rounding error of each of its rows."""
    if PARTS > 1:
        left, right = halves(score, TILE.WARP_GROUPS)
        taken = _epilogue(left, start, mine, rows, head, incoming, out, PARTS // 2, TILE)
        middle = start + right.shape[1] // TILE.WARP_GROUPS
        return taken + _epilogue(right, middle, mine, rows, head, incoming, out, PARTS // 2, TILE)
    columns = part_columns(start, score.shape[1], TILE.COLUMNS // TILE.WARP_GROUPS, TILE.WARP_GROUPS)
    z, slope = logits(add_bias(score, head, columns), mine.scale[:, None], head.inner)
    d = gradient_entries(z, columns, mine, incoming)
    if head.inner is not None:
        d = d * slope
    if rows.SETS is not None:  # behind the slope, which may be NaN where no logit counts
        d = tl.where(in_sets(rows, mine.r, columns, head.V), d, 0.0)
    stored = round_to(d, out.D.dtype.element_ty, TILE.WIDEN)
    taken = mine.g
    if out.R is not None:
        taken = tl.sum(tl.where((columns < head.V)[None, :], d - stored.to(tl.float32), 0.0), 1)
    pointers = out.D + mine.r.to(tl.int64)[:, None] * out.stride_d + columns[None, :]
    tl.store(pointers, stored, mask=(mine.r < rows.C)[:, None] & (columns < head.V)[None, :])
    return taken


@triton.jit
def dlogits_kernel(X, W, rows, head, statistics, incoming, out, TILE: tl.constexpr):
    score, r, inside, column_tile, column_tiles = tile_of(tl.program_id(0), X, W, rows, head, TILE)
    token = (row_token(rows, r, inside) - out.start).to(tl.int32)
    scale = row_scale(rows, r, inside)
    factor = scale
    if head.inner is not None:
        factor = factor * head.inner
    if incoming.UNIT is not None:
        factor = factor * tl.load(incoming.UNIT + r, mask=inside, other=0.0)
    mine = row_terms(r, inside, token, scale, factor, statistics, incoming)
    taken = _epilogue(score, column_tile * TILE.COLUMNS, mine, rows, head, incoming, out, TILE.PARTS, TILE)
    if out.R is not None:
        tl.store(out.R + r.to(tl.int64) * column_tiles + column_tile, taken, mask=inside)


def dlogits(
    p: Operands,  # weight, bias and B are the slice's rows
    statistics: Statistics,
    incoming: Incoming,
    out: torch.Tensor,  # (C, V)
    blocks: Blocks,
    start: int = 0,
) -> torch.Tensor | None:
    """Writes the slice into `out`. start: its first column, from which tokens are counted.

    Returns the rounding error of each of its rows, (C,), or None where it is not rounded.
    """
    count, tiles = p.tokens.shape[0], cdiv(p.weight.shape[0], blocks.columns)
    residual = p.partials(tiles) if out.dtype != torch.float32 else None
    if count:
        *first, tile = tile_arguments(p, blocks if p.sets is None else narrow_parts(blocks, 32))
        grid = (cdiv(count, blocks.rows) * tiles,)
        into = Slice(out, out.stride(0), start, residual)
        dlogits_kernel[grid](*first, statistics, incoming, into, tile, **blocks.options())
    return None if residual is None else residual.sum(1)
