"""Kernel 2: product 1 of the one-pass schedule, with the exponential in its epilogue.

    E_nv = exp(z_nv - anchor_n)        0 in the target's column (v = y_n), and outside the row's support
    S_n  = sum_v E_nv                  one partial per row and column tile, Q_n likewise

anchor_n = z_n,y - clamp(old_n) estimates the row's logsumexp before any other logit of the row is known. So no maximum is
needed and nothing is rescaled. A tile of logits exists only here, in fp32 registers. Only E leaves them, in the dtype in which
products 2 and 3 multiply it.

The sum leaves out the target's column, because 1 - p_y is this sum divided by the sum of all columns. Computed as a whole sum
minus E_y, it would be rounding noise where p_y is close to 1.

Two steps change the stored entries and not the sums:

- Each entry is multiplied by the softcap's slope 1 - tanh^2, a factor of dz/dscore.
- A 16-bit entry is rounded. The rounding error of a row, R_n = sum_v (E_nv - stored_nv), is added back in fp32 at the target's
  row of W: rows of E sum to 0, so the component that all rows of W share must cancel in E @ W.

The epilogue is what remains of a tile's time at a small H, so it is as short as it can be:

- The exponent, in powers of 2, is one multiply-add: score (scale log2 e) - anchor log2 e.
- Nothing caps it. An entry may become infinite: then so does the sum, and kernel 3 stores such a row as zeros.
- Without a softcap a row's rounding error is the difference of two sums, of what is computed and of what is stored.
- Columns beyond the vocabulary are looked for only where the tile does not divide it.

Further statistics of a row, where they are asked for, come from the same tiles (`row_statistics`).

There are no atomics. Kernel 3 adds up the partial sums of a row, in an order that depends neither on C nor on the row's place.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .blocks import Blocks, cdiv, multiprocessors, narrow_parts
from .operands import Operands, is_aligned, tile_arguments
from .row_statistics import NOTHING, Further, fold_further, of_no_column, store_further
from .tile import (
    EXP_IS_ZERO,
    LN2,
    LOG2E,
    add_bias,
    halves,
    in_sets,
    logits,
    part_columns,
    round_to,
    row_scale,
    row_token,
    tile_of,
    tile_position,
)


class TileSums(NamedTuple):
    """The sums of each row over each column tile, (C, tiles), and the buffer of E."""

    S: Any
    Q: Any = None  # sum of E log E, or None
    R: Any = None  # sum of E - stored, or None where E is not rounded
    E: Any = None  # (C, V), or None
    stride_e: Any = None


class Lane(NamedTuple):
    """The numbers of each row that the epilogue needs, (ROWS,) each."""

    r: Any
    token: Any
    scale: Any  # these two times log2 e
    anchor: Any


@triton.jit
def _store(stored, start, first_row, columns, mine, rows, head, E, out, TILE: tl.constexpr):
    if TILE.STORES:  # the descriptor knows where E ends
        E.store([first_row, start], stored)
    else:
        pointers = out.E + mine.r.to(tl.int64)[:, None] * out.stride_e + columns[None, :]
        inside = (mine.r < rows.C)[:, None]
        if not TILE.EVEN_V:
            inside &= (columns < head.V)[None, :]
        tl.store(pointers, stored, mask=inside)


@triton.jit
def _epilogue(score, start, first_row, mine, f, rows, head, E, out, further, PARTS: tl.constexpr, TILE: tl.constexpr):
    """Stores E of a tile (ROWS, COLUMNS) that begins at row `first_row` and column `start`, part by part.

    Returns the tile's sums of E, E log E and E - stored, (ROWS,) each, and its further statistics, f with those of this part.
    """
    if PARTS > 1:
        left, right = halves(score, TILE.WARP_GROUPS)
        s, q, r, f = _epilogue(left, start, first_row, mine, f, rows, head, E, out, further, PARTS // 2, TILE)
        middle = start + right.shape[1] // TILE.WARP_GROUPS
        s_right, q_right, r_right, f = _epilogue(
            right, middle, first_row, mine, f, rows, head, E, out, further, PARTS // 2, TILE
        )  # fmt: skip
        s = s + s_right
        q = q + q_right
        r = r + r_right
    else:
        columns = part_columns(start, score.shape[1], TILE.COLUMNS // TILE.WARP_GROUPS, TILE.WARP_GROUPS)
        log2_z, slope = logits(add_bias(score, head, columns), mine.scale[:, None], head.inner)
        log2_e = log2_z - mine.anchor[:, None]
        others = columns[None, :] != mine.token[:, None]
        counts = (columns < head.V)[None, :]
        if rows.SETS is not None:
            counts = in_sets(rows, mine.r, columns, head.V)
        if rows.SETS is not None or not TILE.EVEN_V:
            others &= counts
        f = _fold(f, further, log2_z * LN2, others, columns, counts)  # before there are exponentials in registers too
        e = tl.where(others, tl.exp2(log2_e), 0.0)
        f = _add_squares(f, further, e)
        s = tl.sum(e, 1)
        q = s
        r = s
        if out.Q is not None:
            q = LN2 * tl.sum(e * tl.maximum(log2_e, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL), 1)
        if out.E is not None:
            if head.inner is not None:
                # with sets the slope may be NaN where no logit counts
                e = e * slope if rows.SETS is None else tl.where(e == 0.0, 0.0, e * slope)
            stored = round_to(e, out.E.dtype.element_ty, TILE.WIDEN)
            if out.R is not None:
                if head.inner is None:
                    r = s - tl.sum(stored.to(tl.float32), 1)
                else:
                    r = tl.sum(e - stored.to(tl.float32), 1)
            _store(stored, start, first_row, columns, mine, rows, head, E, out, TILE)
    return s, q, r, f


@triton.jit
def _fold(f, out, z, others, columns, counts):
    return fold_further(f, out, z, tl.where(others, z, float("-inf")), columns, counts, f.SQUARES)


@triton.jit
def _add_squares(f, out, e):
    squares = f.SQUARES
    if out.SQUARES is not None:
        squares += tl.sum(e * e, 1)
    return Further(f.TOP, f.SUM, squares, f.ABOVE, f.TARGET)


@triton.jit
def _one_tile(place, X, W, rows, head, ANCHOR, E, out, further, K: tl.constexpr, TILE: tl.constexpr):
    score, r, inside, column_tile, column_tiles = tile_of(place, X, W, rows, head, TILE)
    row_tile, _ = tile_position(place, tl.cdiv(rows.C, TILE.ROWS), column_tiles)
    token = row_token(rows, r, inside).to(tl.int32)
    anchor = tl.load(ANCHOR + r, mask=inside, other=0.0)
    mine = Lane(r, token, row_scale(rows, r, inside) * LOG2E, anchor * LOG2E)
    f = of_no_column(further, r, inside, TILE.ROWS, K)
    s, q, taken, f = _epilogue(
        score, column_tile * TILE.COLUMNS, row_tile * TILE.ROWS, mine, f, rows, head, E, out, further, TILE.PARTS, TILE
    )  # fmt: skip
    at = r.to(tl.int64) * column_tiles + column_tile
    tl.store(out.S + at, s, mask=inside)
    if out.Q is not None:
        tl.store(out.Q + at, q, mask=inside)
    if out.R is not None:
        tl.store(out.R + at, taken, mask=inside)
    store_further(further, at, inside, f, K)


@triton.jit
def anchored_exp_kernel(X, W, rows, head, ANCHOR, E, out, further, K: tl.constexpr, TILE: tl.constexpr):
    """E: a descriptor of the buffer with TILE.STORES, else None. further: Further of (C, tiles), of which K keys are kept."""
    if TILE.PERSISTENT:
        # flattened: the loads of the next tile begin before the epilogue of this one
        tiles = tl.cdiv(rows.C, TILE.ROWS) * tl.cdiv(head.V, TILE.COLUMNS)
        for place in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _one_tile(place, X, W, rows, head, ANCHOR, E, out, further, K, TILE)
    else:
        _one_tile(tl.program_id(0), X, W, rows, head, ANCHOR, E, out, further, K, TILE)


def anchored_exp(
    p: Operands,
    anchor: torch.Tensor,  # (C,) fp32
    entropy: bool,
    exps: torch.Tensor | None,  # (C, V) out
    blocks: Blocks,
    further: Further = NOTHING,  # (C, column tiles), where further statistics of each tile are written
) -> TileSums:
    """Writes E into `exps` if given; returns the partial sums (C, column tiles)."""
    count, columns = p.tokens.shape[0], cdiv(p.weight.shape[0], blocks.columns)
    rounds, stride = exps is not None and exps.dtype != torch.float32, None if exps is None else exps.stride(0)
    out = TileSums(
        p.partials(columns), p.partials(columns) if entropy else None, p.partials(columns) if rounds else None, exps, stride
    )
    if count:
        keys = 0 if further.TOP is None else further.TOP.shape[2]
        if further is not NOTHING:
            blocks = narrow_parts(blocks, 8)
        tiles, descriptor = cdiv(count, blocks.rows) * columns, None
        if blocks.stores and exps is not None and is_aligned(exps):
            descriptor = TensorDescriptor.from_tensor(exps, [blocks.rows, blocks.columns // blocks.parts])
        *first, tile = tile_arguments(p, blocks, descriptor is not None)
        programs = min(tiles, multiprocessors(p.hidden.device)) if blocks.persistent else tiles
        anchored_exp_kernel[(programs,)](*first, anchor, descriptor, out, further, keys, tile, **blocks.options())
    return out
