"""The heads of real models, by name: vocabulary and hidden size as in their published configurations."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Head(NamedTuple):
    vocab: int
    hidden: int


HEADS = {
    "smollm2-135m": Head(49152, 576),
    "qwen3-0.6b": Head(151936, 1024),
    "llama3-8b": Head(128256, 4096),
    "qwen3-8b": Head(151936, 4096),
    "gemma2-2b": Head(256000, 2304),
}


class Batch(NamedTuple):
    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    tokens: torch.Tensor  # (N,)
    old_logprobs: torch.Tensor  # (N,)
    advantages: torch.Tensor  # (N,)

    def leaves(self) -> Batch:
        """The same with hidden and weight as fresh leaves that require gradients (no copy of their values)."""
        hidden, weight = (x.detach().requires_grad_() for x in (self.hidden, self.weight))
        return self._replace(hidden=hidden, weight=weight)


def batch(head: Head, rows: int, dtype: torch.dtype, seed: int = 0) -> Batch:
    """Logits with a standard deviation of 2, tokens drawn at random, ratios within about e^+-0.1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, head.hidden, generator=generator).to(dtype)
    weight = (torch.randn(head.vocab, head.hidden, generator=generator) * (2 / head.hidden**0.5)).to(dtype)
    tokens = torch.randint(0, head.vocab, (rows,), generator=generator)
    logprobs = []
    for h, t in zip(hidden.split(256), tokens.split(256), strict=True):
        logprobs.append(torch.log_softmax(h.float() @ weight.float().T, -1).gather(1, t[:, None])[:, 0])
    old = torch.cat(logprobs) + 0.1 * torch.randn(rows, generator=generator)
    return Batch(hidden, weight, tokens, old, torch.randn(rows, generator=generator))
