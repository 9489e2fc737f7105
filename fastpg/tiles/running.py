"""Further statistics of rows in PyTorch, as running values that every tile of logits updates."""

from __future__ import annotations

import torch

from .row_statistics import largest_of
from .structures import Asked, FurtherPartials, largest_kept


def of_no_column(asked: Asked, count: int, dtype: torch.dtype, device: torch.device) -> FurtherPartials:
    """The values of `count` rows before the first tile. `squares` is sum exp(2 (z_v - m)) here, as s is sum exp(z_v - m)."""

    def zeros(present: bool, dtype: torch.dtype = dtype) -> torch.Tensor | None:
        return torch.zeros(count, dtype=dtype, device=device) if present else None

    values = ids = None
    if largest_kept(asked):
        ids = torch.zeros(count, largest_kept(asked), dtype=torch.int64, device=device)
        values = torch.full_like(ids, -torch.inf, dtype=dtype)
    return FurtherPartials(values, ids, zeros(asked.mean), zeros(asked.squares), zeros(asked.rank, torch.int64))


def add_columns(further: FurtherPartials, block: slice, start: int, z: torch.Tensor, outside: torch.Tensor | None) -> None:
    """Adds a tile of logits, rows `block` and the columns from `start` on, the target's own among them; z stays as it is.

    Logits `outside` the rows' supports are -inf; None: there are none.
    """
    if further.sum is not None:
        further.sum[block] += (z if outside is None else z.masked_fill(outside, 0)).sum(1)
    if further.ids is None:
        return
    count = further.ids.shape[1]
    values, ids = _largest(z, min(count, z.shape[1]))
    ids = ids + start
    if start:  # the first tile has at least as many columns as are kept
        values, ids = largest_of(torch.cat([further.values[block], values], 1), torch.cat([further.ids[block], ids], 1), count)
    further.values[block], further.ids[block] = values, ids


def count_above(further: FurtherPartials, block: slice, z: torch.Tensor, target: torch.Tensor) -> None:
    """Counts the columns of a tile with z_v > z_y; the target's own holds -inf."""
    if further.above is not None:
        further.above[block] += (z > target[block, None]).sum(1, dtype=torch.int32)  # it is widened to that first


def closed(further: FurtherPartials, total: torch.Tensor) -> FurtherPartials:
    """After the last tile: `squares` as `FurtherPartials` defines it, from that sum and s."""
    if further.squares is None:
        return further
    squares = torch.where(total == 0, 0, further.squares.log() - 2 * total.log())
    return FurtherPartials(further.values, further.ids, further.sum, squares, further.above)


def _largest(z: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of z (C, n) in descending order, with their places; of equal ones the first. (`topk` takes any.)"""
    if count == 1:
        return z.max(1, keepdim=True)
    left = z.clamp(min=torch.finfo(z.dtype).min)  # -inf marks what has been taken
    places = []
    for _ in range(count):
        places.append(left.max(1, keepdim=True).indices)
        left.scatter_(1, places[-1], -torch.inf)
    places = torch.cat(places, 1)
    return z.gather(1, places), places
