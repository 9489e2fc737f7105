"""Kernel 11: the loss of a call and its metrics, from a few sums over the rows of every program.

A kernel that computes the loss of its rows (3 and 12) also leaves ten numbers per program, by `store_sums`. With d = logp - old
and r = exp(d), over the rows that count:

    sum of the losses        number of rows           max d              sum r / r_max            sum (r / r_max)^2
    sum d                    sum of r - 1 - d         ratios outside     sum of entropies         flagged rows
                                                      the clip's bounds

r is taken relative to the largest of the program, r_max = exp(max d), because squares of r would leave fp32's range. One
program then reduces these numbers, in a fixed order, to the loss and to the metrics of `fastpg.loss.metrics`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .limits import SUMMARY
from .objectives import kl_k3

_BLOCK = 1024

# the places of the numbers of a program
_LOSS, _COUNT, _LARGEST, _RATIO, _SQUARE, _LOG_RATIO, _K3, _OUTSIDE, _ENTROPY, _FLAGGED = map(tl.constexpr, range(10))
FIELDS = 10


class Sums(NamedTuple):
    """Where the programs of a launch leave their numbers."""

    VALUES: Any  # (FIELDS, programs of the call) fp32
    stride: Any  # from one field to the next
    first: Any  # the place of the launch's first program


class Summary(NamedTuple):
    LOSS: Any  # ()
    METRICS: Any  # (8,): `limits.SUMMARY`; 0 for an entropy that is not wanted


@triton.jit
def _finite_or_zero(x):
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _is_outside(ratio, bounds):
    outside = ratio < 0
    if bounds.low is not None:
        outside = outside | (ratio < bounds.low)
    if bounds.high is not None:
        outside = outside | (ratio > bounds.high)
    return outside


@triton.jit
def store_sums(sums, keep, loss, logp, old, entropy, flagged, bounds):
    """Stores the numbers of this program, over its rows with `keep`. entropy: None where none is wanted."""
    place = sums.VALUES + sums.first + tl.program_id(0)
    d = tl.where(keep, logp - old, 0.0)
    log_ratios = tl.sum(d, 0)
    largest = tl.max(tl.where(keep, d, float("-inf")), 0)
    largest = tl.where(log_ratios == log_ratios, largest, log_ratios)  # tl.max drops a NaN
    ratio = tl.where(keep, tl.exp(d - _finite_or_zero(largest)), 0.0)
    k3, _, _ = kl_k3(d)
    outside = keep & _is_outside(tl.exp(d), bounds)
    tl.store(place + _LOSS * sums.stride, tl.sum(tl.where(keep, loss, 0.0), 0))
    tl.store(place + _COUNT * sums.stride, tl.sum(keep.to(tl.float32), 0))
    tl.store(place + _LARGEST * sums.stride, largest)
    tl.store(place + _RATIO * sums.stride, tl.sum(ratio, 0))
    tl.store(place + _SQUARE * sums.stride, tl.sum(ratio * ratio, 0))
    tl.store(place + _LOG_RATIO * sums.stride, log_ratios)
    tl.store(place + _K3 * sums.stride, tl.sum(k3, 0))
    tl.store(place + _OUTSIDE * sums.stride, tl.sum(outside.to(tl.float32), 0))
    if entropy is not None:
        tl.store(place + _ENTROPY * sums.stride, tl.sum(tl.where(keep, entropy, 0.0), 0))
    tl.store(place + _FLAGGED * sums.stride, tl.sum((keep & flagged).to(tl.float32), 0))


@triton.jit
def _total(VALUES, programs, field, BLOCK: tl.constexpr):
    """The sum of one field over all programs."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        total += tl.load(VALUES + field * programs + p, mask=p < programs, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _ratio_sums(VALUES, programs, log_ratios, BLOCK: tl.constexpr):
    """max d, sum r / r_max and sum (r / r_max)^2 over all programs."""
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, programs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(VALUES + _LARGEST * programs + p, mask=p < programs, other=float("-inf")))
    top = tl.where(log_ratios == log_ratios, tl.max(largest, 0), log_ratios)
    ratio = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        own = tl.load(VALUES + _LARGEST * programs + p, mask=p < programs, other=float("-inf"))
        share = tl.where(own == float("-inf"), 0.0, tl.exp(_finite_or_zero(own) - _finite_or_zero(top)))
        ratio += share * tl.load(VALUES + _RATIO * programs + p, mask=p < programs, other=0.0)
        square += share * share * tl.load(VALUES + _SQUARE * programs + p, mask=p < programs, other=0.0)
    return top, tl.sum(ratio, 0), tl.sum(square, 0)


@triton.jit
def summary_kernel(VALUES, programs, out, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    count = _total(VALUES, programs, _COUNT, BLOCK)
    some = tl.maximum(count, 1.0)
    log_ratios = _total(VALUES, programs, _LOG_RATIO, BLOCK)
    top, ratio, square = _ratio_sums(VALUES, programs, log_ratios, BLOCK)
    tl.store(out.LOSS, _total(VALUES, programs, _LOSS, BLOCK))
    tl.store(out.METRICS, ratio * tl.exp(_finite_or_zero(top)) / some)
    tl.store(out.METRICS + 1, tl.exp(top))
    tl.store(out.METRICS + 2, _total(VALUES, programs, _OUTSIDE, BLOCK) / some)
    tl.store(out.METRICS + 3, tl.where(count == 0, 1.0, ratio * ratio / (some * square)))
    tl.store(out.METRICS + 4, -log_ratios / some)
    tl.store(out.METRICS + 5, _total(VALUES, programs, _K3, BLOCK) / some)
    entropy = 0.0
    if ENTROPY:
        entropy = _total(VALUES, programs, _ENTROPY, BLOCK) / some
    tl.store(out.METRICS + 6, entropy)
    tl.store(out.METRICS + 7, _total(VALUES, programs, _FLAGGED, BLOCK))


def summary(values: torch.Tensor, entropy: bool) -> Summary:
    """The loss and the metrics, from the numbers (FIELDS, programs) of all programs of a call."""
    out = Summary(values.new_empty(()), values.new_empty(len(SUMMARY)))
    summary_kernel[(1,)](values, values.shape[1], out, ENTROPY=entropy, BLOCK=_BLOCK)
    return out
