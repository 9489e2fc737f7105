"""Kernel 4, the forward of the two-pass schedule: one pass over the vocabulary that stores nothing of the vocabulary's size.

For each row, over the columns v != y, split by split:

    m = max z_v        s = sum exp(z_v - m)        q = sum exp(z_v - m) (z_v - m)

z_y comes from kernel 1. The accumulators of tensor cores lose bits that kernel 1's dot product keeps, and z_y enters a
log-probability alone, not as one term of many.

A split is a fixed number of column tiles, so a row's bits do not depend on the batch size. A program keeps m, s and q of its
rows in registers (Milakov and Gimelshein, arXiv 1805.02867). When the pivot moves from m to m', by d = m - m', s becomes s e^d
and q becomes e^d (q + s d). `combine_kernel` does the same across splits, in their order. Unless other ranks hold other
columns, it also finishes the row: its log-probability and its entropy.

A column that must not count (the target's, one beyond the vocabulary, one outside the row's support) enters as z = -inf. The
pivot is 0 until a column has counted, because -inf - -inf would be NaN. A NaN logit reaches s, whatever the maximum makes of
it.

Further statistics of a row, where they are asked for, come from the same sweep (`row_statistics`).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import Blocks, cdiv, narrow_parts
from .operands import Operands, tile_arguments
from .row_statistics import NOTHING, Further, combine_further, fold_further, fold_squares, has_sums, of_no_column, store_further
from .tile import (
    EXP_IS_ZERO,
    LOG2E,
    ROWS_PER_PROGRAM,
    add_bias,
    entropy_from_log_odds,
    halves,
    in_sets,
    log_sigmoid,
    logits,
    others_only,
    part_columns,
    product_tile,
    row_scale,
    row_token,
    tile_position,
)

# column tiles of a split: few enough that 128 rows of a common vocabulary occupy a GPU, many enough that partials are few
_TILES_PER_SPLIT = 8
_BLOCK = 128


class Running(NamedTuple):
    """m, s, q of each row, over each split (C, splits) or over all columns (C,). Q is None without an entropy."""

    M: Any
    S: Any
    Q: Any = None


class Lane(NamedTuple):
    """The numbers of each row that the sweep needs, (ROWS,) each."""

    r: Any
    token: Any
    scale: Any


class Finished(NamedTuple):
    """The statistics of each row, (C,) each; `fastpg.tiles.row_statistics` has the formulas."""

    LOGP: Any
    ENTROPY: Any  # or None
    T: Any
    LOGSUMEXP: Any
    OTHERS: Any  # or None


@triton.jit
def fold(z, m, s, q, ENTROPY: tl.constexpr):
    """The running statistics (ROWS,), updated with the logits z (ROWS, COLUMNS). A logit of -inf does not count."""
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
def _fold_parts(
    score, start, m, s, q, f, mine, rows, head, out, further, PARTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The running statistics that `out` and `further` ask for, updated with a tile, part by part."""
    if PARTS > 1:
        left, right = halves(score, TILE.WARP_GROUPS)
        m, s, q, f = _fold_parts(left, start, m, s, q, f, mine, rows, head, out, further, PARTS // 2, TILE)
        middle = start + right.shape[1] // TILE.WARP_GROUPS
        return _fold_parts(right, middle, m, s, q, f, mine, rows, head, out, further, PARTS // 2, TILE)
    columns = part_columns(start, score.shape[1], TILE.COLUMNS // TILE.WARP_GROUPS, TILE.WARP_GROUPS)
    z, _ = logits(add_bias(score, head, columns), mine.scale[:, None], head.inner)
    others = others_only(z, columns, mine.token, head.V)
    counts = (columns < head.V)[None, :]
    if rows.SETS is not None:
        counts = in_sets(rows, mine.r, columns, head.V)
        others = tl.where(counts, others, float("-inf"))
    larger, s, q = fold(others, m, s, q, out.Q is not None)
    squares = fold_squares(f, further, others, m, larger)
    return larger, s, q, fold_further(f, further, z, others, columns, counts, squares)


@triton.jit
def store_running(out, place, inside, m, s, q):
    tl.store(out.M + place, m, mask=inside)
    tl.store(out.S + place, s, mask=inside)
    if out.Q is not None:
        tl.store(out.Q + place, q, mask=inside)


@triton.jit
def logsumexp_kernel(X, W, rows, head, out, further, K: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """further: Further of (C, splits), of which K keys are kept."""
    splits = tl.cdiv(head.V, TILE.COLUMNS * TILES)
    row_tile, split = tile_position(tl.program_id(0), tl.cdiv(rows.C, TILE.ROWS), splits)
    r = row_tile * TILE.ROWS + tl.arange(0, TILE.ROWS)
    inside = r < rows.C
    mine = Lane(r, row_token(rows, r, inside).to(tl.int32), row_scale(rows, r, inside))
    ROWS: tl.constexpr = TILE.ROWS
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    q = tl.zeros((ROWS,), tl.float32)
    f = of_no_column(further, r, inside, ROWS, K)
    for tile in range(0, tl.minimum(TILES, tl.cdiv(head.V, TILE.COLUMNS) - split * TILES)):
        start = (split * TILES + tile) * TILE.COLUMNS
        score = product_tile(X, W, row_tile * TILE.ROWS, start, rows, head, TILE)
        m, s, q, f = _fold_parts(score, start, m, s, q, f, mine, rows, head, out, further, TILE.PARTS, TILE)
    place = r.to(tl.int64) * splits + split
    store_running(out, place, inside, m, s, q)
    store_further(further, place, inside, f, K)


@triton.jit
def finish_row(m, s, q, target, out, r, inside):
    """Stores the statistics of the rows r, from m, s, q of all columns but the target's, and z_y.

    The formulas are those of `fastpg.tiles.row_statistics.finish_rows`.
    """
    # a z_y of +inf is no certainty, not even where the others are -inf: softmax has no value there
    target = tl.where(target == float("inf"), float("nan"), target)
    pivot = tl.where(m == float("-inf"), 0.0, m)
    some = tl.where(s == 0, 1.0, s)
    log_s = tl.where(s == 0, float("-inf"), tl.log(some))
    t = (pivot - target) + log_s
    log_p = log_sigmoid(-t)
    log_1mp = log_sigmoid(tl.where(t < 0, 0.0, t))
    tl.store(out.LOGP + r, log_p, mask=inside)
    tl.store(out.T + r, t, mask=inside)
    tl.store(out.LOGSUMEXP + r, tl.where(t < 0, target - log_p, (pivot + log_s) - log_1mp), mask=inside)
    if out.ENTROPY is not None:
        others = tl.where(s == 0, 0.0, log_s - q / some)
        tl.store(out.OTHERS + r, others, mask=inside)
        tl.store(out.ENTROPY + r, entropy_from_log_odds(t, others), mask=inside)


@triton.jit
def combine_kernel(
    partials, TARGET, out, further, merged, C, splits,
    FINISH: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the splits of each row.

    partials: Running of (C, splits). out: Finished with FINISH, which needs z_y in TARGET (C,); else Running of (C,).
    further: Further of (C, splits), merged into Further of (C,), but for its keys. SUMS: whether it has more than these.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_chunk = r < C
    first = r[:, None] * splits
    offsets = tl.arange(0, BLOCK)[None, :]
    largest = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    for start in range(0, splits, BLOCK):
        inside = in_chunk[:, None] & (start + offsets < splits)
        m = tl.load(partials.M + first + start + offsets, mask=inside, other=float("-inf"))
        largest = tl.maximum(largest, m, propagate_nan=tl.PropagateNan.ALL)
    maximum = tl.max(largest, 1)
    pivot = tl.where(maximum == float("-inf"), 0.0, maximum)[:, None]

    s = tl.zeros((ROWS, BLOCK), tl.float32)
    q = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, splits, BLOCK):
        inside = in_chunk[:, None] & (start + offsets < splits)
        places = first + start + offsets
        partial = tl.load(partials.S + places, mask=inside, other=0.0)
        shift = tl.load(partials.M + places, mask=inside, other=float("-inf")) - pivot
        shift = tl.maximum(shift, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL)
        decay = tl.exp2(shift * LOG2E)
        if partials.Q is not None:
            q += decay * (tl.load(partials.Q + places, mask=inside, other=0.0) + partial * shift)
        s += decay * partial
    if FINISH:
        target = tl.load(TARGET + r, mask=in_chunk, other=0.0)
        finish_row(maximum, tl.sum(s, 1), tl.sum(q, 1), target, out, r, in_chunk)
    else:
        store_running(out, r, in_chunk, maximum, tl.sum(s, 1), tl.sum(q, 1))
    if SUMS:
        combine_further(partials.M, further, merged, r, in_chunk, pivot, tl.sum(s, 1), splits, ROWS, BLOCK)


def split_count(vocab: int, columns: int) -> int:
    return cdiv(vocab, columns * _TILES_PER_SPLIT)


def logsumexp(p: Operands, entropy: bool, blocks: Blocks, further: Further = NOTHING) -> Running:
    """m, s, q of each row over the columns v != y of each split, (C, splits) fp32; `combine` or `finished` merges them.

    further: where further statistics of each split are written.
    """
    count, splits = p.tokens.shape[0], split_count(p.weight.shape[0], blocks.columns)
    out = Running(p.partials(splits), p.partials(splits), p.partials(splits) if entropy else None)
    if count:
        keys = 0 if further.TOP is None else further.TOP.shape[2]
        is_plain = further is NOTHING
        *first, tile = tile_arguments(p, blocks if is_plain else narrow_parts(blocks, 32 if p.sets is None else 16))
        grid = (cdiv(count, blocks.rows) * splits,)
        logsumexp_kernel[grid](*first, out, further, keys, _TILES_PER_SPLIT, tile, **blocks.options())
    return out


def combine(partials: Running, further: Further = NOTHING, merged: Further = NOTHING) -> Running:
    """m, s, q (C,) over all splits. Of further statistics, sums over all splits are written to `merged`."""
    return _combined(partials, None, Running(*_vectors(partials, (True, True, partials.Q is not None))), further, merged)


def finished(partials: Running, target: torch.Tensor, further: Further = NOTHING, merged: Further = NOTHING) -> Finished:
    """The statistics of each row, (C,) each, from those of its splits and z_y (C,); and `merged` as in `combine`."""
    entropy = partials.Q is not None
    return _combined(partials, target, Finished(*_vectors(partials, (True, entropy, True, True, entropy))), further, merged)


def _vectors(partials: Running, wanted: tuple[bool, ...]) -> list[torch.Tensor | None]:
    return [partials.M.new_empty(partials.M.shape[0]) if is_wanted else None for is_wanted in wanted]


def _combined(partials: Running, target: torch.Tensor | None, out, further: Further, merged: Further):
    count, splits = partials.M.shape
    if count:
        grid = (cdiv(count, ROWS_PER_PROGRAM),)
        combine_kernel[grid](
            partials, target, out, further, merged, count, splits, FINISH=target is not None,
            SUMS=has_sums(merged), ROWS=ROWS_PER_PROGRAM, BLOCK=_BLOCK,
        )  # fmt: skip
    return out
