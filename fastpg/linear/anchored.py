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
from ..tiles import large_pages
from ..tiles.backend import tiles_of
from ..tiles.host_read import HostRead
from ..tiles.products import Sums, accumulation_dtype
from ..tiles.row_statistics import entropy_of
from ..tiles.structures import (
    Chunk,
    DeviceLoss,
    Gradients,
    Head,
    LossSummary,
    LossSums,
    RowSums,
    Target,
    TokenTerms,
    Wanted,
)
from ..tiles.torch_tiles import store_target
from . import operators
from .rows import Rows, part
from .statistics import row_statistics
from .workspace import Plan, exps_dtype, row_stride

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# (logprobs, terms) -> per-token losses, whose sum is the loss
TokenLosses = Callable[[torch.Tensor, TokenTerms], torch.Tensor]


class OnePass(NamedTuple):
    """The results of a sweep over K rows."""

    loss: torch.Tensor  # ()
    logprobs: torch.Tensor  # (K,)
    entropy: torch.Tensor | None  # (K,)
    summary: torch.Tensor | None  # metrics, where kernels have computed the loss of all rows
    again: torch.Tensor | None  # (2,) int64: how many rows were computed again, and whether dW was too; None: none
    gradients: Gradients  # of the loss


class RowResults(NamedTuple):
    """Results of rows, (K,) each."""

    logprobs: torch.Tensor
    losses: torch.Tensor | None  # 0 where masked; None: not computed yet
    entropy: torch.Tensor | None


class Options(NamedTuple):
    """Settings of a sweep."""

    wanted: Wanted
    entropy: bool
    plan: Plan
    host_reads: bool
    backend: str
    device_loss: DeviceLoss | None  # the loss as device functions; None: it is computed in PyTorch
    wide_weight: bool = False  # dW stays in the accumulation dtype, to be added to a buffer of the caller
    group: ProcessGroup | None = None  # whose ranks hold the other columns


class _RowVectors(NamedTuple):
    """Vectors (C,) of a chunk after product 1."""

    logprobs: torch.Tensor
    losses: torch.Tensor | None  # None: computed at the end, of all rows at once
    entropy: torch.Tensor | None
    factor: torch.Tensor | None  # u, 0 where a row adds nothing; None if no gradient is wanted
    state: torch.Tensor  # int8: 0: S and u are in range, 1: u is not, 2: S is not. The row is flagged unless it is 0
    residual: torch.Tensor | None  # R, the rounding error of each row of E (`RowSums`); None if they are not rounded


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

    results = RowResults(*(_joined(found, name) for name in ("logprobs", "losses", "entropy")))
    if flagged is not None and flagged.read():
        repeats = sweep.widen_weight(chunk, vectors)
        results, again = _computed_again(sweep, rows, terms, found, results)
        numbers = rows.tokens.new_tensor([again, repeats], dtype=torch.int64)
        return OnePass(results.losses.sum(), *results[::2], None, numbers, sweep.gradients(rows))
    if summary is not None:
        return OnePass(summary.loss, *results[::2], summary.metrics, None, sweep.gradients(rows))
    logprobs, losses, entropies = results
    if losses is None:
        logprobs, entropies = terms.kept(logprobs), None if entropies is None else terms.kept(entropies)
        losses = token_losses(logprobs, terms)
    return OnePass(losses.sum(), logprobs, entropies, None, None, sweep.gradients(rows))


def _number_of_flagged(found: list[_RowVectors], summary: LossSummary | None) -> HostRead:
    if summary is not None:
        return HostRead(summary.metrics[SUMMARY.index("flagged")])
    return HostRead((_joined(found, "state") > 0).sum())


