"""Kernel 3: completes each row from its partial sums. With an objective it also computes the loss and the gradient's factor.

    S = sum of the partials in a fixed order (Q, R likewise)
    E_y = -S slope_y                                          the gradient of the target's own column, which kernel 2 left at 0

A row whose sum is not below 2^99 has lost its entries to overflow or NaN. It is stored as zeros, so that it adds nothing to
products 2 and 3; the schedule computes it again, or makes the result NaN.

With an objective from `objectives` the kernel also computes

    a = clamp(old, -60, 0)                                    the anchor's log-probability; S e^-a = (1 - p_y) / p_y
    t = log S - a        logp = logsigmoid(-t)                and the entropy, from t, S and Q
    loss, g = token_loss(logp, old, A, ...)                   g = dloss/dlogp
    u = -g logit_scale / (T (S + e^a))                        the row's factor: dX = u (E @ W), dW = E^T (u x)

and whether S and u are in the range where 16-bit exponents and fp32 sums are safe. Every program also leaves sums of its rows,
which kernel 11 reduces to the loss and the metrics. With a user's own objective the kernel stops at S, Q and R, and PyTorch
does the rest on vectors.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import limits
from .anchored_exp import TileSums
from .blocks import cdiv
from .objectives import Loss, numbers_of, token_loss
from .summary import FIELDS, Sums, store_sums
from .tile import (
    INTERPRETED,
    ROWS_PER_PROGRAM,
    entropy_from_log_odds,
    load_fp32,
    log_anchor,
    log_sigmoid,
    round_to,
    row_sums,
)

_BLOCK = 512

SMALLEST_SUM, LARGEST_SUM = tl.constexpr(limits.SMALLEST_SUM), tl.constexpr(limits.LARGEST_SUM)
SMALLEST_FACTOR, LARGEST_FACTOR = tl.constexpr(limits.SMALLEST_FACTOR), tl.constexpr(limits.LARGEST_FACTOR)


class RowSums(NamedTuple):
    """S; Q, or None; the rounding error of the row of E, or None. (C,) each."""

    TOTAL: Any
    WEIGHTED: Any
    RESIDUAL: Any


class Tokens(NamedTuple):
    """Each row's token, the softcap's slope there, and logit_scale / T."""

    TOKENS: Any  # (C,)
    SLOPE: Any  # (C,), or None where all are 1
    SCALE: Any  # (C,), or None where `scale` serves all rows
    scale: Any


class Terms(NamedTuple):
    """The inputs of a loss, (C,) each: the fields of `fastpg.loss.policy_loss.TokenTerms`."""

    MASKED: Any  # uint8: 1 for rows that add nothing, whose other inputs may be anything; None where every row counts
    OLD: Any  # None: on-policy
    ADVANTAGES: Any
    WEIGHTS: Any  # or () where all rows share it
    ROLLOUT: Any  # or None
    REF: Any  # or None


class Results(NamedTuple):
    """The results of each row, (C,) each."""

    LOGP: Any
    LOSS: Any
    ENTROPY: Any  # or None
    FACTOR: Any  # u, 0 where a row is masked or flagged; None without a gradient
    STATE: Any  # int8: 0 both are in range, 1 the factor is not, 2 the sum is not


class Tile(NamedTuple):
    """Compile-time constants: the rows and columns that a program takes at a time, and switches."""

    ROWS: int
    BLOCK: int
    EMULATE: bool
    KL_IS_WEIGHTED: bool
    SHOW_LOST: bool
    SAME_WEIGHT: bool


@triton.jit
def _complete_exps(sums, total, r, inside, tokens, tiles, V, RESIDUAL, TILE: tl.constexpr):
    """Writes the target's entry of E, or a row of zeros where the row is lost; stores the rounding error of the row."""
    ROWS: tl.constexpr = TILE.ROWS
    BLOCK: tl.constexpr = TILE.BLOCK
    kept = total < LARGEST_SUM
    token = tl.load(tokens.TOKENS + r, mask=inside, other=-1).to(tl.int64)
    is_here = (token >= 0) & (token < V)  # with a sharded vocabulary another rank may hold it
    entry = -total
    if tokens.SLOPE is not None:
        entry = entry * tl.load(tokens.SLOPE + r, mask=inside, other=0.0)
    stored = round_to(entry, sums.E.dtype.element_ty, TILE.EMULATE)
    if RESIDUAL is not None:
        residual = row_sums(sums.R, r, inside, tiles, TILE.ROWS, TILE.BLOCK)
        residual += tl.where(is_here, entry - stored.to(tl.float32), 0.0)
        tl.store(RESIDUAL + r, tl.where(kept, residual, 0.0), mask=inside)
    tl.store(sums.E + r * sums.stride_e + token, stored, mask=kept & is_here)
    lost = inside & ~kept
    if tl.max(lost.to(tl.int32), 0) > 0:
        for start in range(0, V, TILE.BLOCK):
            columns = (start + tl.arange(0, TILE.BLOCK))[None, :]
            pointers = sums.E + r[:, None] * sums.stride_e + columns
            zeros = tl.zeros((ROWS, BLOCK), sums.E.dtype.element_ty)
            tl.store(pointers, zeros, mask=lost[:, None] & (columns < V))


