"""The tile ops on the kernels of `fastpg.kernels`: the functions of `tile_ops`, with the same signatures.

On CUDA and ROCm tensors; on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 before the first import). Operands keep
their dtype, bf16 and fp16 included. A row's numbers do not depend on its place in a tile, so nothing is padded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from .kernels.anchored_exp import anchored_exp as anchored_exp_tiles
from .kernels.blocks import Blocks, blocks_for, fewest_columns, target_of
from .kernels.dlogits import dlogits as dlogits_tiles
from .kernels.finalize import finalize, finalize_cispo
from .kernels.given import given_dlogits as given_dlogits_tiles
from .kernels.given import given_logsumexp as given_logsumexp_tiles
from .kernels.logits import INTERPRETED
from .kernels.logsumexp import logsumexp, split_count
from .kernels.target import target_logits as target_kernel_logits
from .lm_head import Projection, lora_rank
from .products import accumulation_dtype, dense
from .row_statistics import Partials, RowStatistics
from .rows import Chunk
from .tile_ops import TileShape

__all__ = [
    "INTERPRETED",
    "anchored_cispo",
    "anchored_exp",
    "dlogits",
    "given_dlogits",
    "given_logsumexp",
    "one_pass_bytes",
    "online_logsumexp",
    "operand_dtype",
    "target_logits",
    "tile_shape",
    "two_pass_bytes",
    "weight_buffer",
    "weight_tile",
]


def tile_shape(head: Projection) -> TileShape:
    """What a schedule steps by: chunks of a number of row tiles, slices wide enough for products at full speed."""
    return TileShape(256, 2048, 1, 1024) if head.weight.device.type == "cpu" else TileShape(128, 8192, 1, 16384)


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return dtype


def weight_buffer(head: Projection) -> None:
    return None


def weight_tile(head: Projection, start: int, stop: int, buffer: None) -> torch.Tensor:
    return dense(head.weight[start:stop])


def one_pass_bytes(head: Projection, entropy: bool) -> tuple[int, int]:
    # one partial sum of each kind per row and column tile
    partials = 1 + entropy + (head.weight.dtype != torch.float32)
    return _lora_bytes(head), 4 * partials * -(-head.weight.shape[0] // fewest_columns(head.weight.dtype))


def two_pass_bytes(head: Projection, entropy: bool) -> tuple[int, int]:
    columns = fewest_columns(head.weight.dtype)
    slice_tiles = -(-min(tile_shape(head).columns, head.weight.shape[0]) // columns)
    return _lora_bytes(head), 4 * max((2 + entropy) * split_count(head.weight.shape[0], columns), slice_tiles)


def _lora_bytes(head: Projection) -> int:
    # B as bf16 operands of the same product (`kernels.logits.operands`), with the parts they are put together from
    if head.weight.dtype == torch.float32:
        return 0 if lora_rank(head) == 0 else 4 * head.weight.shape[0] * lora_rank(head)
    return 2 * 12 * head.weight.shape[0] * lora_rank(head)


def _device_of(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _on_its_device(tile_op: Callable) -> Callable:
    @functools.wraps(tile_op)
    def wrapped(chunk: Chunk, *arguments):
        with _device_of(chunk.hidden):
            return tile_op(chunk, *arguments)

    return wrapped


@_on_its_device
def online_logsumexp(chunk: Chunk, head: Projection, entropy: bool) -> Partials:
    operands = _operands(chunk, head)
    maximum, total, weighted = logsumexp(*operands, entropy, _blocks(head))
    target, _ = target_kernel_logits(*operands)
    return Partials(maximum, total, total.new_empty(0) if weighted is None else weighted, target)


@_on_its_device
def target_logits(chunk: Chunk, head: Projection) -> tuple[torch.Tensor, torch.Tensor]:
    return target_kernel_logits(*_operands(chunk, head))


@_on_its_device
def dlogits(
    chunk: Chunk,
    head: Projection,
    w: torch.Tensor,
    start: int,
    statistics: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    unit: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    stop = start + len(w)
    bias = None if head.bias is None else head.bias[start:stop]
    b = None if head.lora_weight is None else head.lora_weight[start:stop]
    slice_of_head = head._replace(weight=w, lora_weight=b, bias=bias)
    for_entropy = None
    if grad_entropy is not None:
        for_entropy = grad_entropy.contiguous(), statistics.entropy, statistics.others_entropy
    return dlogits_tiles(
        *_operands(chunk._replace(tokens=chunk.tokens - start), slice_of_head),
        statistics.logprobs, statistics.t, statistics.logsumexp, grad_logprobs.contiguous(), for_entropy, unit, out,
        _blocks(head),
    )  # fmt: skip


def given_logsumexp(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor | None, keep: torch.Tensor, entropy: bool
) -> Partials:
    with _device_of(logits):
        maximum, total, weighted, target = given_logsumexp_tiles(
            _in_rows(logits), keep, tokens, _given_scale(logits, temperature), entropy
        )
    return Partials(maximum, total, total.new_empty(0) if weighted is None else weighted, target)


def given_dlogits(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    keep: torch.Tensor,
    statistics: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
) -> torch.Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    g, for_entropy = torch.where(keep, grad_logprobs, 0), None
    if grad_entropy is not None:
        for_entropy = torch.where(keep, grad_entropy, 0), statistics.entropy, statistics.others_entropy
    with _device_of(logits):
        given_dlogits_tiles(
            _in_rows(logits), keep, tokens, _given_scale(logits, temperature), statistics.logprobs, statistics.t,
            statistics.logsumexp, g, for_entropy, out,
        )  # fmt: skip
    return out


def _in_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _given_scale(logits: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    if temperature is None:
        return torch.ones(len(logits), device=logits.device)
    return 1 / temperature[:, 0]


@_on_its_device
def anchored_exp(
    chunk: Chunk,
    head: Projection,
    log_anchor: torch.Tensor,
    entropy: bool,
    out: torch.Tensor | None,
    target: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logit, slope = target
    partials = anchored_exp_tiles(*_operands(chunk, head), logit - log_anchor, entropy, out, _blocks(head))
    return finalize(partials, chunk.tokens, slope, out)


@_on_its_device
def anchored_cispo(
    chunk: Chunk,
    head: Projection,
    log_anchor: torch.Tensor,
    entropy: bool,
    out: torch.Tensor | None,
    masked: torch.Tensor | None,  # (C,) bool
    old_logprobs: torch.Tensor,  # (C,) fp32
    advantages: torch.Tensor,  # (C,) fp32
    loss_weights: torch.Tensor,  # (C,) fp32: the loss is their product with clip(ratio) A logp
    ratio_min: float | None,
    ratio_max: float | None,
) -> tuple[torch.Tensor, ...]:
    """`anchored_exp` and, from the same launch that completes the rows, (C,) logp, loss, u and int8 state: 0 in range, 1 u is
    not, 2 the sum is not."""
    operands = _operands(chunk, head)
    logit, slope = target_kernel_logits(*operands)
    partials = anchored_exp_tiles(*operands, logit - log_anchor, entropy, out, _blocks(head))
    row_scale = _row_scale(chunk, head.logit_scale)
    return finalize_cispo(
        partials, chunk.tokens, slope, out, log_anchor, old_logprobs, advantages, loss_weights, row_scale, masked,
        ratio_min, ratio_max,
    )  # fmt: skip


def _blocks(head: Projection) -> Blocks:
    has_bias, has_softcap = head.bias is not None, head.softcap is not None
    return blocks_for(target_of(head.weight.device), head.weight.dtype, has_bias, has_softcap)


def _operands(chunk: Chunk, head: Projection) -> tuple:
    """What every kernel that sees logits begins with: hidden with contiguous rows, weight, (l, B) or None, bias, tokens, and
    scale (C,) and inner of `kernels.logits`."""
    hidden = chunk.hidden if chunk.hidden.stride(1) == 1 else chunk.hidden.contiguous()
    lora = None if head.lora_weight is None else (chunk.lora_hidden.contiguous(), head.lora_weight)
    bias = None if head.bias is None else head.bias.contiguous()
    inner = None if head.softcap is None else head.logit_scale / head.softcap
    scale = _row_scale(chunk, head.logit_scale if head.softcap is None else head.softcap)
    return hidden, head.weight, lora, bias, chunk.tokens, scale, inner


def _row_scale(chunk: Chunk, numerator: float) -> torch.Tensor:
    """numerator / T, (C,) fp32."""
    if chunk.temperature is None:
        dtype = accumulation_dtype(chunk.hidden.dtype)
        return torch.full((len(chunk.tokens),), numerator, dtype=dtype, device=chunk.hidden.device)
    return numerator / chunk.temperature[:, 0]
