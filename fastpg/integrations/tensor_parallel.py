"""Hidden states and the lm_head of a rank, for frameworks that sum the gradient of hidden states over the ranks themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..lm_head import LMHead


def share_of_rank(
    hidden: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, vocab_start: int
) -> tuple[torch.Tensor, LMHead]:
    """(hidden, head) of a rank with some rows of the weight, whose gradient of hidden is 1 / ranks of the whole.

    fastpg's own gradient of hidden is complete on every rank. Megatron's regions around the call sum it over the group.
    """
    return share_of_gradient(hidden, dist.get_world_size(group)), LMHead(weight, group=group, vocab_start=vocab_start)


def share_of_gradient(hidden: torch.Tensor, ranks: int) -> torch.Tensor:
    """hidden, whose gradient is divided by the number of ranks that will sum it."""
    return _ShareOfGradient.apply(hidden, ranks)


class _ShareOfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: int) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad / ctx.ranks, None
