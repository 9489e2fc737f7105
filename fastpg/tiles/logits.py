"""From a product to logits, in PyTorch: logit scale, softcap and temperature, in place."""

from __future__ import annotations

import torch

from .structures import Head


def to_logits_(score: torch.Tensor, head: Head, temperature: torch.Tensor | None, want_slope: bool) -> torch.Tensor | None:
    """x . w + b -> z = softcap(logit_scale (x . w + b)) / T in place.

    Returns the softcap's slope there, if there is a softcap and the slope is wanted.
    """
    if head.logit_scale != 1:
        score.mul_(head.logit_scale)
    slope = None
    if head.softcap is not None:
        slope = softcap_(score, head.softcap, want_slope)
    if temperature is not None:
        score.div_(temperature)
    return slope


def softcap_(u: torch.Tensor, cap: float, want_slope: bool) -> torch.Tensor | None:
    """u <- c tanh(u / c); returns 1 - tanh^2 = 4 q / (1 + q)^2, q = exp(-2 |u / c|), which does not cancel at large u.

    tanh = -expm1(-2 |u / c|) / (1 + q), which does not cancel at small u either.
    """
    exponent = u.abs().mul_(-2 / cap)
    q_plus_1 = exponent.exp().add_(1)
    slope = exponent.exp().mul_(4).div_(q_plus_1).div_(q_plus_1) if want_slope else None
    torch.copysign(exponent.expm1_().div_(q_plus_1).mul_(cap), u, out=u)
    return slope
