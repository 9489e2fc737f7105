"""From log-probabilities to a loss as a trainer writes it: what every peer ends in.

Needs torch alone, so that `host_time` measures with it beside any checkout of fastpg.
"""

from __future__ import annotations

import torch


def plain_cispo_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The lines of the README before fastpg. `* mask` stands for `[mask]`, which makes the host wait for a GPU."""
    ratio = (logprobs - old_logprobs).exp().clamp(max=5.0).detach()
    return -(ratio * advantages * logprobs * mask).sum() / mask.sum().clamp(min=1)
