"""Registration of the schedules as `torch.ops.fastpg.*`, opaque to torch.compile, and the choice of a backend.

Operators take tensors and numbers one by one; here they are put together into the structures the schedules use.
"""

import importlib.util
import os
from types import ModuleType

import torch

from . import distributed, products, tile_ops, two_pass_schedule
from .lm_head import Projection
from .products import accumulation_dtype
from .row_statistics import Partials, RowStatistics, finish_rows
from .rows import Chunk, Rows, Wanted

BACKENDS = ("torch", "triton")
# FASTPG_BACKEND replaces the default, for debugging; an argument `backend=` goes before it.
_ENVIRONMENT = os.environ.get("FASTPG_BACKEND")
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(backend: str | None, hidden: torch.Tensor, name: str = "hidden") -> str:
    """ "torch" or "triton": the argument, else FASTPG_BACKEND, else triton for CUDA and ROCm tensors and torch elsewhere.

    float64 has no kernels: it takes torch unless triton is asked for by the argument, which is then an error, as it is where
    triton is not installed, or for CPU tensors outside Triton's interpreter.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f'backend must be "torch", "triton" or None; got {backend!r}')
    if backend is None and _ENVIRONMENT not in (None, "", *BACKENDS):
        raise ValueError(f'the environment variable FASTPG_BACKEND must be "torch" or "triton"; got {_ENVIRONMENT!r}')
    is_float64 = hidden.dtype == torch.float64
    default = "triton" if hidden.is_cuda and _TRITON_IS_INSTALLED else "torch"
    chosen = backend or ("torch" if is_float64 else _ENVIRONMENT or default)
    if chosen == "triton":
        if is_float64:
            raise TypeError('backend="triton" has no float64 kernels; use backend="torch", or float32 inputs')
        _check_triton(hidden.device.type, name)
    return chosen


def _check_triton(device: str, name: str) -> None:
    if not _TRITON_IS_INSTALLED:
        raise ModuleNotFoundError('backend="triton" needs triton, which is not installed: pip install triton')
    if device != "cuda" and not tiles_of("triton").INTERPRETED:
        raise ValueError(
            f'backend="triton" runs on CUDA and ROCm tensors; {name} is on {device}. Use backend="torch"; to debug the kernels '
            "on a CPU, start Python with TRITON_INTERPRET=1"
        )


def tiles_of(backend: str) -> ModuleType:
    """The tile ops of a backend. Triton is imported here and not with fastpg."""
    if backend == "torch":
        return tile_ops
    from . import triton_tile_ops

    return triton_tile_ops


def row_statistics(
    rows: Rows, head: Projection, entropy: bool, workspace: int, backend: str, group: distributed.Group
) -> RowStatistics:
    """The two-pass forward over the columns of all ranks of the group, or of the one process there is."""
    partials = Partials(*two_pass_forward(*rows, *head, entropy, workspace, backend))
    if group is not None:
        partials = distributed.combine(partials, rows.tokens, head.weight.shape[0], group)
    return finish_rows(partials, entropy)


@torch.library.custom_op("fastpg::two_pass_forward", mutates_args=())
def two_pass_forward(
    hidden: torch.Tensor,
    lora_hidden: torch.Tensor | None,
    indices: torch.Tensor | None,
    masked: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    weight: torch.Tensor,
    lora_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    workspace: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partials of the rows that `rows.Rows` describes, over the columns of the weight."""
    rows = Rows(hidden, lora_hidden, indices, masked, tokens, temperature)
    head = Projection(weight, lora_weight, bias, softcap, logit_scale)
    return tuple(two_pass_schedule.two_pass_forward(tiles_of(backend), rows, head, entropy, workspace))


@two_pass_forward.register_fake
def _(
    hidden, lora_hidden, indices, masked, tokens, temperature, weight, lora_weight, bias, softcap, logit_scale,
    entropy, workspace, backend,
):  # fmt: skip
    def per_row(present: bool) -> torch.Tensor:
        return weight.new_empty(tokens.shape[0] if present else 0, dtype=accumulation_dtype(weight.dtype))

    return per_row(True), per_row(True), per_row(entropy), per_row(True)


