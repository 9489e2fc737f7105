"""A few prompts and what a model answers, for people to read: before the training and after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch

from .sampling import sample
from .tasks import Task, spelled
from .walk import Walk, play

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 5
_SEED = 4  # its first prompts differ, in each of the tasks


class Answer(NamedTuple):
    question: str
    wanted: str  # the right answer, or one of them
    said: str
    right: bool


def answers(model: PreTrainedModel, task: Task | Walk, count: int = SHOWN) -> list[Answer]:
    """Of the same prompts at every call, and drawn by the same random numbers; at temperature 1, as in training."""
    drawing, generator = lambda: Random(_SEED), torch.Generator(model.device).manual_seed(_SEED)
    return (_walks if isinstance(task, Walk) else _completions)(model, task, count, drawing, generator)


def _completions(
    model: PreTrainedModel, task: Task, count: int, drawing: Callable[[], Random], generator: torch.Generator
) -> list[Answer]:
    rollouts = sample(model, replace(task, prompts_per_step=count, group_size=1), drawing(), generator)
    random, found = drawing(), []
    for tokens, mask, reward in zip(rollouts.tokens, rollouts.mask, rollouts.rewards.tolist(), strict=True):
        prompt, wanted = task.draw(random)  # what `sample` has drawn
        ids = [token for token in tokens[mask].tolist() if token != task.stop_token]
        found.append(Answer(task.question(prompt), str(wanted), " ".join(task.decode(ids).split()), reward > 0))
    return found


def _walks(
    model: PreTrainedModel, task: Walk, count: int, drawing: Callable[[], Random], generator: torch.Generator
) -> list[Answer]:
    random = drawing()
    starts = [task.draw(random) for _ in range(count)]
    steps, found = play(model, starts, generator), []
    for i, start in enumerate(starts):
        mine = [step for step in steps if step.episode == i]
        wanted = (">" if start.goal > start.position else "<") * abs(start.goal - start.position)
        said = spelled([step.token for step in mine])
        found.append(Answer(spelled(start.prompt()), wanted, said, any(step.reward > 0 for step in mine)))
    return found
