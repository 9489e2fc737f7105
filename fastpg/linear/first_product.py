"""Product 1 of the one-pass schedule, and what follows from it for any objective: PyTorch on vectors (see `anchored`).

On Triton the launch that completes the sums computes all of this for a named objective (`operators.anchored_loss`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from ..distributed import vocab_parallel
from ..kernels.limits import LARGEST_FACTOR, LARGEST_SUM, LOWEST_ANCHOR, SMALLEST_FACTOR, SMALLEST_SUM
from ..tiles import running
from ..tiles.backend import TileOps
from ..tiles.row_statistics import entropy_of, finish_further
from ..tiles.structures import (
    Asked,
    Chunk,
    DeviceLoss,
    Further,
    FurtherPartials,
    Head,
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
from .workspace import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# (logprobs, terms) -> per-token losses, whose sum is the loss
TokenLosses = Callable[[torch.Tensor, TokenTerms], torch.Tensor]


class Options(NamedTuple):
    """Settings of a sweep."""

    wanted: Wanted
    asked: Asked
    plan: Plan
    host_reads: bool
    skip_silenced: bool  # rows whose u is 0 leave products 2 and 3, for whose number the host waits
    backend: str
    device_loss: DeviceLoss | None  # the loss as device functions; None: it is computed in PyTorch
    wide_weight: bool = False  # dW stays in the accumulation dtype, to be added to a buffer of the caller
    group: ProcessGroup | None = None  # whose ranks hold the other columns
    first_column: int = 0  # the token id of this rank's first column; ids count all columns


class RowVectors(NamedTuple):
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


class FirstProduct:
    """Product 1 of chunks, with the settings that they share."""

    def __init__(self, tiles: TileOps, head: Head, token_losses: TokenLosses, options: Options) -> None:
        self.tiles, self.head, self.token_losses, self.options = tiles, head, token_losses, options
        # V of all ranks, of which a mean is asked for
        self.columns = vocab_parallel.all_columns(head.weight, options.group) if options.asked.mean else len(head.weight)

    def vectors(self, chunk: Chunk, exps: torch.Tensor | None, terms: TokenTerms, anchors: torch.Tensor | None) -> RowVectors:
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
            found = _Product(_without_lost_squares(found.sums, log_anchor), found.target)
            factor = None if factor is None else terms.kept(torch.where(lost, torch.nan, factor))
        elif factor is not None and anchors is None:
            factor = factor.masked_fill(flagged, 0)
        results = self._results(chunk, found, t, logprobs, asked)
        return RowVectors(results, None, factor, flagged.to(torch.int8) + ~in_range, found.sums.residual)

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
            further = finish_further(partials, statistics, tokens, self.columns, asked)
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
            return _Product(sums, target)
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
        further = vocab_parallel.combine_further(sums.further, group, largest_kept(asked), self.options.first_column)
        if further.squares is not None:
            squares = vocab_parallel.sum_over_ranks(further.squares, group)
            further = FurtherPartials(*further[:3], squares, further.above)
        return _Product(RowSums(whole[0], whole[1] if asked.entropy else None, residual, further), target)

    def _row_factor(self, g: torch.Tensor, denominator: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
        """u = -g logit_scale / (T D)."""
        scale = self.head.logit_scale
        if temperature is not None:
            scale = scale / temperature[: len(g), 0]
        return -g * scale / denominator


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
