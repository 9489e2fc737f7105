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

`tiles` is the backend to run on: `torch_tiles` or `triton_tiles`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..tiles import large_pages
from ..tiles.backend import TileOps
from ..tiles.products import WIDENED_ROWS, accumulation_dtype, product, skinny_product, weight_product
from ..tiles.structures import Gradients, Head, Incoming, Partials, RowStatistics, Wanted, lora_rank
from .rows import Rows


class Plan(NamedTuple):
    """How a call is computed; not what."""

    chunk_rows: int
    backend: str
    partial: bool  # other ranks hold other columns: dX is returned of the K rows and unrounded, to be summed with theirs


def two_pass_statistics(tiles: TileOps, rows: Rows, head: Head, entropy: bool, chunk_rows: int) -> RowStatistics:
    """What is known of every row: vectors (K,)."""
    return RowStatistics(*_forward(tiles.row_statistics, tiles, rows, head, entropy, chunk_rows))


def two_pass_partials(tiles: TileOps, rows: Rows, head: Head, entropy: bool, chunk_rows: int) -> Partials:
    """What the columns of `head` leave of every row: vectors (K,), for `finish_rows`."""
    return Partials(*_forward(tiles.online_logsumexp, tiles, rows, head, entropy, chunk_rows))


def _forward(tile_op: Callable, tiles: TileOps, rows: Rows, head: Head, entropy: bool, chunk_rows: int) -> list:
    count = len(rows.tokens)
    dtype, padding = tiles.operand_dtype(head.weight.dtype, head.weight.device), tiles.tile_shape(head).padding
    chunks = []
    for start in range(0, max(count, 1), chunk_rows):  # without rows, one chunk of none
        stop = min(start + chunk_rows, count)
        found = tile_op(rows.chunk(start, stop, dtype, multiple=padding), head, entropy)
        chunks.append([None if x is None else x[: stop - start] for x in found])
    if len(chunks) == 1:
        return chunks[0]
    return [None if x[0] is None else torch.cat(x) for x in zip(*chunks, strict=True)]


def two_pass_backward(
    tiles: TileOps,
    rows: Rows,
    head: Head,
    statistics: RowStatistics,
    incoming: Incoming,
    wanted: Wanted,
    plan: Plan,
    weight_grad: torch.Tensor | None = None,
) -> Gradients:
    """Gradients for incoming gradients (K,) of the log-probabilities and entropies.

    weight_grad (V, H) in the accumulation dtype: dW is added to it, and not returned.
    """
    backward = _Backward(tiles, rows, head, statistics, incoming, wanted, plan, weight_grad)
    backward.add_slices()
    return backward.finish()


