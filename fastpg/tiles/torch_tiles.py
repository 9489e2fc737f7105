"""The tile ops in PyTorch: the functions that a schedule calls inside its loops. For any device; the default on a CPU.

`triton_tiles` has the same functions, with the same signatures, on the kernels.

A chunk has C rows. In the forward pass C is a multiple of `tile_shape(...).rows`, so that every product there has exactly that
many rows. BLAS libraries choose the order of a sum by the shape of the product. With one shape, a token's log-probability has
the same bits whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..kernels.limits import EXP_IS_ZERO, LARGEST_SUM
from . import running
from .gathered import gathered_dots as gathered_dots
from .gathered import run_sums as run_sums
from .gradient_rows import gradient_rows as gradient_rows
from .gradient_rows import scale_ as scale_
from .keep import keep as keep
from .logits import to_logits_
from .products import (
    accumulation_dtype,
    has_gaps,
    inner_size,
    product,
    tile_columns,
    to_inner_size,
)
from .row_statistics import finish_further, finish_rows, target_gradient
from .structures import (
    Asked,
    Chunk,
    FurtherPartials,
    Head,
    Incoming,
    Partials,
    ReadyLogits,
    RowResults,
    RowStatistics,
    RowSums,
    Target,
    TileShape,
    lora_rank,
)


def tile_shape(head: Head) -> TileShape:
    """The largest tile of logits that exists at a time. It depends on H and the device alone, and so do the orders of sums."""
    if head.weight.device.type != "cpu":
        return TileShape(512, 8192, 512, 16384)
    # with 8 tiles of rows the products are at full speed; a longer chunk would only leave the cache
    return TileShape(256, tile_columns(head.weight.shape[1]), 256, 8 * 256)


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which tiles of inputs of `dtype` are multiplied.

    fp16 is widened: its range loses softmax tails (probabilities below 6e-8) and small gradients.
    """
    if dtype == torch.bfloat16 and device.type != "cpu":
        return dtype
    return accumulation_dtype(dtype)


def weight_tile(head: Head, start: int, stop: int, buffer: torch.Tensor | None) -> torch.Tensor:
    """weight[start:stop] in the operand dtype, (columns, H or more): a view without `buffer`, otherwise a copy in it.

    On a CPU zeros fill its rows up to `inner_size`.
    """
    rows = head.weight[start:stop]
    if buffer is None:
        return rows
    tile = buffer[: stop - start]
    tile[:, : head.weight.shape[1]] = rows
    return tile


def weight_buffer(head: Head) -> torch.Tensor | None:
    weight = head.weight
    dtype, inner = operand_dtype(weight.dtype, weight.device), inner_size(head.weight.shape[1], weight.device)
    # The product of a transposed weight sums in another order, which on a CPU depends on a row's place in the matrix.
    is_operand = weight.device.type != "cpu" or (weight.stride(1) == 1 and not has_gaps(weight))
    if dtype == weight.dtype and inner == head.weight.shape[1] and is_operand:
        return None
    columns = min(tile_shape(head).columns, head.weight.shape[0])
    return torch.zeros(columns, inner, dtype=dtype, device=weight.device)


def online_logsumexp(chunk: Chunk, head: Head, asked: Asked, target: torch.Tensor | None = None) -> Partials:
    """One pass over the vocabulary: for each row, over the columns v != y,

        m = max z_v      s = sum exp(z_v - m)      q = sum exp(z_v - m) (z_v - m)

    which every tile updates (Milakov and Gimelshein, arXiv 1805.02867), so that nothing larger than a tile of logits exists.
    q only if asked for an entropy. z_y comes from `target_logits`, as in the one-pass schedule: NaN for a token that is not
    among the columns. `FurtherPartials` has what else may be asked for.

    target: z_y (C,) of the rows, where some of their tokens are on other ranks; only a rank needs it.
    """
    own = _targets(chunk, head)
    further = running.of_no_column(asked, len(own), own.dtype, own.device)
    tiles, compared = _tiles_of_head(chunk, head), own if target is None else target
    m, s, q = _folded(tiles, chunk.tokens, own.dtype, asked.entropy, further, compared)
    return Partials(m, s, q, own, running.closed(further, s))