def _computed_again(
    sweep: _Sweep, rows: Rows, terms: TokenTerms, found: list[_RowVectors], results: RowResults
) -> tuple[RowResults, int]:
    """The results with those of the flagged rows, in chunks of their own, and how many these are."""
    logprobs, losses, entropies = results
    state = _joined(found, "state")
    flagged = state.nonzero()[:, 0]
    again, again_terms = rows.select(flagged), terms.select(flagged)
    anchors, again_entropies = sweep.recompute(again, state[flagged] < 2, flagged, logprobs, entropies)
    logprobs = logprobs.index_copy(0, flagged, anchors)
    entropies = None if entropies is None else entropies.index_copy(0, flagged, again_entropies)
    if losses is None:
        losses = sweep.token_losses(logprobs, terms)
    else:
        losses = losses.index_copy(0, flagged, sweep.token_losses(anchors, again_terms))
    for span in _spans(len(flagged), sweep.options.plan.sweep_rows) if any(sweep.wanted) else []:
        chunk, vectors = sweep.first_product(again, span, again_terms.select(span), anchors[span])
        sweep.add_gradients(again, span, chunk, vectors, once=False)
    return RowResults(logprobs, losses, entropies), len(flagged)


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
        found = self.tiles.anchored_loss(chunk, self.head, terms, loss, exps, self.options.entropy, into)
        return chunk, _RowVectors(*found)

    def _any_objective(
        self, chunk: Chunk, exps: torch.Tensor | None, terms: TokenTerms, anchors: torch.Tensor | None
    ) -> _RowVectors:
        """The vectors of a chunk for any objective, in PyTorch (`anchored_loss` has them for named ones)."""
        size = len(terms.advantages)
        log_anchor = _log_anchor(terms) if anchors is None else anchors
        padded = F.pad(log_anchor, (0, len(chunk.tokens) - size))
        total, weighted, residual = self._sums(chunk, padded, exps)
        total = total[:size]
        t = total.log() - log_anchor
        logprobs = F.logsigmoid(-t) if anchors is None else anchors
        entropy = None if weighted is None else entropy_of(t, total.log(), total, weighted[:size])
        in_range = (total >= SMALLEST_SUM) & (total < LARGEST_SUM)
        flagged, factor = ~in_range, None
        if exps is not None:
            g = loss_gradient(self.token_losses, terms.kept(logprobs), terms)
            factor = self._row_factor(g, total + log_anchor.exp(), chunk.temperature)
            flagged = flagged | ~_factor_in_range(factor, g)
        if not self.options.host_reads:
            # nothing can be recomputed: NaN shows a row that has left the range
            lost = ~(total < LARGEST_SUM) if factor is None else ~(total < LARGEST_SUM) | ~factor.isfinite()
            logprobs, entropy, factor = (
                None if x is None else terms.kept(torch.where(lost, torch.nan, x)) for x in (logprobs, entropy, factor)
            )
        elif factor is not None and anchors is None:
            factor = factor.masked_fill(flagged, 0)
        return _RowVectors(logprobs, None, entropy, factor, flagged.to(torch.int8) + ~in_range, residual)

    def _sums(self, chunk: Chunk, log_anchor: torch.Tensor, exps: torch.Tensor | None) -> RowSums:
        """Product 1: S and Q over the columns of all ranks, R over this rank's. Writes E of this rank's columns to exps."""
        head, options, group = self.head, self.options, self.options.group
        target = self.tiles.target_logits(chunk, head)
        if group is not None:
            columns = [target.logit] if target.slope is None else list(target)
            of_owner = vocab_parallel.on_the_owner(torch.stack(columns, 1), chunk.tokens, head.weight.shape[0], group)
            target = Target(*of_owner.T.contiguous()) if len(columns) == 2 else Target(of_owner[:, 0].contiguous(), None)
        sums = self.tiles.anchored_exp(chunk, head, log_anchor, target, exps, options.entropy)
        if group is None:
            return sums
        whole = vocab_parallel.sum_over_ranks(torch.stack([x for x in sums[:2] if x is not None]), group)
        residual = sums.residual
        if exps is not None:
            size = len(exps)
            slope = 1 if target.slope is None else target.slope[:size]
            before, after, tokens = (x[:size] for x in (sums.total, whole[0], chunk.tokens))
            # else the row has been stored as zeros (before), or will be flagged or lost (after): it stays as it is
            in_range = (before < LARGEST_SUM) & (after < LARGEST_SUM)
            columns = torch.where(in_range, tokens, -1)
            taken = store_target(exps, columns, torch.where(in_range, -after * slope, 0))
            if residual is not None:
                # the entry that is replaced was rounded too: its error leaves R, the new entry's enters
                once = torch.where(columns == tokens.clamp(0, head.weight.shape[0] - 1), -before * slope, 0)
                residual = residual - (once - once.to(exps.dtype).to(once.dtype)) + taken
        return RowSums(whole[0], whole[1] if options.entropy else None, residual)

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
        return None if self.sums is None else self.tiles.loss_summary(self.sums, self.options.entropy)

    def _allocate_sums(self, dtype: torch.dtype) -> None:
        head, device = self.head, self.head.weight.device
        if self.wanted.weight:
            self.dweight = large_pages.empty(head.weight.shape, dtype, device)
        if self.wanted.lora_weight:
            self.dlora_weight = torch.empty(head.lora_weight.shape, dtype=self.dtype, device=device)
        if self.wanted.bias:
            self.dbias = torch.empty(head.weight.shape[0], dtype=self.dtype, device=device)

    def recompute(
        self,
        flagged_rows: Rows,
        keeps: torch.Tensor,
        flagged: torch.Tensor,
        logprobs: torch.Tensor,
        entropies: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and entropies of the flagged rows, from the two-pass forward.

        Rows with `keeps` True, which are flagged only for their u, keep those they have.
        """
        options = self.options
        statistics = row_statistics(
            flagged_rows, self.head, options.entropy, options.plan.two_pass_rows, options.backend, options.group
        )
        again = torch.where(keeps, logprobs[flagged], statistics.logprobs)
        return again, None if entropies is None else torch.where(keeps, entropies[flagged], statistics.entropy)

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


def _joined(chunks: list[_RowVectors], name: str) -> torch.Tensor | None:
    """The field `name` of all chunks as one vector."""
    vectors = [getattr(chunk, name) for chunk in chunks]
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
