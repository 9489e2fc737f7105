"""The operators that the public functions call: functions that torch.compile must not look into (see `operator`)."""

from __future__ import annotations

import torch

from ..kernels.limits import SUMMARY
from ..tiles import products
from ..tiles.backend import TileOps, tiles_of
from ..tiles.operator import is_opaque, operator
from ..tiles.products import Sums, accumulation_dtype
from ..tiles.structures import (
    Asked,
    Chunk,
    DeviceLoss,
    Entries,
    Further,
    FurtherPartials,
    Gradients,
    Head,
    Incoming,
    Keep,
    LossRows,
    LossSummary,
    LossSums,
    Partials,
    ReadyLogits,
    RowResults,
    RowStatistics,
    RowSums,
    SetPartials,
    Target,
    TokenInputs,
    TokenTerms,
    Wanted,
    largest_kept,
)
from . import gathered, online
from .rows import Rows


def _vector(like: torch.Tensor, count: int, present: bool = True) -> torch.Tensor | None:
    return like.new_empty(count, dtype=accumulation_dtype(like.dtype)) if present else None


def _fake_keep(given: TokenInputs, backend: str) -> Keep:
    def like(present: bool = True) -> torch.Tensor | None:
        return torch.empty_like(given.tokens, dtype=torch.bool, memory_format=torch.contiguous_format) if present else None

    return Keep(like(), like(given.advantages is not None), given.tokens.new_empty(6, dtype=torch.int64))


@operator(_fake_keep)
def keep(given: TokenInputs, backend: str) -> Keep:
    """Which tokens count, and how many: `torch_tiles.keep`."""
    return tiles_of(backend).keep(given)


def _like_rows(rows: Rows, dtype: torch.dtype, *shape: int, present: bool = True) -> torch.Tensor | None:
    return rows.tokens.new_empty(rows.tokens.shape[0], *shape, dtype=dtype) if present else None


def _fake_statistics(rows: Rows, head: Head, asked: Asked, chunk_rows: int, backend: str) -> RowResults:
    wide, entropy, top = accumulation_dtype(head.weight.dtype), asked.entropy, asked.top_k > 0
    statistics = (_like_rows(rows, wide, present=present) for present in (True, entropy, True, True, entropy))
    further = Further(
        _like_rows(rows, torch.int64, present=asked.argmax), _like_rows(rows, wide, present=asked.mean),
        _like_rows(rows, wide, present=asked.squares), _like_rows(rows, torch.int64, present=asked.rank),
        _like_rows(rows, wide, asked.top_k, present=top), _like_rows(rows, torch.int64, asked.top_k, present=top),
    )  # fmt: skip
    return RowResults(RowStatistics(*statistics), further)


@operator(_fake_statistics)
def two_pass_statistics(rows: Rows, head: Head, asked: Asked, chunk_rows: int, backend: str) -> RowResults:
    """`RowResults` of the rows."""
    return online.two_pass_statistics(tiles_of(backend), rows, head, asked, chunk_rows)


def _fake_partials(
    rows: Rows, head: Head, asked: Asked, chunk_rows: int, backend: str, target: torch.Tensor | None
) -> Partials:
    wide = accumulation_dtype(head.weight.dtype)
    further = _fake_further(rows.tokens, head, asked)
    return Partials(*(_like_rows(rows, wide, present=present) for present in (True, True, asked.entropy, True)), further)


def _fake_further(tokens: torch.Tensor, head: Head, asked: Asked) -> FurtherPartials:
    wide, kept = accumulation_dtype(head.weight.dtype), largest_kept(asked)

    def like(present: bool, dtype: torch.dtype, *shape: int) -> torch.Tensor | None:
        return tokens.new_empty(tokens.shape[0], *shape, dtype=dtype) if present else None

    return FurtherPartials(
        like(kept > 0, wide, kept), like(kept > 0, torch.int64, kept), like(asked.mean, wide), like(asked.squares, wide),
        like(asked.rank, torch.int64),
    )  # fmt: skip


@operator(_fake_partials)
def two_pass_partials(
    rows: Rows, head: Head, asked: Asked, chunk_rows: int, backend: str, target: torch.Tensor | None
) -> Partials:
    """`Partials` of the rows, over the columns of this rank's weight (`online.two_pass_partials`)."""
    return online.two_pass_partials(tiles_of(backend), rows, head, asked, chunk_rows, target)


def _fake_targets(rows: Rows, head: Head, chunk_rows: int, backend: str) -> torch.Tensor:
    return _like_rows(rows, accumulation_dtype(head.weight.dtype))


