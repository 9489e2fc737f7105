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
import torch.nn.functional as F

from ..distributed import vocab_parallel
from ..kernels.limits import LARGEST_FACTOR, LARGEST_SUM, LOWEST_ANCHOR, SMALLEST_FACTOR, SMALLEST_SUM, SUMMARY
from ..tiles import large_pages, running
from ..tiles.backend import tiles_of
from ..tiles.host_read import HostRead
from ..tiles.products import Sums, accumulation_dtype
from ..tiles.row_statistics import entropy_of, finish_further
from ..tiles.structures import (
    Asked,
    Chunk,
    DeviceLoss,
    Further,
    FurtherPartials,
    Gradients,
    Head,
    LossSummary,
    LossSums,
    RowResults,
    RowStatistics,
    RowSums,
    Target,
    TokenTerms,
    Wanted,
    is_further,
    largest_kept,
)
from ..tiles.torch_tiles import store_target
from . import operators
from .rows import Rows, part
from .statistics import row_results
from .workspace import Plan, exps_dtype, row_stride

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# (logprobs, terms) -> per-token losses, whose sum is the loss
TokenLosses = Callable[[torch.Tensor, TokenTerms], torch.Tensor]


class OnePass(NamedTuple):
    """The results of a sweep over K rows."""

    loss: torch.Tensor  # ()
    rows: RowResults  # the log-probabilities, and what else is asked for
    summary: torch.Tensor | None  # metrics, where kernels have computed the loss of all rows
    again: torch.Tensor | None  # (2,) int64: how many rows were computed again, and whether dW was too; None: none
    gradients: Gradients  # of the loss


class Options(NamedTuple):
    """Settings of a sweep."""

    wanted: Wanted
    asked: Asked
    plan: Plan
    host_reads: bool
    backend: str
    device_loss: DeviceLoss | None  # the loss as device functions; None: it is computed in PyTorch
    wide_weight: bool = False  # dW stays in the accumulation dtype, to be added to a buffer of the caller
    group: ProcessGroup | None = None  # whose ranks hold the other columns
    first_column: int = 0  # the token id of this rank's first column; ids count all columns


class _RowVectors(NamedTuple):
    """Vectors (C,) of a chunk after product 1."""

    results: RowResults
    losses: torch.Tensor | None  # None: computed at the end, of all rows at once
    factor: torch.Tensor | None  # u, 0 where a row adds nothing; None if no gradient is wanted
    state: torch.Tensor  # int8: 0: S and u are in range, 1: u is not, 2: S is not. The row is flagged unless it is 0
    residual: torch.Tensor | None  # R, the rounding error of each row of E (`RowSums`); None if they are not rounded


class _Product(NamedTuple):
    """What product 1 finds out about the rows of a chunk, padding included."""

    sums: RowSums  # S, Q and further partials over the columns of all ranks, R over this rank's
    target: Target
    columns: int | torch.Tensor  # V, of all ranks


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
        chunk, vectors = sweep.first_product(rows, span, terms if span.stop - span.start == count else terms.select(span))
        found.append(vectors)
        if span.stop == count:
            summary = sweep.summary()
            flagged = _number_of_flagged(found, summary) if options.host_reads else None
        sweep.add_gradients(rows, span, chunk, vectors, once=count <= length)

    results, losses = _joined([x.results for x in found]), _joined_vectors([x.losses for x in found])
    if flagged is not None and flagged.read():
        repeats = sweep.widen_weight(chunk, vectors)
        results, losses, again = _computed_again(sweep, rows, terms, found, results, losses)
        numbers = rows.tokens.new_tensor([again, repeats], dtype=torch.int64)
        return OnePass(losses.sum(), results, None, numbers, sweep.gradients(rows))
    if summary is not None:
        return OnePass(summary.loss, results, summary.metrics, None, sweep.gradients(rows))
    if losses is None:
        results = kept_results(results, terms)
        losses = token_losses(results.statistics.logprobs, terms)
    return OnePass(losses.sum(), results, None, None, sweep.gradients(rows))


def kept_results(results: RowResults, terms: TokenTerms) -> RowResults:
    """The results, with log-probabilities and entropies of 0 where masked."""
    logprobs, entropy, *others = results.statistics
    entropy = None if entropy is None else terms.kept(entropy)
    return RowResults(RowStatistics(terms.kept(logprobs), entropy, *others), results.further)


