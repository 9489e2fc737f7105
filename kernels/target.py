"""Kernel 1: the logit of each row's own token, by one dot product per row.

    z_n,y = logits(x_n . w_y + b_y)              2 N H flops, against 2 N H V of a matrix product

It is what the one-pass schedule anchors a row's sum with, before any other logit is known. Also the softcap's slope there.
"""

import torch
import triton
import triton.language as tl

from .logits import ROWS_PER_PROGRAM, logits

_BLOCK = 512


@triton.jit
def target_kernel(
    X,  # (C, H)
    W,  # (V, H)
    BIAS,  # (V,) or None
    TOKENS,  # (C,)
    SCALE,  # (C,)
    TARGET,  # (C,) out
    SLOPE,  # (C,) out
    inner,
    C,
    V,
    H,
    stride_x,
    stride_w,
    stride_h,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_chunk = rows < C
    token = tl.load(TOKENS + rows, mask=in_chunk, other=-1).to(tl.int64)
    inside = (token >= 0) & (token < V)
    column = tl.where(inside, token, 0)
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, H, BLOCK):
        h = (start + tl.arange(0, BLOCK))[None, :]
        mask = in_chunk[:, None] & (h < H)
        x = tl.load(X + rows[:, None] * stride_x + h, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(W + column[:, None] * stride_w + h.to(tl.int64) * stride_h, mask=mask, other=0.0).to(tl.float32)
        products += x * w
    score = tl.sum(products, 1)
    if BIAS is not None:
        score += tl.load(BIAS + column).to(tl.float32)
    z, slope = logits(score, tl.load(SCALE + rows, mask=in_chunk, other=0.0), inner, SOFTCAP)
    # an infinite anchor would turn a row of other infinities into an ordinary one
    tl.store(TARGET + rows, tl.where(inside & (z != float("inf")), z, float("nan")), mask=in_chunk)
    tl.store(SLOPE + rows, tl.zeros((ROWS,), tl.float32) + slope, mask=in_chunk)


def target_logits(
    hidden: torch.Tensor,  # (C, H)
    weight: torch.Tensor,  # (V, H)
    bias: torch.Tensor | None,  # (V,)
    tokens: torch.Tensor,  # (C,)
    scale: torch.Tensor,  # (C,) fp32
    inner: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_y and the softcap's slope there (1 without one), each (C,) fp32; z_y is NaN for a token outside the vocabulary."""
    target, slope = torch.empty_like(scale), torch.empty_like(scale)
    if len(tokens):
        target_kernel[(triton.cdiv(len(tokens), ROWS_PER_PROGRAM),)](
            hidden, weight, bias, tokens, scale, target, slope, inner or 1.0, len(tokens), *weight.shape,
            hidden.stride(0), *weight.stride(), SOFTCAP=inner is not None, ROWS=ROWS_PER_PROGRAM, BLOCK=_BLOCK,
        )  # fmt: skip
    return target, slope
