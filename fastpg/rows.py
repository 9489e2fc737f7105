"""The rows of a call: which tokens are computed, and how chunks of them reach the tile ops."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .lm_head import LMHead
from .lora import lora_hidden
from .products import accumulation_dtype, dense

_ROUNDED_ROWS = 512


class Chunk(NamedTuple):
    """C rows of a call, ready to be multiplied. Padding rows are zeros with token -1 and temperature 1."""

    hidden: torch.Tensor  # (C, H) in the operand dtype
    lora_hidden: torch.Tensor | None  # (C, r) in the accumulation dtype
    tokens: torch.Tensor  # (C,) int64
    temperature: torch.Tensor | None  # (C, 1) in the accumulation dtype; None is 1


class Rows(NamedTuple):
    """The K rows of hidden (N, H) that a call computes.

    Either `indices` (K,) gathers them, or all rows are computed (K = N) and those with `keep` (N,) False enter as zeros.
    """

    hidden: torch.Tensor  # (N, H)
    lora_hidden: torch.Tensor | None  # (N, r) in the accumulation dtype: scale * hidden @ A^T, of a head with LoRA
    indices: torch.Tensor | None  # (K,) int64
    keep: torch.Tensor | None  # (N,) bool
    tokens: torch.Tensor  # (K,) int64
    temperature: torch.Tensor | None  # (K,) in the accumulation dtype; None is 1

    def chunk(self, start: int, stop: int, dtype: torch.dtype, multiple: int = 1) -> Chunk:
        """Rows [start, stop) in the operand dtype `dtype`, padded to a multiple of `multiple` rows."""
        hidden = self._gather(self.hidden, start, stop).to(dtype)
        # columns side by side would be summed in another order, and bits would depend on whether the chunk is padded
        hidden = dense(hidden if hidden.stride(1) == 1 else hidden.contiguous())
        lora_hidden = None if self.lora_hidden is None else self._gather(self.lora_hidden, start, stop)
        tokens = self.tokens[start:stop]
        temperature = None if self.temperature is None else self.temperature[start:stop]
        padding = (start - stop) % multiple
        if padding:
            hidden = torch.cat([hidden, hidden.new_zeros(padding, hidden.shape[1])])
            if lora_hidden is not None:
                lora_hidden = torch.cat([lora_hidden, lora_hidden.new_zeros(padding, lora_hidden.shape[1])])
            tokens = torch.cat([tokens, tokens.new_full((padding,), -1)])
            if temperature is not None:
                temperature = torch.cat([temperature, temperature.new_ones(padding)])
        return Chunk(hidden, lora_hidden, tokens, None if temperature is None else temperature[:, None])

    def _gather(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        x = x[start:stop] if self.indices is None else x[self.indices[start:stop]]
        return x if self.keep is None else torch.where(self.keep[start:stop, None], x, 0)

    def select(self, positions: torch.Tensor) -> Rows:
        """The rows at `positions` among these K."""
        indices = positions if self.indices is None else self.indices[positions]
        temperature = None if self.temperature is None else self.temperature[positions]
        return Rows(self.hidden, self.lora_hidden, indices, None, self.tokens[positions], temperature)

    def scatter_rounded(self, values: torch.Tensor) -> torch.Tensor:
        """`scatter` of (K, H), rounded to the dtype of hidden a few rows at a time."""
        if self.indices is None and values.dtype == self.hidden.dtype:
            return values
        out = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        for start in range(0, len(values), _ROUNDED_ROWS):
            part = slice(start, start + _ROUNDED_ROWS)
            if self.indices is None:
                out[part] = values[part]
            else:
                out.index_copy_(0, self.indices[part], values[part].to(out.dtype))
        return out

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the K rows (K, ...) -> (N, ...), 0 where a row was not computed."""
        if self.indices is not None:
            return values.new_zeros(len(self.hidden), *values.shape[1:]).index_copy(0, self.indices, values)
        return values if self.keep is None else torch.where(self.keep.view(-1, *(1,) * (values.dim() - 1)), values, 0)


def rows_of(
    hidden: torch.Tensor,  # (..., H)
    tokens: torch.Tensor,  # (...)
    computed: torch.Tensor,  # (...) bool
    temperature: float | torch.Tensor,  # number or (...)
    gather: bool,
    head: LMHead,
) -> Rows:
    """From checked inputs. With `gather`, one host read finds the rows to compute; without, every row is."""
    flat_hidden, flat = hidden.reshape(-1, hidden.shape[-1]), computed.reshape(-1)
    flat_tokens = torch.where(computed, tokens, 0).reshape(-1).long()
    if head.group is not None:  # as this rank numbers its own
        flat_tokens = flat_tokens - head.vocab_start
    dtype = accumulation_dtype(hidden.dtype)
    low_rank = None if head.lora is None else lora_hidden(flat_hidden, flat, head.lora)
    per_row = None
    if isinstance(temperature, torch.Tensor):
        per_row = torch.where(computed, temperature.to(dtype), 1).reshape(-1)
    elif temperature != 1:
        per_row = torch.full((len(flat),), temperature, dtype=dtype, device=hidden.device)
    if not gather:
        return Rows(flat_hidden, low_rank, None, flat, flat_tokens, per_row)
    every = Rows(flat_hidden, low_rank, None, None, flat_tokens, per_row)
    indices = flat.nonzero()[:, 0]
    return every if len(indices) == len(flat) else every.select(indices)


class Wanted(NamedTuple):
    """Which gradients a call computes."""

    hidden: bool
    lora_hidden: bool
    weight: bool
    lora_weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Each in its input's shape and dtype; empty (0,) where not wanted."""

    hidden: torch.Tensor
    lora_hidden: torch.Tensor
    weight: torch.Tensor
    lora_weight: torch.Tensor
    bias: torch.Tensor
