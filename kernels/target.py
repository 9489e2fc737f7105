"""Kernel 1: the logit of each row's own token, by one dot product per row.

    z_n,y = logits(x_n . w_y + l_n . B_y + b_y)              2 N H flops, against 2 N H V of a matrix product

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
    L,  # (C, rank) or None: of LoRA
    B,  # (V, rank) or None
    BIAS,  # (V,) or None
    TOKENS,  # (C,)
    SCALE,  # (C,)
    TARGET,  # (C,) out
    SLOPE,  # (C,) out
    inner,
    C,
    V,
    H,
    rank,
    stride_x,
    stride_w,
    stride_h,
    stride_l,
    stride_b,
    stride_r,
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
    if L is not None:
        for start in range(0, rank, BLOCK):
            r = (start + tl.arange(0, BLOCK))[None, :]
            mask = in_chunk[:, None] & (r < rank)
            low_rank = tl.load(L + rows[:, None] * stride_l + r, mask=mask, other=0.0)
            b = tl.load(B + column[:, None] * stride_b + r.to(tl.int64) * stride_r, mask=mask, other=0.0).to(tl.float32)
            products += low_rank * b
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
    lora: tuple[torch.Tensor, torch.Tensor] | None,  # l (C, rank) fp32 with contiguous rows, B (V, rank)
    bias: torch.Tensor | None,  # (V,)
    tokens: torch.Tensor,  # (C,)
    scale: torch.Tensor,  # (C,) fp32
    inner: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_y and the softcap's slope there (1 without one), each (C,) fp32; z_y is NaN for a token outside the vocabulary."""
    target, slope = torch.empty_like(scale), torch.empty_like(scale)
    if len(tokens):
        low_rank, b = (None, None) if lora is None else lora
        rank, strides = (0, (0, 0, 0)) if lora is None else (b.shape[1], (low_rank.stride(0), *b.stride()))
        target_kernel[(triton.cdiv(len(tokens), ROWS_PER_PROGRAM),)](
            hidden, weight, low_rank, b, bias, tokens, scale, target, slope, inner or 1.0, len(tokens), *weight.shape, rank,
            hidden.stride(0), *weight.stride(), *strides, SOFTCAP=inner is not None, ROWS=ROWS_PER_PROGRAM, BLOCK=_BLOCK,
        )  # fmt: skip
    return target, slope
