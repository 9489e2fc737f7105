"""The two-pass schedule: any loss of the log-probabilities, four products, almost no memory.

    forward    per token chunk: one online pass over the vocabulary                          product 1
    backward   per vocabulary tile, per token chunk:
                   D = dL/dlogits of the tile, from recomputed logits                        product 1 again
                   dX[chunk] += D @ W[tile]                                                  product 2
                   dW[tile]  += D^T @ X[chunk],  db[tile] += sum of D                        product 3

The vocabulary is the outer loop of the backward, so that dW is summed in one fp32 tile and rounded once, with no [V, H] copy;
dX is summed in fp32 [K, H] and rounded once. Every sum has a fixed order.

Rows of D sum to 0, so that what the rows of W have in common cancels in D @ W. Rounding an entry of D breaks that, so the
rounding error of each row's sum is added back at its token's row of W, in fp32.

    head    D holds                  in a buffer of
    fp32    fp32 values              fp32
    bf16    bf16 values              bf16; fp32 in the PyTorch tile ops on a CPU, which has no bf16 product with fp32 results
    fp16    fp16 values times unit   fp16; in the PyTorch tile ops fp32 values in fp32, without a unit

fp16 has a short range. Row n is stored times unit_n = 2^14 / m_n, with m_n a power of two that bounds the row's entries, and
dX is divided by unit_n in fp32. dW multiplies D with fp16(s x_n / unit_n), and is divided by s: one power of two for the call,
which brings the largest of these factors into fp16's range.

`tiles` is the module of tile ops to run on: `tile_ops` or `triton_tile_ops`.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import buffers
from .lm_head import Projection, lora_rank
from .products import accumulation_dtype, product, skinny_product, weight_product
from .row_statistics import Partials, RowStatistics
from .rows import Gradients, Rows, Wanted

# Rows that are finished at a time, after all slices: few, because their targets' rows of W are copied in fp32.
_FINISHED_ROWS = 512


def chunk_rows(tiles: ModuleType, head: Projection, workspace: int, entropy: bool) -> int:
    """How many tokens a chunk may have so that everything the two passes allocate fits `workspace` bytes.

    Raises ValueError where not even one tile fits.
    """
    rows, columns, _, longest = tiles.tile_shape(head)
    columns = min(columns, head.weight.shape[0])
    dtype, device = head.weight.dtype, head.weight.device
    wide, narrow = accumulation_dtype(dtype).itemsize, tiles.operand_dtype(dtype, device).itemsize
    fixed, per_row = tiles.two_pass_bytes(head, entropy)
    fixed += columns * head.weight.shape[1] * wide  # a tile of dW
    # hidden states (gathered, widened or scaled), a row of dlogits, and a score of per-row numbers
    per_row += 2 * (head.weight.shape[1] + 3 * lora_rank(head)) * wide + columns * narrow + 20 * wide
    fixed += 4 * columns * lora_rank(head) * wide
    if dtype == torch.bfloat16 and device.type == "cpu":  # the operands of a slice of dW, and that slice, in bf16
        per_row += 2 * (columns + head.weight.shape[1])
        fixed += 2 * columns * head.weight.shape[1]
    fitting = (workspace - fixed) // per_row // rows
    if fitting < 1:
        raise ValueError(
            f"workspace={workspace} bytes is too small: one tile of a {tuple(head.weight.shape)} {dtype} head "
            f"on {device.type} needs {fixed + rows * per_row}"
        )
    return min(fitting * rows, longest)


def two_pass_forward(tiles: ModuleType, rows: Rows, head: Projection, entropy: bool, workspace: int) -> Partials:
    """What the columns of `head` leave of every row: Partials of (K,) vectors, for `finish_rows`."""
    count, longest = len(rows.tokens), chunk_rows(tiles, head, workspace, entropy)
    dtype, padding = tiles.operand_dtype(head.weight.dtype, head.weight.device), tiles.tile_shape(head).padding
    parts = []
    for start in range(0, count, longest):
        stop = min(start + longest, count)
        chunk = rows.chunk(start, stop, dtype, multiple=padding)
        parts.append(Partials(*(s[: stop - start] for s in tiles.online_logsumexp(chunk, head, entropy))))
    if not parts:
        dtype = accumulation_dtype(head.weight.dtype)
        return Partials(*(head.weight.new_empty(0, dtype=dtype) for _ in Partials._fields))
    return Partials(*(torch.cat(s) for s in zip(*parts, strict=True)))


def two_pass_backward(
    tiles: ModuleType,
    rows: Rows,
    head: Projection,
    statistics: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    wanted: Wanted,
    workspace: int,
    weight_grad: torch.Tensor | None = None,
    partial: bool = False,
) -> Gradients:
    """Gradients for incoming gradients (K,) of the log-probabilities and entropies.

    weight_grad (V, H) in the accumulation dtype: dW is added to it, and not returned. partial: other ranks hold other columns;
    the gradients of hidden (K, H) and lora_hidden (K, r) are returned unrounded, to be summed with theirs.
    """
    count, weight = len(rows.tokens), head.weight
    longest = chunk_rows(tiles, head, workspace, grad_entropy is not None)
    wide, narrow = accumulation_dtype(weight.dtype), tiles.operand_dtype(weight.dtype, weight.device)
    parts = [slice(start, min(start + longest, count)) for start in range(0, count, longest)]
    half = None
    if narrow == torch.float16:
        half = _half_scales(rows, head, statistics, grad_logprobs, grad_entropy, parts)

    def zeros(is_wanted: bool, *shape: int) -> torch.Tensor:
        return weight.new_zeros(shape if is_wanted else 0, dtype=wide)

    dweight = weight_grad
    if weight_grad is None:  # written tile by tile, if there are rows
        dweight = weight.new_zeros(weight.shape if wanted.weight and not count else 0)
        if wanted.weight and count:
            dweight = buffers.empty(weight.shape, weight.dtype, weight.device)
    rounds = narrow != wide or weight.dtype == torch.bfloat16
    sums = _Sums(
        zeros(wanted.hidden, count, head.weight.shape[1]),
        zeros(wanted.lora_hidden, count, lora_rank(head)),
        zeros(rounds, count),
        dweight,
        zeros(wanted.lora_weight, head.weight.shape[0], lora_rank(head)),
        zeros(wanted.bias, head.weight.shape[0]),
    )
    if count:
        adds = weight_grad is not None
        _add_slices(tiles, rows, head, statistics, grad_logprobs, grad_entropy, wanted, parts, half, sums, adds)
    return _finish(rows, head, wanted, sums, half, weight_grad is None, partial)


class _Sums(NamedTuple):
    """What the slices add to, (0,) where not wanted; in the accumulation dtype but for dweight."""

    dhidden: torch.Tensor  # (K, H)
    dlora_hidden: torch.Tensor  # (K, r)
    residual: torch.Tensor  # (K,): the rounding error of the sum of each row of D
    dweight: torch.Tensor  # (V, H) in its own dtype: every tile is written once; or the caller's buffer
    dlora_weight: torch.Tensor  # (V, r)
    dbias: torch.Tensor  # (V,)


def _add_slices(
    tiles: ModuleType,
    rows: Rows,
    head: Projection,
    statistics: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    wanted: Wanted,
    parts: list[slice],
    half: _HalfScales | None,
    sums: _Sums,
    adds: bool,
) -> None:
    """The loops: slice after slice of the vocabulary, chunk after chunk of the rows. adds: dW to what is there."""
    weight, holds_bf16 = head.weight, head.weight.dtype == torch.bfloat16
    wide, narrow = accumulation_dtype(weight.dtype), tiles.operand_dtype(weight.dtype, weight.device)
    columns = min(tiles.tile_shape(head).columns, head.weight.shape[0])
    buffer = tiles.weight_buffer(head)
    dlogits = torch.empty(parts[0].stop * columns, dtype=narrow, device=weight.device)
    by_tile = wanted.weight and (adds or weight.dtype != wide)
    dw_buffer = torch.empty(columns if by_tile else 0, head.weight.shape[1], dtype=wide, device=weight.device)
    for v in range(0, head.weight.shape[0], columns):
        width = min(columns, head.weight.shape[0] - v)
        w = tiles.weight_tile(head, v, v + width, buffer)
        dw = dw_buffer[:width] if by_tile else sums.dweight[v : v + width]
        for part in parts:
            chunk = rows.chunk(part.start, part.stop, narrow)
            d = dlogits[: len(chunk.tokens) * width].view(-1, width)
            taken = tiles.dlogits(
                chunk, head, w, v, RowStatistics(*(s[part] for s in statistics)), grad_logprobs[part],
                None if grad_entropy is None else grad_entropy[part], None if half is None else half.unit[part], d,
            )  # fmt: skip
            if len(taken):
                sums.residual[part] += taken
            if wanted.hidden:
                product(sums.dhidden[part], d, w[:, : head.weight.shape[1]], v > 0, holds_bf16)
            if wanted.weight:
                x = chunk.hidden if half is None else (chunk.hidden * half.share[part, None]).to(narrow)
                weight_product(dw, d, x, part.start > 0, holds_bf16, single=len(parts) == 1 and not adds)
            if wanted.bias and half is None:
                sums.dbias[v : v + width] += d.sum(0, dtype=wide)
            elif wanted.bias:
                product(sums.dbias[v : v + width, None], d.T, half.share[part, None].to(narrow), part.start > 0, False)
            if wanted.lora_hidden:
                sums.dlora_hidden[part] += skinny_product(d, head.lora_weight[v : v + width])
            if wanted.lora_weight:
                z = chunk.lora_hidden if half is None else chunk.lora_hidden * half.share[part, None]
                sums.dlora_weight[v : v + width] += skinny_product(d.T, z)
        if half is not None and wanted.weight:
            dw.div_(half.scale)
        if by_tile and adds:
            sums.dweight[v : v + width] += dw
        elif by_tile:
            sums.dweight[v : v + width] = dw


class _HalfScales(NamedTuple):
    """The powers of two that keep fp16 operands in their range."""

    unit: torch.Tensor  # (K,): rows of D are stored times it
    share: torch.Tensor  # (K,) scale / unit: rows of X and z, and the ones of the bias, are multiplied by it
    scale: torch.Tensor  # (): what dW and db are divided by


def _half_scales(
    rows: Rows,
    head: Projection,
    statistics: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    parts: list[slice],
) -> _HalfScales:
    """|D_nv| <= m_n = sigmoid(t) (|g| + |h| (|t| + Ho + 1)) logit_scale / T, rounded up to a power of two."""
    bound = grad_logprobs.abs()
    if grad_entropy is not None:
        log_odds = torch.where(statistics.t.isinf(), 0, statistics.t.abs())
        bound = bound + grad_entropy.abs() * (log_odds + statistics.others_entropy + 1)
    bound = bound * F.logsigmoid(statistics.t).exp() * head.logit_scale
    unit = _to_2_14(bound if rows.temperature is None else bound / rows.temperature)
    largest = bound.new_ones(len(bound))
    for part in parts:
        chunk = rows.chunk(part.start, part.stop, rows.hidden.dtype)
        size = chunk.hidden.abs().amax(1).to(bound.dtype).clamp(min=1)
        if chunk.lora_hidden is not None:
            size = torch.maximum(size, chunk.lora_hidden.abs().amax(1))
        largest[part] = size / unit[part]
    scale = _to_2_14(largest.amax()) if len(largest) else largest.new_ones(())
    return _HalfScales(unit, scale / unit, scale)


def _to_2_14(x: torch.Tensor) -> torch.Tensor:
    """The power of two that brings |x| into [2^13, 2^14); NaN and 0 take any."""
    exponent = torch.frexp(x).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(x), 14 - exponent)


def _finish(
    rows: Rows, head: Projection, wanted: Wanted, sums: _Sums, half: _HalfScales | None, returns_weight: bool, partial: bool
) -> Gradients:
    """From sums to gradients: each rounded once to the dtype of its input, and over all N rows, unless it is partial."""
    weight = head.weight
    dhidden, dlora_hidden, dweight, dlora_weight, dbias = (weight.new_empty(0) for _ in Gradients._fields)
    if wanted.hidden:
        _finish_rows(sums.dhidden, weight, sums.residual, half, rows.tokens)
        dhidden = sums.dhidden if partial else rows.scatter_rounded(sums.dhidden)
    if wanted.lora_hidden:
        _finish_rows(sums.dlora_hidden, head.lora_weight, sums.residual, half, rows.tokens)
        dlora_hidden = sums.dlora_hidden if partial else rows.scatter(sums.dlora_hidden)
    scale = 1 if half is None else half.scale
    if wanted.lora_weight:
        dlora_weight = (sums.dlora_weight / scale).to(head.lora_weight.dtype)
    if wanted.bias:
        dbias = (sums.dbias / scale).to(weight.dtype)
    return Gradients(dhidden, dlora_hidden, sums.dweight if returns_weight else dweight, dlora_weight, dbias)


def _finish_rows(
    sums: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, half: _HalfScales | None, tokens: torch.Tensor
) -> None:
    """Adds the rounding error of each row of D back to D @ weight, (K, ...) in place, and divides by fp16's units.

    Any row of the weight serves for a token that is on another rank: it is what the rows have in common that must cancel.
    """
    if not len(residual) and half is None:
        return
    for start in range(0, len(sums), _FINISHED_ROWS):
        part = slice(start, start + _FINISHED_ROWS)
        if len(residual):
            at_target = weight[tokens[part].clamp(0, len(weight) - 1)].to(sums.dtype)
            sums[part].add_(at_target.mul_(residual[part, None]))
        if half is not None:
            sums[part].div_(half.unit[part, None])
