"""Vocab-parallel heads: what crosses ranks, and how it is added up.

A vocab-parallel call is made by every rank of `head.group` with the same hidden states and tokens, and its own rows of the
weight. Of a row of logits only these numbers cross ranks (C rows, in rank order, so that every rank has equal bits):

    one pass    z_y of the rank that has the token, then the sums S (and Q for an entropy), and at the end the sum of dX
    two passes  m, s, q, z_y of each rank's columns, and in backward the sum of dX

The gradient of hidden is complete on every rank when backward returns: no further all-reduce belongs behind it (Megatron's
`copy_to_tensor_model_parallel_region` would double it). Gradients of weight, bias and B are those of the rank's own rows.

Nothing collective is hidden inside a loss apart from that. DISTRIBUTED.md has the bytes and the memory.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..kernels.limits import EXP_IS_ZERO
from ..tiles.structures import Partials

# torch may be built without it
Group = dist.ProcessGroup | None if dist.is_available() else None


def gathered(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(...) of each rank -> (ranks, ...), in rank order: the same bits on every rank, whatever is computed from them."""
    values = values.contiguous()
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    if values.numel():
        dist.all_gather(everyone, values, group=group)
    return torch.stack(everyone)


def sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum in rank order, of vectors; large tensors take `dist.all_reduce`."""
    return gathered(values, group).sum(0)


def all_reduced(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over ranks, in place."""
    if values.numel():
        dist.all_reduce(values, group=group)
    return values


def on_the_owner(values: torch.Tensor, tokens: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """values (C, ...) of the one rank whose columns [0, vocab_size) have the token (C,); NaN where none or several have it."""
    inside = (tokens >= 0) & (tokens < vocab_size)
    columns = values if values.dim() == 2 else values[:, None]
    mine = torch.cat([torch.where(inside[:, None], columns, 0), inside[:, None].to(values.dtype)], 1)
    total = sum_over_ranks(mine, group)
    return torch.where(total[:, -1:] == 1, total[:, :-1], torch.nan).view_as(values)


def combine(partials: Partials, tokens: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> Partials:
    """The partials over all ranks' columns: m the largest, s and q moved to it and added in rank order, z_y the owner's."""
    maximum, total, weighted, target = partials
    maxima, totals = gathered(torch.stack([maximum, total]), group).unbind(1)
    largest = maxima.amax(0)
    pivot = torch.where(largest == -torch.inf, 0, largest)
    shift = (maxima - pivot).clamp(min=EXP_IS_ZERO)
    decay = shift.exp()
    if weighted is not None:
        weighted = (decay * (gathered(weighted, group) + totals * shift)).sum(0)
    return Partials(largest, (decay * totals).sum(0), weighted, on_the_owner(target, tokens, vocab_size, group))
