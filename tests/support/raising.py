"""What the tests of error messages share: an exact error before any work, through the public interface alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpg import (
    LinearPolicyLoss,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
    masked_mean,
    policy_loss,
    selective_logprobs,
)
from fastpg.linear.options import ModuleOptions, PolicyLossOptions

V, H = 7, 4
# the arithmetic of a model or a loss; checks compare, count and index
_WORK = re.compile(
    r"fastpg\.|aten\.((add|b|badd|)(mm|mv)|matmul|linear|dot|exp|expm1|log|log1p|logsumexp|_?(log_)?softmax|tanh|sigmoid)\."
)


class NoWork(TorchDispatchMode):
    """Fails on the first matrix product, exponential or operator of fastpg."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not _WORK.match(str(func)), f"{func} ran before the error"
        return func(*args, **(kwargs or {}))


def never(*_: torch.Tensor) -> torch.Tensor:
    """An objective that may not be called."""
    raise AssertionError("the objective was called before the error")


def said(function: Callable[[], Any], before_work: bool = True) -> str:
    """The error of a call as a traceback ends, "TypeError: its words"; or "nothing"."""
    try:
        with NoWork() if before_work else nullcontext():
            function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def module_loss(**given: Any) -> Any:
    options = {name: given.pop(name) for name in given.keys() & {"objective", *ModuleOptions.__annotations__}}
    return LinearPolicyLoss(**options)(**given)


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


ACCEPTED = {
    f: _parameters(f) for f in (linear_logprobs, linear_policy_loss, linear_cispo_loss, selective_logprobs, policy_loss)
}
ACCEPTED[linear_cispo_loss] |= {*PolicyLossOptions.__annotations__}
ACCEPTED |= {masked_mean: _parameters(masked_mean), module_loss: ACCEPTED[linear_policy_loss]}

ONE_PASS = (linear_policy_loss, linear_cispo_loss, module_loss)
LINEAR = (linear_logprobs, *ONE_PASS)


def of_shape(shape: tuple[int, ...] = (2, 3), **changes: Any) -> dict[str, Any]:
    """Inputs that fit for tokens of this shape, then the changes."""
    count = torch.Size(shape).numel()
    inputs = {
        "hidden": torch.ones(*shape, H),
        "logits": torch.ones(*shape, V),
        "logprobs": -torch.ones(shape),
        "values": torch.ones(shape),
        "head": torch.ones(V, H),
        "tokens": (torch.arange(count) % V).reshape(shape),
        "old_logprobs": -torch.ones(shape),
        "advantages": torch.ones(shape),
        "objective": never,
    }
    return inputs | changes


def accepts(function: Callable, changes: dict[str, Any]) -> bool:
    return changes.keys() - {"shape"} <= ACCEPTED[function]


def call(function: Callable, changes: dict[str, Any], **more: Any) -> Any:
    """The function on `of_shape(**changes)`, of which it takes the arguments that it has."""
    given = of_shape(**{**changes, **more})
    if function is masked_mean:
        given.setdefault("mask", torch.ones(given["values"].shape if "values" not in changes else 1, dtype=torch.bool))
    return function(**{name: value for name, value in given.items() if name in ACCEPTED[function]})


def cases(*tables: tuple[tuple[Callable, ...], dict[str, tuple]]) -> list:
    """pytest parameters (function, changes, words): each case for each function of its table that has the arguments."""
    found = []
    for functions, table in tables:
        for name, (changes, words) in table.items():
            able = [f for f in functions if accepts(f, changes)]
            assert able, name
            found += [pytest.param(f, changes, words, id=f"{name}-{f.__name__}") for f in able]
    return found
