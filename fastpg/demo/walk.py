"""A small environment with several steps, which GiGPO and VinePPO need.

An agent stands on a digit and wants to reach another. At every step the model reads `3?7=` (position, goal) and says one
character: `>` moves up, `<` moves down, anything else wastes the step. Reaching the goal in time earns 1. The
prompt is all that the model reads, so prompts recur across the episodes of a group, and a rollout can start from any state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..advantages import monte_carlo_values
from ..linear.support import Support
from .estimators import Rollouts
from .nucleus import draw
from .tasks import ALPHABET, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOVES = {ALPHABET.index(">"): 1, ALPHABET.index("<"): -1}


class State(NamedTuple):
    position: int
    goal: int
    steps_left: int

    def prompt(self) -> list[int]:
        return [ALPHABET.index(character) for character in f"{self.position}?{self.goal}="]


@dataclass(frozen=True)
class Walk:
    """Settings with which the tiny model learns to walk."""

    prompts_per_step: int = 8  # starts
    group_size: int = 16  # episodes of each; even, because each step is made of two updates
    max_steps: int = 6
    learning_rate: float = 1e-3
    steps: int = 100
    rollouts_per_state: int = 4  # for VinePPO
    asks: str = "3?7= asks for steps from 3 to 7, > up and < down, at most 6"

    def draw(self, random: Random) -> State:
        position = random.randint(0, 9)
        goal = random.choice([g for g in range(10) if 0 < abs(g - position) <= 3])
        return State(position, goal, self.max_steps)


class Step(NamedTuple):
    """One row: the state that the model read, the token it said, and the reward."""

    episode: int
    state: State
    token: int
    reward: float
    hidden: torch.Tensor  # (H,), at the end of the prompt
    kept: torch.Tensor | None  # (V,) bool, the tokens that could be drawn; None: all


@torch.no_grad()
def play(model: PreTrainedModel, starts: Sequence[State], generator: torch.Generator, top_p: float = 1.0) -> list[Step]:
    """Plays an episode from each start to its end, all of them side by side. Steps of an episode are in order.

    The generator is on the model's device.
    """
    states, running, steps = list(starts), list(range(len(starts))), []
    while running:
        prompts = torch.tensor([states[i].prompt() for i in running], device=generator.device)
        hidden = model.base_model(prompts).last_hidden_state[:, -1]
        tokens, kept = draw(model.get_output_embeddings()(hidden), top_p, generator)
        still_running = []
        sets = [None] * len(running) if kept is None else kept
        for i, token, h, allowed in zip(running, tokens.tolist(), hidden, sets, strict=True):
            position, goal, steps_left = states[i]
            moved = min(max(position + _MOVES.get(token, 0), 0), 9)
            steps.append(Step(i, states[i], token, float(moved == goal), h, allowed))
            states[i] = State(moved, goal, steps_left - 1)
            if moved != goal and steps_left > 1:
                still_running.append(i)
        running = still_running
    return steps


def walk(model: PreTrainedModel, task: Walk, random: Random, generator: torch.Generator, top_p: float = 1.0) -> Rollouts:
    """Plays a group of episodes from each of a few starts. Every step of every episode is a row."""
    starts = [state for state in (task.draw(random) for _ in range(task.prompts_per_step)) for _ in range(task.group_size)]
    steps, device = play(model, starts, generator, top_p), generator.device
    tokens = torch.tensor([[step.token] for step in steps], device=device)
    return Rollouts(
        torch.tensor([step.state.prompt() for step in steps], device=device),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.stack([step.hidden for step in steps])[:, None],
        torch.tensor([step.reward for step in steps], device=device),
        torch.tensor([step.episode for step in steps], device=device),
        torch.arange(len(starts), device=device) // task.group_size,
        [step.state for step in steps],
        Support.from_mask(torch.stack([step.kept for step in steps])) if top_p < 1 else None,
    )


def returns(model: PreTrainedModel, starts: Sequence[State], generator: torch.Generator, top_p: float = 1.0) -> list[float]:
    """The reward of one fresh episode from each start; the rollout function of `advantages.monte_carlo_values`."""
    earned = [0.0] * len(starts)
    for step in play(model, starts, generator, top_p):
        earned[step.episode] += step.reward
    return earned


def rollout_values(
    model: PreTrainedModel, task: Task | Walk, generator: torch.Generator, top_p: float = 1.0
) -> Callable[[list[Hashable]], torch.Tensor] | None:
    """A function from states to V(s), by fresh rollouts. None if the task has no states to start from."""
    if not isinstance(task, Walk):
        return None
    return lambda states: monte_carlo_values(
        lambda starts: returns(model, starts, generator, top_p), states, task.rollouts_per_state, batched=True
    )