@torch.library.custom_op("fastpg::two_pass_backward", mutates_args={"weight_grad"})
def two_pass_backward(
    hidden: torch.Tensor,
    lora_hidden: torch.Tensor | None,
    indices: torch.Tensor | None,
    masked: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    weight: torch.Tensor,
    lora_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    statistics: list[torch.Tensor],
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    wanted: list[bool],
    workspace: int,
    backend: str,
    weight_grad: torch.Tensor | None,
    partial: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients, (0,) where not wanted (`two_pass_schedule.two_pass_backward`)."""
    rows = Rows(hidden, lora_hidden, indices, masked, tokens, temperature)
    head = Projection(weight, lora_weight, bias, softcap, logit_scale)
    return tuple(
        two_pass_schedule.two_pass_backward(
            tiles_of(backend), rows, head, RowStatistics(*statistics), grad_logprobs, grad_entropy, Wanted(*wanted), workspace,
            weight_grad, partial,
        )
    )  # fmt: skip


@two_pass_backward.register_fake
def _(
    hidden, lora_hidden, indices, masked, tokens, temperature, weight, lora_weight, bias, softcap, logit_scale,
    statistics, grad_logprobs, grad_entropy, wanted, workspace, backend, weight_grad, partial,
):  # fmt: skip
    wide = accumulation_dtype(weight.dtype)

    def like(x: torch.Tensor | None, present: bool, is_partial: bool = False) -> torch.Tensor:
        if not present:
            return weight.new_empty(0)
        return x.new_empty(tokens.shape[0], x.shape[1], dtype=wide) if is_partial else x.new_empty(x.shape)

    dweight = like(weight, wanted[2] and weight_grad is None)
    of_rows = like(hidden, wanted[0], partial), like(lora_hidden, wanted[1], partial)
    return *of_rows, dweight, like(lora_weight, wanted[3]), like(bias, wanted[4])


@torch.library.custom_op("fastpg::target_logits", mutates_args=())
def target_logits(
    hidden: torch.Tensor,
    lora_hidden: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    weight: torch.Tensor,
    lora_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row's own token, for a chunk (C, H): `tile_ops.target_logits`."""
    head, chunk = Projection(weight, lora_weight, bias, softcap, logit_scale), Chunk(hidden, lora_hidden, tokens, temperature)
    return tiles_of(backend).target_logits(chunk, head)


@target_logits.register_fake
def _(hidden, lora_hidden, tokens, temperature, weight, lora_weight, bias, softcap, logit_scale, backend):
    dtype = accumulation_dtype(weight.dtype)
    return hidden.new_empty(len(hidden), dtype=dtype), hidden.new_empty(len(hidden), dtype=dtype)


@torch.library.custom_op("fastpg::anchored_scores", mutates_args={"scores"})
def anchored_scores(
    hidden: torch.Tensor,
    lora_hidden: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    log_anchor: torch.Tensor,
    weight: torch.Tensor,
    lora_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    backend: str,
    scores: torch.Tensor | None,
    target: torch.Tensor,
    target_slope: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Product 1 of the one-pass schedule, for a chunk (C, H): `tile_ops.anchored_exp`. Writes scores (C, V) if given."""
    head, chunk = Projection(weight, lora_weight, bias, softcap, logit_scale), Chunk(hidden, lora_hidden, tokens, temperature)
    return tiles_of(backend).anchored_exp(chunk, head, log_anchor, entropy, scores, (target, target_slope))


def _row_sums(log_anchor: torch.Tensor, entropy: bool, scores: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    total = torch.empty_like(log_anchor)
    is_rounded = scores is not None and scores.dtype != total.dtype
    return total, total.new_empty(len(log_anchor) if entropy else 0), total.new_empty(len(scores) if is_rounded else 0)


@anchored_scores.register_fake
def _(
    hidden, lora_hidden, tokens, temperature, log_anchor, weight, lora_weight, bias, softcap, logit_scale, entropy, backend,
    scores, target, target_slope,
):  # fmt: skip
    return _row_sums(log_anchor, entropy, scores)


@torch.library.custom_op("fastpg::cispo_scores", mutates_args={"scores"})
def cispo_scores(
    hidden: torch.Tensor,
    lora_hidden: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    log_anchor: torch.Tensor,
    weight: torch.Tensor,
    lora_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    scores: torch.Tensor | None,
    masked: torch.Tensor | None,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_weights: torch.Tensor,
    ratio_min: float | None,
    ratio_max: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`anchored_scores` on Triton with the CISPO loss in its last kernel: `triton_tile_ops.anchored_cispo`."""
    head, chunk = Projection(weight, lora_weight, bias, softcap, logit_scale), Chunk(hidden, lora_hidden, tokens, temperature)
    return tiles_of("triton").anchored_cispo(
        chunk, head, log_anchor, entropy, scores, masked, old_logprobs, advantages, loss_weights, ratio_min, ratio_max
    )


@cispo_scores.register_fake
def _(
    hidden, lora_hidden, tokens, temperature, log_anchor, weight, lora_weight, bias, softcap, logit_scale, entropy, scores,
    masked, old_logprobs, advantages, loss_weights, ratio_min, ratio_max,
):  # fmt: skip
    numbers = (torch.empty_like(log_anchor) for _ in range(3))
    return *_row_sums(log_anchor, entropy, scores), *numbers, torch.empty_like(advantages, dtype=torch.int8)


@torch.library.custom_op("fastpg::gradient_products", mutates_args={"dhidden", "dweight", "dbias"})
def gradient_products(
    scores: torch.Tensor,
    factor: torch.Tensor,
    residual: torch.Tensor,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    dhidden: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    accumulate: bool,
) -> None:
    """Products 2 and 3 of a chunk (`products.gradient_products`)."""
    products.gradient_products(scores, factor, residual, hidden, tokens, weight, dhidden, dweight, dbias, accumulate)


@torch.library.custom_op("fastpg::lora_products", mutates_args={"dlora_hidden", "dlora_weight"})
def lora_products(
    scores: torch.Tensor,
    factor: torch.Tensor,
    residual: torch.Tensor,
    lora_hidden: torch.Tensor,
    tokens: torch.Tensor,
    lora_weight: torch.Tensor,
    dlora_hidden: torch.Tensor | None,
    dlora_weight: torch.Tensor | None,
    accumulate: bool,
) -> None:
    """The same with LoRA's factors (`products.lora_products`)."""
    products.lora_products(scores, factor, residual, lora_hidden, tokens, lora_weight, dlora_hidden, dlora_weight, accumulate)


@torch.library.custom_op("fastpg::given_logsumexp", mutates_args=())
def given_logsumexp(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    keep: torch.Tensor,
    entropy: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partials of ready logits (N, V): `tile_ops.given_logsumexp`."""
    return tuple(tiles_of(backend).given_logsumexp(logits, tokens, temperature, keep, entropy))


@given_logsumexp.register_fake
def _(logits, tokens, temperature, keep, entropy, backend):
    def per_row(present: bool) -> torch.Tensor:
        return logits.new_empty(logits.shape[0] if present else 0, dtype=accumulation_dtype(logits.dtype))

    return per_row(True), per_row(True), per_row(entropy), per_row(True)


@torch.library.custom_op("fastpg::given_dlogits", mutates_args=())
def given_dlogits(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    keep: torch.Tensor,
    statistics: list[torch.Tensor],
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """Their gradient: `tile_ops.given_dlogits`."""
    tiles = tiles_of(backend)
    return tiles.given_dlogits(logits, tokens, temperature, keep, RowStatistics(*statistics), grad_logprobs, grad_entropy)


@given_dlogits.register_fake
def _(logits, tokens, temperature, keep, statistics, grad_logprobs, grad_entropy, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
