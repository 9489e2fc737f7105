"""Checks of the estimators' arguments, and which rewards count."""

from __future__ import annotations

import numbers
from collections.abc import Hashable, Sequence
from typing import Literal

import torch

from ..validation import check_mask, kind, require

OnSingleton = Literal["zero", "raise"]
OnNaN = Literal["propagate", "raise", "ignore"]


def real(name: str, value: torch.Tensor, like_name: str = "", like: torch.Tensor | None = None) -> torch.Tensor:
    """The value as a constant: float64 stays, all else becomes float32. Checks that it has the shape of `like`, if given."""
    if not isinstance(value, torch.Tensor) or value.is_complex():
        raise TypeError(f"{name} must be a tensor of real numbers; got {kind(value)}")
    if like is not None:
        check_like(name, value, like_name, like)
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def check_like(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor, same_shape: bool = True) -> None:
    if same_shape and value.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {like_name}, {tuple(like.shape)}; got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}")


def check_ids(name: str, ids: torch.Tensor, like_name: str = "", like: torch.Tensor | None = None) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} must be a tensor of integers; got {kind(ids)}")
    if like is not None:
        if like.dim() != 1:
            raise ValueError(f"{like_name} must be (n,) where {name} are, one number per id; got shape {tuple(like.shape)}")
        check_like(name, ids, like_name, like)


def check_layout(name: str, like: torch.Tensor, mask: torch.Tensor | None, sequence_ids: torch.Tensor | None) -> None:
    check_mask(mask, name, like)
    if sequence_ids is not None:
        check_ids("sequence_ids", sequence_ids, name, like)
    elif like.dim() != 2:
        raise ValueError(f"{name} must be (B, T), or packed (N,) with sequence_ids= (N,); got shape {tuple(like.shape)} alone")


def check_numbers(most: float, **given: float) -> None:
    for name, value in given.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"{name} must be a number {'in [0, 1]' if most == 1 else '>= 0 and finite'}; got {value!r}")


def check_options(singleton: OnSingleton = "zero", nan: OnNaN = "propagate", **flags: bool) -> None:
    options = {"singleton": (singleton, "zero", "raise"), "nan": (nan, "propagate", "raise", "ignore")}
    for name, (value, *choices) in (options | {name: (flag, True, False) for name, flag in flags.items()}).items():
        if type(value) is not type(choices[0]) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_scored(name: str, kept: torch.Tensor) -> None:
    some = ~kept.isnan().all() | (kept.numel() == 0)
    require(some, lambda: f"{name} must not all be NaN: nothing was scored. Check the reward function, or skip this batch")


def which_count(name: str, rewards: torch.Tensor, mask: torch.Tensor | None, nan: OnNaN) -> torch.Tensor:
    """A bool tensor like rewards: which of them enter the statistics."""
    keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    check_scored(name, rewards[keep])
    scored = ~rewards.isnan()
    if nan == "raise":
        holds = scored | ~keep
        remedy = 'give it a number, or take nan="ignore" to leave it out'
        require(holds, lambda: f"{name} must not be NaN; it is at {tuple((~holds).nonzero()[0].tolist())}: {remedy}")
    return keep & scored if nan == "ignore" else keep


def check_keys(keys: Sequence[Hashable], count: int) -> None:
    if isinstance(keys, torch.Tensor) or not hasattr(keys, "__len__"):
        raise TypeError(f"anchor_keys must be a sequence of hashable keys, such as a list of strings; got {kind(keys)}")
    if len(keys) != count:
        raise ValueError(f"anchor_keys must have one key per step, {count} as in step_rewards; got {len(keys)}")
    for i, key in enumerate(keys):
        try:
            usable = hash(key) is not None and not isinstance(key, torch.Tensor)  # tensors hash by identity: never equal
        except TypeError:
            usable = False
        if not usable:
            raise TypeError(f"anchor_keys must be hashable by value (tuples, .tobytes()); got {type(key).__name__} at {i}")


def places_of(episode_ids: torch.Tensor, episodes: torch.Tensor | None, episode_rewards: torch.Tensor) -> torch.Tensor:
    """The index in episode_rewards of each step's episode."""
    places = torch.arange(len(episode_rewards), device=episode_rewards.device)
    episodes = places if episodes is None else episodes
    check_ids("episodes", episodes, "episode_rewards", episode_rewards)
    names, inverse = torch.unique(torch.cat([episodes.long(), episode_ids.long()]), return_inverse=True)
    place_of = torch.full_like(names, -1)
    place_of[inverse[: len(places)]] = places
    found = place_of[inverse[len(places) :]]
    require((place_of >= 0).sum() == len(places), lambda: "episodes must list every id once; got one twice")
    wanted = f"in episodes= (by default 0 to {len(places) - 1}, places in episode_rewards)"
    require(found >= 0, lambda: f"episode_ids must be {wanted}; got {episode_ids[found < 0][0].item()}")
    return found
