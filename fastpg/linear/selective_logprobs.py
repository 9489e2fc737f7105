"""Log-probabilities of ready logits, for callers who hold them: no fp32 copy of the logits, exact for confident tokens."""

from __future__ import annotations

import torch

from .. import validation
from ..tiles.backend import choose_backend
from ..tiles.products import accumulation_dtype
from ..tiles.structures import Incoming, ReadyLogits, RowStatistics
from . import operators
from .linear_logprobs import TokenLogprobs
from .support import Support, check_sets, check_support, packed_sets


def selective_logprobs(
    logits: torch.Tensor,  # (..., V)
    tokens: torch.Tensor,  # (...)
    *,
    mask: torch.Tensor | None = None,  # (...)
    support: Support | None = None,
    temperature: float | torch.Tensor = 1.0,  # number or (...)
    entropy: bool = False,
    backend: str | None = None,
    check: bool = True,
) -> TokenLogprobs:
    """log softmax(logits / temperature)[token], and the entropy, from logits that exist.

        z = logits / temperature        logp = z[token] - logsumexp_v z_v        H = -sum_v p_v log p_v

    Differentiable in logits. Tiles are computed in fp32 (float64 for float64). Beyond the results the forward keeps five
    numbers per row, and the backward writes one tensor of the logits' shape and dtype. Where you hold the hidden states, use
    `linear_logprobs`: it needs no logits, and logits rounded to bf16 are off by up to 2^-9 of themselves before this begins.

    Args:
        logits: (..., V) float16, bfloat16, float32 or float64; logits[..., t, :] predicts tokens[..., t]. Logits that cannot
            be viewed as (N, V), such as `logits[:, :-1]`, are copied once; pass all of them and end `tokens` with -100.
        tokens: (...) int64 or int32 in [0, V); -100 means "not a token": value 0, gradient exactly 0.
        mask: (...) bool, False means the same. NaN in masked rows of the logits reaches nothing.
        support, temperature, entropy, backend: as in `linear_logprobs`.
        check: True checks token ids and temperatures, for which the host waits. False reads nothing (for CUDA graphs).

    Returns TokenLogprobs(logprobs (...), entropy (...) or None), as `linear_logprobs`. Double backward raises.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit.
    """
    validation.check_given_logits(logits, tokens, mask, temperature)
    backend = choose_backend(backend, logits, "logits")
    keep = tokens != validation.IGNORED_TOKEN
    if mask is not None:
        keep = keep & mask
    if support is not None:
        check_support(support, tokens)
    if check:
        validation.check_values(tokens, keep, logits.shape[-1], temperature)
        if support is not None:
            check_sets(support, keep, tokens, logits.shape[-1])
    flat, kept = logits.reshape(-1, logits.shape[-1]), keep.reshape(-1)
    ids = torch.where(keep, tokens, 0).reshape(-1).long()
    per_row = None
    if isinstance(temperature, torch.Tensor) or temperature != 1:
        dtype = accumulation_dtype(logits.dtype)
        per_row = torch.as_tensor(temperature, dtype=dtype, device=logits.device)
        per_row = torch.where(keep, per_row, 1).reshape(-1, 1)
    allowed = None if support is None else packed_sets(support, None, ids, 0, logits.shape[-1])
    values = _SelectiveLogprobs.apply(flat, ReadyLogits(None, ids, per_row, kept, allowed), entropy, backend)
    masked = ~keep
    return TokenLogprobs(*(None if x is None else x.view(tokens.shape).masked_fill(masked, 0) for x in values))


class _SelectiveLogprobs(torch.autograd.Function):
    """(logprobs (N,), entropy (N,) or None) of logits (N, V)."""

    @staticmethod
    def forward(ctx, logits, ready, entropy, backend):
        ready = ready._replace(logits=logits)
        statistics = operators.selective_statistics(ready, entropy, backend)
        ctx.save_for_backward(*ready, *statistics)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return statistics.logprobs, statistics.entropy

    # not once_differentiable, for the reason given in linear_logprobs
    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        saved, count = ctx.saved_tensors, len(ReadyLogits._fields)
        ready, statistics = ReadyLogits(*saved[:count]), RowStatistics(*saved[count:])
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(statistics.logprobs)
        incoming = Incoming(grad_logprobs, grad_entropy)
        return operators.selective_dlogits(ready, statistics, incoming, ctx.backend), None, None, None
