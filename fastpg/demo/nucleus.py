"""Sampling with top-p: from the nucleus, the fewest of the most probable tokens whose probabilities sum to top_p or more."""

from __future__ import annotations

import torch


def draw(logits: torch.Tensor, top_p: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, V) logits -> tokens (B,), and (B, V) bool, True where a token could be drawn; None: every token could."""
    probabilities = logits.softmax(-1)
    kept = None
    if top_p < 1:
        ordered, ids = probabilities.sort(-1, descending=True)
        of_more_probable = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(ids, dtype=torch.bool).scatter(-1, ids, of_more_probable < top_p)
        probabilities = probabilities.masked_fill(~kept, 0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0], kept