class _Backward:
    """One call: its chunks, and the sums that slices add to; None where not wanted."""

    def __init__(
        self,
        tiles: TileOps,
        rows: Rows,
        head: Head,
        statistics: RowStatistics,
        incoming: Incoming,
        wanted: Wanted,
        plan: Plan,
        weight_grad: torch.Tensor | None,
    ) -> None:
        self.tiles, self.rows, self.head, self.statistics, self.incoming = tiles, rows, head, statistics, incoming
        self.wanted, self.partial, self.adds = wanted, plan.partial, weight_grad is not None
        weight, count = head.weight, len(rows.tokens)
        self.wide, self.narrow = accumulation_dtype(weight.dtype), tiles.operand_dtype(weight.dtype, weight.device)
        self.spans = [slice(start, min(start + plan.chunk_rows, count)) for start in range(0, count, plan.chunk_rows)]
        self.fp16 = None
        if self.narrow == torch.float16:
            self.fp16 = _fp16_scales(rows, head, statistics, incoming, self.spans)

        def zeros(is_wanted: bool, *shape: int) -> torch.Tensor | None:
            return weight.new_zeros(shape, dtype=self.wide) if is_wanted else None

        # (K, H) and (K, r), added up slice by slice
        self.dhidden = zeros(wanted.hidden and not count, 0, weight.shape[1])
        if wanted.hidden and count:  # the first slice writes it
            self.dhidden = weight.new_empty(count, weight.shape[1], dtype=self.wide)
        self.dlora_hidden = zeros(wanted.lora_hidden, count, lora_rank(head))
        self.residual: torch.Tensor | None = None  # (K,): the rounding error of the sum of each row of D
        self.dlora_weight = zeros(wanted.lora_weight, weight.shape[0], lora_rank(head))
        self.dbias = zeros(wanted.bias, weight.shape[0])
        self.dweight = weight_grad
        if weight_grad is None and wanted.weight:  # written tile by tile, if there are rows
            self.dweight = (
                large_pages.empty(weight.shape, weight.dtype, weight.device) if count else weight.new_zeros(weight.shape)
            )

    def add_slices(self) -> None:
        """Slice after slice of the vocabulary, chunk after chunk of the rows."""
        if not self.spans:
            return
        weight = self.head.weight
        columns = min(self.tiles.tile_shape(self.head).columns, weight.shape[0])
        buffer = self.tiles.weight_buffer(self.head)
        dlogits = torch.empty(self.spans[0].stop * columns, dtype=self.narrow, device=weight.device)
        by_tile = self.wanted.weight and (self.adds or weight.dtype != self.wide)
        tile_of_dw = torch.empty(columns if by_tile else 0, weight.shape[1], dtype=self.wide, device=weight.device)
        for v in range(0, weight.shape[0], columns):
            into = slice(v, min(v + columns, weight.shape[0]))
            w = self.tiles.weight_tile(self.head, into.start, into.stop, buffer)
            dw = None
            if self.wanted.weight:
                dw = tile_of_dw[: into.stop - v] if by_tile else self.dweight[into]
            for span in self.spans:
                self._add(span, into, w, dw, dlogits)
            if self.fp16 is not None and dw is not None:
                dw.div_(self.fp16.scale)
            if by_tile and self.adds:
                self.dweight[into] += dw
            elif by_tile:
                self.dweight[into] = dw

    def _add(self, span: slice, into: slice, w: torch.Tensor, dw: torch.Tensor | None, dlogits: torch.Tensor) -> None:
        """One chunk of rows and one slice of columns, `into`: its D, and what it adds to the sums."""
        head, wanted, fp16, holds_bf16 = self.head, self.wanted, self.fp16, self.head.weight.dtype == torch.bfloat16
        chunk = self.rows.chunk(span.start, span.stop, self.narrow)
        d = dlogits[: len(chunk.tokens) * len(w)].view(-1, len(w))
        unit = None if fp16 is None else fp16.unit[span]
        taken = self.tiles.dlogits(
            chunk, head, w, into.start, self.statistics.select(span), self.incoming.select(span), unit, d
        )
        if taken is not None:
            self._add_residual(span, taken)
        if wanted.hidden:
            product(self.dhidden[span], d, w[:, : head.weight.shape[1]], into.start > 0, holds_bf16)
        if dw is not None:
            x = chunk.hidden if fp16 is None else (chunk.hidden * fp16.share[span, None]).to(self.narrow)
            weight_product(dw, d, x, span.start > 0, holds_bf16, single=len(self.spans) == 1 and not self.adds)
        if wanted.bias and fp16 is None:
            self.dbias[into] += d.sum(0, dtype=self.wide)
        elif wanted.bias:
            product(self.dbias[into, None], d.T, fp16.share[span, None].to(self.narrow), span.start > 0, False)
        if wanted.lora_hidden:
            self.dlora_hidden[span] += skinny_product(d, head.lora_weight[into])
        if wanted.lora_weight:
            z = chunk.lora_hidden if fp16 is None else chunk.lora_hidden * fp16.share[span, None]
            self.dlora_weight[into] += skinny_product(d.T, z)

    def _add_residual(self, span: slice, taken: torch.Tensor) -> None:
        if len(self.spans) == 1:
            self.residual = taken if self.residual is None else self.residual + taken
            return
        if self.residual is None:
            self.residual = taken.new_zeros(len(self.rows.tokens))
        self.residual[span] += taken

    def finish(self) -> Gradients:
        """From sums to gradients: each rounded once to the dtype of its input, and over all N rows, unless it is partial."""
        rows, head, fp16 = self.rows, self.head, self.fp16
        dhidden, dlora_hidden, dlora_weight, dbias = self.dhidden, self.dlora_hidden, self.dlora_weight, self.dbias
        if dhidden is not None:
            _finish_rows(dhidden, head.weight, self.residual, fp16, rows.tokens)
            dhidden = dhidden if self.partial else rows.scatter_rounded(dhidden)
        if dlora_hidden is not None:
            _finish_rows(dlora_hidden, head.lora_weight, self.residual, fp16, rows.tokens)
            dlora_hidden = dlora_hidden if self.partial else rows.scatter(dlora_hidden)
        scale = 1 if fp16 is None else fp16.scale
        if dlora_weight is not None:
            dlora_weight = (dlora_weight / scale).to(head.lora_weight.dtype)
        if dbias is not None:
            dbias = (dbias / scale).to(head.weight.dtype)
        return Gradients(dhidden, dlora_hidden, None if self.adds else self.dweight, dlora_weight, dbias)


