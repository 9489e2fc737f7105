"""The first half of a LoRA update: z = scale * A x, r numbers per token. The vocabulary does not enter into it.

The second half, B, stands beside the weight in every product of the schedules. So the weight stays frozen, and no (V, H) update
exists.
"""

from __future__ import annotations

import torch

from ..lm_head import LoRA
from ..tiles.products import accumulation_dtype, dense, inner_size, product, to_inner_size

# Every product has this many rows. BLAS libraries choose their order of summation by the shape, and a token's bits must not
# depend on the number of other tokens.
_ROWS = 256


def lora_hidden(hidden: torch.Tensor, keep: torch.Tensor, lora: LoRA) -> torch.Tensor:
    """scale * hidden (N, H) @ A^T (r, H) -> (N, r) in the accumulation dtype, 0 where keep (N,) is False. Differentiable.

    hidden and A in 16 bits are widened: rounding z to bf16 would be an error of 2^-9 in every logit's update. The gradient that
    reaches hidden through z is rounded to hidden's dtype before autograd adds it to the gradient through the weight.
    """
    return _LoraHidden.apply(hidden, lora.a, keep, float(lora.scale))


def _spans(count: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS)]


def _widened(x: torch.Tensor, keep: torch.Tensor, span: slice, dtype: torch.dtype) -> torch.Tensor:
    """A span of rows of x in `dtype`, (_ROWS, ...): masked rows and the padding after the span are zeros."""
    wide = x.new_zeros(_ROWS, x.shape[1], dtype=dtype)
    wide[: span.stop - span.start] = torch.where(keep[span, None], x[span], 0)
    return wide


class _LoraHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, a, keep, scale):
        dtype = accumulation_dtype(hidden.dtype)
        out = hidden.new_empty(len(hidden), len(a), dtype=dtype)
        inner = inner_size(hidden.shape[1], hidden.device)
        tile, transposed = hidden.new_empty(_ROWS, len(a), dtype=dtype), to_inner_size(a.to(dtype).contiguous(), inner).T
        for span in _spans(len(hidden)):
            x = to_inner_size(_widened(hidden, keep, span, dtype), inner)
            product(tile, x, transposed, False, False)
            out[span] = tile[: span.stop - span.start]
        ctx.save_for_backward(hidden, a, keep)
        ctx.scale = scale
        return out.mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("a head with LoRA has no second derivative; use full logits (fastpg.reference)")
        hidden, a, keep = ctx.saved_tensors
        grad = grad * ctx.scale
        wide_a = dense(a.to(grad.dtype))
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        da = torch.zeros_like(wide_a) if ctx.needs_input_grad[1] else None
        tile = torch.empty(_ROWS, hidden.shape[1], dtype=grad.dtype, device=grad.device)
        for span in _spans(len(hidden)):
            dz = _widened(grad, keep, span, grad.dtype)
            if dhidden is not None:
                product(tile, dz, wide_a, False, False)
                dhidden[span] = tile[: span.stop - span.start]
            if da is not None:
                product(da, dz.T, _widened(hidden, keep, span, grad.dtype), True, False)
        return dhidden, None if da is None else da.to(a.dtype), None, None
