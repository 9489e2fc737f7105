"""Kernel 3: from partial sums to what a row is, a few rows per program; with CISPO, all the way to its gradient's factor.

    S = sum of the partials in a fixed order (Q, R likewise)
    E_y = -S slope_y                                          the gradient of the target's own column, which kernel 2 left at 0

A row whose sum is not below 2^99 has lost its entries to overflow or NaN: it is stored as zeros, so that nothing of it
reaches products 2 and 3 (the schedule computes it again, or makes the result NaN). With CISPO also

    t = log S - a        logp = logsigmoid(-t)                a: the anchor's log-probability; S e^-a = (1 - p_y) / p_y
    c = clip(exp(logp - old)) A                               `cispo_coefficient`, held constant
    loss = w c logp      g = dloss/dlogp = w c                w = -weight_n / D of the reduction, times the rollout weight
    u = -g logit_scale / (T (S + e^a))                        the row's factor: dX = u (E @ W), dW = E^T (u x)

and whether S and u are in the range where 16-bit exponents and fp32 sums are safe. Any other objective takes S, Q and R from
here and does the rest in PyTorch, on vectors.
"""

import torch
import triton
import triton.language as tl

from .logits import INTERPRETED, ROWS_PER_PROGRAM, log_sigmoid, round_to, row_sums

_BLOCK = 512

SMALLEST_SUM, LARGEST_SUM = tl.constexpr(2.0**-90), tl.constexpr(2.0**99)
SMALLEST_FACTOR, LARGEST_FACTOR = tl.constexpr(2.0**-110), tl.constexpr(2.0**110)


@triton.jit
def cispo_coefficient(logp, old, advantage, ratio_min, ratio_max):
    """clip(exp(logp - old), ratio_min, ratio_max) A, a bound of None being none. NaN stays NaN.

    MiniMax-M1 (arXiv 2506.13585), equations 4 and 5, with bounds on the ratio itself.
    """
    ratio = tl.exp(logp - old)
    if ratio_min is not None:
        ratio = tl.maximum(ratio, ratio_min, propagate_nan=tl.PropagateNan.ALL)
    if ratio_max is not None:
        ratio = tl.minimum(ratio, ratio_max, propagate_nan=tl.PropagateNan.ALL)
    return ratio * advantage


