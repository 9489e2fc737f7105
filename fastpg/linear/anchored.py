"""The one-pass schedule: loss and gradients in one sweep, three matrix products, anchored by the old log-probabilities.

Every policy-gradient loss is given old_n, an estimate of logp_n. So with a_n = clamp(old_n, -60, 0), anchor_n = z_n,y - a_n
estimates the row's logsumexp up to the log ratio, before a single logit is known, and

    E_nv = exp(z_nv - anchor_n)  for v != y_n        S_n = sum_v E_nv        D_n = S_n + exp(a_n)
    t_n = log S_n - a_n          logp_n = logsigmoid(-t_n)                   p_nv = E_nv / D_n

need no running maximum, no rescaling and no second pass: exp is taken in the epilogue of the first product. The loss enters
through one number per row, g_n = dL/dlogp_n, which commutes with the other two products:

    dL/dz_nv = g_n ([v = y] - p_nv) = -g_n E_nv / D_n  with  E_n,y = -S_n            u_n = -g_n logit_scale / (T_n D_n)
    dX_n = u_n (E @ W)_n                      dW = E^T @ (u x)    db = E^T u

Per token chunk: product 1 with its epilogue (`operators.anchored_exp`), plain Python on [C] vectors, products 2 and 3
(`operators.gradient_products`). Chunks are as long as the workspace allows; where one holds everything, dW is written once. On
Triton a loss of named objectives is computed where the sums are completed, in one launch (`operators.anchored_loss`).

Range. The kernels cap E at 2^100; in PyTorch it may become infinite, and so may its sum. A row is flagged unless 2^-90
<= S < 2^99 and (g = 0 or 2^-110 <= |u| <= 2^110), which NaN, overflow, underflow and the empty sum of V = 1 all fail. Flagged
rows add nothing to their chunk; they form last chunks of their own, anchored at their own log-probability from the two-pass
forward, not clamped. Then E = p, S = 1 - p, D = 1 and nothing overflows.

Vocab-parallel. Each rank multiplies its own columns. z_y is the owner's, S and Q are summed over ranks before the vectors, and
the target's entry -S is written again by its owner; dX is summed at the end. Nothing else knows of other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from ..distributed import vocab_parallel
from ..kernels.limits import LARGEST_FACTOR, LARGEST_SUM, LOWEST_ANCHOR, SMALLEST_FACTOR, SMALLEST_SUM
from ..loss.objectives import DeviceLoss
from ..loss.policy_loss import TokenTerms
from ..tiles import large_pages
from ..tiles.backend import tiles_of
from ..tiles.products import Sums, accumulation_dtype
from ..tiles.row_statistics import entropy_of
from ..tiles.structures import Chunk, Gradients, Head, RowSums, Target, Wanted
from ..tiles.torch_tiles import store_target
from . import operators
from .rows import Rows
from .statistics import row_statistics
from .workspace import Plan, exps_dtype, row_stride

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# (logprobs, terms) -> per-token losses, whose sum is the loss
TokenLosses = Callable[[torch.Tensor, TokenTerms], torch.Tensor]


class OnePass(NamedTuple):
    """What a sweep returns of its K rows."""

    logprobs: torch.Tensor  # (K,)
    losses: torch.Tensor  # (K,), 0 where masked; the loss is their sum
    entropy: torch.Tensor | None  # (K,)
    recomputed: torch.Tensor  # (): how many rows were flagged
    gradients: Gradients  # of the loss


class Options(NamedTuple):
    """How a call is computed; not what."""

    wanted: Wanted
    entropy: bool
    plan: Plan
    host_reads: bool
    backend: str
    device_loss: DeviceLoss | None  # the loss as device functions, where the Triton backend has it in a kernel
    wide_weight: bool = False  # dW in the accumulation dtype, for a buffer of the caller
    group: ProcessGroup | None = None  # whose ranks hold the other columns


class _RowVectors(NamedTuple):
    """Vectors (C,) of a chunk after product 1."""

    logprobs: torch.Tensor
    losses: torch.Tensor | None  # None if they are left to the end
    entropy: torch.Tensor | None
    factor: torch.Tensor | None  # u, 0 where a row adds nothing; None if no gradient is wanted
    residual: torch.Tensor | None  # what rounding took from the rows of E; None if they are not rounded
    sum_in_range: torch.Tensor | None  # bool, as the next; None where nothing is checked
    flagged: torch.Tensor | None


def one_pass(rows: Rows, head: Head, terms: TokenTerms, token_losses: TokenLosses, options: Options) -> OnePass:
    """Log-probabilities, losses, entropies and gradients of the loss for K rows.

    With `options.host_reads` one read, after product 1 of the last chunk, finds flagged rows, which are then recomputed.
    Without it nothing is read: a row whose sum overflows or is not finite gets a NaN log-probability and makes the gradients
    NaN.
    """
    count, length = len(rows.tokens), options.plan.sweep_rows
    sweep = _Sweep(head, token_losses, options, rows, min(count, length))
    found, flagged = [], None
    for span in _spans(count, length):
        chunk, vectors = sweep.first_product(rows, span, terms if span.stop - span.start == count else terms.select(span))
        found.append(vectors)
        if options.host_reads and span.stop == count:
            flagged = _joined(found, "flagged").nonzero()[:, 0]  # the host read
            flagged = flagged if len(flagged) else None
        sweep.add_gradients(rows, span, chunk, vectors, once=count <= length and flagged is None)

    logprobs, losses, entropies = (_joined(found, name) for name in ("logprobs", "losses", "entropy"))
    if flagged is not None:
        again, again_terms = rows.select(flagged), terms.select(flagged)
        anchors, again_entropies = sweep.recompute(again, _joined(found, "sum_in_range")[flagged], flagged, logprobs, entropies)
        logprobs = logprobs.index_copy(0, flagged, anchors)
        entropies = None if entropies is None else entropies.index_copy(0, flagged, again_entropies)
        losses = None if losses is None else losses.index_copy(0, flagged, token_losses(anchors, again_terms))
        for span in _spans(len(flagged), length) if any(options.wanted) else []:
            chunk, vectors = sweep.first_product(again, span, again_terms.select(span), anchors[span])
            sweep.add_gradients(again, span, chunk, vectors, once=False)
    if losses is None:
        logprobs = terms.kept(logprobs)
        losses = token_losses(logprobs, terms)
        entropies = None if entropies is None else terms.kept(entropies)
    recomputed = rows.tokens.new_full((), 0 if flagged is None else len(flagged))
    return OnePass(logprobs, losses, entropies, recomputed, sweep.gradients(rows))


class _Sweep:
    """One call: what stays the same for all of its chunks, the buffer for E, and the sums of the gradients."""

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
            vocab = head.weight.shape[0]
            exps[:, vocab:] = 0  # products may read past the end of a row (see `products`)
            self.exps = exps[:, :vocab]
        self.dhidden = self.dlora_hidden = None
        if self.wanted.hidden:  # summed over ranks before it is rounded
            writes_all = rows.indices is None and longest
            new = hidden.new_empty if writes_all else hidden.new_zeros
            self.dhidden = new(hidden.shape, dtype=hidden.dtype if options.group is None else self.dtype)
        if self.wanted.lora_hidden:
            self.dlora_hidden = torch.zeros_like(rows.lora_hidden)
        # allocated by the first chunk, which knows whether there are others
        self.dweight = self.dlora_weight = self.dbias = None

    def first_product(
        self, rows: Rows, span: slice, terms: TokenTerms, anchors: torch.Tensor | None = None
    ) -> tuple[Chunk, _RowVectors]:
        """Product 1 of a chunk, and what follows from it row by row. `anchors`: log-probabilities already known.

        Also returns the chunk, whose hidden states product 3 needs.
        """
        chunk = rows.chunk(span.start, span.stop, self.operand_dtype, multiple=self.padding)
        exps = None if self.exps is None else self.exps[: span.stop - span.start]
        loss, checks = self.options.device_loss, self.options.host_reads
        if loss is None or anchors is not None:
            return chunk, self._any_objective(chunk, exps, terms, anchors)
        found = self.tiles.anchored_loss(chunk, self.head, terms, loss, exps, self.options.entropy)
        in_range = found.state < 2 if checks else None
        flagged = found.state > (1 if exps is None else 0) if checks else None
        return chunk, _RowVectors(*found[:4], found.residual, in_range, flagged)

    def _any_objective(
        self, chunk: Chunk, exps: torch.Tensor | None, terms: TokenTerms, anchors: torch.Tensor | None
    ) -> _RowVectors:
        """Any objective, on vectors."""
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
            lost = ~(total < LARGEST_SUM) if factor is None else ~(total < LARGEST_SUM) | ~factor.isfinite()
            logprobs, entropy, factor = (
                None if x is None else terms.kept(torch.where(lost, torch.nan, x)) for x in (logprobs, entropy, factor)
            )
        elif factor is not None and anchors is None:
            factor = factor.masked_fill(flagged, 0)
        return _RowVectors(logprobs, None, entropy, factor, residual, in_range, flagged)

    def _sums(self, chunk: Chunk, log_anchor: torch.Tensor, exps: torch.Tensor | None) -> RowSums:
        """S, Q and what rounding took, from product 1, over the columns of all ranks; E of this rank's into exps."""
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
            in_range = (before < LARGEST_SUM) & (after < LARGEST_SUM)  # else the row is stored as zeros, or dropped
            columns = torch.where(in_range, tokens, -1)
            taken = store_target(exps, columns, torch.where(in_range, -after * slope, 0))
            if residual is not None:
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
        """Products 2 and 3 of a chunk. once: it is the only chunk of the call."""
        if self.exps is None or span.stop == span.start:
            return
        weight, count = self.head.weight, span.stop - span.start
        add = any(x is not None for x in (self.dweight, self.dlora_weight, self.dbias))
        if not add:
            self._allocate_sums(weight.dtype if once and not self.options.wide_weight else self.dtype)
        sums = Sums(
            _rows_to_write(self.dhidden, rows, span), _rows_to_write(self.dlora_hidden, rows, span), self.dweight,
            self.dlora_weight, self.dbias,
        )  # fmt: skip
        operators.gradient_products(self.exps[:count], vectors.factor, vectors.residual, chunk, self.head, sums, add)
        _write_back(self.dhidden, rows, span, sums.hidden)
        _write_back(self.dlora_hidden, rows, span, sums.lora_hidden)

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
        """Log-probabilities and entropies of flagged rows from the two-pass forward; rows flagged only for u keep theirs."""
        options = self.options
        statistics = row_statistics(
            flagged_rows, self.head, options.entropy, options.plan.two_pass_rows, options.backend, options.group
        )
        again = torch.where(keeps, logprobs[flagged], statistics.logprobs)
        return again, None if entropies is None else torch.where(keeps, entropies[flagged], statistics.entropy)

    def gradients(self, rows: Rows) -> Gradients:
        """In the dtype of each input; dX summed over the ranks that share the columns."""
        head, group = self.head, self.options.group
        self.exps = None
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
    """One vector of all chunks."""
    vectors = [getattr(chunk, name) for chunk in chunks]
    return vectors[0] if len(vectors) == 1 or vectors[0] is None else torch.cat(vectors)


