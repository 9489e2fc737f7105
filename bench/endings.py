"""The plain lines of a trainer, from log-probabilities to a loss. Every peer without a loss of its own ends in them.

This file needs torch alone, so that `host_time` can use it with any checkout of fastpg.
"""

from __future__ import annotations

import torch


def plain_cispo_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The loss of the README's block "before". `* mask` replaces its `[mask]`, for which the host would wait for a GPU."""
    ratio = (logprobs - old_logprobs).exp().clamp(max=5.0).detach()
    return -(ratio * advantages * logprobs * mask).sum() / mask.sum().clamp(min=1)
