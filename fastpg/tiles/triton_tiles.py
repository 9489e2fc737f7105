"""The tile ops on the kernels of `fastpg.kernels`: the functions of `torch_tiles`, with the same signatures.

They run on CUDA and ROCm tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 before the first import).
Operands keep their dtype, bf16 and fp16 included. A row's bits do not depend on its place in a tile, so nothing is padded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from ..kernels import dlogits as dlogits_kernel
from ..kernels import finish as finish_kernel
from ..kernels import gathered as gathered_kernel
from ..kernels import gradient_rows as rows_kernel
from ..kernels import keep as keep_kernel
from ..kernels import objectives
from ..kernels import policy_loss as policy_loss_kernel
from ..kernels import row_statistics as further_kernel
from ..kernels import scale as scale_kernel
from ..kernels import selective as selective_kernel
from ..kernels import summary as summary_kernel
from ..kernels.anchored_exp import anchored_exp as anchored_tiles
from ..kernels.blocks import Blocks, blocks_for, cdiv, fewest_columns, target_of
from ..kernels.logsumexp import combine, finished, logsumexp, split_count
from ..kernels.operands import Operands
from ..kernels.target import target_logits as target_kernel_logits
from ..kernels.tile import INTERPRETED
from .products import dense
from .row_statistics import finish_further
from .structures import (
    Asked,
    Chunk,
    DeviceLoss,
    FurtherPartials,
    Head,
    Incoming,
    Keep,
    LogprobsLoss,
    LossRows,
    LossSummary,
    LossSums,
    Partials,
    ReadyLogits,
    RowResults,
    RowStatistics,
    RowSums,
    Target,
    TileShape,
    TokenInputs,
    TokenTerms,
    is_further,
    largest_kept,
)

__all__ = [
    "INTERPRETED",
    "anchored_exp",
    "anchored_loss",
    "dlogits",
    "first_of_sums",
    "gathered_dots",
    "gradient_rows",
    "keep",
    "keys_of_a_split",
    "loss_summary",
    "loss_sums",
    "most_column_tiles",
    "most_splits",
    "online_logsumexp",
    "operand_dtype",
    "policy_loss",
    "row_statistics",
    "run_sums",
    "scale_",
    "selective_dlogits",
    "selective_statistics",
    "target_logits",
    "tile_shape",
    "weight_buffer",
    "weight_tile",
]


_NOTHING = nullcontext()


def tile_shape(head: Head) -> TileShape:
    """The steps of a schedule: chunks of whole row tiles, and slices wide enough for products at full speed."""
    return TileShape(256, 2048, 1, 1024) if head.weight.device.type == "cpu" else TileShape(128, 8192, 1, 16384)


def most_column_tiles(columns: int, dtype: torch.dtype) -> int:
    """The most tiles that `columns` are cut into, on any device: each tile has a partial sum for every row."""
    return cdiv(columns, fewest_columns(dtype))


def most_splits(vocab: int, dtype: torch.dtype) -> int:
    """The most splits of `online_logsumexp`, on any device: each has partial sums for every row."""
    return split_count(vocab, fewest_columns(dtype))


def keys_of_a_split(largest: int) -> int:
    """How many logits each of them keeps where the `largest` ones are wanted."""
    return further_kernel.kept(largest)


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return dtype


def weight_buffer(head: Head) -> None:
    return None


def weight_tile(head: Head, start: int, stop: int, buffer: None) -> torch.Tensor:
    return dense(head.weight[start:stop])


def _device_of(x: torch.Tensor) -> AbstractContextManager:
    """A context in which x's device is the current one: Triton launches on the current device, which may be another."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else _NOTHING


