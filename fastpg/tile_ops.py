"""The tile ops in PyTorch: what a schedule calls between its loops. Any device; the default on CPU.

Shapes: a chunk has C rows; in the forward pass a multiple of `tile_shape(...).rows`, so that every product there has exactly
that many rows. BLAS libraries choose their summation order by the shape of the product, so this, and not the values, is what
makes a token's log-probability the same bits whatever else is in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .lm_head import LMHead
from .products import accumulation_dtype, operand_dtype, product

# exp of this is 0 in every dtype, and unlike -inf it can be multiplied by 0.
_EXP_IS_ZERO = -1e4


class TileShape(NamedTuple):
    rows: int  # tokens per product
    columns: int  # vocabulary entries per product


class Chunk(NamedTuple):
    """C rows of the call, ready to be multiplied. Padding rows are zeros with token -1 and temperature 1."""

    hidden: torch.Tensor  # (C, H) in the operand dtype
    tokens: torch.Tensor  # (C,) int64
    temperature: torch.Tensor | None  # (C, 1) in the accumulation dtype; None is 1


class RowStatistics(NamedTuple):
    """What the two-pass forward keeps of each row; all (C,) in the accumulation dtype. Defined in `finish_rows`."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    t: torch.Tensor
    logsumexp: torch.Tensor
    others_entropy: torch.Tensor


def tile_shape(head: LMHead) -> TileShape:
    """The largest tile of logits that exists at a time. A function of H and the device alone, so that bits of logp are."""
    if head.weight.device.type != "cpu":
        return TileShape(2048, 8192)
    # At most 8 MiB of fp32 weights and 4 MiB of logits, so that a tile stays in cache between its passes.
    columns = 2**21 // head.hidden_size // 64 * 64
    return TileShape(256, max(128, min(4096, columns)))


def weight_tile(head: LMHead, start: int, stop: int, buffer: torch.Tensor | None) -> torch.Tensor:
    """weight[start:stop] in the operand dtype: a view where that is the weight's own, else widened into `buffer`."""
    rows = head.weight[start:stop]
    return rows if buffer is None else buffer[: stop - start].copy_(rows)


def weight_buffer(head: LMHead) -> torch.Tensor | None:
    weight = head.weight
    dtype = operand_dtype(weight.dtype, weight.device)
    if dtype == weight.dtype:
        return None
    columns = min(tile_shape(head).columns, head.vocab_size)
    return torch.empty(columns, head.hidden_size, dtype=dtype, device=weight.device)


def online_logsumexp(chunk: Chunk, head: LMHead, entropy: bool) -> RowStatistics:
    """One pass over the vocabulary: for each row, over the columns v != y,

        m = max z_v      s = sum exp(z_v - m)      q = sum exp(z_v - m) (z_v - m)

    kept online (Milakov and Gimelshein, arXiv 1805.02867), and z_y. Nothing larger than a tile of logits exists.
    q only if `entropy`.
    """
    rows, columns = tile_shape(head)
    weight = head.weight
    dtype = accumulation_dtype(weight.dtype)
    buffer = weight_buffer(head)
    logits = torch.empty(rows * min(columns, head.vocab_size), dtype=dtype, device=weight.device)

    size = len(chunk.tokens)
    maximum = torch.full((size,), -torch.inf, dtype=dtype, device=weight.device)
    total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
    target = torch.full_like(maximum, torch.nan)  # stays NaN for a token outside the vocabulary
    for start in range(0, head.vocab_size, columns):
        stop = min(start + columns, head.vocab_size)
        w = weight_tile(head, start, stop, buffer)
        z = logits[: rows * (stop - start)].view(rows, stop - start)
        for r in range(0, size, rows):
            block = slice(r, r + rows)
            _logits(chunk, block, w, head, start, z, want_slope=False)
            column, inside = _target_column(chunk.tokens[block], start, stop)
            z_target = z.gather(1, column)
            target[block] = torch.where(inside, z_target, target[block, None])[:, 0]
            z.scatter_(1, column, torch.where(inside, -torch.inf, z_target))
            _fold_tile(z, maximum[block], total[block], weighted[block] if entropy else None)
    return finish_rows(maximum, total, weighted, target, entropy)


def _fold_tile(z: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor, weighted: torch.Tensor | None) -> None:
    """Folds a tile of logits (which it overwrites) into the running m, s and q of its rows, in place."""
    larger = torch.maximum(maximum, z.amax(1))
    pivot = torch.where(larger == -torch.inf, 0, larger)  # -inf - -inf would be NaN while no column has counted yet
    shift = (maximum - pivot).clamp_(min=_EXP_IS_ZERO)
    decay = shift.exp()
    z.sub_(pivot[:, None])
    if weighted is not None:
        e = z.clamp_(min=_EXP_IS_ZERO).exp()
        # moving the pivot by `shift` turns exp(z - m) (z - m) into decay * (that + exp(z - m) * shift)
        weighted.copy_(decay * (weighted + total * shift) + z.mul_(e).sum(1))
    else:
        e = z.exp_()
    total.mul_(decay).add_(e.sum(1))
    maximum.copy_(larger)