class _Fp16Scales(NamedTuple):
    """The powers of two that keep fp16 operands in their range."""

    unit: torch.Tensor  # (K,): rows of D are stored times it
    share: torch.Tensor  # (K,) scale / unit: rows of X and z, and the ones of the bias, are multiplied by it
    scale: torch.Tensor  # (): what dW and db are divided by


def _fp16_scales(
    rows: Rows,
    head: Head,
    statistics: RowStatistics,
    incoming: Incoming,
    spans: list[slice],
) -> _Fp16Scales:
    """|D_nv| <= m_n = sigmoid(t) (|g| + |h| (|t| + Ho + 1)) logit_scale / T, rounded up to a power of two."""
    bound = incoming.logprobs.abs()
    if incoming.entropy is not None:
        log_odds = torch.where(statistics.t.isinf(), 0, statistics.t.abs())
        bound = bound + incoming.entropy.abs() * (log_odds + statistics.others_entropy + 1)
    bound = bound * F.logsigmoid(statistics.t).exp() * head.logit_scale
    unit = _to_2_14(bound if rows.temperature is None else bound / rows.temperature)
    largest = bound.new_ones(len(bound))
    for span in spans:
        chunk = rows.chunk(span.start, span.stop, rows.hidden.dtype)
        size = chunk.hidden.abs().amax(1).to(bound.dtype).clamp(min=1)
        if chunk.lora_hidden is not None:
            size = torch.maximum(size, chunk.lora_hidden.abs().amax(1))
        largest[span] = size / unit[span]
    scale = _to_2_14(largest.amax()) if len(largest) else largest.new_ones(())
    return _Fp16Scales(unit, scale / unit, scale)


def _to_2_14(x: torch.Tensor) -> torch.Tensor:
    """The power of two that brings |x| into [2^13, 2^14); NaN and 0 take any."""
    exponent = torch.frexp(x).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(x), 14 - exponent)


def _finish_rows(
    sums: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, fp16: _Fp16Scales | None, tokens: torch.Tensor
) -> None:
    """Adds the rounding error of each row of D back to D @ weight, (K, ...) in place, and divides by fp16's units.

    Any row of the weight serves for a token that is on another rank: it is what the rows have in common that must cancel.
    """
    if residual is None and fp16 is None:
        return
    for start in range(0, len(sums), WIDENED_ROWS):
        span = slice(start, start + WIDENED_ROWS)
        if residual is not None:
            at_target = weight[tokens[span].clamp(0, len(weight) - 1)].to(sums.dtype)
            sums[span].add_(at_target.mul_(residual[span, None]))
        if fp16 is not None:
            sums[span].div_(fp16.unit[span, None])
