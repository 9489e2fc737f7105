"""Vocab-parallel heads: the numbers that cross ranks, and how they are added up.

Every rank of `head.group` makes a vocab-parallel call with the same hidden states and tokens, and its own rows of the weight.
Only these numbers of a row of logits cross ranks:

    one pass    z_y of the rank that has the token (with a softcap its slope there too), then the sums S (and Q for an entropy),
                and at the end the sum of dX
    two passes  m, s, q, z_y of each rank's columns, and in backward the sum of dX

Vectors are added in rank order, so that every rank has equal bits; dX takes an all-reduce. With LoRA the gradient of A x is
summed like dX.

The gradient of hidden is complete on every rank when backward returns. No further all-reduce belongs behind it: Megatron's
`copy_to_tensor_model_parallel_region` would double it. Gradients of weight, bias and B are those of the rank's own rows.

A loss has no other collectives than these and the table of `agreement`; heads with DTensors (`dtensor`) have their own.
DISTRIBUTED.md has the bytes and the memory.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..kernels.limits import EXP_IS_ZERO
from ..tiles.structures import Partials

# torch may be built without torch.distributed
Group = dist.ProcessGroup | None if dist.is_available() else None


def gathered(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(...) of each rank -> (ranks, ...) in rank order. All that is computed from it has the same bits on every rank."""
    values = values.contiguous()
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    if values.numel():
        dist.all_gather(everyone, values, group=group)
    return torch.stack(everyone)


def sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over ranks of vectors, in rank order. (Large tensors take `all_reduced`.)"""
    return gathered(values, group).sum(0)


def all_reduced(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over ranks of a large tensor, in place."""
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
    """The partials over the columns of all ranks: m is the largest, s and q are rescaled to it and added in rank order, and z_y
    is that of the token's owner."""
    maximum, total, weighted, target = partials
    maxima, totals = gathered(torch.stack([maximum, total]), group).unbind(1)
    largest = maxima.amax(0)
    pivot = torch.where(largest == -torch.inf, 0, largest)
    shift = (maxima - pivot).clamp(min=EXP_IS_ZERO)
    decay = shift.exp()
    if weighted is not None:
        weighted = (decay * (gathered(weighted, group) + totals * shift)).sum(0)
    return Partials(largest, (decay * totals).sum(0), weighted, on_the_owner(target, tokens, vocab_size, group))
