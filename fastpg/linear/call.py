"""The start of every call, in both schedules: checks, casts, and which tokens count."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from .. import validation
from ..distributed.dtensor import local_hidden, localized
from ..lm_head import LMHead, LoRA, as_head
from ..tiles.backend import choose_backend
from ..tiles.host_read import HostRead
from ..tiles.structures import Head, TokenInputs, Wanted
from . import operators
from .kept import Kept, check_kept, raise_for_rows
from .rows import Rows
from .support import Support, check_sets, check_support


class Inputs(NamedTuple):
    """Checked arguments, in the dtype that the call computes in."""

    hidden: torch.Tensor  # (..., H)
    head: LMHead  # this rank's rows of the weight
    tokens: torch.Tensor  # (...)
    mask: torch.Tensor | Kept | None  # (...)
    temperature: float | torch.Tensor  # number or (...)
    backend: str
    host_reads: bool  # True: values are checked and rows skipped, for which the host waits; False: it never does


def prepare(
    hidden: torch.Tensor,
    head: torch.Tensor | LMHead,
    tokens: torch.Tensor,
    mask: torch.Tensor | Kept | None,
    temperature: float | torch.Tensor,
    backend: str | None,
    check: bool,
) -> Inputs:
    """The arguments, checked and cast.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices. `counted` checks values.
    """
    hidden = local_hidden(hidden)
    head = localized(as_head(head))
    hidden, head = _cast(hidden, head)
    is_kept = isinstance(mask, Kept)
    validation.check_linear_inputs(hidden, head, tokens, mask.mask if is_kept else mask, temperature)
    if is_kept:
        check_kept(mask, tokens)
    return Inputs(hidden, head, tokens, mask, temperature, choose_backend(backend, hidden), check)


def skips_silenced(skip_silenced: bool | None, inputs: Inputs) -> bool:
    """Whether rows without a gradient leave the products of the gradients. None: where the host knows their number anyway."""
    if skip_silenced is not None and not isinstance(skip_silenced, bool):
        raise TypeError(f"skip_silenced must be True, False or None; got {skip_silenced!r}")
    if skip_silenced and not inputs.host_reads:
        raise ValueError("skip_silenced=True needs check=True: the host reads how many rows are left")
    is_free = inputs.host_reads and inputs.hidden.device.type == "cpu" and inputs.backend == "torch"
    return is_free if skip_silenced is None else skip_silenced


class Counted(NamedTuple):
    """Which tokens count, and which of them are computed: all, unless some add exactly 0 to a loss."""

    keep: torch.Tensor  # (...) bool: tokens that count
    computed: torch.Tensor  # (...) bool; `keep` itself where it is the same
    numbers: torch.Tensor  # int64: how many, first of `keep` and then of `computed`
    rows: int | None  # the second of them, where the host knows it
    indices: torch.Tensor | None  # (rows,) int64, where they were given
    check: Callable[[], None]  # raises for values out of range, if that has not been done: it waits for the device


def counted(
    inputs: Inputs,
    advantages: torch.Tensor | None = None,
    rollout_weights: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    support: Support | None = None,
) -> Counted:
    """The tokens that count. With advantages (...), those that add exactly 0 to the loss are not computed (`torch_tiles.keep`).

    With `inputs.host_reads` the host waits for six numbers. Raises ValueError where they say that a token that counts is
    outside the vocabulary, or that its temperature is not a positive number. With a `Kept`, on a GPU, the host need not wait
    yet: it does in `Counted.check`, unless ranks have to agree on the outcome. The sets of a support are checked too.
    """
    tokens, temperature, head, reads = inputs.tokens, inputs.temperature, inputs.head, inputs.host_reads
    rows = inputs.mask if isinstance(inputs.mask, Kept) else None
    mask, indices = (inputs.mask, None) if rows is None else rows[:2]
    vocab = head.vocab_size if reads and head.group is None else None
    checked = temperature if reads and isinstance(temperature, torch.Tensor) else None
    given = TokenInputs(tokens, mask, checked, advantages, rollout_weights, old_logprobs, weight, indices, vocab)
    with torch.no_grad():
        found = operators.keep(given, inputs.backend)
        if support is not None:
            check_support(support, tokens)
            if reads:
                check_sets(support, found.keep, tokens, vocab)
    count, check = None if rows is None else len(indices), _nothing
    if reads:
        check = partial(_check_numbers, HostRead(found.numbers), given, found.keep, temperature, rows)
        if rows is None or head.group is not None or _reading_is_free(tokens):
            count, check = check(), _nothing
    computed = found.keep if found.computed is None else found.computed
    if rows is not None:
        indices = indices.clamp(0, max(tokens.numel() - 1, 0))  # they may not have been checked
        if rows.skips:
            computed = torch.zeros_like(found.keep).view(-1).index_fill(0, indices, True).view(found.keep.shape)
    return Counted(found.keep, computed, found.numbers, count, indices, check)


def _nothing() -> None:
    pass


def _reading_is_free(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def _check_numbers(
    read: HostRead, given: TokenInputs, keep: torch.Tensor, temperature: float | torch.Tensor, rows: Kept | None
) -> int:
    """Waits for the numbers of `keep`; raises ValueError for those that must be 0; returns the number of computed rows."""
    _, count, foreign, improper, misplaced, missing = read.read()
    if foreign or improper:
        validation.check_values(given.tokens, keep, given.vocab, temperature)
    if misplaced or missing:
        raise_for_rows(rows, given.tokens, misplaced, missing)
    return count


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
    # (not by `_replace`, which takes the host longer)
    rows, head = Rows(hidden, lora_hidden, *call.rows[2:]), Head(weight, lora_weight, bias, *call.head[3:])
    return type(call)(rows, head, *call[2:])


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


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which autocast is off. Where it is off already nothing is entered, which saves the host's time."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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
