"""The one-pass schedule: loss and gradients in one sweep, three matrix products, anchored by the old log-probabilities.

Every policy-gradient loss is given old_n, an estimate of logp_n. Let a_n = clamp(old_n, -60, 0), or 0 where no old_n is given.
Then anchor_n = z_n,y - a_n estimates the row's logsumexp up to the log ratio. It needs one logit, that of the row's own token,
which is one dot product. The anchored exponentials E (`exps` in the code) and all that follows from them

    E_nv = exp(z_nv - anchor_n)  for v != y_n        S_n = sum_v E_nv        D_n = S_n + exp(a_n)
    t_n = log S_n - a_n          logp_n = logsigmoid(-t_n)                   p_nv = E_nv / D_n

need no running maximum, no rescaling and no second pass: exp is taken in the epilogue of the first product. The loss enters
through one number per row, g_n = dL/dlogp_n. It scales rows, so it is applied after product 2 and before product 3:

    dL/dz_nv = g_n ([v = y] - p_nv) = -g_n E_nv / D_n  with  E_n,y = -S_n            u_n = -g_n logit_scale / (T_n D_n)
    dX_n = u_n (E @ W)_n                      dW = E^T @ (u x)    db = E^T u

Rows are computed in chunks, as long as the workspace allows. A chunk takes three steps: product 1 with its epilogue
(`operators.anchored_exp`), plain PyTorch on [C] vectors, products 2 and 3 (`operators.gradient_products`). Where one chunk
holds all rows, dW is written once. On Triton the launch that completes the sums also computes the loss of named objectives
(`operators.anchored_loss`).

Range. An entry of E may become infinite, and then its sum is. A row is flagged where it fails one of two conditions:

    condition                           rows that fail it                                     their log-probability
    2^-90 <= S < 2^99                   old_n too far off (over- or underflow), NaN,          is computed again by the
                                        V = 1, whose sum is empty                             two-pass forward
    g = 0 or 2^-110 <= |u| <= 2^110     g or D very large or very small, NaN                  stays, if S is in range

Flagged rows add nothing to the gradients of their chunk. They form chunks of their own after all others, anchored at their own
log-probability, which is not clamped. Then E = p, S = 1 - p, D = 1 and nothing overflows.

Vocab-parallel. Each rank multiplies its own columns. z_y comes from the token's owner, the rank that has its column. S and Q
are summed over ranks before the vectors are computed. The owner then writes the target's entry again, as -S of all columns.
dX is summed over ranks at the end. Nothing else knows of other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..distributed import vocab_parallel
from ..kernels.limits import SUMMARY
from ..tiles import large_pages
from ..tiles.backend import tiles_of
from ..tiles.host_read import HostRead
from ..tiles.products import Sums, accumulation_dtype
from ..tiles.structures import (
    Chunk,
    Gradients,
    Head,
    LossSummary,
    LossSums,
    RowResults,
    RowStatistics,
    TokenTerms,
)
from . import operators
from .first_product import FirstProduct, Options, RowVectors, TokenLosses
from .rows import Rows, move_rows, part
from .statistics import row_results
from .workspace import exps_dtype, row_stride

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class OnePass(NamedTuple):
    """The results of a sweep over K rows."""

    loss: torch.Tensor  # ()
    rows: RowResults  # the log-probabilities, and what else is asked for
    summary: torch.Tensor | None  # metrics, where kernels have computed the loss of all rows
    again: torch.Tensor | None  # (3,) int64: rows computed again, whether dW was too, silenced rows that were left out; None: 0
    gradients: Gradients  # of the loss


class _Live(NamedTuple):
    """The rows of a chunk that products 2 and 3 take: all, or those whose u is not 0, in another order."""

    chunk: Chunk
    factor: torch.Tensor | None  # (L,)
    residual: torch.Tensor | None  # (L,)
    span: slice  # the rows of the chunk among those of the call


def one_pass(rows: Rows, head: Head, terms: TokenTerms, token_losses: TokenLosses, options: Options) -> OnePass:
    """Log-probabilities, losses, entropies and gradients of the loss for K rows.

    With `options.host_reads` the number of flagged rows is read once all products are enqueued, so that the device is busy
    while the host waits. If there are any, they are computed again. Without it nothing is read: a row whose sum S is NaN or not
    below 2^99, or whose u is not finite, gets a NaN log-probability and makes the gradients NaN.
    """
    count, length = rows.tokens.shape[0], options.plan.sweep_rows
    sweep = _Sweep(head, token_losses, options, rows, min(count, length))
    found, summary, flagged = [], None, None
    for span in _spans(count, length):
        vectors, live = sweep.first_product(rows, span, terms if span.stop - span.start == count else terms.select(span))
        found.append(vectors)
        if span.stop == count:
            summary = sweep.summary()
            flagged = _number_of_flagged(found, summary) if options.host_reads else None
        sweep.add_gradients(live, once=count <= length)

    results, losses = _joined([x.results for x in found]), _joined_vectors([x.losses for x in found])
    if flagged is not None and flagged.read():
        repeats = sweep.widen_weight(live)
        results, losses, again = _computed_again(sweep, rows, terms, found, results, losses)
        numbers = rows.tokens.new_tensor([again, repeats, sweep.silenced], dtype=torch.int64)
        return OnePass(losses.sum(), results, None, numbers, sweep.gradients(rows))
    numbers = rows.tokens.new_tensor([0, 0, sweep.silenced], dtype=torch.int64) if sweep.silenced else None
    if summary is not None:
        return OnePass(summary.loss, results, summary.metrics, numbers, sweep.gradients(rows))
    if losses is None:
        results = kept_results(results, terms)
        losses = token_losses(results.statistics.logprobs, terms)
    return OnePass(losses.sum(), results, None, numbers, sweep.gradients(rows))


def kept_results(results: RowResults, terms: TokenTerms) -> RowResults:
    """The results, with log-probabilities and entropies of 0 where masked."""
    logprobs, entropy, *others = results.statistics
    entropy = None if entropy is None else terms.kept(entropy)
    return RowResults(RowStatistics(terms.kept(logprobs), entropy, *others), results.further)


def _number_of_flagged(found: list[RowVectors], summary: LossSummary | None) -> HostRead:
    if summary is not None:
        return HostRead(summary.metrics[SUMMARY.index("flagged")])
    return HostRead((_joined_vectors([x.state for x in found]) > 0).sum())


def _computed_again(
    sweep: _Sweep,
    rows: Rows,
    terms: TokenTerms,
    found: list[RowVectors],
    results: RowResults,
    losses: torch.Tensor | None,
) -> tuple[RowResults, torch.Tensor, int]:
    """The results and losses with those of the flagged rows, in chunks of their own, and how many these are."""
    state = _joined_vectors([x.state for x in found])
    flagged = state.nonzero()[:, 0]
    again, again_terms = rows.select(flagged), terms.select(flagged)
    anew = sweep.recompute(again, state[flagged] < 2, flagged, results)
    results, anchors = _merged(lambda x, new: x.index_copy(0, flagged, new), results, anew), anew.statistics.logprobs
    if losses is None:
        losses = sweep.token_losses(results.statistics.logprobs, terms)
    else:
        losses = losses.index_copy(0, flagged, sweep.token_losses(anchors, again_terms))
    for span in _spans(len(flagged), sweep.options.plan.sweep_rows) if any(sweep.wanted) else []:
        _, live = sweep.first_product(again, span, again_terms.select(span), anchors[span])
        sweep.add_gradients(live, once=False)
    return results, losses, len(flagged)


def _merged(function: Callable[..., torch.Tensor], *results: RowResults) -> RowResults:
    """function(x, ...) of each field that the results have."""

    def fields(kind: type[NamedTuple], *tuples: tuple) -> NamedTuple:
        return kind(*(None if x[0] is None else function(*x) for x in zip(*tuples, strict=True)))

    statistics, further = (fields(type(x[0]), *x) for x in zip(*results, strict=True))
    return RowResults(statistics, further)


class _Sweep:
    """One call: the settings that its chunks share, the buffer for E, and the sums of the gradients."""

    def __init__(self, head: Head, token_losses: TokenLosses, options: Options, rows: Rows, longest: int) -> None:
        self.head, self.token_losses, self.options, self.wanted = head, token_losses, options, options.wanted
        weight, hidden = head.weight, rows.hidden
        tiles = tiles_of(options.backend)
        self.tiles = operators.one_pass_tiles(options.backend, hidden)
        self.dtype = accumulation_dtype(weight.dtype)
        self.operand_dtype, self.padding = tiles.operand_dtype(weight.dtype, weight.device), tiles.tile_shape(head).padding
        self.first = FirstProduct(self.tiles, head, token_losses, options)
        self.exps = None
        if any(self.wanted):
            exps = large_pages.empty((longest, row_stride(head)), exps_dtype(weight.dtype), weight.device)
            vocab = weight.shape[0]
            if weight.device.type == "cpu":
                exps[:, vocab:] = 0  # products may read past the end of a row (see `products`)
            self.exps = exps[:, :vocab]
        self.dhidden = self.dlora_hidden = None
        if self.wanted.hidden:  # with a group it is summed over ranks first and rounded afterwards
            writes_all = rows.indices is None and longest
            new = hidden.new_empty if writes_all else hidden.new_zeros
            self.dhidden = new(hidden.shape, dtype=hidden.dtype if options.group is None else self.dtype)
        if self.wanted.lora_hidden:
            self.dlora_hidden = torch.zeros_like(rows.lora_hidden)
        # the first chunk allocates these: it knows whether there are other chunks
        self.dweight = self.dlora_weight = self.dbias = None
        self.silenced = 0  # rows that products 2 and 3 have left out because their gradient is 0
        self.sums = None
        if options.device_loss is not None:
            self.sums = tiles.loss_sums(rows.tokens.shape[0], hidden.device)

    def first_product(
        self, rows: Rows, span: slice, terms: TokenTerms, anchors: torch.Tensor | None = None
    ) -> tuple[RowVectors, _Live]:
        """Product 1 of a chunk: the vectors that follow from it, and the rows that products 2 and 3 take.

        anchors (C,): the rows' log-probabilities where they are known already, for rows that are recomputed.
        """
        chunk = rows.chunk(span.start, span.stop, self.operand_dtype, multiple=self.padding)
        exps = None if self.exps is None else part(self.exps, 0, span.stop - span.start)
        loss = self.options.device_loss
        if loss is None or anchors is not None:
            vectors = self.first.vectors(chunk, exps, terms, anchors)
            return vectors, self._live(span, chunk, exps, vectors)
        into = LossSums(self.sums, tiles_of(self.options.backend).first_of_sums(span.start))
        found = self.tiles.anchored_loss(chunk, self.head, terms, loss, exps, self.options.asked.entropy, into)
        results = RowResults(RowStatistics(found.logprobs, found.entropy, None, None, None))
        vectors = RowVectors(results, found.losses, found.factor, found.state, found.residual)
        return vectors, self._live(span, chunk, exps, vectors)

    def _live(self, span: slice, chunk: Chunk, exps: torch.Tensor | None, vectors: RowVectors) -> _Live:
        """The rows for products 2 and 3: all, or without silenced and flagged ones, whose places in E others then take."""
        factor, residual, count = vectors.factor, vectors.residual, span.stop - span.start
        if factor is None or not self.options.skip_silenced:
            return _Live(chunk, factor, residual, span)
        is_live = factor != 0
        left, silenced = HostRead(torch.stack([is_live.sum(), (~is_live & (vectors.state == 0)).sum()])).read()
        if left == count:
            return _Live(chunk, factor, residual, span)
        self.silenced += silenced
        order = move_rows(exps, is_live, left)
        if self.dhidden is not None and chunk.places is None:
            part(self.dhidden, span.start, span.stop).zero_()
        places = order + span.start if chunk.places is None else chunk.places[order]
        lora_hidden = None if chunk.lora_hidden is None else chunk.lora_hidden[order]
        chunk = Chunk(chunk.hidden[order], lora_hidden, chunk.tokens[order], None, places)
        return _Live(chunk, factor[order], None if residual is None else residual[order], span)

    def add_gradients(self, live: _Live, once: bool) -> None:
        """Products 2 and 3 of a chunk. once: it is the only chunk of the call, so dW is rounded as it is written."""
        if self.exps is None or live.factor.shape[0] == 0:
            return
        weight = self.head.weight
        # The first chunk writes dW, dB and db, later ones add to them: nothing is filled with zeros first.
        add = any(x is not None for x in (self.dweight, self.dlora_weight, self.dbias))
        if not add:
            # several chunks are summed in the accumulation dtype; one alone needs no such copy of dW
            self._allocate_sums(weight.dtype if once and not self.options.wide_weight else self.dtype)
        # rows of dX are written and never added to: a flagged row is overwritten by its second chunk
        dhidden, dlora_hidden = (_rows_to_write(x, live) for x in (self.dhidden, self.dlora_hidden))
        sums = Sums(dhidden, dlora_hidden, self.dweight, self.dlora_weight, self.dbias)
        operators.gradient_products(
            part(self.exps, 0, live.factor.shape[0]), live.factor, live.residual, live.chunk, self.head, sums, add,
            self.options.backend,
        )  # fmt: skip

    def widen_weight(self, live: _Live) -> bool:
        """Computes dW once more, in the accumulation dtype, where the only chunk has rounded it: other rows can then be added.

        Returns whether it did. The buffer still holds the chunk's E.
        """
        if self.dweight is None or self.dweight.dtype == self.dtype:
            return False
        self.dweight = None  # its memory is free before there is another
        self.dweight = large_pages.empty(self.head.weight.shape, self.dtype, self.head.weight.device)
        operators.gradient_products(
            self.exps[: len(live.factor)], live.factor, live.residual, live.chunk, self.head,
            Sums(None, None, self.dweight, None, None), False, self.options.backend,
        )  # fmt: skip
        return True

    def summary(self) -> LossSummary | None:
        """The loss and the metrics of all chunks, where kernels have computed their losses."""
        return None if self.sums is None else self.tiles.loss_summary(self.sums, self.options.asked.entropy)

    def _allocate_sums(self, dtype: torch.dtype) -> None:
        head, device = self.head, self.head.weight.device
        if self.wanted.weight:
            self.dweight = large_pages.empty(head.weight.shape, dtype, device)
        if self.wanted.lora_weight:
            self.dlora_weight = torch.empty(head.lora_weight.shape, dtype=self.dtype, device=device)
        if self.wanted.bias:
            self.dbias = torch.empty(head.weight.shape[0], dtype=self.dtype, device=device)

    def recompute(self, flagged_rows: Rows, keeps: torch.Tensor, flagged: torch.Tensor, results: RowResults) -> RowResults:
        """The results of the flagged rows, from the two-pass forward.

        Rows with `keeps` True, which are flagged only for their u, keep those they have.
        """
        options = self.options
        anew = row_results(
            flagged_rows, self.head, options.asked, options.plan.two_pass_rows, options.backend, options.group,
            options.first_column,
        )  # fmt: skip

        def chosen(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return torch.where(keeps.view(-1, *(1,) * (new.dim() - 1)), old[flagged], new)

        return _merged(chosen, results, anew)

    def gradients(self, rows: Rows) -> Gradients:
        """The gradients, in their inputs' dtypes (dW with `wide_weight` in the accumulation dtype); dX is summed over ranks."""
        head, group = self.head, self.options.group
        self.exps = None  # its memory is free before the rounded copies are made
        if group is not None:
            self.dhidden, self.dlora_hidden = (_summed(x, rows, group) for x in (self.dhidden, self.dlora_hidden))
            self.dhidden = None if self.dhidden is None else self.dhidden.to(rows.hidden.dtype)

        def rounded(wanted: bool, x: torch.Tensor | None, sums: torch.Tensor | None, dtype: torch.dtype | None = None):
            if not wanted:
                return None
            dtype = dtype or x.dtype
            if sums is None:  # there were no rows
                return torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
            return sums.to(dtype)

        wanted = self.wanted
        return Gradients(
            self.dhidden, self.dlora_hidden,
            rounded(wanted.weight, head.weight, self.dweight, self.dtype if self.options.wide_weight else None),
            rounded(wanted.lora_weight, head.lora_weight, self.dlora_weight), rounded(wanted.bias, head.bias, self.dbias),
        )  # fmt: skip