@triton.jit
def _row_factor(g, total, anchor, keep, in_range, tokens, r, inside, SHOW_LOST: tl.constexpr):
    """u, whether it is in range, and whether the row is lost."""
    if tokens.SCALE is not None:
        scale = tl.load(tokens.SCALE + r, mask=inside, other=0.0)
    else:
        scale = tl.where(inside, tokens.scale, 0.0)
    factor = -g * scale / (total + tl.exp(anchor))
    size = tl.abs(factor)
    # tests g and not u, because a u that underflowed to 0 is out of range
    factor_in_range = (g == 0) | ~keep | ((size >= SMALLEST_FACTOR) & (size <= LARGEST_FACTOR))
    lost = ~(total < LARGEST_SUM) | ~(size < float("inf"))
    if SHOW_LOST:
        factor = tl.where(keep, tl.where(lost, float("nan"), factor), 0.0)
    else:
        factor = tl.where(keep & in_range & factor_in_range, factor, 0.0)
    return factor, factor_in_range, lost


@triton.jit
def _row_weights(terms, r, keep, SAME: tl.constexpr):
    if SAME:
        return tl.load(terms.WEIGHTS)
    else:
        return tl.load(terms.WEIGHTS + r, mask=keep, other=0.0)


@triton.jit
def _add_loss(total, weighted, r, inside, tokens, terms, results, into, OBJECTIVE, KL, numbers, TILE: tl.constexpr):
    """Log-probability, entropy, loss, factor and state of the rows r, from their sums; and the sums of this program."""
    keep = inside
    if terms.MASKED is not None:
        keep = tl.load(terms.MASKED + r, mask=inside, other=1) == 0
    old, rollout, ref = None, None, None  # (Triton 3.5 has no functions that return None)
    anchor = tl.zeros_like(total)
    if terms.OLD is not None:
        old = load_fp32(terms.OLD, r, keep)
        anchor = log_anchor(old)
    if terms.ROLLOUT is not None:
        rollout = load_fp32(terms.ROLLOUT, r, keep)
    if terms.REF is not None:
        ref = load_fp32(terms.REF, r, keep)
    some = tl.where(total == 0, 1.0, total)
    log_total = tl.where(total == 0, float("-inf"), tl.log(some))
    t = log_total - anchor
    logp = log_sigmoid(-t)
    loss, g = token_loss(
        logp, old, load_fp32(terms.ADVANTAGES, r, keep), _row_weights(terms, r, keep, TILE.SAME_WEIGHT), rollout, ref,
        OBJECTIVE, numbers.bounds, KL, numbers.kl_coef, numbers.kl_max_log_ratio, TILE.KL_IS_WEIGHTED,
    )  # fmt: skip
    in_range = (total >= SMALLEST_SUM) & (total < LARGEST_SUM)
    factor_in_range = inside
    lost = ~(total < LARGEST_SUM)
    if results.FACTOR is not None:
        factor, factor_in_range, lost = _row_factor(g, total, anchor, keep, in_range, tokens, r, inside, TILE.SHOW_LOST)
        tl.store(results.FACTOR + r, factor, mask=inside)
    if TILE.SHOW_LOST:
        logp = tl.where(lost, float("nan"), logp)
        loss = tl.where(lost, float("nan"), loss)
    tl.store(results.LOGP + r, tl.where(keep, logp, 0.0), mask=inside)
    tl.store(results.LOSS + r, tl.where(keep, loss, 0.0), mask=inside)
    tl.store(results.STATE + r, tl.where(in_range, tl.where(factor_in_range, 0, 1), 2).to(tl.int8), mask=inside)
    entropy = None
    if results.ENTROPY is not None:
        entropy = entropy_from_log_odds(t, tl.where(total == 0, 0.0, log_total - weighted / some))
        if TILE.SHOW_LOST:
            entropy = tl.where(lost, float("nan"), entropy)
        tl.store(results.ENTROPY + r, tl.where(keep, entropy, 0.0), mask=inside)
    if terms.OLD is None:
        old = logp
    store_sums(into, keep, loss, logp, old, entropy, ~(in_range & factor_in_range), numbers.ratio_range)


