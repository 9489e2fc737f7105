"""Further statistics of rows: device functions of the sweeps, kernels 2 and 4, and of what combines their parts.

Over the columns of a split of kernel 4, or of a tile of kernel 2, in each row:

    the K largest logits and their columns, of all columns            K is 2, 4 or 8
    sum z_v                                                           of all columns
    sum exp(2 (z_v - m))                                              of the columns v != y; moves with the pivot as e^(2d)
    how many z_v > z_y                                                of the columns v != y

Kernel 2 has the anchor in the place of m, so the third is its sum of E^2, and nothing moves.

A logit and its column are one key, an integer of 64 bits: the upper ones are the logit's bits, in the order of the logits, and
the lower ones the column, counted down. So the larger key is the larger logit, or of equal logits the smaller column, and the
order in which columns are seen changes nothing.

All that is not asked for is None, and costs nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import cdiv
from .tile import EXP_IS_ZERO, LOG2E, ROWS_PER_PROGRAM, row_sums

_BLOCK = 512

_LOWEST = -(2**63)
LOWEST = tl.constexpr(_LOWEST)  # below the key of every logit
_NO_COLUMN = 0x7FFFFFFF
NO_COLUMN = tl.constexpr(_NO_COLUMN)


class Further(NamedTuple):
    """Of each split or tile (C, splits) or of all columns (C,), as pointers; in a program, the values of its rows (ROWS,)."""

    TOP: Any = None  # int64 keys, (C, splits, K); in a program (ROWS, K), in any order
    SUM: Any = None
    SQUARES: Any = None  # of all splits: log sum q_v^2, q_v = exp(z_v - m) / s; 0 where s = 0. Of all tiles: sum E^2
    ABOVE: Any = None  # int32
    TARGET: Any = None  # z_y (C,), which ABOVE is compared with


NOTHING = Further()  # kernels look at fields: Triton 3.5 cannot tell whether a structure with a None in it is None


@triton.jit
def of_no_column(out, r, inside, ROWS: tl.constexpr, K: tl.constexpr):
    """The values of rows r before the first tile; 0 for what `out`, a structure of pointers, does not ask for.

    (Triton 3.5 cannot return None.)
    """
    top = 0
    total = 0
    squares = 0
    above = 0
    target = 0
    if out.TOP is not None:
        # distinct keys, so that one at a time is replaced
        top = tl.zeros((ROWS, K), tl.int64) + LOWEST + tl.arange(0, K).to(tl.int64)[None, :]
    if out.SUM is not None:
        total = tl.zeros((ROWS,), tl.float32)
    if out.SQUARES is not None:
        squares = tl.zeros((ROWS,), tl.float32)
    if out.ABOVE is not None:
        above = tl.zeros((ROWS,), tl.int32)
        target = tl.load(out.TARGET + r, mask=inside, other=0.0)
    return Further(top, total, squares, above, target)


@triton.jit
def ordered_bits(z):
    """fp32 -> int64 in the order of the numbers; -0 and 0 are equal."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ NO_COLUMN, bits).to(tl.int64)


@triton.jit
def insert(top, z, columns, counts):
    """The K largest of the keys `top` (ROWS, K) and of the logits z (ROWS, COLUMNS) that count. Most tiles insert none."""
    keys = (ordered_bits(z) << 32) + ((-columns).to(tl.int64) + NO_COLUMN)[None, :]
    keys = tl.where(counts, keys, LOWEST)
    best = tl.max(keys, 1)
    smallest = tl.min(top, 1)
    while tl.max((best > smallest).to(tl.int32), 0) > 0:
        is_replaced = (top == smallest[:, None]) & (best > smallest)[:, None]
        top = tl.where(is_replaced, best[:, None], top)
        keys = tl.where(keys == best[:, None], LOWEST, keys)
        best = tl.max(keys, 1)
        smallest = tl.min(top, 1)
    return top


@triton.jit
def fold_squares(f, out, others, before, m):
    """sum exp(2 (z_v - m)), updated with the logits `others` (ROWS, COLUMNS): -inf where v != y does not hold.

    before, m: their running maximum, without and with these. (As in `fold` of `logsumexp`, whose exponentials these are.)
    """
    squares = f.SQUARES
    if out.SQUARES is not None:
        pivot = tl.where(m == float("-inf"), 0.0, m)
        shift = tl.maximum(before - pivot, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL)
        decay = tl.exp2(shift * LOG2E)
        e = tl.exp2((others - pivot[:, None]) * LOG2E)
        squares = squares * decay * decay + tl.sum(e * e, 1)
    return squares


@triton.jit
def fold_further(f, out, z, others, columns, counts, squares):
    """The values that `out` asks for, updated with the logits z (ROWS, COLUMNS).

    others: z with -inf in columns that are not v != y. counts: which columns belong to the softmax, (ROWS, COLUMNS) or
    (1, COLUMNS). squares: the new SQUARES.
    """
    top = f.TOP
    total = f.SUM
    above = f.ABOVE
    if out.ABOVE is not None:
        above += tl.sum((others > f.TARGET[:, None]).to(tl.int32), 1)
    if out.SUM is not None:
        total += tl.sum(tl.where(counts, z, 0.0), 1)
    if out.TOP is not None:
        top = insert(top, z, columns, counts)
    return Further(top, total, squares, above, f.TARGET)


