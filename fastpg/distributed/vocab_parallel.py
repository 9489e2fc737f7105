"""What crosses ranks: vocab-parallel heads, weights that are DTensors, and global denominators for data parallelism.

A vocab-parallel call is made by every rank of `head.group` with the same hidden states and tokens, and its own rows of the
weight. Of a row of logits only these numbers cross ranks (C rows, in rank order, so that every rank has equal bits):

    one pass    z_y of the rank that has the token, then the sums S (and Q for an entropy), and at the end the sum of dX
    two passes  m, s, q, z_y of each rank's columns, and in backward the sum of dX

The gradient of hidden is complete on every rank when backward returns: no further all-reduce belongs behind it (Megatron's
`copy_to_tensor_model_parallel_region` would double it). Gradients of weight, bias and B are those of the rank's own rows.

Nothing collective is hidden inside a loss apart from that; for data parallelism see `global_count`. DISTRIBUTED.md has the
bytes and the memory.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..lm_head import LMHead, LoRA
from ..tiles.row_statistics import Partials

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# torch may be built without it
Group = dist.ProcessGroup | None if dist.is_available() else None

_EXP_IS_ZERO = -1e4  # unlike -inf it can be multiplied by 0


def global_count(mask: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """How many True entries the masks of all ranks have together, () float32: one all-reduce of one number.

    mask (...) bool, of any shape on any rank, also empty; group None: the default group.

    Ranks hold unequal numbers of tokens, so the mean of their token means is not the mean over all tokens. With

        loss = linear_policy_loss(..., denominator=count.clamp(min=1) / world_size).loss

    where count = global_count(mask) and world_size the number of ranks, the gradients that DDP and FSDP average over ranks are
    those of the mean over all tokens: mean_r(world_size * sum_r / count) = sum / count. Where gradients are summed instead
    (no averaging), leave world_size out. Under gradient accumulation count the tokens of all micro-batches first. For a
    mean over sequences count them: `global_count(mask.any(-1))`. A rank without tokens takes part like any other: its loss is
    0 and differentiable.

    Raises TypeError for a mask that is not bool, RuntimeError where torch.distributed is not initialised.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor; got {getattr(mask, 'dtype', type(mask).__name__)}")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("global_count needs torch.distributed.init_process_group; on one process use mask.sum()")
    count = mask.sum().float()  # NCCL and gloo sum fp32; it counts exactly to 2^24 per rank and rounds beyond
    dist.all_reduce(count, group=group)
    return count


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
    shift = (maxima - pivot).clamp(min=_EXP_IS_ZERO)
    decay = shift.exp()
    if weighted is not None:
        weighted = (decay * (gathered(weighted, group) + totals * shift)).sum(0)
    return Partials(largest, (decay * totals).sum(0), weighted, on_the_owner(target, tokens, vocab_size, group))


def localized(head: LMHead) -> LMHead:
    """The head with plain tensors: DTensors in place where their rows are sharded on head.group, gathered otherwise.

    The gradient of a gathered weight is averaged over the ranks and placed as the parameter is, as FSDP does with the
    gradients it computes itself: give every rank's loss the factors that `global_count` describes.

    Raises ValueError for a DTensor that is sharded along H on the group, and where a rank would have no row.
    """
    if not is_dtensor(head.weight) and not any(is_dtensor(x) for x in (head.bias, *(head.lora or ())[:2])):
        return head
    if head.weight_grad is not None:
        raise ValueError("head.weight_grad needs a weight that is a plain tensor; got a DTensor")
    if head.vocab_start is not None and is_dtensor(head.weight):
        raise ValueError("head.vocab_start is known from a weight that is a DTensor; leave it out")
    start = head.vocab_start
    if head.group is not None and is_dtensor(head.weight):
        start = _row_offset(head.weight, head.group)
    lora = head.lora
    if lora is not None:
        lora = LoRA(_local("head.lora's A", lora.a, None), _local("head.lora's B", lora.b, head.group), lora.scale)
    weight, bias = _local("head.weight", head.weight, head.group), _local("head.bias", head.bias, head.group)
    return replace(head, weight=weight, bias=bias, lora=lora, vocab_start=start)


def is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # imported by whoever made one
    return module is not None and isinstance(x, module.DTensor)


def _local(name: str, x: torch.Tensor | None, group: dist.ProcessGroup | None) -> torch.Tensor | None:
    """A plain tensor: this rank's rows where x is sharded along them on `group`, else all of it."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = x.device_mesh
    dims = _dimensions(mesh, group)
    for d in dims:
        if not x.placements[d].is_shard(0):
            raise ValueError(
                f"{name} must be sharded along its rows, Shard(0), on head.group; got {x.placements[d]} on mesh dimension {d}"
            )
    if group is not None and not dims:
        raise ValueError(f"{name} is a DTensor on {mesh}, no dimension of which is head.group")
    kept = [Shard(0) if d in dims else Replicate() for d in range(mesh.ndim)]
    gradients = [Shard(0) if d in dims else Partial("avg") for d in range(mesh.ndim)]
    return x.redistribute(placements=kept).to_local(grad_placements=gradients)


def _dimensions(mesh: DeviceMesh, group: Group) -> list[int]:
    """The mesh dimension that is the group: by its ranks, as equal meshes have groups of their own."""
    if group is None:
        return []
    ranks = dist.get_process_group_ranks(group)
    return [d for d in range(mesh.ndim) if dist.get_process_group_ranks(mesh.get_group(d)) == ranks]


def _row_offset(x: torch.Tensor, group: dist.ProcessGroup) -> int:
    """Shard(0) cuts like torch.chunk: every rank has ceil(V / ranks) rows, and the last ones fewer or none."""
    ranks, vocab = dist.get_world_size(group), x.shape[0]
    share = -(-vocab // ranks)
    if share * (ranks - 1) >= vocab:
        raise ValueError(f"head.weight has {vocab} rows on {ranks} ranks of which the last has none; use fewer ranks")
    return share * dist.get_rank(group)