def _number_of_flagged(found: list[_RowVectors], summary: LossSummary | None) -> HostRead:
    if summary is not None:
        return HostRead(summary.metrics[SUMMARY.index("flagged")])
    return HostRead((_joined_vectors([x.state for x in found]) > 0).sum())


def _computed_again(
    sweep: _Sweep,
    rows: Rows,
    terms: TokenTerms,
    found: list[_RowVectors],
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
        chunk, vectors = sweep.first_product(again, span, again_terms.select(span), anchors[span])
        sweep.add_gradients(again, span, chunk, vectors, once=False)
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
        self.sums = None
        if options.device_loss is not None:
            self.sums = tiles.loss_sums(rows.tokens.shape[0], hidden.device)

    def first_product(
        self, rows: Rows, span: slice, terms: TokenTerms, anchors: torch.Tensor | None = None
    ) -> tuple[Chunk, _RowVectors]:
        """Product 1 of a chunk, and the vectors that follow from it. Also returns the chunk, which products 2 and 3 need.

        anchors (C,): the rows' log-probabilities where they are known already, for rows that are recomputed.
        """
        chunk = rows.chunk(span.start, span.stop, self.operand_dtype, multiple=self.padding)
        exps = None if self.exps is None else part(self.exps, 0, span.stop - span.start)
        loss = self.options.device_loss
        if loss is None or anchors is not None:
            return chunk, self._any_objective(chunk, exps, terms, anchors)
        into = LossSums(self.sums, tiles_of(self.options.backend).first_of_sums(span.start))
        found = self.tiles.anchored_loss(chunk, self.head, terms, loss, exps, self.options.asked.entropy, into)
        results = RowResults(RowStatistics(found.logprobs, found.entropy, None, None, None))
        return chunk, _RowVectors(results, found.losses, found.factor, found.state, found.residual)

    def _any_objective(
        self, chunk: Chunk, exps: torch.Tensor | None, terms: TokenTerms, anchors: torch.Tensor | None
    ) -> _RowVectors:
        """The vectors of a chunk for any objective, in PyTorch (`anchored_loss` has them for named ones)."""
        size = len(terms.advantages)
        log_anchor = _log_anchor(terms) if anchors is None else anchors
        padded = F.pad(log_anchor, (0, len(chunk.tokens) - size))
        asked = self.options.asked if anchors is None else Asked()
        found = self._product(chunk, padded, exps, asked)
        total = found.sums.total[:size]
        t = total.log() - log_anchor
        logprobs = F.logsigmoid(-t) if anchors is None else anchors
        in_range = (total >= SMALLEST_SUM) & (total < LARGEST_SUM) & _squares_in_range(found.sums.further, log_anchor)
        flagged, factor = ~in_range, None
        if exps is not None:
            g = loss_gradient(self.token_losses, terms.kept(logprobs), terms)
            factor = self._row_factor(g, total + log_anchor.exp(), chunk.temperature)
            flagged = flagged | ~_factor_in_range(factor, g)
        if not self.options.host_reads:
            # nothing can be recomputed: NaN shows a row that has left the range
            lost = ~(total < LARGEST_SUM) if factor is None else ~(total < LARGEST_SUM) | ~factor.isfinite()
            t, logprobs = (torch.where(lost, torch.nan, x) for x in (t, logprobs))
            found = _Product(_without_lost_squares(found.sums, log_anchor), *found[1:])
            factor = None if factor is None else terms.kept(torch.where(lost, torch.nan, factor))
        elif factor is not None and anchors is None:
            factor = factor.masked_fill(flagged, 0)
        results = self._results(chunk, found, t, logprobs, asked)
        return _RowVectors(results, None, factor, flagged.to(torch.int8) + ~in_range, found.sums.residual)

    def _results(self, chunk: Chunk, found: _Product, t: torch.Tensor, logprobs: torch.Tensor, asked: Asked) -> RowResults:
        """The log-probabilities (C,), and what else is asked of the rows, from their log-odds t and their sums."""
        size, (total, weighted, _, further) = len(t), found.sums
        total, logsumexp, entropy = total[:size], None, None
        if asked.entropy:
            entropy = entropy_of(t, total.log(), total, weighted[:size])
        if asked.logsumexp or asked.top_k:
            # the row's own logit less its log-probability, from the side that does not cancel; log S - a = t
            z = found.target.logit[:size]
            logsumexp = torch.where(t < 0, z - logprobs, (z + t) - F.logsigmoid(t))
        statistics = RowStatistics(logprobs, entropy, t, logsumexp, None)
        if is_further(asked):
            partials = running.closed(FurtherPartials(*(None if x is None else x[:size] for x in further)), total)
            tokens = chunk.tokens[:size] + self.options.first_column
            further = finish_further(partials, statistics, tokens, found.columns, asked)
        else:
            further = Further()
        return RowResults(RowStatistics(logprobs, entropy, None, logsumexp, None), further)

    def _product(self, chunk: Chunk, log_anchor: torch.Tensor, exps: torch.Tensor | None, asked: Asked) -> _Product:
        """Product 1. Writes E of this rank's columns to exps."""
        head, group, columns = self.head, self.options.group, self.head.weight.shape[0]
        target = self.tiles.target_logits(chunk, head)
        if group is not None:
            numbers = [target.logit] if target.slope is None else list(target)
            of_owner = vocab_parallel.on_the_owner(torch.stack(numbers, 1), chunk.tokens, columns, group)
            target = Target(*of_owner.T.contiguous()) if len(numbers) == 2 else Target(of_owner[:, 0].contiguous(), None)
        local = Asked(*asked[:-1], min(asked.top_k, columns))
        sums = self.tiles.anchored_exp(chunk, head, log_anchor, target, exps, local)
        if group is None:
            return _Product(sums, target, columns)
        whole = vocab_parallel.sum_over_ranks(torch.stack([x for x in sums[:2] if x is not None]), group)
        residual = sums.residual
        if exps is not None:
            size = len(exps)
            slope = 1 if target.slope is None else target.slope[:size]
            before, after, tokens = (x[:size] for x in (sums.total, whole[0], chunk.tokens))
            # else the row has been stored as zeros (before), or will be flagged or lost (after): it stays as it is
            in_range = (before < LARGEST_SUM) & (after < LARGEST_SUM)
            places = torch.where(in_range, tokens, -1)
            taken = store_target(exps, places, torch.where(in_range, -after * slope, 0))
            if residual is not None:
                # the entry that is replaced was rounded too: its error leaves R, the new entry's enters
                once = torch.where(places == tokens.clamp(0, columns - 1), -before * slope, 0)
                residual = residual - (once - once.to(exps.dtype).to(once.dtype)) + taken
        further, all_columns = vocab_parallel.combine_further(
            sums.further, chunk.tokens, columns, group, largest_kept(asked), self.options.first_column
        )  # fmt: skip
        if further.squares is not None:
            squares = vocab_parallel.sum_over_ranks(further.squares, group)
            further = FurtherPartials(*further[:3], squares, further.above)
        sums = RowSums(whole[0], whole[1] if asked.entropy else None, residual, further)
        return _Product(sums, target, columns if all_columns is None else all_columns)

    def _row_factor(self, g: torch.Tensor, denominator: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
        """u = -g logit_scale / (T D)."""
        scale = self.head.logit_scale
        if temperature is not None:
            scale = scale / temperature[: len(g), 0]
        return -g * scale / denominator

    def add_gradients(self, rows: Rows, span: slice, chunk: Chunk, vectors: _RowVectors, once: bool) -> None:
        """Products 2 and 3 of a chunk. once: it is the only chunk of the call, so dW is rounded as it is written."""
        if self.exps is None or span.stop == span.start:
            return
        weight, count = self.head.weight, span.stop - span.start
        # The first chunk writes dW, dB and db, later ones add to them: nothing is filled with zeros first.
        add = any(x is not None for x in (self.dweight, self.dlora_weight, self.dbias))
        if not add:
            # several chunks are summed in the accumulation dtype; one alone needs no such copy of dW
            self._allocate_sums(weight.dtype if once and not self.options.wide_weight else self.dtype)
        # rows of dX are written and never added to: a flagged row is overwritten by its second chunk
        dhidden, dlora_hidden = (_rows_to_write(x, rows, span) for x in (self.dhidden, self.dlora_hidden))
        sums = Sums(dhidden, dlora_hidden, self.dweight, self.dlora_weight, self.dbias)
        operators.gradient_products(
            part(self.exps, 0, count), vectors.factor, vectors.residual, chunk, self.head, sums, add, self.options.backend
        )  # fmt: skip

    def widen_weight(self, chunk: Chunk, vectors: _RowVectors) -> bool:
        """Computes dW once more, in the accumulation dtype, where the only chunk has rounded it: other rows can then be added.

        Returns whether it did. The buffer still holds the chunk's E.
        """
        if self.dweight is None or self.dweight.dtype == self.dtype:
            return False
        self.dweight = None  # its memory is free before there is another
        self.dweight = large_pages.empty(self.head.weight.shape, self.dtype, self.head.weight.device)
        operators.gradient_products(
            self.exps[: len(vectors.factor)], vectors.factor, vectors.residual, chunk, self.head,
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
            return torch.zeros_like(x, dtype=dtype) if sums is None else sums.to(dtype)  # None: there were no rows

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


def _rows_to_write(sums: torch.Tensor | None, rows: Rows, span: slice) -> torch.Tensor | None:
    """The part of a gradient (N, ...) that a chunk writes to: its rows, or all of it where these are gathered."""
    return sums if sums is None or rows.indices is not None else part(sums, span.start, span.stop)


def _summed(sums: torch.Tensor | None, rows: Rows, group: ProcessGroup) -> torch.Tensor | None:
    """A gradient (N, ...) summed over ranks. Only computed rows are sent: the others are zeros on every rank."""
    if sums is None:
        return None
    if rows.indices is None:
        return vocab_parallel.all_reduced(sums, group)
    return sums.index_copy_(0, rows.indices, vocab_parallel.all_reduced(sums[rows.indices], group))


def loss_gradient(token_losses: TokenLosses, logprobs: torch.Tensor, terms: TokenTerms) -> torch.Tensor:
    """g = dL/dlogp (C,), by autograd through the objective on vectors. Called inside the forward of an autograd.Function."""
    if torch.compiler.is_compiling():  # Dynamo refuses torch.autograd.grad there
        g = torch.func.grad(lambda x: token_losses(x, terms).sum())(logprobs)
    else:
        # torch.func refuses to run under the saved-tensor hooks of checkpointing. Identity hooks keep those away from these
        # few vectors.
        identity = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.enable_grad(), identity:
            x = logprobs.detach().requires_grad_()
            g = torch.autograd.grad(token_losses(x, terms).sum(), x)[0]
    return terms.kept(g)  # a user's function may have an infinite slope at a masked token's zeros


def _log_anchor(terms: TokenTerms) -> torch.Tensor:
    old = terms.old_logprobs
    return torch.zeros_like(terms.advantages) if old is None else old.clamp(LOWEST_ANCHOR, 0)


def _spans(count: int, length: int) -> list[slice]:
    """Spans of `length` rows that cover `count` rows; where there are none, one empty span."""
    return [slice(start, min(start + length, count)) for start in range(0, max(count, 1), length)]


def _factor_in_range(factor: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    size = factor.abs()
    return (g == 0) | ((size >= SMALLEST_FACTOR) & (size <= LARGEST_FACTOR))


# where sum E^2 is below this, and exp(a) is small enough for it to matter, sum p^2 cannot be told from it
_SMALLEST_SQUARES, _SMALL_ANCHOR = 2.0**-110, -20.0


def _without_lost_squares(sums: RowSums, log_anchor: torch.Tensor) -> RowSums:
    """The sums with NaN for those of squares that have left their range."""
    if sums.further.squares is None:
        return sums
    squares = sums.further.squares[: len(log_anchor)]
    squares = torch.where(_squares_in_range(sums.further, log_anchor), squares, torch.nan)
    return RowSums(*sums[:3], FurtherPartials(*sums.further[:3], squares, sums.further.above))


def _squares_in_range(further: FurtherPartials, log_anchor: torch.Tensor) -> torch.Tensor | bool:
    """Whether sum E^2, if it is asked for, has neither over- nor underflowed: S may be in range where it has."""
    if further.squares is None:
        return True
    squares = further.squares[: len(log_anchor)]
    return squares.isfinite() & ((squares >= _SMALLEST_SQUARES) | (log_anchor > _SMALL_ANCHOR))
