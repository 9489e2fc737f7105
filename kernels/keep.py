"""Kernel 10: which tokens count, which of these are computed, and how many. The first launch of a call.

    keep_n     = token_n != -100 and mask_n
    computed_n = keep_n, unless token n adds exactly 0 to the loss: rollout_n A_n = 0, and old_n and the weight are finite

It also counts the tokens outside the vocabulary and the temperatures that are not positive numbers, so that the host learns all
of that from one read. A token with a value of NaN or inf is computed, so that it makes the loss NaN.

The rows may also have been chosen before, as ascending `indices`. Then the kernel counts those that are not of a token that
counts, and the tokens that they leave out though computed_n holds.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import limits
from .blocks import cdiv
from .tile import INTERPRETED

_BLOCK = 4096 if INTERPRETED else 1024

IGNORED_TOKEN = tl.constexpr(limits.IGNORED_TOKEN)


class Tokens(NamedTuple):
    """What is known of each token, (N,) each."""

    TOKENS: Any
    MASK: Any  # uint8: 0 where a token does not count; None: all count
    TEMPERATURE: Any  # None where it need not be looked at
    stride_t: Any  # 0 where one temperature serves all tokens


class Factors(NamedTuple):
    """What a token's loss is multiplied by, and the old log-probability, (N,) fp32 each."""

    ADVANTAGES: Any = None  # None, as all are then: no token is skipped
    ROLLOUT: Any = None  # or None
    OLD: Any = None  # None: on-policy
    WEIGHT: Any = None  # one number, what all tokens weigh; None where it is finite


class Keep(NamedTuple):
    """The results, (N,) each, and their sums."""

    KEEP: Any  # uint8 in the kernel, else bool
    COMPUTED: Any  # likewise; None where it is the same
    # (programs, 6) int32: tokens that count, computed ones, ids out of range, temperatures out of range; of given indices, the
    # misplaced ones, and the tokens that are missing among them
    NUMBERS: Any


@triton.jit
def _keeps(tokens, n, inside):
    """The ids of the tokens n, and whether they count."""
    token = tl.load(tokens.TOKENS + n, mask=inside, other=IGNORED_TOKEN)
    keep = inside & (token != IGNORED_TOKEN)
    if tokens.MASK is not None:
        keep = keep & (tl.load(tokens.MASK + n, mask=inside, other=0) != 0)
    return token, keep


@triton.jit
def _adds_nothing(factors, n, inside):
    """Whether the loss of a token, and its gradient, is exactly 0."""
    factor = tl.load(factors.ADVANTAGES + n, mask=inside, other=0.0)
    if factors.ROLLOUT is not None:
        factor = factor * tl.load(factors.ROLLOUT + n, mask=inside, other=0.0)
    if factors.WEIGHT is not None:
        weight = tl.load(factors.WEIGHT)
        factor += weight - weight  # NaN where it is not finite, which no factor of 0 hides
    nothing = factor == 0
    if factors.OLD is not None:
        nothing = nothing & (tl.abs(tl.load(factors.OLD + n, mask=inside, other=0.0)) < float("inf"))
    return nothing


@triton.jit
def _of_indices(tokens, factors, INDICES, K, N, k):
    """Of the indices k: whether each is one, whether it is misplaced, and whether its token would be computed."""
    is_row = k < K
    index = tl.load(INDICES + k, mask=is_row, other=0)
    before = tl.load(INDICES + k - 1, mask=is_row & (k > 0), other=-1)
    inside = is_row & (index >= 0) & (index < N)
    place = tl.where(inside, index, 0)
    _, keep = _keeps(tokens, place, inside)
    needed = keep
    if factors.ADVANTAGES is not None:
        needed = keep & ~_adds_nothing(factors, place, inside)
    return is_row, is_row & ~(keep & (index > before)), needed


@triton.jit
def _count(x):
    return tl.sum(x.to(tl.int32), 0)


@triton.jit
def keep_kernel(tokens, factors, INDICES, K, N, V, out, BLOCK: tl.constexpr):
    """INDICES (K,): None where none are given. V: None where ids are not looked at."""
    program = tl.program_id(0)
    n = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    token, keep = _keeps(tokens, n, inside)
    computed = keep
    if factors.ADVANTAGES is not None:
        computed = keep & ~_adds_nothing(factors, n, inside)
    foreign = n < 0
    if V is not None:
        foreign = keep & ((token < 0) | (token >= V))
    improper = n < 0
    if tokens.TEMPERATURE is not None:
        temperature = tl.load(tokens.TEMPERATURE + n * tokens.stride_t, mask=inside, other=1.0).to(tl.float32)
        improper = keep & ~((temperature > 0) & (temperature < float("inf")))
    tl.store(out.KEEP + n, keep.to(tl.uint8), mask=inside)
    if out.COMPUTED is not None:
        tl.store(out.COMPUTED + n, computed.to(tl.uint8), mask=inside)
    place = out.NUMBERS + program * 6
    rows, misplaced, missing = _count(computed), 0, 0
    if INDICES is not None:
        is_row, is_misplaced, needed = _of_indices(tokens, factors, INDICES, K, N, n)
        missing = rows - _count(needed)
        rows, misplaced = _count(is_row), _count(is_misplaced)
    tl.store(place, _count(keep))
    tl.store(place + 1, rows)
    tl.store(place + 2, _count(foreign))
    tl.store(place + 3, _count(improper))
    tl.store(place + 4, misplaced)
    tl.store(place + 5, missing)


def keep(tokens: Tokens, factors: Factors, indices: torch.Tensor | None, vocab: int | None) -> Keep:
    """KEEP and COMPUTED, (N,) each; the sums of NUMBERS over programs, (6,) int64. indices (K,), of K <= N rows, or None."""
    ids = tokens.TOKENS
    count = ids.shape[0]
    programs = cdiv(count, _BLOCK)
    out = Keep(
        torch.empty_like(ids, dtype=torch.bool),
        None if factors.ADVANTAGES is None else torch.empty_like(ids, dtype=torch.bool),
        ids.new_empty(programs, 6, dtype=torch.int32),
    )
    if programs:
        computed = None if out.COMPUTED is None else out.COMPUTED.view(torch.uint8)
        as_bytes = Keep(out.KEEP.view(torch.uint8), computed, out.NUMBERS)
        rows = None if indices is None else indices.shape[0]
        keep_kernel[(programs,)](tokens, factors, indices, rows, count, vocab, as_bytes, BLOCK=_BLOCK)
    return Keep(out.KEEP, out.COMPUTED, out.NUMBERS.sum(0))
