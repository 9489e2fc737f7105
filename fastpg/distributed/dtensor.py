"""Heads whose weights are DTensors: used in place where their rows are sharded on the head's group, gathered otherwise.

Hidden states may be a DTensor too, if every rank holds all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..lm_head import LMHead, LoRA
from ..validation import is_dtensor
from .vocab_parallel import Group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def localized(head: LMHead) -> LMHead:
    """The head with plain tensors: this rank's rows of a DTensor that is sharded along them on head.group, else all of it.

    The gradient of a gathered weight is averaged over the ranks and placed as the parameter is, as FSDP does with the
    gradients it computes itself. So give every rank's loss the factors that `global_count` describes.

    Raises ValueError for a DTensor that is not sharded along its rows on head.group, for weight_grad beside a DTensor, for
    vocab_start beside a weight that is one, and where a rank would have no row.
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


def local_hidden(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states as a plain tensor: those of a DTensor that is replicated, whose gradient is a DTensor replicated alike.

    Raises ValueError for other placements, which do not say whether the tokens are all tokens or this rank's.
    """
    if not is_dtensor(hidden):
        return hidden
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(
            f"hidden must be a plain tensor or a DTensor that is replicated; got placements {hidden.placements}: pass "
            "hidden.full_tensor() with all tokens, or hidden.to_local() with this rank's own"
        )
    return hidden.to_local()


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
    """The mesh dimension that is the group. Ranks are compared and not groups: equal meshes have groups of their own."""
    if group is None:
        return []
    ranks = dist.get_process_group_ranks(group)
    return [d for d in range(mesh.ndim) if dist.get_process_group_ranks(mesh.get_group(d)) == ranks]


def _row_offset(x: torch.Tensor, group: dist.ProcessGroup) -> int:
    """The row of x that this rank's first one is. Shard(0) cuts like torch.chunk: every rank has ceil(V / ranks) rows, and the
    last ones fewer or none."""
    ranks, vocab = dist.get_world_size(group), x.shape[0]
    share = -(-vocab // ranks)
    if share * (ranks - 1) >= vocab:
        raise ValueError(f"head.weight has {vocab} rows on {ranks} ranks of which the last has none; use fewer ranks")
    return share * dist.get_rank(group)
