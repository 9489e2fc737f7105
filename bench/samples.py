"""A batch as a trainer sees it: SmolLM2's hidden states of sampled answers, in groups, some with equal rewards throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import torch
from cases import DTYPES, HEADS, Batch, Cell, batch_of

_PROMPTS, _GROUP = 32, 8


def sampled_cell(device: str, dtype: str = "bfloat16") -> tuple[Cell, Callable[[], Batch]]:
    """The demo's task before training: 32 sums with 8 answers each, of at most 12 tokens.

    Tokens have weight zero in groups whose answers all earned the same reward, so sampling decides their share.
    """
    cell = Cell("samples", f"SmolLM2's answers, {dtype}", HEADS["smollm2-135m"], 0, dtype, ("fastpg one pass", "full logits"))
    b = _sampled(DTYPES[dtype]).to(device)
    cell = replace(cell, rows=len(b.tokens), zero_share=(b.advantages == 0).float().mean().item())
    return cell, lambda: b


def _sampled(dtype: torch.dtype) -> Batch:
    from fastpg.advantages import grpo
    from fastpg.demo.tasks import load_smollm2, sums
    from fastpg.demo.train import sample

    model, tokenizer = load_smollm2()
    task = replace(sums(tokenizer), prompts_per_step=_PROMPTS, group_size=_GROUP)
    rollouts = sample(model, task, Random(0), torch.Generator().manual_seed(0))
    of_answers = grpo(rollouts.rewards, rollouts.groups)
    advantages = of_answers[:, None].expand(rollouts.tokens.shape)
    hidden, tokens, advantages = (x[rollouts.mask] for x in (rollouts.hidden, rollouts.tokens, advantages))
    weight = model.get_output_embeddings().weight.detach()
    return batch_of(hidden.to(dtype), weight.to(dtype), tokens, advantages).with_logprobs()