def row_statistics(chunk: Chunk, head: Head, asked: Asked) -> RowResults:
    """`finish_rows` and `finish_further` of `online_logsumexp`."""
    partials = online_logsumexp(chunk, head, asked)
    statistics = finish_rows(partials, asked.entropy)
    return RowResults(statistics, finish_further(partials.further, statistics, chunk.tokens, len(head.weight), asked))


def _targets(chunk: Chunk, head: Head) -> torch.Tensor:
    """z_y (C,), a tile of rows at a time."""
    rows = tile_shape(head).rows
    blocks = [slice(r, r + rows) for r in range(0, max(len(chunk.tokens), 1), rows)]
    return torch.cat([target_logits(_block_of(chunk, block), head).logit for block in blocks])


def _block_of(chunk: Chunk, block: slice) -> Chunk:
    return Chunk(*(None if x is None else x[block] for x in chunk))


# Tiles of logits, one after another: (block of rows, first column, z, where z is outside the row's support or None). The caller
# may overwrite z, and the next tile does.
_Tiles = Iterator[tuple[slice, int, torch.Tensor, torch.Tensor | None]]


def _outside(allowed: torch.Tensor | None, block: slice, start: int, stop: int) -> torch.Tensor | None:
    """(rows, stop - start) bool: which of the columns are outside the supports of the block's rows. start: 8 divides it."""
    if allowed is None:
        return None
    packed = allowed[block, start // 8 : -(-stop // 8), None]
    bits = packed & torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return bits.flatten(1)[:, : stop - start] == 0


def _tiles_of_head(chunk: Chunk, head: Head) -> _Tiles:
    rows, columns, *_ = tile_shape(head)
    weight, size, vocab = head.weight, len(chunk.tokens), head.weight.shape[0]
    buffer = weight_buffer(head)
    logits = torch.empty(rows * min(columns, vocab), dtype=accumulation_dtype(weight.dtype), device=weight.device)
    for start in range(0, vocab if size else 0, columns):
        stop = min(start + columns, vocab)
        w = weight_tile(head, start, stop, buffer)
        z = logits[: rows * (stop - start)].view(rows, stop - start)
        for r in range(0, size, rows):
            block = slice(r, r + rows)
            _logits(chunk, block, w, head, start, z, want_slope=False)
            yield block, start, z, _outside(chunk.allowed, block, start, stop)


def _tiles_of_ready(ready: ReadyLogits) -> _Tiles:
    """Logits / temperature in the accumulation dtype; zeros in rows with keep False."""
    logits, dtype = ready.logits, accumulation_dtype(ready.logits.dtype)
    for r in range(0, len(logits), _READY_ROWS):
        block = slice(r, r + _READY_ROWS)
        for start in range(0, logits.shape[1], _READY_COLUMNS):
            z = torch.where(ready.keep[block, None], logits[block, start : start + _READY_COLUMNS], 0).to(dtype)
            outside = _outside(ready.allowed, block, start, start + z.shape[1])
            yield block, start, z if ready.temperature is None else z.div_(ready.temperature[block]), outside


def _folded(
    tiles: _Tiles, tokens: torch.Tensor, dtype: torch.dtype, entropy: bool,
    further: FurtherPartials, target: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """m, s and q of the columns v != y, (C,) each. Updates `further`, for whose ranks the rows have the logits `target`."""
    maximum = torch.full(tokens.shape, -torch.inf, dtype=dtype, device=tokens.device)
    total = torch.zeros_like(maximum)
    weighted = torch.zeros_like(maximum) if entropy else None
    for block, start, z, outside in tiles:
        column, inside = _target_column(tokens[block], start, start + z.shape[1])
        if outside is not None:
            z.masked_fill_(outside, -torch.inf)
        running.add_columns(further, block, start, z, outside)
        z.scatter_(1, column, torch.where(inside, -torch.inf, z.gather(1, column)))
        running.count_above(further, block, z, target)
        sums = (None if x is None else x[block] for x in (weighted, further.squares))
        _fold_tile(z, maximum[block], total[block], *sums)
    return maximum, total, weighted


def _fold_tile(
    z: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor, weighted: torch.Tensor | None, squares: torch.Tensor | None
) -> None:
    """Folds a tile of logits (which it overwrites) into the running m, s, q and sum exp(2 (z_v - m)) of its rows, in place."""
    larger = torch.maximum(maximum, z.amax(1))
    pivot = torch.where(larger == -torch.inf, 0, larger)  # -inf - -inf would be NaN while no column has counted yet
    shift = (maximum - pivot).clamp_(min=EXP_IS_ZERO)
    decay = shift.exp()
    z.sub_(pivot[:, None])
    if weighted is not None:
        e = z.clamp_(min=EXP_IS_ZERO).exp()
        # moving the pivot by `shift` turns exp(z - m) (z - m) into decay * (that + exp(z - m) * shift)
        weighted.copy_(decay * (weighted + total * shift) + z.mul_(e).sum(1))
    else:
        e = z.exp_()
    total.mul_(decay).add_(e.sum(1))
    if squares is not None:
        squares.mul_(decay.square_()).add_(e.square_().sum(1))
    maximum.copy_(larger)


def dlogits(
    chunk: Chunk,
    head: Head,
    w: torch.Tensor,
    start: int,
    statistics: RowStatistics,
    incoming: Incoming,
    unit: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor | None:
    """Writes D, the gradient dL/dlogits of the columns [start, start + len(w)), to out (C, len(w)) in the operand dtype.

    For a bf16 head the entries are rounded to bf16, whatever dtype `out` has. Returns the rounding error of the sum of each
    row, (C,), or None where nothing is rounded. `unit` is None here: only a D in fp16 has units, and here fp16 is widened.

    For incoming g (logp), h (entropy), l (logsumexp) and m (sum of the logits), each (C,), with log p_v = z_v - logsumexp:

        v = y   g sigmoid(t) + h p_y (1 - p_y) (t - Ho) + l p_y + m
        else    -(g - l) p_v - h p_v (log p_v + H) + m

    times logit_scale / T and the slope of the softcap. (`reference` derives it.)
    """
    rows = tile_shape(head).rows
    scale = head.logit_scale if chunk.temperature is None else head.logit_scale / chunk.temperature[:, 0]
    g = incoming.logprobs * scale
    h, ell, of_sum = (None if x is None else x * scale for x in incoming[1:])
    at_target = target_gradient(statistics, g, h, ell)
    g = g if ell is None else g - ell
    wide = statistics.t.dtype
    stored = torch.bfloat16 if head.weight.dtype == torch.bfloat16 else out.dtype
    residual = torch.zeros(len(out), dtype=wide, device=out.device) if stored != wide else None
    for r in range(0, len(chunk.tokens), rows):
        block = slice(r, r + rows)
        z = out[block] if out.dtype == wide else torch.empty_like(out[block], dtype=wide)
        slope = _logits(chunk, block, w, head, start, z, want_slope=True)
        _to_gradient_(z, chunk.tokens, block, start, statistics, g, h, at_target)
        if of_sum is not None:
            z.add_(of_sum[block, None])
        if slope is not None:
            z.mul_(slope)
        outside = _outside(chunk.allowed, block, start, start + len(w))
        if outside is not None:  # behind the slope, which may be NaN there
            z.masked_fill_(outside, 0)
        if stored != wide:
            sums = z.sum(1)
            out[block].copy_(z.to(stored))  # `out[block]` may be z itself
            residual[block] = sums - out[block].sum(1, dtype=wide)
    return residual


def _to_gradient_(
    z: torch.Tensor,
    tokens: torch.Tensor,
    block: slice,
    start: int,
    statistics: RowStatistics,
    g: torch.Tensor,
    h: torch.Tensor | None,
    at_target: torch.Tensor,
) -> None:
    """Turns a tile of logits into dL/dz, in place: rows `block`, columns from `start` on."""
    z.sub_(statistics.logsumexp[block, None])
    if h is None:
        z.exp_().mul_(-g[block, None])
    else:
        p = z.clamp_(min=EXP_IS_ZERO).exp()  # log p_v = -inf only where p_v = 0
        z.add_(statistics.entropy[block, None]).mul_(-h[block, None]).sub_(g[block, None]).mul_(p)
    column, inside = _target_column(tokens[block], start, start + z.shape[1])
    z.scatter_(1, column, torch.where(inside, at_target[block, None], z.gather(1, column)))


def anchored_exp(
    chunk: Chunk,
    head: Head,
    log_anchor: torch.Tensor,
    target: Target,
    out: torch.Tensor | None,
    asked: Asked,
) -> RowSums:
    """Product 1 of the one-pass schedule with its epilogue.

    With a = log_anchor (C,), anchor = z_y - a, and z_y and the softcap's slope there from `target_logits`:

        E_v = exp(z_v - anchor) for v != y        S = sum_v E_v       Q = sum_v E_v log E_v

    Returns S and Q (C,), Q only if asked for an entropy, and what else is asked for. The target's own column, where it is among
    the columns, gets the entry E_y = -S, which stands for its gradient. With `out`, E is stored there in out's dtype. Stored
    entries are multiplied by the softcap's slope; the sums are not. out (M, V) takes the first M rows, without the padding. A
    row whose S is not below 2^99 is stored as zeros: nothing of it may reach the dW of the other rows.

    Also returns R (M,), the rounding error of each stored row: its exact sum less the sum of its rounded entries; None where E
    is not rounded. Rows of E sum to 0 (without a softcap), so the component that all rows of W share cancels in E @ W. Entries
    that are rounded independently no longer sum to 0. Real embeddings share so much that this would give errors of several per
    cent.
    """
    rows, columns, *_ = tile_shape(head)
    weight, size, vocab = head.weight, len(chunk.tokens), head.weight.shape[0]
    dtype = accumulation_dtype(weight.dtype)
    anchor = (target.logit - log_anchor)[:, None]
    total = torch.zeros(size, dtype=dtype, device=weight.device)
    weighted = torch.zeros_like(total) if asked.entropy else None
    further = running.of_no_column(asked, size, dtype, weight.device)
    is_rounded = out is not None and out.dtype != dtype
    residual = torch.zeros(len(out), dtype=dtype, device=weight.device) if is_rounded else None
    buffer = weight_buffer(head)
    scratch = torch.empty(rows * min(columns, vocab), dtype=dtype, device=weight.device)
    for start in range(0, vocab if size else 0, columns):
        stop = min(start + columns, vocab)
        w = weight_tile(head, start, stop, buffer)
        # beside E and not in it, which with its rows in large pages took 1.24 times the bare products, and here 1.00
        e = scratch[: rows * (stop - start)].view(rows, stop - start)
        for r in range(0, size, rows):
            block = slice(r, r + rows)
            slope = _logits(chunk, block, w, head, start, e, want_slope=out is not None)
            outside = _outside(chunk.allowed, block, start, stop)
            if outside is not None:
                e.masked_fill_(outside, -torch.inf)
            column, inside = _target_column(chunk.tokens[block], start, stop)
            running.add_columns(further, block, start, e, outside)
            e.scatter_(1, column, torch.where(inside, -torch.inf, e.gather(1, column)))
            running.count_above(further, block, e, target.logit)
            e.sub_(anchor[block])
            log_e = e.clamp(min=EXP_IS_ZERO) if asked.entropy else None
            sums = e.exp_().sum(1)
            total[block] += sums
            if log_e is not None:
                weighted[block] += log_e.mul_(e).sum(1)
            if asked.squares:
                further.squares[block] += e.square().sum(1)
            if out is not None:
                if slope is not None:
                    e.mul_(slope)
                    if outside is not None:  # where the slope may be NaN
                        e.masked_fill_(outside, 0)
                    sums = e.sum(1) if is_rounded else sums
                stored = out[block, start:stop].copy_(e[: len(out) - r])
                if is_rounded:
                    residual[block] += sums[: len(out) - r] - stored.sum(1, dtype=dtype)
    if out is not None:
        entries = -total if target.slope is None else -total * target.slope
        taken = store_target(out, chunk.tokens[: len(out)], entries[: len(out)])
        if is_rounded:
            residual += taken
        lost = ~(total[: len(out)] < LARGEST_SUM)
        _zero_rows_(out, lost)
        residual = torch.where(lost, 0, residual) if is_rounded else None
    return RowSums(total, weighted, residual, further)


def store_target(exps: torch.Tensor, tokens: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """exps (C, V)[n, tokens_n] = exact_n, rounded; a token outside [0, V) changes nothing. Returns the rounding errors (C,)."""
    rows, column = torch.arange(len(exps), device=exps.device), tokens.clamp(0, exps.shape[1] - 1)
    inside = column == tokens
    stored = exact.to(exps.dtype)
    # not scatter_, which on a CPU widens the whole of a bf16 tensor
    there = exps.gather(1, column[:, None])[:, 0]
    exps.index_put_((rows, column), torch.where(inside, stored, there))
    return torch.where(inside, exact - stored.to(exact.dtype), 0)


def target_logits(chunk: Chunk, head: Head) -> Target:
    """z_y and the softcap's slope there, (C,) each, by one dot product per row."""
    dtype = accumulation_dtype(head.weight.dtype)
    inside = (chunk.tokens >= 0) & (chunk.tokens < head.weight.shape[0])
    tokens = torch.where(inside, chunk.tokens, 0)
    z = (chunk.hidden.to(dtype) * head.weight[tokens].to(dtype)).sum(1, keepdim=True)
    if head.lora_weight is not None:
        z = z + (chunk.lora_hidden * head.lora_weight[tokens].to(dtype)).sum(1, keepdim=True)
    if head.bias is not None:
        z = z + head.bias[tokens].to(dtype)[:, None]
    slope = to_logits_(z, head, chunk.temperature, want_slope=True)
    # +inf becomes NaN: as an anchor it would make a row of other infinities look ordinary
    z = torch.where(inside & (z[:, 0] != torch.inf), z[:, 0], torch.nan)
    return Target(z, None if slope is None else slope[:, 0])


def _zero_rows_(exps: torch.Tensor, rows: torch.Tensor) -> None:
    """exps (C, V)[rows (C,) bool] = 0, whatever was there."""
    if exps.device.type == "cpu":
        exps.index_fill_(0, rows.nonzero()[:, 0], 0)  # touches those rows only
    else:  # nonzero() would make the host wait
        exps.masked_fill_(rows[:, None], 0)


def _logits(
    chunk: Chunk, block: slice, w: torch.Tensor, head: Head, start: int, out: torch.Tensor, want_slope: bool
) -> torch.Tensor | None:
    """Writes a tile's logits to out. Returns the softcap's slope at them, if there is a softcap and the slope is wanted."""
    x = to_inner_size(chunk.hidden[block], w.shape[1])
    product(out, x, w.T, False, head.weight.dtype == torch.bfloat16)
    if head.lora_weight is not None:
        inner = inner_size(lora_rank(head), out.device)
        z, b = chunk.lora_hidden[block], head.lora_weight[start : start + len(w)].to(out.dtype).contiguous()
        product(out, to_inner_size(z, inner), to_inner_size(b, inner).T, True, False)
    if head.bias is not None:
        out.add_(head.bias[start : start + len(w)])
    return to_logits_(out, head, None if chunk.temperature is None else chunk.temperature[block], want_slope)


def _target_column(tokens: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's target as a column (C, 1) of [start, stop), and whether it lies there. The host does not wait."""
    inside = (tokens >= start) & (tokens < stop)
    return torch.where(inside, tokens - start, 0)[:, None], inside[:, None]


# Rows and columns of ready logits that are widened at a time.
_READY_ROWS, _READY_COLUMNS = 256, 4096


def selective_statistics(ready: ReadyLogits, entropy: bool) -> RowStatistics:
    """`row_statistics` of ready logits (N, V) / temperature (N, 1); rows with keep (N,) False count as zeros."""
    dtype = accumulation_dtype(ready.logits.dtype)
    column, inside = _target_column(ready.tokens, 0, ready.logits.shape[1])
    target = torch.where(ready.keep[:, None], ready.logits.gather(1, column), 0).to(dtype)
    if ready.temperature is not None:
        target.div_(ready.temperature)
    target = torch.where(inside, target, torch.nan)[:, 0]
    folded = _folded(_tiles_of_ready(ready), ready.tokens, dtype, entropy, FurtherPartials(), target)
    return finish_rows(Partials(*folded, target), entropy)


def selective_dlogits(ready: ReadyLogits, statistics: RowStatistics, incoming: Incoming) -> torch.Tensor:
    """The gradient of ready logits, (N, V) in their dtype; exactly 0 in rows with keep False."""
    logits, keep, temperature = ready.logits, ready.keep, ready.temperature
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    scale = keep.to(statistics.t.dtype) if temperature is None else keep / temperature[:, 0]
    g = torch.where(keep, incoming.logprobs * scale, 0)
    h = None if incoming.entropy is None else torch.where(keep, incoming.entropy * scale, 0)
    at_target = torch.where(keep, target_gradient(statistics, g, h), 0)
    for block, start, z, outside in _tiles_of_ready(ready):
        _to_gradient_(z, ready.tokens, block, start, statistics, g, h, at_target)
        if outside is not None:
            z.masked_fill_(outside, 0)
        out[block, start : start + z.shape[1]] = z
    return out
