"""verl's fused `linear_cross_entropy` on fastpg, with the same arguments, results and division of gradients among ranks.

from fastpg.integrations.verl import linear_cross_entropy      # was: from verl.utils.kernel.linear_cross_entropy import ...
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..linear.linear_logprobs import linear_logprobs
from ..lm_head import LMHead

REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: torch.Tensor,  # (..., H)
    weight: torch.Tensor,  # (V, H), or this rank's rows of it
    labels: torch.Tensor,  # (...)
    temperature: float | torch.Tensor | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the labels and entropies, without the logits; as verl/utils/kernel/linear_cross_entropy.py.

    hidden (..., H) is flattened to N tokens, as in verl. Returns (logprobs, entropy), float32, differentiable in hidden and
    weight. entropy is (N,). logprobs (log-probabilities, not losses) are (N,), or with reduction "sum" or "mean" their sum or
    mean over all N. A label of -100, which verl does not have, has log-probability and entropy 0 and counts in the mean.
    Without tokens the mean is 0.

    dist_process_group: the ranks hold V rows each of the whole vocabulary, in rank order, as Megatron shards it. fastpg's own
        gradient of hidden is complete on every rank. Here each rank returns 1 / ranks of it, since Megatron's regions around
        the call sum it over the group, as with verl.

    Raises TypeError or ValueError for arguments that do not fit, as `linear_logprobs` does, and for another reduction.
    """
    reduction = "none" if reduction is None else reduction.lower()
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "none", "sum" or "mean"; got {reduction!r}')
    head = LMHead(weight)
    if dist_process_group is not None:
        start = dist.get_rank(dist_process_group) * len(weight)
        head = LMHead(weight, group=dist_process_group, vocab_start=start)
        hidden = _ShareOfGradient.apply(hidden, dist.get_world_size(dist_process_group))
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if isinstance(temperature, torch.Tensor) and temperature.dim() > 0:
        temperature = temperature.reshape(-1)
    temperature = 1.0 if temperature is None else temperature
    logprobs, entropy = linear_logprobs(hidden, head, labels, temperature=temperature, entropy=True)
    if reduction == "none":
        return logprobs, entropy
    total = logprobs.sum()
    return total if reduction == "sum" else total / max(len(logprobs), 1), entropy


class _ShareOfGradient(torch.autograd.Function):
    """The identity, whose gradient is divided by the number of ranks that will sum it."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.ranks, None
