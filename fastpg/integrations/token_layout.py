"""What stands at a token, and what at the hidden state that predicts it: the state of token t - 1 predicts token t."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import validation
from ..linear.kept import Kept
from ..linear.support import Support
from ..loss.mismatch import Mismatch


class Batch(NamedTuple):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    completion_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    check: bool
    fp32_head: bool


def mask_and_targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) bool: tokens with a prediction that are asked for. (B, T): these, at the states that predict them, else -100."""
    ids, attention_mask, completion_mask, position_ids, check, _ = batch
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2:
        shape = tuple(getattr(ids, "shape", ()))
        raise TypeError(f"input_ids and labels must be integer tensors (B, T); got {validation.kind(ids)} {shape}")
    shape = tuple(ids.shape)
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(f"attention_mask must be (B, T) = {shape}, 0 for padding; got {tuple(attention_mask.shape)}")
    if attention_mask is not None and attention_mask.dtype != torch.bool and check:
        said = (
            "attention_mask must hold 0 and 1; other numbers, such as those of packed segments, are not understood: pass "
            "position_ids that begin anew in each sequence"
        )
        validation.require((attention_mask == 0) | (attention_mask == 1), lambda: said)
    validation.check_mask(completion_mask, "input_ids", ids)
    mask = torch.ones_like(ids, dtype=torch.bool) if completion_mask is None else completion_mask.clone()
    mask[:, :1] = False
    real = torch.ones_like(mask) if attention_mask is None else attention_mask != 0
    follows = real[:, 1:] & real[:, :-1]
    if position_ids is not None and position_ids.dim() == 2:
        if position_ids.shape not in (shape, (1, shape[1])):
            raise ValueError(f"position_ids must be (B, T) = {shape} or (1, T); got {tuple(position_ids.shape)}")
        next_of = position_ids.diff(dim=1) == 1
        if attention_mask is not None and check:
            said = "position_ids begin a second sequence in a row; with an attention_mask it sees the first: leave the mask out"
            validation.require(next_of | ~follows, lambda: said)
        follows = follows & next_of
    mask[:, 1:] &= follows
    return mask, ids.masked_fill(~mask, validation.IGNORED_TOKEN).roll(-1, 1)


def to_states(input_ids: torch.Tensor, name: str, value: Any) -> Any:
    """Moves values (B, T) from tokens to the hidden states that predict them. Numbers stay as they are."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.shape != input_ids.shape:
        raise ValueError(f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}; got {tuple(value.shape)}")
    return value.roll(-1, 1)


def all_to_states(input_ids: torch.Tensor, packed: bool, given: dict[str, Any]) -> list[Any]:
    """Values by name, moved to the hidden states, where packed tokens are (N,)."""
    ahead = [to_states(input_ids, name, value) for name, value in given.items()]
    return [x.flatten() if packed and isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in ahead]


def advantages_at_states(input_ids: torch.Tensor, packed: bool, advantages: Any) -> Any:
    """Advantages of tokens as `all_to_states` gives them. Those of sequences stay as they are."""
    if getattr(advantages, "shape", None) != input_ids.shape:
        return advantages
    return all_to_states(input_ids, packed, {"advantages": advantages})[0]


def to_tokens(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.roll(1, 1)


def on_device_of(x: Any, like: torch.Tensor) -> Any:
    """x on the device of `like`, where it is a tensor, a `Kept`, a `Support` or a `Mismatch`."""
    if isinstance(x, (Support, Mismatch)):
        return x.to(like.device)
    if isinstance(x, Kept):
        return x if x.mask.device == like.device else x.mask.to(like.device)
    return x.to(like.device) if isinstance(x, torch.Tensor) and x.dim() else x