def _rows_to_write(sums: torch.Tensor | None, rows: Rows, span: slice) -> torch.Tensor | None:
    """Where a chunk's rows of a gradient (N, ...) are computed: in place, or beside it where they are gathered."""
    if sums is None or rows.indices is None:
        return None if sums is None else sums[span]
    return sums.new_empty(span.stop - span.start, sums.shape[1])


def _write_back(sums: torch.Tensor | None, rows: Rows, span: slice, values: torch.Tensor | None) -> None:
    if values is not None and rows.indices is not None:
        sums.index_copy_(0, rows.indices[span], values)


def _summed(sums: torch.Tensor | None, rows: Rows, group: ProcessGroup) -> torch.Tensor | None:
    """The rows that were computed, summed over ranks; the others are zeros on all of them."""
    if sums is None:
        return None
    if rows.indices is None:
        return vocab_parallel.all_reduced(sums, group)
    return sums.index_copy_(0, rows.indices, vocab_parallel.all_reduced(sums[rows.indices], group))


def loss_gradient(token_losses: TokenLosses, logprobs: torch.Tensor, terms: TokenTerms) -> torch.Tensor:
    """g = dL/dlogp (C,), by automatic differentiation of the objective on vectors, inside an autograd.Function's forward."""
    if torch.compiler.is_compiling():  # Dynamo refuses torch.autograd.grad there
        g = torch.func.grad(lambda x: token_losses(x, terms).sum())(logprobs)
    else:
        # torch.func refuses the saved-tensor hooks of checkpointing; identity hooks keep these few vectors out of theirs
        identity = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.enable_grad(), identity:
            x = logprobs.detach().requires_grad_()
            g = torch.autograd.grad(token_losses(x, terms).sum(), x)[0]
    return terms.kept(g)  # a user's function may have an infinite slope at a masked token's zeros


def _log_anchor(terms: TokenTerms) -> torch.Tensor:
    old = terms.old_logprobs
    return torch.zeros_like(terms.advantages) if old is None else old.clamp(LOWEST_ANCHOR, 0)


def _spans(count: int, length: int) -> list[slice]:
    """Of the rows; one of none where there are none."""
    return [slice(start, min(start + length, count)) for start in range(0, max(count, 1), length)]


def _factor_in_range(factor: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    size = factor.abs()
    return (g == 0) | ((size >= SMALLEST_FACTOR) & (size <= LARGEST_FACTOR))
