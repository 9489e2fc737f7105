"""Sums over sequences. A sequence is a row of (B, T), or the tokens with equal `sequence_ids` of packed (N,).

Sums of packed sequences have a fixed order and need no host read. For that, ids must be in [0, N): number sequences from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..validation import check_plain, kind, require


class Sequences(NamedTuple):
    """The kept tokens of each sequence. All methods but `count` give every token the result of its sequence, like `mask`."""

    mask: torch.Tensor  # (B, T) or (N,) bool
    ids: torch.Tensor | None  # (N,) int64 in [0, N), 0 at masked tokens; None: the rows of (B, T)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over the kept tokens of each token's sequence. Differentiable."""
        kept = torch.where(self.mask, values, 0)
        if self.ids is None:
            return kept.sum(1, keepdim=True).expand_as(kept)
        # index_put adds in a fixed order on GPUs; index_add does not
        return torch.zeros_like(kept).index_put((self.ids,), kept, accumulate=True)[self.ids]

    def lengths(self, dtype: torch.dtype) -> torch.Tensor:
        """The number of kept tokens of each token's sequence, at least 1."""
        return self.total(torch.ones_like(self.mask, dtype=dtype)).clamp(min=1)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.total(values) / self.lengths(values.dtype)

    def count(self) -> torch.Tensor:
        """The number of sequences with a kept token, () int64."""
        if self.ids is None:
            return self.mask.any(1).sum()
        tokens = torch.zeros_like(self.ids).index_put((self.ids,), self.mask.long(), accumulate=True)
        return (tokens > 0).sum()


def sequences_of(mask: torch.Tensor, sequence_ids: torch.Tensor | None) -> Sequences | None:
    """From a checked mask and ids. None for packed tokens without ids, which have no sequences.

    An id out of range, which is found where values are checked, must not make a gather read foreign memory.
    """
    if sequence_ids is not None:
        return Sequences(mask, torch.where(mask, sequence_ids, 0).long().clamp(0, max(len(mask) - 1, 0)))
    return Sequences(mask, None) if mask.dim() == 2 else None


def check_sequence_ids(sequence_ids: torch.Tensor | None, like_name: str, like: torch.Tensor) -> None:
    """Ids must be (N,) integers for packed (N,) tokens. `check_id_values` checks their range."""
    if sequence_ids is None:
        return
    check_plain("sequence_ids", sequence_ids)
    if not isinstance(sequence_ids, torch.Tensor) or sequence_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"sequence_ids must be int64 or int32; got {kind(sequence_ids)}")
    if like.dim() != 1:
        raise ValueError(
            f"sequence_ids are for packed {like_name} of shape (N,); {like_name} has shape {tuple(like.shape)}, whose rows are "
            "the sequences: leave sequence_ids out"
        )
    if sequence_ids.shape != like.shape:
        raise ValueError(
            f"sequence_ids must have the shape of {like_name}, {tuple(like.shape)}; got {tuple(sequence_ids.shape)}"
        )
    if sequence_ids.device != like.device:
        raise ValueError(f"sequence_ids is on {sequence_ids.device} but {like_name} is on {like.device}")


def check_id_values(sequence_ids: torch.Tensor, keep: torch.Tensor, count: int) -> None:
    """Ids must be in [0, count) at kept positions."""
    inside = ((sequence_ids >= 0) & (sequence_ids < count)) | ~keep
    require(
        inside,
        lambda: (
            f"sequence_ids must be in [0, {count}): number the sequences of a pack from 0; got "
            f"{sequence_ids[~inside][0].item()} at position {(~inside).nonzero()[0].item()}"
        ),
    )
