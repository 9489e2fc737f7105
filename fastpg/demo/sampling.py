"""Answers sampled from a model, and the hidden states that predict their tokens."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import torch

from ..linear.support import Support
from .estimators import Rollouts
from .nucleus import draw
from .tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def sample(model: PreTrainedModel, task: Task, random: Random, generator: torch.Generator, top_p: float = 1.0) -> Rollouts:
    """Draws prompts, samples a group of completions of each at temperature 1, and verifies their answers.

    The generator is on the model's device, and so is everything drawn.
    """
    device = generator.device
    problems = [task.draw(random) for _ in range(task.prompts_per_step)]
    prompts = torch.tensor([ids for ids, _ in problems], device=device)
    answers = [answer for _, answer in problems for _ in range(task.group_size)]

    last, cache = read_prompts(model, prompts, task.group_size)
    running = torch.ones(len(last), dtype=torch.bool, device=device)
    tokens, mask, hidden, sets = [], [], [], []
    for _ in range(task.max_new_tokens):
        # The logits of one position of each completion, which sampling needs. Training builds no others.
        token, kept = draw(model.get_output_embeddings()(last), top_p, generator)
        token = torch.where(running, token, task.stop_token)
        tokens.append(token)
        mask.append(running)
        hidden.append(last)
        sets.append(kept)
        running = running & (token != task.stop_token)
        if not running.any():
            break
        last = model.base_model(token[:, None], past_key_values=cache).last_hidden_state[:, -1]

    tokens, mask, hidden = (torch.stack(columns, 1) for columns in (tokens, mask, hidden))
    completions = [[i for i in row if i != task.stop_token] for row in tokens.tolist()]
    verified = [float(task.verify(ids, answer)) for ids, answer in zip(completions, answers, strict=True)]
    rewards, episodes = torch.tensor(verified, device=device), torch.arange(len(tokens), device=device)
    states = [prompt for prompt, _ in problems for _ in range(task.group_size)]
    support = Support.from_mask(torch.stack(sets, 1)) if top_p < 1 else None
    return Rollouts(prompts, tokens, mask, hidden, rewards, episodes, episodes // task.group_size, states, support)


def hidden_states(model: PreTrainedModel, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(P, L) prompts and (B, T) completions -> (B, T, H), where hidden[:, t] predicts tokens[:, t]. Differentiable."""
    last, cache = read_prompts(model, prompts, len(tokens) // len(prompts))
    if tokens.shape[1] == 1:
        return last[:, None]
    # The last token predicts nothing that counts, so it is not read. Causal attention does not see the padding, on the right.
    rest = model.base_model(tokens[:, :-1], past_key_values=cache).last_hidden_state
    return torch.cat([last[:, None], rest], 1)


def read_prompts(model: PreTrainedModel, prompts: torch.Tensor, copies: int):
    """Reads each prompt once for all of its completions: (P, L) -> hidden state at its end (P * copies, H), and the cache."""
    out = model.base_model(prompts, use_cache=True)
    out.past_key_values.batch_repeat_interleave(copies)
    return out.last_hidden_state[:, -1].repeat_interleave(copies, 0), out.past_key_values