def finish_rows(
    maximum: torch.Tensor, total: torch.Tensor, weighted: torch.Tensor, target: torch.Tensor, entropy: bool
) -> RowStatistics:
    """From m, s, q of the other columns and z_y, each (C,):

        t    = (m - z_y) + log s               log-odds against the target; the differences first, for small 1 - p_y
        logp = logsigmoid(-t)
        Ho   = log s - q / s                   entropy of the others alone; 0 where there are none
        H    = p_y softplus(t) + (1 - p_y) (Ho + softplus(-t))
        logsumexp over all columns, from the side that does not cancel

    V = 1, or all others banned: s = 0, t = -inf, logp = 0, H = 0.
    """
    pivot = torch.where(maximum == -torch.inf, 0, maximum)
    log_total = total.log()
    t = (pivot - target) + log_total
    log_p, log_1mp = F.logsigmoid(-t), F.logsigmoid(t)
    logsumexp = torch.where(t < 0, target - log_p, (pivot + log_total) - log_1mp)
    if not entropy:
        nothing = t.new_empty(0)
        return RowStatistics(log_p, nothing, t, logsumexp, nothing)
    others = torch.where(total == 0, 0, log_total - weighted / total)
    # exp(-inf) * inf is 0 in both shares of the entropy
    target_share = torch.where(t == torch.inf, 0, log_p.exp() * -log_p)
    others_share = torch.where(t == -torch.inf, 0, log_1mp.exp() * (others - log_1mp))
    return RowStatistics(log_p, target_share + others_share, t, logsumexp, others)


def dlogits(
    chunk: Chunk,
    head: LMHead,
    w: torch.Tensor,
    start: int,
    statistics: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The gradient of the columns [start, start + len(w)), into out (C, len(w)) in the operand dtype.

    For incoming g (logp) and h (entropy), each (C,), with log p_v = z_v - logsumexp:

        v = y   g sigmoid(t) + h p_y (1 - p_y) (t - Ho)
        else    -g p_v - h p_v (log p_v + H)

    times logit_scale / T and the slope of the softcap. (`reference` derives it.)
    """
    rows = tile_shape(head).rows
    stop = start + len(w)
    scale = head.logit_scale if chunk.temperature is None else head.logit_scale / chunk.temperature[:, 0]
    g = grad_logprobs * scale
    at_target = g * F.logsigmoid(statistics.t).exp()
    h = None
    if grad_entropy is not None:
        h = grad_entropy * scale
        p_q = (statistics.logprobs + F.logsigmoid(statistics.t)).exp()
        at_target = at_target + torch.where(statistics.t.isinf(), 0, h * p_q * (statistics.t - statistics.others_entropy))
    needs_rounding = out.dtype != statistics.t.dtype
    for r in range(0, len(chunk.tokens), rows):
        block = slice(r, r + rows)
        z = torch.empty_like(out[block], dtype=statistics.t.dtype) if needs_rounding else out[block]
        slope = _logits(chunk, block, w, head, start, z, want_slope=True)
        z.sub_(statistics.logsumexp[block, None])
        if h is None:
            z.exp_().mul_(-g[block, None])
        else:
            p = z.clamp_(min=_EXP_IS_ZERO).exp()  # log p_v = -inf only where p_v = 0
            z.add_(statistics.entropy[block, None]).mul_(-h[block, None]).sub_(g[block, None]).mul_(p)
        column, inside = _target_column(chunk.tokens[block], start, stop)
        z.scatter_(1, column, torch.where(inside, at_target[block, None], z.gather(1, column)))
        if slope is not None:
            z.mul_(slope)
        if needs_rounding:
            out[block].copy_(z)


def _logits(
    chunk: Chunk, block: slice, w: torch.Tensor, head: LMHead, start: int, out: torch.Tensor, want_slope: bool
) -> torch.Tensor | None:
    """z = softcap(logit_scale (x . w + b)) / T into out; returns the softcap's slope at z if there is one and it is wanted."""
    product(out, chunk.hidden[block], w.T, False, head.weight.dtype == torch.bfloat16)
    if head.bias is not None:
        out.add_(head.bias[start : start + len(w)])
    if head.logit_scale != 1:
        out.mul_(head.logit_scale)
    slope = None
    if head.softcap is not None:
        slope = _softcap_(out, head.softcap, want_slope)
    if chunk.temperature is not None:
        out.div_(chunk.temperature[block])
    return slope


def _softcap_(u: torch.Tensor, cap: float, want_slope: bool) -> torch.Tensor | None:
    """u <- c tanh(u / c); returns 1 - tanh^2 = 4 q / (1 + q)^2, q = exp(-2 |u / c|), which does not cancel."""
    q = u.abs().mul_(-2 / cap).exp_()
    slope = (q * 4).div_((1 + q).square_()) if want_slope else None
    tanh = (1 - q).div_(q.add_(1))
    torch.copysign(tanh.mul_(cap), u, out=u)
    return slope


def _target_column(tokens: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's target as a column (C, 1) of [start, stop), and whether it lies there. No host read."""
    inside = (tokens >= start) & (tokens < stop)
    return torch.where(inside, tokens - start, 0)[:, None], inside[:, None]
