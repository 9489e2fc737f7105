"""Kernel 1: the logit of each row's own token, by one dot product per row.

    z_n,y = logits(x_n . w_y + l_n . B_y + b_y)              2 N H flops, against 2 N H V of a matrix product

The one-pass schedule anchors each row's sum with this logit, before any other logit is known: given the old log-probabilities,
the kernel stores the anchor z_y - clamp(old, -60, 0) in its place. The forward of two passes takes z_y from here too (see
kernel 4). The kernel also stores the softcap's slope there.
"""

import torch
import triton
import triton.language as tl

from .blocks import cdiv
from .operands import Operands, head_of, rows_of
from .tile import ROWS_PER_PROGRAM, log_anchor, logits, row_scale, row_token

_BLOCK = 512


@triton.jit
def target_kernel(X, W, rows, head, stride_r, OLD, TARGET, SLOPE, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """stride_r: the stride of B along its rank. OLD: old log-probabilities (C,), or None."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_chunk = r < rows.C
    token = row_token(rows, r, in_chunk).to(tl.int64)
    inside = (token >= 0) & (token < head.V)
    column = tl.where(inside, token, 0)
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, head.H, BLOCK):
        h = (start + tl.arange(0, BLOCK))[None, :]
        mask = in_chunk[:, None] & (h < head.H)
        x = tl.load(X + r[:, None] * rows.stride_x + h, mask=mask, other=0.0).to(tl.float32)
        place = column[:, None] * head.stride_w + h.to(tl.int64) * head.stride_h
        products += x * tl.load(W + place, mask=mask, other=0.0).to(tl.float32)
    if head.B is not None:
        for start in range(0, head.rank, BLOCK):
            k = (start + tl.arange(0, BLOCK))[None, :]
            mask = in_chunk[:, None] & (k < head.rank)
            low_rank = tl.load(rows.L + r[:, None] * rows.stride_l + k, mask=mask, other=0.0)
            place = column[:, None] * head.stride_b + k.to(tl.int64) * stride_r
            products += low_rank * tl.load(head.B + place, mask=mask, other=0.0).to(tl.float32)
    score = tl.sum(products, 1)
    if head.BIAS is not None:
        score += tl.load(head.BIAS + column).to(tl.float32)
    z, slope = logits(score, row_scale(rows, r, in_chunk), head.inner)
    # +inf becomes NaN: as an anchor it would make all other entries of E 0, and the row would look certain
    z = tl.where(inside & (z != float("inf")), z, float("nan"))
    if OLD is not None:
        z -= log_anchor(tl.load(OLD + r, mask=in_chunk, other=0.0))
    tl.store(TARGET + r, z, mask=in_chunk)
    if SLOPE is not None:
        tl.store(SLOPE + r, slope, mask=in_chunk)


def target_logits(p: Operands, old: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z_y (C,) fp32, NaN where it is +inf or the token is outside the vocabulary; the softcap's slope there, or None.

    With old (C,) fp32 the anchor z_y - clamp(old, -60, 0) in place of z_y.
    """
    target, slope, count = p.vector(), None if p.inner is None else p.vector(), p.tokens.shape[0]
    if count:
        low_rank, b = (None, None) if p.lora is None else p.lora
        stride_r = None if b is None else b.stride(1)
        target_kernel[(cdiv(count, ROWS_PER_PROGRAM),)](
            p.hidden, p.weight, rows_of(p, low_rank), head_of(p, b), stride_r, old, target, slope,
            ROWS=ROWS_PER_PROGRAM, BLOCK=_BLOCK,
        )  # fmt: skip
    return target, slope