@triton.jit
def finalize_kernel(
    S,  # (C, tiles)
    Q,  # (C, tiles) or None
    R,  # (C, tiles) or None
    TOKENS,  # (C,)
    SLOPE,  # (C,)
    E,  # (C, V) in and out, or None
    SUM,  # (C,) out
    WEIGHTED,  # (C,) out, or None
    RESIDUAL,  # (C,) out, or None
    LOG_ANCHOR,  # (C,), with CISPO
    OLD,  # (C,), with CISPO
    ADVANTAGE,  # (C,), with CISPO
    WEIGHT,  # (C,), with CISPO
    MASKED,  # (C,) uint8 or None, with CISPO
    ROW_SCALE,  # (C,) logit_scale / T, with CISPO
    LOGP,  # (C,) out, with CISPO
    LOSS,  # (C,) out, with CISPO
    FACTOR,  # (C,) out, with CISPO
    STATE,  # (C,) int8 out, with CISPO: 0 in range, 1 the factor is not, 2 the sum is not
    ratio_min,
    ratio_max,
    C,
    tiles,
    V,
    stride_e,
    CISPO: tl.constexpr,
    EMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < C
    total = row_sums(S, rows, inside, tiles, ROWS, BLOCK)
    tl.store(SUM + rows, total, mask=inside)
    if Q is not None:
        tl.store(WEIGHTED + rows, row_sums(Q, rows, inside, tiles, ROWS, BLOCK), mask=inside)
    if E is not None:
        kept = total < LARGEST_SUM
        token = tl.load(TOKENS + rows, mask=inside, other=-1).to(tl.int64)
        is_here = (token >= 0) & (token < V)  # with a sharded vocabulary another rank may have it
        entry = -total * tl.load(SLOPE + rows, mask=inside, other=0.0)
        stored = round_to(entry, E.dtype.element_ty, EMULATE)
        if R is not None:
            residual = row_sums(R, rows, inside, tiles, ROWS, BLOCK)
            residual += tl.where(is_here, entry - stored.to(tl.float32), 0.0)
            tl.store(RESIDUAL + rows, tl.where(kept, residual, 0.0), mask=inside)
        tl.store(E + rows * stride_e + token, stored, mask=kept & is_here)
        lost = inside & ~kept
        if tl.max(lost.to(tl.int32), 0) > 0:
            for start in range(0, V, BLOCK):
                columns = (start + tl.arange(0, BLOCK))[None, :]
                pointers = E + rows[:, None] * stride_e + columns
                tl.store(pointers, tl.zeros((ROWS, BLOCK), E.dtype.element_ty), mask=lost[:, None] & (columns < V))
    if CISPO:
        keep = inside
        if MASKED is not None:
            keep = tl.load(MASKED + rows, mask=inside, other=1) == 0
        log_anchor = tl.load(LOG_ANCHOR + rows, mask=inside, other=0.0)
        weight = tl.load(WEIGHT + rows, mask=inside, other=0.0)
        old = tl.load(OLD + rows, mask=inside, other=0.0)
        advantage = tl.load(ADVANTAGE + rows, mask=inside, other=0.0)
        logp = log_sigmoid(log_anchor - tl.log(tl.where(inside, total, 1.0)))
        coefficient = cispo_coefficient(logp, old, advantage, ratio_min, ratio_max)
        g = weight * coefficient
        row_scale = tl.load(ROW_SCALE + rows, mask=inside, other=0.0)
        factor = tl.where(keep, -g * row_scale / (total + tl.exp(log_anchor)), 0.0)
        size = tl.abs(factor)
        # g and not u: a u that underflows is no zero
        factor_in_range = (g == 0) | ~keep | ((size >= SMALLEST_FACTOR) & (size <= LARGEST_FACTOR))
        sum_in_range = (total >= SMALLEST_SUM) & (total < LARGEST_SUM)
        tl.store(LOGP + rows, logp, mask=inside)
        tl.store(LOSS + rows, tl.where(keep, coefficient * logp * weight, 0.0), mask=inside)
        tl.store(FACTOR + rows, factor, mask=inside)
        tl.store(STATE + rows, tl.where(sum_in_range, tl.where(factor_in_range, 0, 1), 2).to(tl.int8), mask=inside)


def finalize(
    partials: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],  # of `anchored_exp`
    tokens: torch.Tensor,  # (C,)
    slope: torch.Tensor,  # (C,) of `target_logits`
    scores: torch.Tensor | None,  # (C, V) in and out
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S, Q and what rounding took from the rows of E, (C,) each, (0,) where there is none; completes E in place."""
    return _launch(partials, tokens, slope, scores, (None,) * 10, (None, None), CISPO=False)


def finalize_cispo(
    partials: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    tokens: torch.Tensor,
    slope: torch.Tensor,
    scores: torch.Tensor | None,
    log_anchor: torch.Tensor,  # (C,) fp32, as the next four
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    masked: torch.Tensor | None,  # (C,) bool: rows that add nothing
    ratio_min: float | None,
    ratio_max: float | None,
) -> tuple[torch.Tensor, ...]:
    """`finalize`, and logp, loss, u (C,) fp32 and the state (C,) int8: 0 in range, 1 the factor is not, 2 the sum is not."""
    outputs = *(torch.empty_like(log_anchor) for _ in range(3)), torch.empty_like(log_anchor, dtype=torch.int8)
    masked = None if masked is None else masked.view(torch.uint8)
    inputs = log_anchor, old_logprobs, advantages, weight, masked, row_scale
    return *_launch(partials, tokens, slope, scores, inputs + outputs, (ratio_min, ratio_max), CISPO=True), *outputs


def _launch(partials, tokens, slope, scores, cispo, bounds, CISPO):
    count, tiles = partials[0].shape
    # one of each where the kernel writes it; the partials of kernel 2 say what that is
    totals = tuple(None if p is None else slope.new_empty(count) for p in partials)
    if count:
        vocab, stride = (1, 0) if scores is None else (scores.shape[1], scores.stride(0))
        finalize_kernel[(triton.cdiv(count, ROWS_PER_PROGRAM),)](
            *partials, tokens, slope, scores, *totals, *cispo, *bounds, count, tiles, vocab, stride,
            CISPO=CISPO, EMULATE=INTERPRETED, ROWS=ROWS_PER_PROGRAM, BLOCK=_BLOCK,
        )  # fmt: skip
    return tuple(slope.new_empty(0) if t is None else t for t in totals)
