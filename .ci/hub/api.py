"""Triton kernels of fastpg: log-probabilities of tokens, their gradients, and a policy-gradient loss.

The functions take and return plain tensors on one GPU. None of them is known to autograd: a training step calls them in the
order that the repository's README shows. The folder `launchers` is fastpg's own `kernels/`, all of it; names outside `__all__`
may change with any upload.

Here N is the number of tokens, V of vocabulary entries, H the hidden size; z are the logits, softcapped and divided by the
temperature; logp is the log-probability of a row's own token. Tokens that do not count are left out by the caller: the row of a
token outside [0, V) is NaN, and so is its gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from .launchers import objectives
from .launchers.blocks import blocks_for, target_of
from .launchers.dlogits import Incoming, Statistics, dlogits
from .launchers.logsumexp import finished, logsumexp
from .launchers.objectives import Loss, bounds_of
from .launchers.operands import Operands
from .launchers.policy_loss import policy_loss as launch_policy_loss
from .launchers.selective import ready_logits, selective_logsumexp
from .launchers.selective import selective_dlogits as launch_selective_dlogits
from .launchers.target import target_logits
from .launchers.tile import INTERPRETED

__all__ = [
    "RowStatistics",
    "linear_dlogits",
    "linear_logprobs",
    "policy_loss",
    "selective_dlogits",
    "selective_logprobs",
]

OBJECTIVES = {  # and their bounds, in order; of these, OPTIONAL may be None: no bound
    "reinforce": (),
    "importance_weighted": (),
    "cispo": ("ratio_min", "ratio_max"),
    "ppo_clip": ("1 - eps_low", "1 + eps_high", "dual_clip"),
    "sapo": ("tau_pos", "tau_neg"),
    "dppo_tv": ("low", "high", "ratio_max", "two_sided"),
    "dppo_kl": ("low", "high", "ratio_max", "two_sided"),
    "icepop": ("ratio_min", "ratio_max"),
}
OPTIONAL = {"ratio_min", "ratio_max", "dual_clip", "two_sided"}


class RowStatistics(NamedTuple):
    """What the forward knows of each row, (N,) fp32 each; the gradient takes it whole."""

    logprobs: torch.Tensor
    entropies: torch.Tensor | None  # of softmax(z), if asked for
    log_odds: torch.Tensor  # against the token: log((1 - p) / p)
    logsumexp: torch.Tensor  # of z
    other_entropies: torch.Tensor | None  # of the softmax over all other tokens, if entropies are asked for


def linear_logprobs(
    hidden: torch.Tensor,  # (N, H) fp32, bf16 or fp16
    weight: torch.Tensor,  # (V, H), of the same dtype
    tokens: torch.Tensor,  # (N,) int32 or int64
    *,
    bias: torch.Tensor | None = None,  # (V,)
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,  # a number, or (N,)
    entropy: bool = False,
) -> RowStatistics:
    """Statistics of the rows of z = hidden @ weight.T, of which no more than a tile exists at a time."""
    p = _operands(hidden, weight, tokens, bias, softcap, temperature)
    with _device_of(hidden):
        running = logsumexp(p, entropy, _blocks(p, "logsumexp"))
        return RowStatistics(*finished(running, target_logits(p)[0]))


def linear_dlogits(
    hidden: torch.Tensor,  # (N, H) fp32 or bf16
    weight: torch.Tensor,  # (V, H), whole
    tokens: torch.Tensor,
    rows: RowStatistics,  # of linear_logprobs, of the same arguments
    grad_logprobs: torch.Tensor,  # (N,) fp32: dL/dlogp
    columns: slice,  # of the vocabulary, as slice(0, 8192)
    *,
    grad_entropies: torch.Tensor | None = None,  # (N,) fp32
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dL/d(hidden @ weight[columns].T), in the dtype of hidden; the rounding error of each of its rows, or None in fp32).

    Of the gradient D of these columns, hidden's gradient is the sum over all columns of D @ weight[columns], and that of
    weight[columns] is D.T @ hidden. Rows of dL/dz sum to 0, and rounded to bf16 they do not: the sum over all columns of
    rounding[:, None] * weight[tokens] gives hidden's gradient back what that takes from it.
    """
    if hidden.dtype == torch.float16:
        raise TypeError("hidden must be float32 or bfloat16 for a gradient, whose range float16 lacks; got torch.float16")
    start, stop, step = columns.indices(len(weight))
    if step != 1 or start >= stop:
        raise ValueError(f"columns must be a slice of at least one row of weight {tuple(weight.shape)}, step 1; got {columns}")
    part = None if bias is None else bias[start:stop]
    p = _operands(hidden, weight[start:stop], tokens, part, softcap, temperature)
    incoming = _incoming(rows, grad_logprobs, grad_entropies, tokens)
    out = hidden.new_empty(len(tokens), stop - start)
    with _device_of(hidden):
        return out, dlogits(p, Statistics(*rows), incoming, out, _blocks(p, "dlogits"), start)


def selective_logprobs(
    logits: torch.Tensor,  # (N, V) fp32, bf16 or fp16
    tokens: torch.Tensor,  # (N,)
    *,
    temperature: float | torch.Tensor = 1.0,
    entropy: bool = False,
) -> RowStatistics:
    """The same of logits that exist, read in their dtype: no fp32 copy of them is made."""
    with _device_of(logits):
        return RowStatistics(*selective_logsumexp(_ready(logits, tokens, temperature), entropy))


