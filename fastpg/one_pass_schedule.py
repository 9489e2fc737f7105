"""The one-pass schedule: loss and gradients in one sweep, three matrix products, anchored by the old log-probabilities.

Every policy-gradient loss is given old_n, an estimate of logp_n. So with a_n = clamp(old_n, -60, 0), anchor_n = z_n,y - a_n
estimates the row's logsumexp up to the log ratio, before a single logit is known, and

    E_nv = exp(z_nv - anchor_n)  for v != y_n        S_n = sum_v E_nv        D_n = S_n + exp(a_n)
    t_n = log S_n - a_n          logp_n = logsigmoid(-t_n)                   p_nv = E_nv / D_n

need no running maximum, no rescaling and no second pass: exp is taken in the epilogue of the first product. The loss enters
through one number per row, g_n = dL/dlogp_n, which commutes with the other two products:

    dL/dz_nv = g_n ([v = y] - p_nv) = -g_n E_nv / D_n  with  E_n,y = -S_n            u_n = -g_n logit_scale / (T_n D_n)
    dX_n = u_n (E @ W)_n                      dW = E^T @ (u x)    db = E^T u

Per token chunk: product 1 with its epilogue (`ops.anchored_scores`), plain Python on [C] vectors, products 2 and 3
(`ops.gradient_products`). Chunks are as long as the workspace allows; where one holds everything, dW is written once. With
CISPO on Triton the vectors are computed where the sums are completed, in one launch (`ops.cispo_scores`).

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

from . import buffers, distributed, ops
from .lm_head import Projection, lora_rank
from .losses import TokenTerms
from .products import accumulation_dtype, widened_bytes
from .row_statistics import LARGEST_SUM, entropy_of
from .rows import Chunk, Gradients, Rows, Wanted
from .tile_ops import store_target

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LOWEST_ANCHOR = -60.0  # log-probabilities below it are anchored here: exp(60) leaves E room on both sides
_SMALLEST_SUM = 2.0**-90
_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-110, 2.0**110

# (logprobs, terms) -> per-token losses, whose sum is the loss
TokenLosses = Callable[[torch.Tensor, TokenTerms], torch.Tensor]


class OnePass(NamedTuple):
    """What a sweep returns of its K rows."""

    logprobs: torch.Tensor  # (K,)
    losses: torch.Tensor  # (K,), 0 where masked; the loss is their sum
    entropy: torch.Tensor  # (K,), or (0,) if not asked for
    recomputed: torch.Tensor  # (): how many rows were flagged
    gradients: Gradients  # of the loss


class Options(NamedTuple):
    """How a call is computed; not what."""

    wanted: Wanted
    entropy: bool
    workspace: int
    check: bool
    backend: str
    # (ratio_min, ratio_max) where the loss is CISPO's and nothing else: the Triton backend has it in a kernel
    cispo: tuple[float | None, float | None] | None
    wide_weight: bool = False  # dW in the accumulation dtype, for a buffer of the caller
    group: ProcessGroup | None = None  # whose ranks hold the other columns
    length: int | None = None  # rows of a chunk that these ranks agreed on


class _Scored(NamedTuple):
    """Vectors (C,) of a chunk after product 1."""

    logprobs: torch.Tensor
    losses: torch.Tensor  # (0,) if they are left to the end
    entropy: torch.Tensor  # (0,) if not asked for
    factor: torch.Tensor  # u; (0,) if no gradient is wanted
    residual: torch.Tensor  # what rounding took from the rows of E; (0,) if they are not rounded
    total: torch.Tensor  # S
    sum_in_range: torch.Tensor  # bool
    flagged: torch.Tensor  # bool


def one_pass(rows: Rows, head: Projection, terms: TokenTerms, token_losses: TokenLosses, options: Options) -> OnePass:
    """Log-probabilities, losses, entropies and gradients of the loss for K rows.

    check: flagged rows are found by one host read, after product 1 of the last chunk, and recomputed. Without it nothing is
    read; a row whose sum overflows or is not finite gets a NaN log-probability and makes the gradients NaN.
    """
    count, check = len(rows.tokens), options.check
    length = options.length or chunk_length(head, count, options)
    sweep = _Sweep(head, token_losses, options, rows, min(count, length))
    scored = []
    flagged = rows.tokens.new_empty(0)
    for part in _parts(count, length):
        part_terms = terms.select(part)
        chunk, vectors = sweep.score(rows, part, part_terms)
        scored.append(vectors)
        if check and part.stop == count:
            flagged = torch.cat([s.flagged for s in scored]).nonzero()[:, 0]  # the host read
        dropped = vectors.flagged if check else part_terms.masked
        sweep.add_gradients(rows, part, chunk, vectors, dropped, once=count <= length and not len(flagged))

    logprobs, losses, entropies = (sweep.join(scored, name) for name in ("logprobs", "losses", "entropy"))
    if len(flagged):
        again, again_terms = rows.select(flagged), terms.select(flagged)
        anchors, again_entropies = sweep.rescore(again, scored, flagged, logprobs, entropies)
        logprobs = logprobs.index_copy(0, flagged, anchors)
        entropies = entropies.index_copy(0, flagged, again_entropies) if options.entropy else entropies
        if len(losses):
            losses = losses.index_copy(0, flagged, token_losses(anchors, again_terms))
        for part in _parts(len(flagged), length) if any(options.wanted) else []:
            chunk, vectors = sweep.score(again, part, again_terms.select(part), anchors[part])
            sweep.add_gradients(again, part, chunk, vectors, None, once=False)
    logprobs = terms.kept(logprobs)
    losses = losses if len(losses) else token_losses(logprobs, terms)
    entropies = terms.kept(entropies) if options.entropy else entropies
    recomputed = torch.full((), len(flagged), dtype=torch.int64, device=rows.tokens.device)
    return OnePass(logprobs, losses, entropies, recomputed, sweep.gradients(rows))


class _Sweep:
    """One call: what stays the same for all of its chunks, the buffer for E, and the sums of the gradients."""

    def __init__(self, head: Projection, token_losses: TokenLosses, options: Options, rows: Rows, longest: int) -> None:
        self.head, self.token_losses, self.options, self.wanted = head, token_losses, options, options.wanted
        weight, hidden = head.weight, rows.hidden
        tiles = ops.tiles_of(options.backend)
        self.dtype = accumulation_dtype(weight.dtype)
        self.operand_dtype, self.padding = tiles.operand_dtype(weight.dtype, weight.device), tiles.tile_shape(head).padding
        self.scores = None
        if any(self.wanted):
            scores = buffers.empty((longest, _row_stride(head)), _score_dtype(weight.dtype), weight.device)
            vocab = head.weight.shape[0]
            scores[:, vocab:] = 0  # products may read past the end of a row (see `products`)
            self.scores = scores[:, :vocab]
        self.dhidden = self.dlora_hidden = None
        if self.wanted.hidden:  # summed over ranks before it is rounded
            self.dhidden = hidden.new_zeros(hidden.shape, dtype=hidden.dtype if options.group is None else self.dtype)
        if self.wanted.lora_hidden:
            self.dlora_hidden = torch.zeros_like(rows.lora_hidden)
        self.dweight = self.dlora_weight = self.dbias = (
            None  # allocated by the first chunk, which knows whether there are others
        )

    def score(self, rows: Rows, part: slice, terms: TokenTerms, anchors: torch.Tensor | None = None) -> tuple[Chunk, _Scored]:
        """Product 1 of a chunk, and what follows from it row by row. `anchors`: log-probabilities already known.

        Also returns the chunk, whose hidden states product 3 needs.
        """
        chunk = rows.chunk(part.start, part.stop, self.operand_dtype, multiple=self.padding)
        scores = None if self.scores is None else self.scores[: part.stop - part.start]
        if self.options.cispo is not None and anchors is None:
            scored = self._score_cispo(chunk, scores, terms)
        else:
            scored = self._score(chunk, scores, terms, anchors)
        if not self.options.check:
            scored = self._show_lost(scored, terms)
        return chunk, scored

    def _score(self, chunk: Chunk, scores: torch.Tensor | None, terms: TokenTerms, anchors: torch.Tensor | None) -> _Scored:
        """Any objective, on vectors."""
        size = len(terms.advantages)
        log_anchor = _log_anchor(terms) if anchors is None else anchors
        padded = F.pad(log_anchor, (0, len(chunk.tokens) - size))
        total, weighted, residual = self._sums(chunk, padded, scores)
        total = total[:size]
        t = total.log() - log_anchor
        logprobs = F.logsigmoid(-t) if anchors is None else anchors
        entropy = entropy_of(t, total.log(), total, weighted[:size]) if self.options.entropy else weighted
        factor = total.new_empty(0)
        in_range = (total >= _SMALLEST_SUM) & (total < LARGEST_SUM)
        flagged = ~in_range
        if scores is not None:
            g = loss_gradient(self.token_losses, terms.kept(logprobs), terms)
            factor = self._row_factor(g, total + log_anchor.exp(), chunk.temperature)
            flagged = flagged | ~_factor_in_range(factor, g)
        return _Scored(logprobs, total.new_empty(0), entropy, factor, residual, total, in_range, flagged)

    def _sums(
        self, chunk: Chunk, log_anchor: torch.Tensor, scores: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """S, Q and what rounding took, from product 1, over the columns of all ranks; E of this rank's into scores."""
        head, options = self.head, self.options
        target, slope = ops.target_logits(*chunk, *head, options.backend)
        group = options.group
        if group is not None:
            of_owner = distributed.on_the_owner(torch.stack([target, slope], 1), chunk.tokens, head.weight.shape[0], group)
            target, slope = of_owner.T.contiguous()  # the kernels read vectors without a stride
        total, weighted, residual = ops.anchored_scores(
            *chunk, log_anchor, *head, options.entropy, options.backend, scores, target, slope
        )
        if group is None:
            return total, weighted, residual
        sums = distributed.sum_over_ranks(torch.stack([total, weighted] if options.entropy else [total]), group)
        if scores is not None:
            size = len(scores)
            before, after, tokens = (x[:size] for x in (total, sums[0], chunk.tokens))
            in_range = (before < LARGEST_SUM) & (after < LARGEST_SUM)  # else the row is stored as zeros, or dropped
            columns = torch.where(in_range, tokens, -1)
            taken = store_target(scores, columns, torch.where(in_range, -after * slope[:size], 0))
            if len(residual):
                once = torch.where(columns == tokens.clamp(0, head.weight.shape[0] - 1), -before * slope[:size], 0)
                residual = residual - (once - once.to(scores.dtype).to(once.dtype)) + taken
        return sums[0], sums[1] if options.entropy else weighted, residual

    def _score_cispo(self, chunk: Chunk, scores: torch.Tensor | None, terms: TokenTerms) -> _Scored:
        """CISPO, by the kernel that completes the sums."""
        log_anchor = _log_anchor(terms)
        loss_weights = -terms.weights if terms.rollout_weights is None else -terms.weights * terms.rollout_weights
        total, weighted, residual, logprobs, losses, factor, state = ops.cispo_scores(
            *chunk, log_anchor, *self.head, self.options.entropy, scores,
            terms.masked, terms.old_logprobs, terms.advantages, loss_weights, *self.options.cispo,
        )  # fmt: skip
        entropy = weighted
        if self.options.entropy:
            entropy = entropy_of(total.log() - log_anchor, total.log(), total, weighted)
        flagged = state == 2 if scores is None else state > 0
        return _Scored(logprobs, losses, entropy, factor, residual, total, state < 2, flagged)

    def _show_lost(self, scored: _Scored, terms: TokenTerms) -> _Scored:
        """With check=False: NaN where the sum of a kept row, or its factor, has left the range of its dtype."""
        lost = ~(scored.total < LARGEST_SUM)
        if self.scores is not None:
            lost = lost | ~scored.factor.isfinite()
        lost = terms.kept(lost)

        def shown(values: torch.Tensor) -> torch.Tensor:
            return torch.where(lost, torch.nan, values) if len(values) else values

        return scored._replace(**{name: shown(getattr(scored, name)) for name in ("logprobs", "losses", "entropy", "factor")})

    def _row_factor(self, g: torch.Tensor, denominator: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
        """u = -g logit_scale / (T D)."""
        scale = self.head.logit_scale
        if temperature is not None:
            scale = scale / temperature[: len(g), 0]
        return -g * scale / denominator

    def add_gradients(
        self,
        rows: Rows,
        part: slice,
        chunk: Chunk,
        scored: _Scored,
        dropped: torch.Tensor | None,
        once: bool,
    ) -> None:
        """Products 2 and 3 of a chunk. Rows in `dropped` (C,) add nothing. once: it is the only chunk of the call."""
        if self.scores is None:
            return
        factor, weight = scored.factor, self.head.weight
        scores, hidden = self.scores[: len(factor)], chunk.hidden[: len(factor)]
        if dropped is not None:
            factor = torch.where(dropped, 0, factor)
        accumulate = any(x is not None for x in (self.dweight, self.dlora_weight, self.dbias))
        if not accumulate:
            self._allocate_sums(weight.dtype if once and not self.options.wide_weight else self.dtype)
        tokens, given = rows.tokens[part], (scores, factor, scored.residual)
        dhidden = _rows_to_write(self.dhidden, rows, part)
        ops.gradient_products(*given, hidden, tokens, weight, dhidden, self.dweight, self.dbias, accumulate)
        _write_back(self.dhidden, rows, part, dhidden)
        if self.wanted.lora_hidden or self.wanted.lora_weight:
            z, dz = chunk.lora_hidden[: len(factor)], _rows_to_write(self.dlora_hidden, rows, part)
            ops.lora_products(*given, z, tokens, self.head.lora_weight, dz, self.dlora_weight, accumulate)
            _write_back(self.dlora_hidden, rows, part, dz)

    def _allocate_sums(self, dtype: torch.dtype) -> None:
        head, device = self.head, self.head.weight.device
        if self.wanted.weight:
            self.dweight = buffers.empty(head.weight.shape, dtype, device)
        if self.wanted.lora_weight:
            self.dlora_weight = torch.empty(head.lora_weight.shape, dtype=self.dtype, device=device)
        if self.wanted.bias:
            self.dbias = torch.empty(head.weight.shape[0], dtype=self.dtype, device=device)

    def rescore(
        self,
        flagged_rows: Rows,
        scored: list[_Scored],
        flagged: torch.Tensor,
        logprobs: torch.Tensor,
        entropies: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of flagged rows from the two-pass forward; rows flagged only for u keep theirs."""
        entropy, workspace, backend = self.options.entropy, self.options.workspace, self.options.backend
        statistics = ops.row_statistics(flagged_rows, self.head, entropy, workspace, backend, self.options.group)
        keeps = torch.cat([s.sum_in_range for s in scored])[flagged]
        again = torch.where(keeps, logprobs[flagged], statistics[0])
        return again, torch.where(keeps, entropies[flagged], statistics[1]) if entropy else entropies

    def join(self, scored: list[_Scored], name: str) -> torch.Tensor:
        nothing = torch.empty(0, dtype=self.dtype, device=self.head.weight.device)
        return torch.cat([nothing, *(getattr(s, name) for s in scored)])

    def gradients(self, rows: Rows) -> Gradients:
        """In the dtype of each input; dX summed over the ranks that share the columns."""
        head, group = self.head, self.options.group
        self.scores = None
        if group is not None:
            self.dhidden, self.dlora_hidden = (_summed(x, rows, group) for x in (self.dhidden, self.dlora_hidden))
            self.dhidden = None if self.dhidden is None else self.dhidden.to(rows.hidden.dtype)

        def rounded(wanted: bool, x: torch.Tensor | None, sums: torch.Tensor | None, dtype: torch.dtype | None = None):
            if not wanted:
                return None
            dtype = dtype or x.dtype
            return torch.zeros_like(x, dtype=dtype) if sums is None else sums.to(dtype)  # None: there were no rows

        wanted = self.wanted
        found = (
            self.dhidden, self.dlora_hidden,
            rounded(wanted.weight, head.weight, self.dweight, self.dtype if self.options.wide_weight else None),
            rounded(wanted.lora_weight, head.lora_weight, self.dlora_weight), rounded(wanted.bias, head.bias, self.dbias),
        )  # fmt: skip
        return Gradients(*(head.weight.new_empty(0) if g is None else g for g in found))


def _rows_to_write(sums: torch.Tensor | None, rows: Rows, part: slice) -> torch.Tensor | None:
    """Where a chunk's rows of a gradient (N, ...) are computed: in place, or beside it where they are gathered."""
    if sums is None or rows.indices is None:
        return None if sums is None else sums[part]
    return sums.new_empty(part.stop - part.start, sums.shape[1])


def _write_back(sums: torch.Tensor | None, rows: Rows, part: slice, values: torch.Tensor | None) -> None:
    if values is not None and rows.indices is not None:
        sums.index_copy_(0, rows.indices[part], values)


def _summed(sums: torch.Tensor | None, rows: Rows, group: ProcessGroup) -> torch.Tensor | None:
    """The rows that were computed, summed over ranks; the others are zeros on all of them."""
    if sums is None:
        return None
    if rows.indices is None:
        return distributed.all_reduced(sums, group)
    return sums.index_copy_(0, rows.indices, distributed.all_reduced(sums[rows.indices], group))


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


def chunk_length(head: Projection, count: int, options: Options) -> int:
    """Rows per chunk, a multiple of the tile's: the fewest chunks that fit the workspace, of equal length.

    Raises ValueError where not even one tile of rows fits.
    """
    rows, workspace = ops.tiles_of(options.backend).tile_shape(head).rows, options.workspace
    fixed, per_row = chunk_bytes(head, options)
    fitting = max(0, workspace - fixed) // per_row // rows
    if fitting < 1:
        raise ValueError(
            f"workspace={workspace} bytes is too small: {rows} rows of a ({head.weight.shape[0]}, {head.weight.shape[1]}) "
            f"{head.weight.dtype} head on {head.weight.device.type} need {fixed + rows * per_row}"
        )
    padded = -(-count // rows)
    chunks = max(1, -(-padded // fitting))
    return max(1, -(-padded // chunks)) * rows


def smallest_workspace(head: Projection, options: Options) -> int:
    """Bytes that one tile of rows needs."""
    fixed, per_row = chunk_bytes(head, options)
    return fixed + ops.tiles_of(options.backend).tile_shape(head).rows * per_row


def chunk_bytes(head: Projection, options: Options) -> tuple[int, int]:
    """Transient bytes: (of the call, of each row of a chunk)."""
    tiles, weight = ops.tiles_of(options.backend), head.weight
    wide = accumulation_dtype(weight.dtype).itemsize
    fixed, per_row = tiles.one_pass_bytes(head, options.entropy)
    # hidden states with the temporaries of the target's logit, or of products 2 and 3; a score of per-row numbers
    per_row += 4 * (head.weight.shape[1] + lora_rank(head)) * wide + 20 * wide
    fixed += 3 * head.weight.shape[0] * lora_rank(head) * wide  # dB of a chunk, in two parts and summed
    if any(options.wanted):
        per_row += _row_stride(head) * _score_dtype(weight.dtype).itemsize
        fixed += widened_bytes(head)
    return fixed, per_row


def _log_anchor(terms: TokenTerms) -> torch.Tensor:
    old = terms.old_logprobs
    return torch.zeros_like(terms.advantages) if old is None else old.clamp(_LOWEST_ANCHOR, 0)


def _parts(count: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    """E is stored in the dtype of the inputs, so that products 2 and 3 run at its speed; fp16 has too little range."""
    return dtype if dtype == torch.bfloat16 else accumulation_dtype(dtype)


def _row_stride(head: Projection) -> int:
    # Rows of E aligned to 64 elements, and never a power of two apart: at V = 49152 rows that share their place in the cache
    # cost products 2 and 3 15 % on a CPU.
    return (head.weight.shape[0] + 63) // 64 * 64 + 32


def _factor_in_range(factor: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    size = factor.abs()
    return (g == 0) | ((size >= _SMALLEST_FACTOR) & (size <= _LARGEST_FACTOR))