@triton.jit
def finish_kernel(
    sums,
    tokens,
    C,
    tiles,
    V,
    out,
    terms,  # None without an objective, as are the parameters after it, TILE apart
    results,
    into,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    numbers,
    TILE: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * TILE.ROWS + tl.arange(0, TILE.ROWS)
    inside = r < C
    total = row_sums(sums.S, r, inside, tiles, TILE.ROWS, TILE.BLOCK)
    tl.store(out.TOTAL + r, total, mask=inside)
    weighted = total
    if sums.Q is not None:
        weighted = row_sums(sums.Q, r, inside, tiles, TILE.ROWS, TILE.BLOCK)
        if out.WEIGHTED is not None:
            tl.store(out.WEIGHTED + r, weighted, mask=inside)
    if sums.E is not None:
        _complete_exps(sums, total, r, inside, tokens, tiles, V, out.RESIDUAL, TILE)
    if OBJECTIVE is not None:
        _add_loss(total, weighted, r, inside, tokens, terms, results, into, OBJECTIVE, KL, numbers, TILE)


def finish(sums: TileSums, tokens: Tokens) -> RowSums:
    """Completes E in place; returns S, Q and the rounding errors of its rows."""
    out = _row_sums(sums, sums.Q is not None)
    _launch(sums, tokens, out, None, None, None, None)
    return out


def finish_with_loss(
    sums: TileSums, tokens: Tokens, terms: Terms, loss: Loss, into: Sums | None = None
) -> tuple[RowSums, Results]:
    """`finish` without Q, and the log-probability, loss, entropy, factor and state of each row.

    into: where the sums of the launch go, a number of each field for each of its `programs`; None: nobody wants them.
    """
    out = _row_sums(sums, False)
    if into is None:
        count = programs(sums.S.shape[0])
        into = Sums(sums.S.new_empty(FIELDS, count), count, 0)
    entropy, factor = (None if x is None else torch.empty_like(out.TOTAL) for x in (sums.Q, sums.E))
    state = torch.empty_like(out.TOTAL, dtype=torch.int8)
    results = Results(torch.empty_like(out.TOTAL), torch.empty_like(out.TOTAL), entropy, factor, state)
    _launch(sums, tokens, out, terms, results, into, loss)
    return out, results


def programs(count: int) -> int:
    """The number of programs of a launch for `count` rows."""
    return cdiv(count, ROWS_PER_PROGRAM)


def _row_sums(sums: TileSums, weighted: bool) -> RowSums:
    count = sums.S.shape[0]
    return RowSums(*(sums.S.new_empty(count) if wanted else None for wanted in (True, weighted, sums.R is not None)))


def _launch(
    sums: TileSums,
    tokens: Tokens,
    out: RowSums,
    terms: Terms | None,
    results: Results | None,
    into: Sums | None,
    loss: Loss | None,
) -> None:
    count, tiles = sums.S.shape
    if not count:
        return
    objective, kl, numbers, switches = None, None, None, (False, False, False)
    if loss is not None:
        objective, kl, numbers = loss.objective, loss.kl, numbers_of(loss)
        switches = loss.kl_is_weighted, loss.show_lost, terms.WEIGHTS.dim() == 0
    tile = Tile(ROWS_PER_PROGRAM, _BLOCK, INTERPRETED, *switches)
    vocab = 1 if sums.E is None else sums.E.shape[1]
    finish_kernel[(programs(count),)](
        sums, tokens, count, tiles, vocab, out, terms, results, into, objective, kl, numbers, tile
    )  # fmt: skip
