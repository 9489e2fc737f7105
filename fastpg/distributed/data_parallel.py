"""Data parallelism: ranks with tokens of their own."""

from __future__ import annotations

import torch
import torch.distributed as dist


def global_count(mask: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The number of True entries in the masks of all ranks together, () float32: one all-reduce of one number.

    mask (...) bool, of any shape on any rank, also empty; group None: the default group.

    Ranks hold unequal numbers of tokens, so the mean of their token means is not the mean over all tokens. With

        loss = linear_policy_loss(..., denominator=count.clamp(min=1) / world_size).loss

    where count = global_count(mask) and world_size is the number of ranks, the gradients that DDP and FSDP average over ranks
    are those of the mean over all tokens: mean_r(world_size * sum_r / count) = sum / count. Where gradients are summed and not
    averaged, leave world_size out. Under gradient accumulation count the tokens of all micro-batches first. For a mean over
    sequences count sequences: `global_count(mask.any(-1))`. A rank without tokens takes part like any other: its loss is 0 and
    differentiable.

    Raises TypeError for a mask that is not bool, and RuntimeError where torch.distributed is not initialised.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor; got {getattr(mask, 'dtype', type(mask).__name__)}")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("global_count needs torch.distributed.init_process_group; on one process use mask.sum()")
    count = mask.sum().float()  # NCCL and gloo sum fp32; it counts exactly to 2^24 per rank and rounds beyond
    dist.all_reduce(count, group=group)
    return count