def keep(given: TokenInputs) -> Keep:
    mask = None if given.mask is None else _flat(given.mask).view(torch.uint8)
    temperature = None if given.temperature is None else _flat(given.temperature)
    stride = None if temperature is None else int(len(temperature) > 1)
    factors = keep_kernel.Factors() if given.advantages is None else keep_kernel.Factors(*map(_flat, given[3:7]))
    tokens = keep_kernel.Tokens(_flat(given.tokens), mask, temperature, stride)
    with _device_of(given.tokens):
        found = keep_kernel.keep(tokens, factors, given.indices, given.vocab)
    if given.tokens.dim() == 1:
        return Keep(*found)
    shape = given.tokens.shape
    computed = None if found.COMPUTED is None else found.COMPUTED.view(shape)
    return Keep(found.KEEP.view(shape), computed, found.NUMBERS)


def _flat(x: torch.Tensor | None) -> torch.Tensor | None:
    if x is None or (x.dim() == 1 and x.is_contiguous()):
        return x
    return x.contiguous().view(-1)


def online_logsumexp(chunk: Chunk, head: Head, asked: Asked, target: torch.Tensor | None = None) -> Partials:
    with _device_of(chunk.hidden):
        p = _operands(chunk, head)
        own = target_kernel_logits(p)[0]
        further, merged = _further(asked, own if target is None else target, _splits(head))
        running = combine(logsumexp(p, asked.entropy, _blocks(head, "logsumexp"), further), further, merged)
        return Partials(*running, own, _further_partials(further, merged, asked, len(head.weight)))


def row_statistics(chunk: Chunk, head: Head, asked: Asked) -> RowResults:
    with _device_of(chunk.hidden):
        p = _operands(chunk, head)
        target = target_kernel_logits(p)[0]
        further, merged = _further(asked, target, _splits(head))
        running = logsumexp(p, asked.entropy, _blocks(head, "logsumexp"), further)
        statistics = RowStatistics(*finished(running, target, further, merged))
        partials = _further_partials(further, merged, asked, len(head.weight))
        return RowResults(statistics, finish_further(partials, statistics, chunk.tokens, len(head.weight), asked))


def _splits(head: Head) -> int:
    return split_count(len(head.weight), _blocks(head, "logsumexp").columns)


def _further(asked: Asked, target: torch.Tensor, parts: int) -> tuple[further_kernel.Further, further_kernel.Further]:
    """Where further statistics are written: those of each of the `parts` of a row, and those of rows without keys."""
    if not is_further(asked):
        return further_kernel.NOTHING, further_kernel.NOTHING
    wanted, rows = further_kernel.Further(None, asked.mean, asked.squares, asked.rank, target.contiguous()), len(target)
    keys = keys_of_a_split(largest_kept(asked))
    return (
        further_kernel.empty_further(target, (rows, parts), keys, wanted),
        further_kernel.empty_further(target, (rows,), 0, wanted),
    )


def _further_partials(
    further: further_kernel.Further, merged: further_kernel.Further, asked: Asked, vocab: int
) -> FurtherPartials:
    values = ids = None
    if further.TOP is not None:
        values, ids = further_kernel.largest_of(further.TOP, largest_kept(asked), vocab)
    return FurtherPartials(values, ids, merged.SUM, merged.SQUARES, None if merged.ABOVE is None else merged.ABOVE.long())


def target_logits(chunk: Chunk, head: Head) -> Target:
    with _device_of(chunk.hidden):
        return Target(*target_kernel_logits(_operands(chunk, head)))