@operator(_fake_targets)
def two_pass_targets(rows: Rows, head: Head, chunk_rows: int, backend: str) -> torch.Tensor:
    """z_y of the rows, (K,); NaN for a token that is not among the columns."""
    return online.two_pass_targets(tiles_of(backend), rows, head, chunk_rows)


def _fake_backward(
    rows: Rows, head: Head, statistics: RowStatistics, incoming: Incoming, wanted: Wanted, plan: online.Plan,
    weight_grad: torch.Tensor | None,
) -> Gradients:  # fmt: skip
    def like(x: torch.Tensor | None, present: bool, of_rows: bool = False) -> torch.Tensor | None:
        if not present:
            return None
        return _vector(x, rows.tokens.shape[0] * x.shape[1]).view(-1, x.shape[1]) if of_rows else x.new_empty(x.shape)

    partial = plan.partial
    return Gradients(
        like(rows.hidden, wanted.hidden, partial), like(rows.lora_hidden, wanted.lora_hidden, partial),
        like(head.weight, wanted.weight and weight_grad is None), like(head.lora_weight, wanted.lora_weight),
        like(head.bias, wanted.bias),
    )  # fmt: skip


@operator(_fake_backward, mutates=("weight_grad",))
def two_pass_backward(
    rows: Rows,
    head: Head,
    statistics: RowStatistics,
    incoming: Incoming,
    wanted: Wanted,
    plan: online.Plan,
    weight_grad: torch.Tensor | None,
) -> Gradients:
    """Gradients, None where not wanted (`online.two_pass_backward`)."""
    return online.two_pass_backward(tiles_of(plan.backend), rows, head, statistics, incoming, wanted, plan, weight_grad)


def _fake_target(chunk: Chunk, head: Head, backend: str) -> Target:
    count = chunk.hidden.shape[0]
    return Target(_vector(head.weight, count), _vector(head.weight, count, head.softcap is not None))


@operator(_fake_target)
def target_logits(chunk: Chunk, head: Head, backend: str) -> Target:
    """`Target` of the rows: `torch_tiles.target_logits`."""
    return tiles_of(backend).target_logits(chunk, head)


def _fake_sums(
    chunk: Chunk, head: Head, log_anchor: torch.Tensor, target: Target, exps: torch.Tensor | None, asked: Asked, backend: str
) -> RowSums:
    return RowSums(*_row_sums(chunk, head, exps, asked.entropy)[:3], _fake_further(chunk.tokens, head, asked))


def _row_sums(chunk: Chunk, head: Head, exps: torch.Tensor | None, weighted: bool) -> RowSums:
    count = chunk.hidden.shape[0]
    is_rounded = exps is not None and exps.dtype != accumulation_dtype(head.weight.dtype)
    residual = _vector(head.weight, exps.shape[0]) if is_rounded else None
    return RowSums(_vector(head.weight, count), _vector(head.weight, count, weighted), residual)


@operator(_fake_sums, mutates=("exps",))
def anchored_exp(
    chunk: Chunk, head: Head, log_anchor: torch.Tensor, target: Target, exps: torch.Tensor | None, asked: Asked, backend: str
) -> RowSums:
    """Product 1 of the one-pass schedule: `torch_tiles.anchored_exp`. Writes exps (C, V) if given."""
    return tiles_of(backend).anchored_exp(chunk, head, log_anchor, target, exps, asked)


def _fake_loss(
    chunk: Chunk, head: Head, terms: TokenTerms, loss: DeviceLoss, exps: torch.Tensor | None, entropy: bool, sums: LossSums
) -> LossRows:
    def vector(present: bool = True) -> torch.Tensor | None:
        return _vector(head.weight, chunk.hidden.shape[0], present)

    state = chunk.hidden.new_empty(chunk.hidden.shape[0], dtype=torch.int8)
    residual = _row_sums(chunk, head, exps, False).residual
    return LossRows(vector(), vector(), vector(entropy), vector(exps is not None), state, residual)


@operator(_fake_loss, mutates=("exps", "sums"))
def anchored_loss(
    chunk: Chunk, head: Head, terms: TokenTerms, loss: DeviceLoss, exps: torch.Tensor | None, entropy: bool, sums: LossSums
) -> LossRows:
    """`anchored_exp` on Triton, whose last kernel computes the loss too: `triton_tiles.anchored_loss`."""
    return tiles_of("triton").anchored_loss(chunk, head, terms, loss, exps, entropy, sums)


def _fake_summary(values: torch.Tensor, entropy: bool) -> LossSummary:
    return LossSummary(values.new_empty(()), values.new_empty(len(SUMMARY)))


