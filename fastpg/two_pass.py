"""Log-probabilities and entropies as a differentiable function of hidden states and the lm_head: the two-pass schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from . import distributed, ops, validation
from .agreement import one_outcome
from .lm_head import LMHead, LoRA, Projection, as_head, projection_of
from .row_statistics import RowStatistics
from .rows import Gradients, Rows, Wanted, rows_of
from .two_pass_schedule import chunk_rows


class TokenLogprobs(NamedTuple):
    """logprobs (...): log-probability of each token, 0 where masked. entropy (...): of each token's distribution, or None.

    Both float32, or float64 for float64 inputs.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


def linear_logprobs(
    hidden: torch.Tensor,  # (..., H)
    head: torch.Tensor | LMHead,  # (V, H), or an LMHead
    tokens: torch.Tensor,  # (...)
    *,
    mask: torch.Tensor | None = None,  # (...)
    temperature: float | torch.Tensor = 1.0,  # number or (...)
    entropy: bool = False,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> TokenLogprobs:
    """log softmax(logits)[token] for each token, and the entropy of softmax(logits), without the logits.

        z    = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        logp = z[token] - logsumexp_v z_v          H = -sum_v p_v log p_v

    Differentiable in hidden, weight and bias, through both results, so that any loss can be written on top. The forward
    keeps a few numbers per row; the backward recomputes the logits tile by tile: four matrix products in all. Logits are
    fp32 for bf16 and fp16 inputs, gradients are summed in fp32 and rounded once.

    Args:
        hidden: (..., H) float16, bfloat16, float32 or float64; hidden[..., t, :] is the state that predicts tokens[..., t]
            (already shifted). A hidden that cannot be viewed as (N, H), such as `states[:, :-1]`, is copied once; to avoid
            that, pass all states and end `tokens` with -100.
        head: the weight (V, H) in hidden's dtype, or an LMHead with bias, softcap and logit_scale. Under torch.autocast both
            are used in its dtype, those in float32 too, unless LMHead(weight, fp32_head=True) asks for float32.
        tokens: (...) int64 or int32 in [0, V); -100 means "not a token": value 0, no work, gradient exactly 0.
        mask: (...) bool, False means the same. Nothing at a masked position is ever read into the arithmetic.
        temperature: > 0, a number or per token (...); divides the logits, as in the sampler.
        entropy: also return the entropy of each row, in nats.
        workspace: bytes of transient memory; default 256 MiB on a CPU, 1 GiB on accelerators. On top come the results, and
            one fp32 copy of dX. Log-probabilities do not depend on it.
        backend: "torch" or "triton"; None: triton for CUDA and ROCm tensors, torch elsewhere. The environment variable
            FASTPG_BACKEND replaces that default.
        check: True checks token ids and temperatures, and reads the host once to skip masked rows. False reads nothing and
            computes every row (for torch.compile and CUDA graphs); a token outside [0, V) then gives NaN.

    A token's log-probability has the same bits whatever else is in the batch. NaN or inf at a kept position gives NaN.
    Saved for backward: the inputs and five numbers per row. Double backward raises. Under non-reentrant checkpointing the
    forward's product runs again. On CPU, bf16 products hold a process-wide torch switch (see `products`).

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit, and for a workspace
    too small for one tile.
    """
    with one_outcome(head) as facts:
        hidden, head, keep, backend = prepare(hidden, head, tokens, mask, temperature, backend, check)
        workspace = validation.workspace_bytes(workspace, hidden.device)
        projection = projection_of(head)
        chunk_rows(ops.tiles_of(backend), projection, workspace, entropy)  # raises before any work where it is too small
        facts.describe(hidden, head, tokens, keep, temperature, backend=backend, entropy=entropy, check=check)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = rows_of(hidden, tokens, keep, temperature, check, head)
        values = row_logprobs(rows, head, entropy, workspace, backend)
    logprobs, entropies = (rows.scatter(v).reshape(tokens.shape) if len(v) == len(rows.tokens) else None for v in values)
    return TokenLogprobs(logprobs, entropies if entropy else None)


def row_logprobs(rows: Rows, head: LMHead, entropy: bool, workspace: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (K,) and entropies (K,), or (0,), of the rows: differentiable where something wants a gradient."""
    projection = projection_of(head)
    if not needs_gradient(rows.hidden, head):
        return ops.row_statistics(rows, projection, entropy, workspace, backend, head.group)[:2]
    options = entropy, workspace, backend, head.group, head.weight_grad
    return _LinearLogprobs.apply(*rows[:2], *projection[:3], *rows[2:], *projection[3:], *options)


def prepare(
    hidden: torch.Tensor,
    head: torch.Tensor | LMHead,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    backend: str | None,
    check: bool,
) -> tuple[torch.Tensor, LMHead, torch.Tensor, str]:
    """What both schedules do first: checks, casts, which tokens count, (...) bool, and the backend."""
    head = distributed.localized(as_head(head))
    hidden, head = _cast(hidden, head)
    validation.check_linear_inputs(hidden, head, tokens, mask, temperature)
    backend = ops.choose_backend(backend, hidden)
    keep = tokens != validation.IGNORED_TOKEN
    if mask is not None:
        keep = keep & mask
    if check:
        validation.check_values(tokens, keep, head.vocab_size if head.group is None else None, temperature)
    return hidden, head, keep, backend


def needs_gradient(hidden: torch.Tensor, head: LMHead) -> bool:
    # decided here and not by ctx.needs_input_grad, which is True under no_grad as well
    factors = () if head.lora is None else head.lora[:2]
    inputs = (hidden, head.weight, head.bias, *factors)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _cast(hidden: torch.Tensor, head: LMHead) -> tuple[torch.Tensor, LMHead]:
    """hidden and head in the dtype that is asked for; unchanged where none is."""
    dtype = _asked_dtype(hidden, head)
    if dtype is None:
        return hidden, head
    bias, weight = None if head.bias is None else head.bias.to(dtype), head.weight.to(dtype)
    # under no_grad the cast weight requires no gradient, and nothing will be added
    weight_grad = head.weight_grad if weight.requires_grad else None
    lora = _in_dtype(head.lora, dtype)
    return hidden.to(dtype), replace(head, weight=weight, bias=bias, lora=lora, weight_grad=weight_grad)


def _asked_dtype(hidden: torch.Tensor, head: LMHead) -> torch.dtype | None:
    """float32 with head.fp32_head, else that of autocast where it is on. float64 stays, as in torch's own products."""
    if not isinstance(hidden, torch.Tensor) or hidden.dtype not in validation.FLOATING_DTYPES:
        return None
    if torch.float64 in (hidden.dtype, head.weight.dtype):
        return None
    if head.fp32_head:
        return torch.float32
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(hidden.device.type):
        return None  # (Dynamo of torch 2.9 cannot ask)
    on = torch.is_autocast_enabled(hidden.device.type)
    return torch.get_autocast_dtype(hidden.device.type) if on else None


def _in_dtype(lora: LoRA | None, dtype: torch.dtype) -> LoRA | None:
    """Factors in fp32 stay: they are used as they are."""
    if lora is None:
        return None
    a, b = (x if x.dtype == torch.float32 else x.to(dtype) for x in lora[:2])
    return LoRA(a, b, lora.scale)


class _LinearLogprobs(torch.autograd.Function):
    """(logprobs (K,), entropy (K,) or (0,)) of the rows that `rows.Rows` describes."""

    @staticmethod
    def forward(ctx, *arguments):
        rows, head, options = _put_together(arguments)
        entropy, workspace, backend, group, _ = options
        statistics = ops.row_statistics(rows, head, entropy, workspace, backend, group)
        tensors = arguments[: -len(options) - 2]
        ctx.save_for_backward(*tensors, *statistics)
        ctx.numbers = head.softcap, head.logit_scale
        ctx.options = options
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(statistics[1])
        return statistics[0], statistics[1]

    # Not once_differentiable, which would drop a second derivative silently where the incoming gradient is a constant: the
    # operator called here has no derivative, and says so when one is asked for.
    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        count = len(RowStatistics._fields)
        saved = ctx.saved_tensors  # read once: checkpointing unpacks each tensor a single time
        tensors, statistics = saved[:-count], saved[-count:]
        rows, head, options = _put_together((*tensors, *ctx.numbers, *ctx.options))
        entropy, workspace, backend, group, weight_grad = options
        if not entropy:  # compiled, an empty result that is marked as not differentiable has an empty gradient, and not None
            grad_entropy = None
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(statistics[0])
        wanted = Wanted(*ctx.needs_input_grad[:5])
        gradients = gradients_of(
            rows, head, statistics, grad_logprobs, grad_entropy, wanted, workspace, backend, group, weight_grad
        )
        wanted = wanted._replace(weight=wanted.weight and weight_grad is None)
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *(None,) * (len(ctx.needs_input_grad) - 5)


def gradients_of(
    rows: Rows,
    head: Projection,
    statistics: tuple[torch.Tensor, ...],
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    wanted: Wanted,
    workspace: int,
    backend: str,
    group: distributed.Group,
    weight_grad: torch.Tensor | None = None,
) -> Gradients:
    """The two-pass backward; dX complete on every rank of the group."""
    with torch.autocast(rows.hidden.device.type, enabled=False):  # backward() may be called under it
        gradients = Gradients(
            *ops.two_pass_backward(
                *rows, *head, list(statistics), grad_logprobs, grad_entropy, list(wanted), workspace, backend, weight_grad,
                group is not None,
            )
        )  # fmt: skip
    if group is None:
        return gradients
    dhidden, dlora_hidden = (distributed.all_reduced(x, group) for x in gradients[:2])
    if wanted.hidden:
        dhidden = rows.scatter_rounded(dhidden)
    if wanted.lora_hidden:
        dlora_hidden = rows.scatter(dlora_hidden)
    return gradients._replace(hidden=dhidden, lora_hidden=dlora_hidden)


def _put_together(arguments: tuple) -> tuple[Rows, Projection, tuple]:
    """Autograd takes tensors one by one, those with a gradient first: (hidden, lora_hidden, weight, B, bias, ...)."""
    hidden, lora_hidden, weight, lora_weight, bias, indices, masked, tokens, temperature, softcap, scale, *options = arguments
    rows = Rows(hidden, lora_hidden, indices, masked, tokens, temperature)
    return rows, Projection(weight, lora_weight, bias, softcap, scale), tuple(options)
