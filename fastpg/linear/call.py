"""The start of every call, in both schedules: checks, casts, and which tokens count."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from .. import validation
from ..distributed.dtensor import localized
from ..lm_head import LMHead, LoRA, as_head
from ..tiles.backend import choose_backend
from ..tiles.structures import Head, TokenInputs, Wanted
from . import operators


class Inputs(NamedTuple):
    """Checked arguments, in the dtype that the call computes in."""

    hidden: torch.Tensor  # (..., H)
    head: LMHead  # this rank's rows of the weight
    tokens: torch.Tensor  # (...)
    mask: torch.Tensor | None  # (...)
    temperature: float | torch.Tensor  # number or (...)
    backend: str
    host_reads: bool  # True: values are checked and rows skipped, for which the host waits; False: it never does


def prepare(
    hidden: torch.Tensor,
    head: torch.Tensor | LMHead,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    backend: str | None,
    check: bool,
) -> Inputs:
    """The arguments, checked and cast.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices. `counted` checks values.
    """
    head = localized(as_head(head))
    hidden, head = _cast(hidden, head)
    validation.check_linear_inputs(hidden, head, tokens, mask, temperature)
    return Inputs(hidden, head, tokens, mask, temperature, choose_backend(backend, hidden), check)


class Counted(NamedTuple):
    """Which tokens count, and which of them are computed: all, unless some add exactly 0 to a loss."""

    keep: torch.Tensor  # (...) bool: tokens that count
    computed: torch.Tensor  # (...) bool; `keep` itself where it is the same
    numbers: torch.Tensor  # (4,) int64: how many, first of `keep` and then of `computed`
    rows: int | None  # the second of them, where the host reads it


def counted(
    inputs: Inputs,
    advantages: torch.Tensor | None = None,
    rollout_weights: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> Counted:
    """The tokens that count. With advantages (...), those that add exactly 0 to the loss are not computed (`torch_tiles.keep`).

    With `inputs.host_reads` the host waits for four numbers. Raises ValueError where they say that a token that counts is
    outside the vocabulary, or that its temperature is not a positive number.
    """
    tokens, temperature, head = inputs.tokens, inputs.temperature, inputs.head
    vocab = head.vocab_size if inputs.host_reads and head.group is None else None
    checked = temperature if inputs.host_reads and isinstance(temperature, torch.Tensor) else None
    given = TokenInputs(tokens, inputs.mask, checked, advantages, rollout_weights, old_logprobs, weight, vocab)
    with torch.no_grad():
        found = operators.keep(given, inputs.backend)
    rows = None
    if inputs.host_reads:
        _, rows, *out_of_range = found.numbers.tolist()
        if any(out_of_range):
            validation.check_values(tokens, found.keep, vocab, temperature)
    return Counted(found.keep, found.keep if found.computed is None else found.computed, found.numbers, rows)


def head_of(head: LMHead) -> Head:
    b = None if head.lora is None else head.lora.b
    return Head(head.weight, b, head.bias, head.softcap, float(head.logit_scale))


def wanted_of(inputs: Inputs) -> Wanted:
    """The gradients that backward may be asked for."""
    hidden, head = inputs.hidden, inputs.head
    grad = needs_gradient(hidden, head)
    a, b = (None, None) if head.lora is None else head.lora[:2]

    def needs(x: torch.Tensor | None) -> bool:
        return grad and x is not None and x.requires_grad

    of_lora = head.lora is not None and (needs(hidden) or needs(a))
    return Wanted(needs(hidden), of_lora, needs(head.weight), needs(b), needs(head.bias))


# Autograd has to see inputs that may have a gradient one by one. An autograd.Function therefore takes a call, a NamedTuple with
# `rows` and `head`, as the five tensors that may have one and, whole, the rest of it.


def differentiable(call: NamedTuple) -> tuple[torch.Tensor | None, ...]:
    return *call.rows[:2], *call.head[:3]


def with_inputs(call: NamedTuple, hidden=None, lora_hidden=None, weight=None, lora_weight=None, bias=None) -> NamedTuple:
    """The call with these tensors in place of its own; with none of them, the rest of a call."""
    rows = call.rows._replace(hidden=hidden, lora_hidden=lora_hidden)
    return call._replace(rows=rows, head=call.head._replace(weight=weight, lora_weight=lora_weight, bias=bias))


def needs_gradient(hidden: torch.Tensor, head: LMHead) -> bool:
    # not decided by ctx.needs_input_grad, which is True under no_grad as well
    factors = () if head.lora is None else head.lora[:2]
    inputs = (hidden, head.weight, head.bias, *factors)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _cast(hidden: torch.Tensor, head: LMHead) -> tuple[torch.Tensor, LMHead]:
    """hidden and head in the dtype that the call asks for (`_asked_dtype`); unchanged where it asks for none."""
    dtype = _asked_dtype(hidden, head)
    if dtype is None:
        return hidden, head
    bias, weight = None if head.bias is None else head.bias.to(dtype), head.weight.to(dtype)
    # under no_grad the cast weight requires no gradient, and nothing will be added to the buffer
    weight_grad = head.weight_grad if weight.requires_grad else None
    lora = _in_dtype(head.lora, dtype)
    return hidden.to(dtype), replace(head, weight=weight, bias=bias, lora=lora, weight_grad=weight_grad)


def _asked_dtype(hidden: torch.Tensor, head: LMHead) -> torch.dtype | None:
    """float32 with head.fp32_head, else autocast's dtype where it is on, else None.

    float64 inputs are not cast, as in torch's own products.
    """
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
    """The factors in `dtype`, but for those in float32, which are used as they are."""
    if lora is None:
        return None
    a, b = (x if x.dtype == torch.float32 else x.to(dtype) for x in lora[:2])
    return LoRA(a, b, lora.scale)
