"""The rows of a call: which tokens are computed, and how chunks of them reach the tile ops."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .products import accumulation_dtype


class Chunk(NamedTuple):
    """C rows of a call, ready to be multiplied. Padding rows are zeros with token -1 and temperature 1."""

    hidden: torch.Tensor  # (C, H) in the operand dtype
    tokens: torch.Tensor  # (C,) int64
    temperature: torch.Tensor | None  # (C, 1) in the accumulation dtype; None is 1


class Rows(NamedTuple):
    """The K rows of hidden (N, H) that a call computes.

    Either `indices` (K,) gathers them, or all rows are computed (K = N) and those with `keep` (N,) False enter as zeros.
    """

    hidden: torch.Tensor  # (N, H)
    indices: torch.Tensor | None  # (K,) int64
    keep: torch.Tensor | None  # (N,) bool
    tokens: torch.Tensor  # (K,) int64
    temperature: torch.Tensor | None  # (K,) in the accumulation dtype; None is 1

    def chunk(self, start: int, stop: int, dtype: torch.dtype, multiple: int = 1) -> Chunk:
        """Rows [start, stop) in the operand dtype `dtype`, padded to a multiple of `multiple` rows."""
        hidden = self.hidden[start:stop] if self.indices is None else self.hidden[self.indices[start:stop]]
        if self.keep is not None:
            hidden = torch.where(self.keep[start:stop, None], hidden, 0)
        hidden = hidden.to(dtype)
        tokens = self.tokens[start:stop]
        temperature = None if self.temperature is None else self.temperature[start:stop]
        padding = (start - stop) % multiple
        if padding:
            hidden = torch.cat([hidden, hidden.new_zeros(padding, hidden.shape[1])])
            tokens = torch.cat([tokens, tokens.new_full((padding,), -1)])
            if temperature is not None:
                temperature = torch.cat([temperature, temperature.new_ones(padding)])
        return Chunk(hidden, tokens, None if temperature is None else temperature[:, None])

    def select(self, positions: torch.Tensor) -> Rows:
        """The rows at `positions` among these K."""
        indices = positions if self.indices is None else self.indices[positions]
        temperature = None if self.temperature is None else self.temperature[positions]
        return Rows(self.hidden, indices, None, self.tokens[positions], temperature)

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the K rows (K,) -> (N,), 0 where a row was not computed."""
        if self.indices is not None:
            return values.new_zeros(len(self.hidden)).index_copy(0, self.indices, values)
        return values if self.keep is None else torch.where(self.keep, values, 0)


def rows_of(
    hidden: torch.Tensor,  # (..., H)
    tokens: torch.Tensor,  # (...)
    computed: torch.Tensor,  # (...) bool
    temperature: float | torch.Tensor,  # number or (...)
    gather: bool,
) -> Rows:
    """From checked inputs. With `gather`, one host read finds the rows to compute; without, every row is."""
    flat_hidden, flat = hidden.reshape(-1, hidden.shape[-1]), computed.reshape(-1)
    flat_tokens = torch.where(computed, tokens, 0).reshape(-1).long()
    dtype = accumulation_dtype(hidden.dtype)
    per_row = None
    if isinstance(temperature, torch.Tensor):
        per_row = torch.where(computed, temperature.to(dtype), 1).reshape(-1)
    elif temperature != 1:
        per_row = torch.full((len(flat),), temperature, dtype=dtype, device=hidden.device)
    if not gather:
        return Rows(flat_hidden, None, flat, flat_tokens, per_row)
    every = Rows(flat_hidden, None, None, flat_tokens, per_row)
    indices = flat.nonzero()[:, 0]
    return every if len(indices) == len(flat) else every.select(indices)


class Wanted(NamedTuple):
    """Which gradients a call computes."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Each in its input's shape and dtype; empty (0,) where not wanted."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
