"""`@operator`: a function of structures of tensors that is plain in eager mode and opaque to torch.compile.

torch.compile must not look into the schedules: they would become thousands of nodes of its graph, and our Triton kernels are
launched as they are. So it needs operators of torch.library, which take tensors and numbers one by one and return tensors.

Eager calls gain nothing from an operator, and one that mutates costs the host 46 to 132 us for 8 to 19 arguments (torch 2.13,
one core of a Xeon). So they go straight to the function:

    eager                           the function itself
    torch.compile, fake tensors     torch.ops.fastpg.<name>: arguments are taken apart, a result of None is an empty tensor
    eager, gradients enabled        the same: an operator has no derivative, and raises when one is asked for

Structures are NamedTuples of tensors, None, numbers and structures. The operator's schema is made of their annotations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch._subclasses.fake_tensor import FakeTensor

_SCHEMA_TYPES = {torch.Tensor: "Tensor", bool: "bool", int: "SymInt", float: "float", str: "str"}


def is_opaque(x: torch.Tensor) -> bool:
    """Whether a call with x goes through torch.library."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or isinstance(x, FakeTensor)


def operator(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """fake: takes the same arguments and returns results of the right shapes and dtypes, without work.
    mutates: names of the arguments that the function writes to.

    The first argument is a tensor, or a structure that begins with one. Results are tensors, None, or a NamedTuple of them.
    """

    def decorate(function: Callable) -> Callable:
        op, put_together = _registered(function, fake, mutates)

        @functools.wraps(function)
        def call(*arguments):
            if not is_opaque(_first(arguments)):
                return function(*arguments)
            results = op(*_leaves(arguments))
            # the fake results are the template: they are None where the results are, and their tensors are not used
            return put_together(fake(*arguments), results)

        call.registered, call.leaves = op, lambda *arguments: tuple(_leaves(arguments))  # for opcheck
        return call

    return decorate


def _registered(function: Callable, fake: Callable, mutates: tuple[str, ...]) -> tuple[Callable, Callable]:
    hints = get_type_hints(function)
    result = hints.pop("return")
    parameters = [leaf for name, hint in hints.items() for leaf in _parameters(name, hint, name in mutates)]
    parameters = [(name, text.replace("!", f"a{i}!")) for i, (name, text) in enumerate(parameters)]
    count = _count(result)
    returns = f"({', '.join(['Tensor'] * count)})" if count != 1 else "Tensor"

    def flat(run: Callable) -> Callable:
        def body(*leaves):
            rest = iter(leaves)
            arguments = [_built(hint, rest) for hint in hints.values()]
            found = _leaves((run(*arguments),)) if count else run(*arguments)
            if not count:
                return None
            like = next(x for x in leaves if isinstance(x, torch.Tensor))
            tensors = [like.new_empty(0) if x is None else x for x in found]
            return tensors[0] if count == 1 else tuple(tensors)

        return body

    schema = f"({', '.join(text for _, text in parameters)}) -> {returns}"
    written = [name for name, text in parameters if "!" in text]
    op = torch.library.custom_op(f"fastpg::{function.__name__}", flat(function), mutates_args=written, schema=schema)
    op.register_fake(flat(fake))

    def put_together(template: Any, results: Any) -> Any:
        if not count:
            return None
        rest = iter((results,) if count == 1 else results)
        return _like(template, rest)

    return op, put_together


def _parameters(name: str, hint: Any, is_written: bool) -> list[tuple[str, str]]:
    """(name, declaration in the schema) of each leaf of one argument: the tensors and numbers that it is made of."""
    kind, optional = _without_none(hint)
    if kind in _SCHEMA_TYPES:
        alias = "(!)" if is_written and kind is torch.Tensor else ""
        return [(name, f"{_SCHEMA_TYPES[kind]}{alias}{'?' if optional else ''} {name}")]
    fields = get_type_hints(kind)
    return [leaf for field, hint in fields.items() for leaf in _parameters(f"{name}_{field}", hint, is_written)]


def _count(hint: Any) -> int:
    """The number of leaves of a result."""
    kind, _ = _without_none(hint)
    if kind is type(None):
        return 0
    if kind is torch.Tensor:
        return 1
    return sum(_count(field) for field in get_type_hints(kind).values())


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, UnionType):
        (kind,) = (x for x in get_args(hint) if x is not type(None))
        return kind, True
    return hint, False


def _built(hint: Any, leaves: Iterator) -> Any:
    kind, _ = _without_none(hint)
    if kind in _SCHEMA_TYPES:
        return next(leaves)
    return kind(*(_built(field, leaves) for field in get_type_hints(kind).values()))


def _leaves(x: tuple) -> list:
    found: list = []
    for item in x:
        if isinstance(item, tuple):
            found += _leaves(item)
        else:
            found.append(item)
    return found


def _first(x: Any) -> Any:
    return _first(x[0]) if isinstance(x, tuple) else x


def _like(template: Any, leaves: Iterator) -> Any:
    """A structure of the template's form: a leaf where the template has a tensor, None where it has None."""
    if not isinstance(template, tuple):
        leaf = next(leaves)
        return None if template is None else leaf
    return type(template)(*(_like(item, leaves) for item in template))