@triton.jit
def store_further(out, place, inside, f, K: tl.constexpr):
    if out.TOP is not None:
        tl.store(out.TOP + place[:, None] * K + tl.arange(0, K)[None, :], f.TOP, mask=inside[:, None])
    if out.SUM is not None:
        tl.store(out.SUM + place, f.SUM, mask=inside)
    if out.SQUARES is not None:
        tl.store(out.SQUARES + place, f.SQUARES, mask=inside)
    if out.ABOVE is not None:
        tl.store(out.ABOVE + place, f.ABOVE, mask=inside)


@triton.jit
def combine_further(M, further, out, r, inside, pivot, s, splits, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Merges the splits of the rows r but for the keys (see `largest_of`). pivot (ROWS, 1) and s (ROWS,): over all splits."""
    offsets = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    above = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, splits, BLOCK):
        mask = inside[:, None] & (start + offsets < splits)
        places = r[:, None] * splits + start + offsets
        if further.SUM is not None:
            total += tl.load(further.SUM + places, mask=mask, other=0.0)
        if further.SQUARES is not None:
            shift = tl.load(M + places, mask=mask, other=float("-inf")) - pivot
            decay = tl.exp2(tl.maximum(shift, EXP_IS_ZERO, propagate_nan=tl.PropagateNan.ALL) * LOG2E)
            squares += decay * decay * tl.load(further.SQUARES + places, mask=mask, other=0.0)
        if further.ABOVE is not None:
            above += tl.load(further.ABOVE + places, mask=mask, other=0)
    if further.SUM is not None:
        tl.store(out.SUM + r, tl.sum(total, 1), mask=inside)
    if further.SQUARES is not None:
        some = tl.where(s == 0, 1.0, s)
        found = tl.where(s == 0, 1.0, tl.sum(squares, 1))
        tl.store(out.SQUARES + r, tl.log(found) - 2.0 * tl.log(some), mask=inside)
    if further.ABOVE is not None:
        tl.store(out.ABOVE + r, tl.sum(above, 1), mask=inside)


@triton.jit
def sum_further_kernel(further, out, C, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the column tiles of each row, in their order."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = r < C
    if further.SUM is not None:
        tl.store(out.SUM + r, row_sums(further.SUM, r, inside, tiles, ROWS, BLOCK), mask=inside)
    if further.SQUARES is not None:
        tl.store(out.SQUARES + r, row_sums(further.SQUARES, r, inside, tiles, ROWS, BLOCK), mask=inside)
    if further.ABOVE is not None:  # fp32 has every whole number up to 2^24
        above = row_sums(further.ABOVE, r, inside, tiles, ROWS, BLOCK)
        tl.store(out.ABOVE + r, above.to(tl.int32), mask=inside)


def sum_further(further: Further, out: Further, count: int, tiles: int) -> None:
    """The sums over column tiles (C, tiles) into those of rows (C,); for the keys see `largest_of`."""
    if count and has_sums(further):
        grid = (cdiv(count, ROWS_PER_PROGRAM),)
        sum_further_kernel[grid](further, out, count, tiles, ROWS=ROWS_PER_PROGRAM, BLOCK=_BLOCK)


def has_sums(further: Further) -> bool:
    """Whether there is anything but keys."""
    return any(x is not None for x in further[1:4])


def kept(largest: int) -> int:
    """How many keys a split keeps for the `largest` that are wanted: 2, 4 or 8, as blocks have such shapes; 0 for 0."""
    return 0 if largest == 0 else max(2, triton.next_power_of_2(largest))


def empty_further(like: torch.Tensor, shape: tuple[int, ...], keys: int, wanted: Further) -> Further:
    """Empty tensors of a shape, (C, splits) or (C,), for what is `wanted`: True for a field, and z_y (C,) or None as TARGET."""
    top = like.new_empty(*shape, keys, dtype=torch.int64) if keys else None
    total, squares = (like.new_empty(shape, dtype=torch.float32) if x else None for x in (wanted.SUM, wanted.SQUARES))
    above = like.new_empty(shape, dtype=torch.int32) if wanted.ABOVE else None
    return Further(top, total, squares, above, wanted.TARGET if wanted.ABOVE else None)


def largest_of(top: torch.Tensor, count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits (C, count) fp32 in descending order, and their columns (int64), from keys (C, splits, K).

    Where fewer logits of a row count, the rest are -inf, and their columns any.
    """
    keys = top.flatten(1).topk(count, 1).values
    missing = keys < _LOWEST + top.shape[2]
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ _NO_COLUMN, ordered).to(torch.int32)
    return bits.view(torch.float32).masked_fill(missing, -torch.inf), (_NO_COLUMN - (keys & 0xFFFFFFFF)).clamp(max=vocab - 1)
