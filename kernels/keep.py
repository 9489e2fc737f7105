"""Kernel 10: which tokens count, which of these are computed, and how many. The first launch of a call.

    keep_n     = token_n != -100 and mask_n
    computed_n = keep_n, unless token n adds exactly 0 to the loss: rollout_n A_n = 0, and old_n and the weight are finite

It also counts the tokens outside the vocabulary and the temperatures that are not positive numbers, so that the host learns all
of that from one read. A token with a value of NaN or inf is computed, so that it makes the loss NaN.
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

    ADVANTAGES: Any
    ROLLOUT: Any  # or None
    OLD: Any  # None: on-policy
    WEIGHT: Any  # one number, what all tokens weigh; None where it is finite


class Keep(NamedTuple):
    """The results, (N,) each, and their sums."""

    KEEP: Any  # uint8 in the kernel, else bool
    COMPUTED: Any  # likewise; None where it is the same
    NUMBERS: Any  # (programs, 4) int32: tokens that count, computed ones, ids out of range, temperatures out of range


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
def _store_sums(out, program, keep, computed, foreign, improper):
    place = out.NUMBERS + program * 4
    tl.store(place, tl.sum(keep.to(tl.int32), 0))
    tl.store(place + 1, tl.sum(computed.to(tl.int32), 0))
    tl.store(place + 2, tl.sum(foreign.to(tl.int32), 0))
    tl.store(place + 3, tl.sum(improper.to(tl.int32), 0))


@triton.jit
def keep_kernel(tokens, factors, N, V, out, BLOCK: tl.constexpr):
    """factors: None where no token is skipped. V: None where ids are not looked at."""
    program = tl.program_id(0)
    n = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    token = tl.load(tokens.TOKENS + n, mask=inside, other=IGNORED_TOKEN)
    keep = inside & (token != IGNORED_TOKEN)
    if tokens.MASK is not None:
        keep = keep & (tl.load(tokens.MASK + n, mask=inside, other=0) != 0)
    computed = keep
    if factors is not None:
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
    _store_sums(out, program, keep, computed, foreign, improper)


def keep(tokens: Tokens, factors: Factors | None, vocab: int | None) -> Keep:
    """KEEP and COMPUTED, (N,) each; the sums of NUMBERS over programs, (4,) int64."""
    ids = tokens.TOKENS
    programs = cdiv(len(ids), _BLOCK)
    out = Keep(
        torch.empty_like(ids, dtype=torch.bool),
        None if factors is None else torch.empty_like(ids, dtype=torch.bool),
        ids.new_empty(programs, 4, dtype=torch.int32),
    )
    if programs:
        computed = None if factors is None else out.COMPUTED.view(torch.uint8)
        as_bytes = Keep(out.KEEP.view(torch.uint8), computed, out.NUMBERS)
        keep_kernel[(programs,)](tokens, factors, len(ids), vocab, as_bytes, BLOCK=_BLOCK)
    return out._replace(NUMBERS=out.NUMBERS.sum(0))