def _joined(chunks: list[RowResults]) -> RowResults:
    """The results of all chunks as one."""
    return chunks[0] if len(chunks) == 1 else _merged(lambda *x: torch.cat(x), *chunks)


def _joined_vectors(vectors: list[torch.Tensor | None]) -> torch.Tensor | None:
    return vectors[0] if len(vectors) == 1 or vectors[0] is None else torch.cat(vectors)


def _rows_to_write(sums: torch.Tensor | None, live: _Live) -> torch.Tensor | None:
    """The part of a gradient (N, ...) that a chunk writes to: its rows, or all of it where these have places of their own."""
    return sums if sums is None or live.chunk.places is not None else part(sums, live.span.start, live.span.stop)


def _summed(sums: torch.Tensor | None, rows: Rows, group: ProcessGroup) -> torch.Tensor | None:
    """A gradient (N, ...) summed over ranks. Only computed rows are sent: the others are zeros on every rank."""
    if sums is None:
        return None
    if rows.indices is None:
        return vocab_parallel.all_reduced(sums, group)
    return sums.index_copy_(0, rows.indices, vocab_parallel.all_reduced(sums[rows.indices], group))


def _spans(count: int, length: int) -> list[slice]:
    """Spans of `length` rows that cover `count` rows; where there are none, one empty span."""
    return [slice(start, min(start + length, count)) for start in range(0, max(count, 1), length)]