def dlogits(
    chunk: Chunk,
    head: Head,
    w: torch.Tensor,
    start: int,
    statistics: RowStatistics,
    incoming: Incoming,
    unit: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor | None:
    with _device_of(chunk.hidden):
        columns = slice(start, start + len(w))
        bias, b = (None if x is None else x[columns] for x in (head.bias, head.lora_weight))
        return dlogits_kernel.dlogits(
            _operands(chunk, head._replace(weight=w, lora_weight=b, bias=bias), start), _statistics(statistics),
            _incoming(incoming, unit), out, _blocks(head, "dlogits"), start,
        )  # fmt: skip


def _statistics(statistics: RowStatistics) -> dlogits_kernel.Statistics:
    return dlogits_kernel.Statistics(*statistics)


def _incoming(incoming: Incoming, unit: torch.Tensor | None) -> dlogits_kernel.Incoming:
    g, h, of_lse, of_sum = (None if x is None else x.contiguous() for x in incoming)
    return dlogits_kernel.Incoming(g, h, unit, of_lse, of_sum)


def selective_statistics(ready: ReadyLogits, entropy: bool) -> RowStatistics:
    with _device_of(ready.logits):
        return RowStatistics(*selective_kernel.selective_logsumexp(_ready(ready), entropy))


def selective_dlogits(ready: ReadyLogits, statistics: RowStatistics, incoming: Incoming) -> torch.Tensor:
    out = torch.empty_like(ready.logits, memory_format=torch.contiguous_format)
    with _device_of(ready.logits):
        selective_kernel.selective_dlogits(_ready(ready), _statistics(statistics), _incoming(incoming, None), out)
    return out


def _ready(ready: ReadyLogits) -> selective_kernel.ReadyLogits:
    logits = ready.logits if ready.logits.stride(1) == 1 else ready.logits.contiguous()
    scale = None if ready.temperature is None else 1 / ready.temperature[:, 0]
    return selective_kernel.ready_logits(logits, ready.keep, ready.tokens, scale, ready.allowed)


def anchored_exp(
    chunk: Chunk, head: Head, log_anchor: torch.Tensor, target: Target, out: torch.Tensor | None, asked: Asked
) -> RowSums:
    with _device_of(chunk.hidden):
        p, blocks = _operands(chunk, head), _blocks(head, "anchored_exp", is_further(asked))
        tiles = cdiv(len(head.weight), blocks.columns)
        further, merged = _further(asked, target.logit, tiles)
        sums = anchored_tiles(p, target.logit - log_anchor, asked.entropy, out, blocks, further)
        finished = finish_kernel.finish(sums, finish_kernel.Tokens(chunk.tokens, target.slope, None, None))
        further_kernel.sum_further(further, merged, len(chunk.tokens), tiles)
        return RowSums(*finished, _further_partials(further, merged, asked, len(head.weight)))


def gradient_rows(
    of_rows: torch.Tensor | None,
    chunk: Chunk,
    head: Head,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    weighted: torch.Tensor | None,
) -> None:
    weight, x, hidden = head.weight, chunk.hidden, rows_kernel.HiddenRows()
    if out is not None:
        vocab, strides = weight.shape[0], weight.stride()
        hidden = rows_kernel.HiddenRows(
            of_rows.contiguous(), residual, chunk.tokens, weight, vocab, *strides, chunk.places, out, out.stride(0)
        )  # fmt: skip
    into = rows_kernel.WeightedRows() if weighted is None else rows_kernel.WeightedRows(x, x.stride(0), weighted)
    factor, count = None if factor is None else factor.contiguous(), len(weighted if of_rows is None else of_rows)
    with _device_of(weight):
        rows_kernel.gradient_rows(factor, hidden, into, count, weight.shape[1])


def scale_(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    with _device_of(factor):
        scale_kernel.scale(gradients, factor)


def anchored_loss(
    chunk: Chunk, head: Head, terms: TokenTerms, loss: DeviceLoss, exps: torch.Tensor | None, entropy: bool, sums: LossSums
) -> LossRows:
    """`anchored_exp`, anchored by the old log-probabilities, with the loss: the launch that completes the rows computes it.

    It also writes the sums of its rows to `sums`.
    """
    with _device_of(chunk.hidden):
        p = _operands(chunk, head)
        anchor, slope = target_kernel_logits(p, terms.old_logprobs)
        tiles = anchored_tiles(p, anchor, entropy, exps, _blocks(head, "anchored_exp"))
        scale = head.logit_scale if chunk.temperature is None else head.logit_scale / chunk.temperature[:, 0]
        vector, number = (scale, None) if isinstance(scale, torch.Tensor) else (None, scale)
        tokens = finish_kernel.Tokens(chunk.tokens, slope, vector, number)
        masked = None if terms.masked is None else terms.masked.view(torch.uint8)
        into = summary_kernel.Sums(sums.values, sums.values.shape[1], sums.first)
        found, results = finish_kernel.finish_with_loss(
            tiles, tokens, finish_kernel.Terms(masked, *terms[1:]), _loss(loss), into
        )
        return LossRows(*results, found.RESIDUAL)


def loss_sums(count: int, device: torch.device) -> torch.Tensor:
    """An empty buffer for the sums of `count` rows."""
    return torch.empty(summary_kernel.FIELDS, finish_kernel.programs(count), dtype=torch.float32, device=device)


def first_of_sums(start: int) -> int:
    """The place in that buffer of a chunk that begins at row `start`, a multiple of the rows of a tile."""
    return finish_kernel.programs(start)


def loss_summary(values: torch.Tensor, entropy: bool) -> LossSummary:
    with _device_of(values):
        return LossSummary(*summary_kernel.summary(values, entropy))


def policy_loss(logprobs: torch.Tensor, mask: torch.Tensor | None, terms: TokenTerms, loss: DeviceLoss) -> LogprobsLoss:
    """The loss of ready log-probabilities (N,), and its gradient. terms: (N,), of any dtypes; masked ones may be anything.

    They have no field `masked`: mask (N,) bool stands for it.
    """
    as_bytes = None if mask is None else mask.view(torch.uint8)
    with _device_of(logprobs):
        return LogprobsLoss(*policy_loss_kernel.policy_loss(logprobs, as_bytes, terms[1:], _loss(loss)))


@functools.lru_cache(maxsize=64)  # a coefficient may change from step to step
def _loss(loss: DeviceLoss) -> objectives.Loss:
    """The device functions of a loss, and their numbers."""
    objective = getattr(objectives, loss.objective)
    bounds = objectives.bounds_of(objective, loss.numbers)
    kl = None if loss.kl is None else getattr(objectives, loss.kl)
    ratio_range = objectives.RatioRange(loss.ratio_min, loss.ratio_max)
    kl_numbers = loss.kl_coef, loss.kl_is_weighted, loss.kl_max_log_ratio
    return objectives.Loss(objective, bounds, kl, *kl_numbers, loss.show_lost, ratio_range)


def gathered_dots(x: torch.Tensor, place: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    with _device_of(x):
        return gathered_kernel.gathered_dots(x, place, table, index)


def run_sums(
    factor: torch.Tensor, keys: torch.Tensor, source: torch.Tensor, index: torch.Tensor, out: torch.Tensor, add: bool
) -> None:
    with _device_of(source):
        gathered_kernel.run_sums(factor, keys, source, index, out, add)


def _blocks(head: Head, kernel: str, further: bool = False) -> Blocks:
    """further: an epilogue with further statistics, which takes as many registers as a softcap does."""
    has_bias, has_softcap = head.bias is not None, head.softcap is not None or further
    weight = head.weight
    return blocks_for(target_of(weight.device), weight.dtype, has_bias, has_softcap, kernel, weight.shape[1])


def _operands(chunk: Chunk, head: Head, start: int = 0) -> Operands:
    """start: the first column of `head`, where it is a slice of the vocabulary; 8 divides it."""
    hidden = chunk.hidden if chunk.hidden.stride(1) == 1 else chunk.hidden.contiguous()
    lora = None if head.lora_weight is None else (chunk.lora_hidden.contiguous(), head.lora_weight)
    bias = None if head.bias is None else head.bias.contiguous()
    inner = None if head.softcap is None else head.logit_scale / head.softcap
    scale = head.logit_scale if head.softcap is None else head.softcap
    if chunk.temperature is not None:
        scale = scale / chunk.temperature[:, 0]
    allowed = chunk.allowed if chunk.allowed is None or start == 0 else chunk.allowed[:, start // 8 :]
    return Operands(hidden, head.weight, lora, bias, chunk.tokens, scale, inner, allowed)
