"""What schedules and tiles hand to one another: tensors and numbers that belong together, each built once and passed whole."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Head(NamedTuple):
    """What the schedules and tile ops know of a head: its logits are softcap(logit_scale * (x . w + z . b + bias)).

    z (r numbers per token, in the accumulation dtype) is scale * A x, computed before; see `lora`.
    """

    weight: torch.Tensor  # (V, H)
    lora_weight: torch.Tensor | None  # (V, r): B
    bias: torch.Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float


def lora_rank(head: Head) -> int:
    """r, or 0. A function, as sizes are read from the weight: Dynamo of torch 2.9 cannot trace properties of a NamedTuple."""
    return 0 if head.lora_weight is None else head.lora_weight.shape[1]


class Chunk(NamedTuple):
    """C rows of a call, ready to be multiplied. Padding rows are zeros with token -1 and temperature 1."""

    hidden: torch.Tensor  # (C, H) in the operand dtype
    lora_hidden: torch.Tensor | None  # (C, r) in the accumulation dtype
    tokens: torch.Tensor  # (C,) int64
    temperature: torch.Tensor | None  # (C, 1) in the accumulation dtype; None is 1


class TileShape(NamedTuple):
    rows: int  # tokens; chunks are as long as a number of these
    columns: int  # vocabulary entries
    padding: int  # chunks of a forward pass are padded to a multiple of this many rows
    longest: int  # rows of a chunk of the two-pass schedule; longer ones gain nothing


class Partials(NamedTuple):
    """What one pass over some columns leaves of each row, (C,) in the accumulation dtype: over the columns v != y,

    m = max z_v, s = sum exp(z_v - m), q = sum exp(z_v - m) (z_v - m) (None unless an entropy is wanted), and z_y.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor | None
    target: torch.Tensor  # NaN for a token that is not among the columns


class RowStatistics(NamedTuple):
    """What is known of each row after a pass over all columns; all (C,) in the accumulation dtype. Defined in `finish_rows`."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    t: torch.Tensor
    logsumexp: torch.Tensor
    others_entropy: torch.Tensor | None

    def select(self, rows: slice) -> RowStatistics:
        return RowStatistics(*(None if x is None else x[rows] for x in self))


class Incoming(NamedTuple):
    """Incoming gradients of rows, (C,) each."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None

    def select(self, rows: slice) -> Incoming:
        return Incoming(self.logprobs[rows], None if self.entropy is None else self.entropy[rows])


class Target(NamedTuple):
    """Of each row's own token, (C,) each."""

    logit: torch.Tensor  # z_y; NaN for a token that is not among the columns
    slope: torch.Tensor | None  # the softcap's slope there; None without one: 1


class RowSums(NamedTuple):
    """Anchored sums of rows: S and Q (C,), Q None unless an entropy is wanted, and what rounding took from the rows of E."""

    total: torch.Tensor
    weighted: torch.Tensor | None
    residual: torch.Tensor | None  # of the rows that are stored; None where E is not rounded


class LossRows(NamedTuple):
    """Rows with their loss, (C,) each."""

    logprobs: torch.Tensor
    losses: torch.Tensor
    entropy: torch.Tensor | None
    factor: torch.Tensor | None  # u; None where no gradient is wanted
    state: torch.Tensor  # int8: 0 in range, 1 the factor is not, 2 the sum is not
    residual: torch.Tensor | None  # as in RowSums


class ReadyLogits(NamedTuple):
    """Ready logits (N, V), and what belongs to their rows."""

    logits: torch.Tensor
    tokens: torch.Tensor  # (N,) int64
    temperature: torch.Tensor | None  # (N, 1) in the accumulation dtype; None is 1
    keep: torch.Tensor  # (N,) bool


class Wanted(NamedTuple):
    """Which gradients a call computes."""

    hidden: bool
    lora_hidden: bool
    weight: bool
    lora_weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Each in its input's shape and dtype; None where not wanted."""

    hidden: torch.Tensor | None
    lora_hidden: torch.Tensor | None
    weight: torch.Tensor | None
    lora_weight: torch.Tensor | None
    bias: torch.Tensor | None
