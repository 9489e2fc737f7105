"""The rows of a call: which tokens are computed, and how chunks of them reach the tile ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..tiles.products import WIDENED_ROWS, accumulation_dtype, dense
from ..tiles.structures import Chunk
from .lora import lora_hidden

if TYPE_CHECKING:
    from .call import Counted, Inputs


def part(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """x[start:stop]; x itself where that is all of it, as a slice is an operation of torch's, which the host pays for."""
    return x if start == 0 and stop == x.shape[0] else x[start:stop]


# rows that are moved at a time: few, so that the copy is small
_MOVED = 16


def move_rows(x: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Makes the `count` chosen rows of x (C, ...) its first ones, in place. Returns which row is where, (count,).

    As few as possible move: chosen rows behind the first `count` take the places of those before that are not chosen.
    """
    empty, later = (~chosen[:count]).nonzero()[:, 0], chosen[count:].nonzero()[:, 0] + count
    for start in range(0, len(empty), _MOVED):
        span = slice(start, start + _MOVED)
        x[empty[span]] = x[later[span]]
    return torch.arange(count, device=x.device).index_copy_(0, empty, later)


class Rows(NamedTuple):
    """The K rows of hidden (N, H) that a call computes.

    Either `indices` (K,) gathers them, or all rows are computed (K = N) and those with `masked` (N,) True enter as zeros.
    """

    hidden: torch.Tensor  # (N, H)
    lora_hidden: torch.Tensor | None  # (N, r) in the accumulation dtype: scale * hidden @ A^T, of a head with LoRA
    indices: torch.Tensor | None  # (K,) int64
    masked: torch.Tensor | None  # (N,) bool
    tokens: torch.Tensor  # (K,) int64
    temperature: torch.Tensor | None  # (K,) in the accumulation dtype; None is 1
    allowed: torch.Tensor | None = None  # (K, ceil(V / 8)) uint8: the columns of each row's softmax, as in `Chunk`; None: all

    def chunk(self, start: int, stop: int, dtype: torch.dtype, multiple: int = 1) -> Chunk:
        """Rows [start, stop) in the operand dtype `dtype`, padded to a multiple of `multiple` rows."""
        hidden = self._gather(self.hidden, start, stop).to(dtype)
        # A transposed layout is summed in another order. Padding copies the rows, so bits would depend on whether there is any.
        hidden = dense(hidden if hidden.stride(1) == 1 else hidden.contiguous())
        lora_hidden = None if self.lora_hidden is None else self._gather(self.lora_hidden, start, stop)
        tokens = part(self.tokens, start, stop)
        temperature = None if self.temperature is None else part(self.temperature, start, stop)
        allowed = None if self.allowed is None else part(self.allowed, start, stop)
        padding = (start - stop) % multiple
        if padding:
            hidden = torch.cat([hidden, hidden.new_zeros(padding, hidden.shape[1])])
            if lora_hidden is not None:
                lora_hidden = torch.cat([lora_hidden, lora_hidden.new_zeros(padding, lora_hidden.shape[1])])
            tokens = torch.cat([tokens, tokens.new_full((padding,), -1)])
            if temperature is not None:
                temperature = torch.cat([temperature, temperature.new_ones(padding)])
            if allowed is not None:
                allowed = torch.cat([allowed, allowed.new_zeros(padding, allowed.shape[1])])
        places = None if self.indices is None else part(self.indices, start, stop)
        return Chunk(hidden, lora_hidden, tokens, None if temperature is None else temperature[:, None], places, allowed)

    def _gather(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        x = part(x, start, stop) if self.indices is None else x[part(self.indices, start, stop)]
        return x if self.masked is None else x.masked_fill(part(self.masked, start, stop)[:, None], 0)

    def select(self, positions: torch.Tensor) -> Rows:
        """The rows at `positions` among these K."""
        indices = positions if self.indices is None else self.indices[positions]
        temperature = None if self.temperature is None else self.temperature[positions]
        allowed = None if self.allowed is None else self.allowed[positions]
        return Rows(self.hidden, self.lora_hidden, indices, None, self.tokens[positions], temperature, allowed)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all tokens (...) -> those of these rows (K,), 0 where a row is masked."""
        flat = values if values.dim() == 1 else values.reshape(-1)
        if self.indices is not None:
            return flat[self.indices]
        # a copy: later changes by the caller must not reach it, and kernels read contiguous vectors
        return flat.clone(memory_format=torch.contiguous_format) if self.masked is None else flat.masked_fill(self.masked, 0)

    def read(self, values: torch.Tensor) -> torch.Tensor:
        """`of` without the zeros and the copy: for kernels, which keep nothing and let no masked value reach a result."""
        flat = values if values.dim() == 1 else values.reshape(-1)
        return flat.contiguous() if self.indices is None else flat[self.indices]

    def scatter_rounded(self, values: torch.Tensor) -> torch.Tensor:
        """`scatter` of (K, H), rounded to hidden's dtype a few rows at a time."""
        if self.indices is None and values.dtype == self.hidden.dtype:
            return values
        out = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        for start in range(0, len(values), WIDENED_ROWS):
            span = slice(start, start + WIDENED_ROWS)
            if self.indices is None:
                out[span] = values[span]
            else:
                out.index_copy_(0, self.indices[span], values[span].to(out.dtype))
        return out

    def scatter(self, values: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Values of the K rows (K, ...) -> (N, ...), `fill` where a row was not computed."""
        if self.indices is not None:
            return values.new_full((len(self.hidden), *values.shape[1:]), fill).index_copy_(0, self.indices, values)
        return values if self.masked is None else values.masked_fill(self.masked.view(-1, *(1,) * (values.dim() - 1)), fill)


def rows_of(inputs: Inputs, counted: Counted) -> Rows:
    """The rows that are computed. Where the host does not know how many, all are, those that do not count as zeros."""
    hidden, head, keep = inputs.hidden, inputs.head, counted.computed.reshape(-1)
    flat = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    low_rank = None if head.lora is None else lora_hidden(flat, keep, head.lora)
    indices = masked = None
    if counted.indices is not None:
        indices = counted.indices
    elif counted.rows is None:
        masked = ~keep
    elif counted.rows < keep.shape[0]:
        indices = torch.nonzero_static(keep, size=counted.rows)[:, 0]  # the size is known, so that nothing waits
    rows = Rows(flat, low_rank, indices, masked, inputs.tokens, None)
    own = rows.of(inputs.tokens).long()
    if head.group is not None:  # ids count from row 0 of this rank's weight
        own = own - head.vocab_start
    temperature = _per_row(rows, inputs.temperature, own.shape[0], accumulation_dtype(hidden.dtype))
    return Rows(flat, low_rank, indices, masked, own, temperature)


def _per_row(rows: Rows, temperature: float | torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Temperatures (K,), 1 where a row is masked; None where all are 1."""
    if not isinstance(temperature, torch.Tensor):
        return None if temperature == 1 else torch.full((count,), temperature, dtype=dtype, device=rows.hidden.device)
    temperature = temperature.to(dtype)
    of_rows = temperature.expand(count) if temperature.dim() == 0 else temperature.reshape(-1)
    if rows.masked is not None:
        return of_rows.masked_fill(rows.masked, 1)
    if rows.indices is None or temperature.dim() == 0:
        return of_rows.clone(memory_format=torch.contiguous_format)
    return of_rows[rows.indices]
