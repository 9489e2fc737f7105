"""Vocab-parallel heads: the numbers that cross ranks, and how they are added up.

Every rank of `head.group` makes a vocab-parallel call with the same hidden states and tokens, and its own rows of the weight.
Only these numbers of a row of logits cross ranks:

    one pass    z_y of the rank that has the token (with a softcap its slope there too), then the sums S (and Q for an entropy),
                and at the end the sum of dX; of further statistics their partials
    two passes  m, s, q, z_y of each rank's columns, and in backward the sum of dX; of further statistics their partials, and
                for ranks of tokens z_y before the sweep

Vectors are added in rank order, so that every rank has equal bits; dX takes an all-reduce. With LoRA the gradient of A x is
summed like dX.

The gradient of hidden is complete on every rank when backward returns. No further all-reduce belongs behind it: Megatron's
`copy_to_tensor_model_parallel_region` would double it. Gradients of weight, bias and B are those of the rank's own rows.

A loss has no other collectives than these and the table of `agreement`; heads with DTensors (`dtensor`) have their own.
docs/pages/distributed.md has the bytes and the memory.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..kernels.limits import EXP_IS_ZERO
from ..tiles.row_statistics import largest_of
from ..tiles.structures import FurtherPartials, Partials

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


def all_columns(weight: torch.Tensor, group: Group) -> int | torch.Tensor:
    """V, of all ranks."""
    return len(weight) if group is None else sum_over_ranks(torch.tensor([len(weight)], device=weight.device), group)


def on_the_owner(values: torch.Tensor, tokens: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """values (C, ...) of the one rank whose columns [0, vocab_size) have the token (C,); NaN where none or several have it."""
    inside = (tokens >= 0) & (tokens < vocab_size)
    columns = values if values.dim() == 2 else values[:, None]
    mine = torch.cat([torch.where(inside[:, None], columns, 0), inside[:, None].to(values.dtype)], 1)
    total = sum_over_ranks(mine, group)
    return torch.where(total[:, -1:] == 1, total[:, :-1], torch.nan).view_as(values)


def combine(
    partials: Partials, tokens: torch.Tensor, vocab_size: int, group: dist.ProcessGroup, kept: int = 0, first_column: int = 0
) -> tuple[Partials, torch.Tensor | None]:
    """The partials over the columns of all ranks: m is the largest, s and q are rescaled to it and added in rank order, and z_y
    is that of the token's owner. Of the largest logits, `kept` are kept; ids count from 0 on the first of all columns.

    Also returns the number of all columns, where a mean over them is asked for.
    """
    maximum, total, weighted, target, further = partials
    maxima, totals = gathered(torch.stack([maximum, total]), group).unbind(1)
    largest = maxima.amax(0)
    pivot = torch.where(largest == -torch.inf, 0, largest)
    shift = (maxima - pivot).clamp(min=EXP_IS_ZERO)
    shares = shift.exp() * totals
    if weighted is not None:
        weighted = (shift.exp() * (gathered(weighted, group) + totals * shift)).sum(0)
    columns = None if further.sum is None else sum_over_ranks(tokens.new_tensor([vocab_size]), group)
    further = combine_further(further, group, kept, first_column)
    if further.squares is not None:
        total_of_squares = (gathered(further.squares, group).exp() * shares.square()).sum(0).log()
        squares = torch.where(shares.sum(0) == 0, 0, total_of_squares - 2 * shares.sum(0).log())
        further = FurtherPartials(*further[:3], squares, further.above)
    target = on_the_owner(target, tokens, vocab_size, group)
    return Partials(largest, shares.sum(0), weighted, target, further), columns


def combine_further(further: FurtherPartials, group: dist.ProcessGroup, kept: int, first_column: int) -> FurtherPartials:
    """The further partials over the columns of all ranks, but for squares (see `combine`)."""
    values, ids, sums, squares, above = further
    if values is not None:
        values, ids = _largest_of_ranks(values, ids + first_column, kept, group)
    if sums is not None:
        sums = sum_over_ranks(sums, group)
    if above is not None:
        above = sum_over_ranks(above, group)
    return FurtherPartials(values, ids, sums, squares, above)


def _largest_of_ranks(
    values: torch.Tensor, ids: torch.Tensor, kept: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `kept` largest logits (C, kept) of all ranks, and their ids; of equal ones the smaller id, whichever rank has it."""
    missing = kept - values.shape[1]  # a rank may have fewer columns
    values = F.pad(values, (0, missing), value=-torch.inf)
    ids = F.pad(ids, (0, missing), value=torch.iinfo(ids.dtype).max)
    values, ids = (gathered(x, group).transpose(0, 1).flatten(1) for x in (values, ids))
    by_id = ids.argsort(1)
    return largest_of(values.gather(1, by_id), ids.gather(1, by_id), kept)
