"""The two-pass schedule: any loss of the log-probabilities, four products, almost no memory.

    forward    per token chunk: one online pass over the vocabulary                          product 1
    backward   per vocabulary tile, per token chunk:
                   D = dL/dlogits of the tile, from recomputed logits                        product 1 again
                   dX[chunk] += D @ W[tile]                                                  product 2
                   dW[tile]  += D^T @ X[chunk],  db[tile] += sum of D                        product 3

The vocabulary is the outer loop of the backward. So dW is summed in one fp32 tile and rounded once, and no fp32 copy [V, H]
exists. dX is summed in fp32 [K, H] and rounded once. Every sum has a fixed order.

Rows of D sum to 0 (without a softcap), so the component that all rows of W share cancels in D @ W. Rounding the entries of D
breaks that. The rounding error of each row's sum is therefore added back at its token's row of W, in fp32.

    head    D holds                  in a buffer of
    fp32    fp32 values              fp32
    bf16    bf16 values              bf16; fp32 in the PyTorch tile ops on a CPU, which has no bf16 product with fp32 results
    fp16    fp16 values times unit   fp16; in the PyTorch tile ops fp32 values in fp32, without a unit

fp16 has a short range. Three scales, all powers of two, keep the operands inside it:

    scale                       multiplies                                            is divided out, in fp32, of
    unit_n = 2^14 / m_n         row n of D, whose entries the power of two m_n bounds     row n of dX, and of dz
    share_n = s / unit_n        x_n before product 3 (z_n of LoRA; ones for db)           -
    s, one for the call         through share_n; brings the largest (x, z, 1) / unit_n    dW, dB and db
                                into [2^13, 2^14)

Product 3 multiplies D with fp16(share_n x_n): unit_n cancels in every term, and s is common to all of them.

`tiles` is the backend to run on: `torch_tiles` or `triton_tiles`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..tiles import large_pages
from ..tiles.backend import TileOps
from ..tiles.products import accumulation_dtype, add_residual, has_products_in, product, skinny_product, weight_product
from ..tiles.structures import (
    Asked,
    Chunk,
    Further,
    FurtherPartials,
    Gradients,
    Head,
    Incoming,
    Partials,
    RowResults,
    RowStatistics,
    Wanted,
    lora_rank,
)
from .rows import Rows


class Plan(NamedTuple):
    """Settings of a backward."""

    chunk_rows: int
    backend: str
    partial: bool  # other ranks hold other columns: dX is returned for the K rows alone and unrounded, to be summed over ranks


def two_pass_statistics(tiles: TileOps, rows: Rows, head: Head, asked: Asked, chunk_rows: int) -> RowResults:
    """The statistics of every row."""

    def of_chunk(chunk: Chunk, span: slice) -> list:
        statistics, further = tiles.row_statistics(chunk, head, asked)
        return [*statistics, *further]

    found, count = _forward(of_chunk, tiles, rows, head, chunk_rows), len(RowStatistics._fields)
    return RowResults(RowStatistics(*found[:count]), Further(*found[count:]))


def two_pass_partials(
    tiles: TileOps, rows: Rows, head: Head, asked: Asked, chunk_rows: int, target: torch.Tensor | None
) -> Partials:
    """The partial statistics of every row over the columns of `head`, for `finish_rows` and `finish_further`.

    target: z_y (K,), which a rank needs (`two_pass_targets` of the rank that has the token).
    """

    def of_chunk(chunk: Chunk, span: slice) -> list:
        partials = tiles.online_logsumexp(chunk, head, asked, _padded(target, span, len(chunk.tokens)))
        return [*partials[:4], *partials.further]

    found = _forward(of_chunk, tiles, rows, head, chunk_rows)
    return Partials(*found[:4], FurtherPartials(*found[4:]))


def two_pass_targets(tiles: TileOps, rows: Rows, head: Head, chunk_rows: int) -> torch.Tensor:
    """z_y of every row, (K,)."""
    (found,) = _forward(lambda chunk, span: [tiles.target_logits(chunk, head).logit], tiles, rows, head, chunk_rows)
    return found


def _forward(
    of_chunk: Callable[[Chunk, slice], list], tiles: TileOps, rows: Rows, head: Head, chunk_rows: int
) -> list[torch.Tensor | None]:
    """What of_chunk returns of each chunk, put together."""
    count = len(rows.tokens)
    dtype, padding = tiles.operand_dtype(head.weight.dtype, head.weight.device), tiles.tile_shape(head).padding
    chunks = []
    for start in range(0, max(count, 1), chunk_rows):  # without rows, one empty chunk
        stop = min(start + chunk_rows, count)
        found = of_chunk(rows.chunk(start, stop, dtype, multiple=padding), slice(start, stop))
        chunks.append([None if x is None else x[: stop - start] for x in found])
    if len(chunks) == 1:
        return chunks[0]
    return [None if x[0] is None else torch.cat(x) for x in zip(*chunks, strict=True)]


def _padded(values: torch.Tensor | None, span: slice, count: int) -> torch.Tensor | None:
    """values[span], with zeros for the padding of a chunk of `count` rows."""
    return None if values is None else F.pad(values[span], (0, count - (span.stop - span.start)))


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
    """Gradients for incoming gradients (K,) of the log-probabilities, entropies, logsumexps and sums of the logits.

    weight_grad (V, H) in the accumulation dtype: dW is added to it, and not returned.
    """
    backward = _Backward(tiles, rows, head, statistics, incoming, wanted, plan, weight_grad)
    backward.add_slices()
    return backward.finish()


class _Backward:
    """One call: its chunks of rows, and the sums that slices of the vocabulary add to (None where a gradient is not wanted)."""

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
        # where there are several chunks, each is made again for every slice, so that one at a time is in memory
        self.only_chunk = rows.chunk(0, count, self.narrow) if len(self.spans) == 1 else None
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
        # of each chunk of rows, the rounding errors of its rows of D, slice by slice
        self.residuals: list[list[torch.Tensor]] = [[] for _ in self.spans]
        self.dlora_weight = zeros(wanted.lora_weight, weight.shape[0], lora_rank(head))
        self.dbias = zeros(wanted.bias, weight.shape[0])
        self.dweight = weight_grad
        if weight_grad is None and wanted.weight:  # written tile by tile, if there are rows
            self.dweight = (
                large_pages.empty(weight.shape, weight.dtype, weight.device) if count else weight.new_zeros(weight.shape)
            )

    def add_slices(self) -> None:
        """The loops: slice after slice of the vocabulary, and for each slice chunk after chunk of the rows."""
        if not self.spans:
            return
        weight = self.head.weight
        columns = min(self.tiles.tile_shape(self.head).columns, weight.shape[0])
        buffer = self.tiles.weight_buffer(self.head)
        dlogits = torch.empty(self.spans[0].stop * columns, dtype=self.narrow, device=weight.device)
        # A slice of dW is summed in fp32 beside dW where dW itself is 16-bit, and several chunks add to it or there is no
        # product in its dtype. So it is where fp16's scale has to be divided out, and where the caller's buffer has earlier
        # sums, which the first chunk would overwrite.
        at_once = weight.dtype == self.wide or (len(self.spans) == 1 and has_products_in(weight.dtype, weight.device))
        is_sum = self.fp16 is not None or not at_once
        by_tile = self.wanted.weight and (self.adds or is_sum)
        tile_of_dw = torch.empty(columns if by_tile else 0, weight.shape[1], dtype=self.wide, device=weight.device)
        for v in range(0, weight.shape[0], columns):
            into = slice(v, min(v + columns, weight.shape[0]))
            w = self.tiles.weight_tile(self.head, into.start, into.stop, buffer)
            dw = None
            if self.wanted.weight:
                dw = tile_of_dw[: into.stop - v] if by_tile else self.dweight[into]
            for place in range(len(self.spans)):
                self._add(place, into, w, dw, dlogits)
            if self.fp16 is not None and dw is not None:
                dw.div_(self.fp16.scale)
            if by_tile and self.adds:
                self.dweight[into] += dw
            elif by_tile:
                self.dweight[into] = dw

    def _add(self, place: int, into: slice, w: torch.Tensor, dw: torch.Tensor | None, dlogits: torch.Tensor) -> None:
        """One chunk of rows, `spans[place]`, and one slice of columns, `into`: computes D and adds its products to the sums.

        dX is written by the first slice, and a slice of dW by the first chunk; the others add to them.
        """
        span, head, wanted, fp16 = self.spans[place], self.head, self.wanted, self.fp16
        holds_bf16 = head.weight.dtype == torch.bfloat16
        chunk = self.only_chunk or self.rows.chunk(span.start, span.stop, self.narrow)
        d = dlogits[: len(chunk.tokens) * len(w)].view(-1, len(w))
        unit = None if fp16 is None else fp16.unit[span]
        taken = self.tiles.dlogits(
            chunk, head, w, into.start, self.statistics.select(span), self.incoming.select(span), unit, d
        )
        if taken is not None:
            self.residuals[place].append(taken)
        if wanted.hidden:  # a tile of the weight may have columns of zeros behind its H
            product(self.dhidden[span], d, w[:, : head.weight.shape[1]], into.start > 0, holds_bf16)
        if dw is not None:
            x = chunk.hidden if fp16 is None else (chunk.hidden * fp16.share[span, None]).to(self.narrow)
            weight_product(dw, d, x, span.start > 0, holds_bf16)
        if wanted.bias and fp16 is None:
            self.dbias[into] += d.sum(0, dtype=self.wide)
        elif wanted.bias:  # rows of D have different units, so they are summed as a product with their shares
            product(self.dbias[into, None], d.T, fp16.share[span, None].to(self.narrow), span.start > 0, False)
        if wanted.lora_hidden:
            self.dlora_hidden[span] += skinny_product(d, head.lora_weight[into])
        if wanted.lora_weight:
            z = chunk.lora_hidden if fp16 is None else chunk.lora_hidden * fp16.share[span, None]
            self.dlora_weight[into] += skinny_product(d.T, z)

    def _residual(self) -> torch.Tensor | None:
        """(K,): the rounding error of the sum of each row of D; None where D is not rounded, or there is no row."""
        sums = [x[0] if len(x) == 1 else torch.stack(x).sum(0) for x in self.residuals if x]
        return torch.cat(sums) if len(sums) > 1 else next(iter(sums), None)

    def finish(self) -> Gradients:
        """The gradients: each sum is rounded once to its input's dtype, and dX covers all N rows, unless it is partial."""
        rows, head, fp16 = self.rows, self.head, self.fp16
        dhidden, dlora_hidden, dlora_weight, dbias = self.dhidden, self.dlora_hidden, self.dlora_weight, self.dbias
        residual = self._residual()
        if dhidden is not None:
            dhidden = self._rounded_rows(dhidden, residual)
        if dlora_hidden is not None:
            add_residual(dlora_hidden, residual, rows.tokens, head.lora_weight)
            if fp16 is not None:
                dlora_hidden = dlora_hidden / fp16.unit[:, None]
            dlora_hidden = dlora_hidden if self.partial else rows.scatter(dlora_hidden)
        scale = 1 if fp16 is None else fp16.scale
        if dlora_weight is not None:
            dlora_weight = (dlora_weight / scale).to(head.lora_weight.dtype)
        if dbias is not None:
            dbias = (dbias / scale).to(head.weight.dtype)
        return Gradients(dhidden, dlora_hidden, None if self.adds else self.dweight, dlora_weight, dbias)

    def _rounded_rows(self, dhidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """dX from its sums (K, H) in the accumulation dtype: (N, H) in the dtype of hidden, or if partial (K, H) unrounded.

        The rounding error of each row of D is added back at its token's row of the weight (`gradient_rows`). Of a token on
        another rank any row will do: the correction only has to cancel the component that all rows share.
        """
        rows, unit = self.rows, None if self.fp16 is None else self.fp16.unit.reciprocal()
        if self.partial or (rows.indices is None and dhidden.dtype == rows.hidden.dtype):
            out, places = dhidden, None
            if residual is None and unit is None:
                return out
        else:
            new = torch.empty_like if rows.indices is None else torch.zeros_like
            out, places = new(rows.hidden, memory_format=torch.contiguous_format), rows.indices
        chunk = Chunk(rows.hidden, None, rows.tokens, None, places)
        self.tiles.gradient_rows(dhidden, chunk, self.head, unit, residual, out, None)
        return out


class _Fp16Scales(NamedTuple):
    """The powers of two that keep fp16 operands in their range."""

    unit: torch.Tensor  # (K,): row n of D is stored times unit_n
    share: torch.Tensor  # (K,), scale / unit: multiplies the rows of X and z, and the ones that sum db
    scale: torch.Tensor  # (), s: dW, dB and db are divided by it


def _fp16_scales(
    rows: Rows,
    head: Head,
    statistics: RowStatistics,
    incoming: Incoming,
    spans: list[slice],
) -> _Fp16Scales:
    """The scales of a call, from |D_nv| <= (sigmoid(t) (|g| + |h| (|t| + Ho + 1)) + |l| + |m|) logit_scale / T, rounded up to
    2^k. m: the incoming gradient of the sum of the logits."""
    bound = incoming.logprobs.abs()
    if incoming.entropy is not None:
        log_odds = torch.where(statistics.t.isinf(), 0, statistics.t.abs())
        bound = bound + incoming.entropy.abs() * (log_odds + statistics.others_entropy + 1)
    bound = bound * F.logsigmoid(statistics.t).exp()
    for gradient in (incoming.logsumexp, incoming.sum_logits):
        bound = bound if gradient is None else bound + gradient.abs()
    bound = bound * head.logit_scale
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
    """The power of two that brings |x| into [2^13, 2^14); for NaN and 0 it may be any."""
    exponent = torch.frexp(x).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(x), 14 - exponent)
