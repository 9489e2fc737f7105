"""Kernel 12: the loss of ready log-probabilities, and its gradient. The step that ends the two-pass schedule.

    loss_n, g_n = token_loss(logp, old, A, ...)               g = dloss/dlogp; both 0 where masked

Every program also leaves the sums of its tokens, which kernel 11 reduces to the loss and the metrics. Forward and backward of
CISPO with a mask are 9 operations and launches so, and 29 in PyTorch, without any metric.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import cdiv
from .objectives import Loss, numbers_of, token_loss
from .summary import FIELDS, Sums, store_sums, summary
from .tile import INTERPRETED, load_fp32

_BLOCK = 4096 if INTERPRETED else 512


class Terms(NamedTuple):
    """What is known of each token, (N,) each in any dtype. Where a token is masked they may be anything."""

    OLD: Any  # None: on-policy
    ADVANTAGES: Any
    WEIGHTS: Any  # or () where all tokens share it
    ROLLOUT: Any  # or None
    REF: Any  # or None


class Tile(NamedTuple):
    """Compile-time constants: the tokens of a program, and switches."""

    BLOCK: int
    KL_IS_WEIGHTED: bool
    SAME_WEIGHT: bool


@triton.jit
def policy_loss_kernel(
    LOGP, MASK, terms, N, KEPT, GRADIENT, into, OBJECTIVE: tl.constexpr, KL: tl.constexpr, numbers, TILE: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * TILE.BLOCK + tl.arange(0, TILE.BLOCK)
    inside = n < N
    keep = inside
    if MASK is not None:
        keep = tl.load(MASK + n, mask=inside, other=0) != 0
    logp = load_fp32(LOGP, n, keep)
    if TILE.SAME_WEIGHT:
        weight = tl.load(terms.WEIGHTS)
    else:
        weight = load_fp32(terms.WEIGHTS, n, keep)
    old, rollout, ref = None, None, None  # (Triton 3.5 has no functions that return None)
    if terms.OLD is not None:
        old = load_fp32(terms.OLD, n, keep)
    if terms.ROLLOUT is not None:
        rollout = load_fp32(terms.ROLLOUT, n, keep)
    if terms.REF is not None:
        ref = load_fp32(terms.REF, n, keep)
    loss, g = token_loss(
        logp, old, load_fp32(terms.ADVANTAGES, n, keep), weight, rollout, ref, OBJECTIVE, numbers.bounds, KL,
        numbers.kl_coef, numbers.kl_max_log_ratio, TILE.KL_IS_WEIGHTED,
    )  # fmt: skip
    tl.store(KEPT + n, logp, mask=inside)
    tl.store(GRADIENT + n, tl.where(keep, g, 0.0), mask=inside)
    if terms.OLD is None:
        old = logp
    store_sums(into, keep, loss, logp, old, None, n < 0, numbers.ratio_range)


def policy_loss(
    logprobs: torch.Tensor,  # (N,), any floating dtype
    mask: torch.Tensor | None,  # (N,) uint8: 0 where masked
    terms: tuple,  # the fields of `Terms`
    loss: Loss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The log-probabilities (N,), 0 where masked; g (N,); the loss (); the metrics. All in fp32."""
    count, terms = len(logprobs), Terms(*terms)
    kept, gradient = (torch.empty_like(logprobs, dtype=torch.float32) for _ in range(2))
    programs = cdiv(count, _BLOCK)
    values = kept.new_empty(FIELDS, programs)
    if programs:
        tile = Tile(_BLOCK, loss.kl_is_weighted, terms.WEIGHTS.dim() == 0)
        policy_loss_kernel[(programs,)](
            logprobs, mask, terms, count, kept, gradient, Sums(values, programs, 0), loss.objective, loss.kl,
            numbers_of(loss), tile,
        )  # fmt: skip
    return kept, gradient, *summary(values, entropy=False)