@operator(_fake_summary)
def loss_summary(values: torch.Tensor, entropy: bool) -> LossSummary:
    """The loss and the metrics, from the sums of all chunks: `triton_tiles.loss_summary`."""
    return tiles_of("triton").loss_summary(values, entropy)


def _no_result(*arguments) -> None:
    return None


class _Opaque:
    """The tile ops of the one-pass schedule as operators."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def target_logits(self, chunk: Chunk, head: Head) -> Target:
        return target_logits(chunk, head, self.backend)

    def anchored_exp(
        self, chunk: Chunk, head: Head, log_anchor: torch.Tensor, target: Target, out: torch.Tensor | None, asked: Asked
    ) -> RowSums:
        return anchored_exp(chunk, head, log_anchor, target, out, asked, self.backend)

    def anchored_loss(
        self,
        chunk: Chunk,
        head: Head,
        terms: TokenTerms,
        loss: DeviceLoss,
        exps: torch.Tensor | None,
        entropy: bool,
        sums: LossSums,
    ) -> LossRows:
        return anchored_loss(chunk, head, terms, loss, exps, entropy, sums)

    def loss_summary(self, values: torch.Tensor, entropy: bool) -> LossSummary:
        return loss_summary(values, entropy)


def one_pass_tiles(backend: str, hidden: torch.Tensor) -> TileOps | _Opaque:
    """The tile ops that a sweep calls: plain functions, or operators where the call `is_opaque`."""
    return _Opaque(backend) if is_opaque(hidden) else tiles_of(backend)


@operator(_no_result, mutates=("sums",))
def gradient_products(
    exps: torch.Tensor, factor: torch.Tensor, residual: torch.Tensor | None, chunk: Chunk, head: Head, sums: Sums, add: bool,
    backend: str,
) -> None:  # fmt: skip
    """Products 2 and 3 of a chunk (`products.gradient_products`)."""
    products.gradient_products(exps, factor, residual, chunk, head, sums, add, tiles_of(backend).gradient_rows)


def _fake_selective(ready: ReadyLogits, entropy: bool, backend: str) -> RowStatistics:
    count = ready.logits.shape[0]
    return RowStatistics(*(_vector(ready.logits, count, present) for present in (True, entropy, True, True, entropy)))


@operator(_fake_selective)
def selective_statistics(ready: ReadyLogits, entropy: bool, backend: str) -> RowStatistics:
    """`RowStatistics` of ready logits (N, V): `torch_tiles.selective_statistics`."""
    return tiles_of(backend).selective_statistics(ready, entropy)


def _fake_selective_dlogits(ready: ReadyLogits, statistics: RowStatistics, incoming: Incoming, backend: str) -> torch.Tensor:
    return torch.empty_like(ready.logits, memory_format=torch.contiguous_format)


@operator(_fake_selective_dlogits)
def selective_dlogits(ready: ReadyLogits, statistics: RowStatistics, incoming: Incoming, backend: str) -> torch.Tensor:
    """The gradient of ready logits (N, V): `torch_tiles.selective_dlogits`."""
    return tiles_of(backend).selective_dlogits(ready, statistics, incoming)


def _fake_sets(
    rows: Rows, head: Head, entries: Entries, asked: Asked, backend: str, target: torch.Tensor | None
) -> SetPartials:
    logits = _vector(head.weight, entries.row.shape[0])
    slope = None if head.softcap is None else torch.empty_like(logits)
    return SetPartials(_fake_partials(rows, head, asked, 0, backend, target), logits, slope)


@operator(_fake_sets)
def gathered_partials(
    rows: Rows, head: Head, entries: Entries, asked: Asked, backend: str, target: torch.Tensor | None
) -> SetPartials:
    """`gathered.gathered_partials`."""
    return gathered.gathered_partials(tiles_of(backend), rows, head, entries, asked, target)


def _fake_gathered_backward(
    rows: Rows, head: Head, entries: Entries, statistics: RowStatistics, incoming: Incoming, wanted: Wanted, plan: online.Plan,
    weight_grad: torch.Tensor | None,
) -> Gradients:  # fmt: skip
    return _fake_backward(rows, head, statistics, incoming, wanted, plan, weight_grad)


@operator(_fake_gathered_backward, mutates=("weight_grad",))
def gathered_backward(
    rows: Rows, head: Head, entries: Entries, statistics: RowStatistics, incoming: Incoming, wanted: Wanted, plan: online.Plan,
    weight_grad: torch.Tensor | None,
) -> Gradients:  # fmt: skip
    """`gathered.gathered_backward`."""
    tiles = tiles_of(plan.backend)
    return gathered.gathered_backward(
        tiles, rows, head, entries, statistics, incoming, wanted, plan.partial, weight_grad=weight_grad
    )  # fmt: skip