def selective_dlogits(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    rows: RowStatistics,  # of selective_logprobs, of the same arguments
    grad_logprobs: torch.Tensor,  # (N,) fp32: dL/dlogp
    *,
    grad_entropies: torch.Tensor | None = None,  # (N,) fp32
    temperature: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The gradient of the logits, in their shape and dtype."""
    ready, out = _ready(logits, tokens, temperature), torch.empty_like(logits, memory_format=torch.contiguous_format)
    incoming = _incoming(rows, grad_logprobs, grad_entropies, tokens)
    with _device_of(logits):
        launch_selective_dlogits(ready, Statistics(*rows), incoming, out)
    return out


def policy_loss(
    logprobs: torch.Tensor,  # (N,) fp32
    old_logprobs: torch.Tensor | None,  # (N,) of the policy that sampled the tokens; None: logprobs themselves
    advantages: torch.Tensor,  # (N,)
    *,
    objective: str = "cispo",
    bounds: tuple[float | None, ...] = (None, 5.0),  # of the objective, as OBJECTIVES names them
    mask: torch.Tensor | None = None,  # (N,) bool; what is not kept may be anything
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, dloss/dlogp (N,)) of minus the mean of the objective over the tokens that are kept."""
    _check_device("logprobs", logprobs)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    wanted = OBJECTIVES[objective]
    if len(bounds) != len(wanted) or any(x is None and name not in OPTIONAL for name, x in zip(wanted, bounds, strict=True)):
        raise ValueError(f"bounds of {objective} must be ({', '.join(wanted)}); got {bounds}")
    given = {"old_logprobs": old_logprobs, "advantages": advantages, "mask": mask}
    old, advantages, mask = (_vector(name, values, logprobs) for name, values in given.items())
    count = logprobs.new_tensor(float(len(logprobs))) if mask is None else mask.sum().float()
    function = getattr(objectives, objective)
    loss = Loss(function, bounds_of(function, bounds), None, None, False, None, show_lost=True)
    with _device_of(logprobs):
        kept = None if mask is None else mask.view(torch.uint8)
        found = launch_policy_loss(logprobs.contiguous(), kept, (old, advantages, 1 / count.clamp(min=1), None, None), loss)
    return found[2], found[1]


def _operands(hidden, weight, tokens, bias, softcap, temperature) -> Operands:
    _check_device("hidden", hidden)
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype != hidden.dtype:
        raise TypeError(f"hidden and weight must both be float32, bfloat16 or float16; got {hidden.dtype} and {weight.dtype}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden (N, H) and weight (V, H) must agree in H; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if tokens.shape != hidden.shape[:1]:
        raise ValueError(f"tokens must be ({len(hidden)},), one for each row of hidden; got {tuple(tokens.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), one for each row of weight; got {tuple(bias.shape)}")
    for name, value in (("weight", weight), ("tokens", tokens), ("bias", bias)):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device}, as hidden is; got a tensor on {value.device}")
    scale = (softcap or 1.0) / _temperature(temperature, tokens)
    inner, bias = None if softcap is None else 1 / softcap, None if bias is None else bias.contiguous()
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    return Operands(hidden, weight, None, bias, tokens.contiguous(), scale, inner)


def _ready(logits, tokens, temperature):
    _check_device("logits", logits)
    if logits.dim() != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(f"logits (N, V) and tokens (N,) must agree in N; got {tuple(logits.shape)} and {tuple(tokens.shape)}")
    if tokens.device != logits.device:
        raise ValueError(f"tokens must be on {logits.device}, as logits are; got a tensor on {tokens.device}")
    scale = 1 / _temperature(temperature, tokens)
    per_row = scale if isinstance(scale, torch.Tensor) else logits.new_full(tokens.shape, scale, dtype=torch.float32)
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    return ready_logits(rows, torch.ones_like(tokens, dtype=torch.bool), tokens.contiguous(), per_row, None)


def _incoming(rows: RowStatistics, grad_logprobs, grad_entropies, tokens) -> Incoming:
    if grad_entropies is not None and rows.entropies is None:
        raise ValueError("rows must come from a call with entropy=True where grad_entropies is given; got none with entropies")
    return Incoming(_vector("grad_logprobs", grad_logprobs, tokens), _vector("grad_entropies", grad_entropies, tokens))


def _temperature(temperature, tokens) -> float | torch.Tensor:
    return temperature if isinstance(temperature, (int, float)) else _vector("temperature", temperature, tokens).float()


def _vector(name: str, values: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    if values is not None and values.shape != like.shape:
        raise ValueError(f"{name} must be {tuple(like.shape)}, one for each token; got {tuple(values.shape)}")
    if values is not None and values.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as the tokens are; got a tensor on {values.device}")
    return None if values is None else values.contiguous()


def _blocks(p: Operands, kernel: str):
    weight = p.weight
    return blocks_for(target_of(weight.device), weight.dtype, p.bias is not None, p.inner is not None, kernel, weight.shape[1])


def _check_device(name: str, x: torch.Tensor) -> None:
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(
            f"{name} must be on a CUDA or ROCm device, or TRITON_INTERPRET=1 set before triton is imported, for Triton's "
            f"interpreter on CPU tensors; got a tensor on {x.device}"
        )


def _device_of(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which may not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
