"""A forward in the place of a model's own: on that one instance, and with a way back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

# (the model, the forward that was there before, positional arguments, keyword arguments) -> what the call returns
Answer = Callable[[nn.Module, Callable, tuple, dict[str, Any]], Any]

_MARK = "fastpg_placed"  # attribute of a forward placed here: its `Placed`


class Placed:
    """Places `answer` as the forward of `model`; `undo()` takes it back.

    Something may wrap the model's forward later, as accelerate does for mixed precision, so that it cannot be removed. It then
    passes all calls on. A copy of the model (`copy.deepcopy`) computes with its own weights, and is undone with the model.

    Args:
        beside: other modules whose attribute `forward` is to be the same.
        passes_on: whether `answer` may call the forward that was there before, with the arguments as they are. Where it does,
            another forward may be placed over this one.
    """

    def __init__(self, model: nn.Module, answer: Answer, beside: Sequence[nn.Module] = (), passes_on: bool = False) -> None:
        self.on, self.passes_on = True, passes_on
        below = model.forward
        of_class = below.__func__ if getattr(below, "__self__", None) is model else None

        @functools.wraps(getattr(below, "__func__", below))  # `generate` and trainers read the model's arguments from it
        def forward(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before = below if of_class is None else functools.partial(of_class, this)
            return answer(this, before, args, kwargs) if self.on else before(*args, **kwargs)

        setattr(forward, _MARK, self)
        self.model, self.forward = model, types.MethodType(forward, model)
        self._before = [(holder, vars(holder).get("forward")) for holder in (model, *beside)]
        for holder, _ in self._before:
            holder.forward = self.forward

    def undo(self) -> None:
        """Further calls do nothing."""
        self.on = False
        for holder, before in self._before:
            if vars(holder).get("forward") is not self.forward:
                continue
            del holder.forward
            if before is not None:
                holder.forward = before
        self._before = []


def layers(forward: Any) -> Iterator[Any]:
    """The function and the functions it wraps, outermost first."""
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def placed_on(forward: Any) -> list[Placed]:
    """What is placed in this forward, inside any wrapper, and was not undone."""
    found = [vars(layer).get(_MARK) for layer in layers(forward) if hasattr(layer, "__dict__")]
    return [placed for placed in found if placed is not None and placed.on]
