"""`fastpg demo`: reinforcement learning of a small language model, on a GPU or a CPU, with a loss that never builds the logits.

The algorithm is `train`: sample answers in groups, verify them, estimate advantages, take two steps of the objective. `command`
has the options, `sampling` draws the answers, `estimators` has the estimators and the objectives by name.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from ..linear.linear_logprobs import linear_logprobs
from ..linear.linear_policy_loss import linear_policy_loss
from ..linear.support import Support
from ..lm_head import LMHead
from ..loss.objectives import Objective
from ..loss.policy_loss import PolicyLossOutput, policy_loss
from .compare import Batch, FullLogits, LossMemory, adamw, loss_memory, same_draws
from .engines import Engine
from .estimators import ESTIMATORS, OBJECTIVES, Context, Critic, Rollouts
from .sampling import hidden_states, sample
from .tasks import Task
from .walk import Walk, rollout_values, walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BAR = "{bar}| step {n_fmt} of {total_fmt}{postfix} [{elapsed}, {remaining} left]"
UPDATES = 2  # optimiser steps for each batch of rollouts: in the second one ratios differ from 1


class Training(NamedTuple):
    history: list[dict[str, Any]]  # the numbers of each step; None where there is none, and a note that says why
    seconds: dict[str, float]  # by phase
    memory: LossMemory


# ---- The algorithm --------------------------------------------------------------------------------------------------


def train(
    model: PreTrainedModel,
    task: Task | Walk,
    steps: int,
    seed: int = 0,
    advantage: str = "group",
    objective: str = "cispo",
    top_p: float = 1.0,
    engine: Engine | None = None,
    *,
    compare: bool = False,
) -> Training:
    """Trains by policy gradient, with the named estimator and objective, on the model's device.

    With top_p < 1 every log-probability is over the tokens that the sampler kept, in the updates as at the time of sampling.
    engine: samples in the model's place (`--mismatch`); the old log-probabilities are the model's all the same.
    compare: a copy of the model takes the same steps by full logits.
    """
    clock, device = Clock(), model.device
    random, generator = Random(seed), torch.Generator(device).manual_seed(seed)
    optimizer = adamw(model, task)
    head = LMHead.from_model(model)  # the tied embedding itself
    context = Context(Critic(head.hidden_size, device), rollout_values(model, task, generator, top_p), generator)
    beside = FullLogits(model, task, OBJECTIVES[objective]) if compare else None
    history: list[dict[str, Any]] = []
    for step in (progress := tqdm(range(1, steps + 1), bar_format=BAR)):
        sampler, again = walk if isinstance(task, Walk) else sample, same_draws(random, generator)
        with clock("sample"):
            if engine is not None:
                engine.read_weights(model)
            rollouts = sampler(engine or model, task, random, generator, top_p)
        with clock("score"), torch.no_grad():
            weights, mismatch, sampled = None, {}, rollouts
            if engine is not None:  # the hidden states of the model, not of the engine
                rollouts = rollouts._replace(hidden=hidden_states(model, rollouts.prompts, rollouts.tokens))
            scored = {"mask": rollouts.mask, "support": rollouts.support}
            old_logprobs = linear_logprobs(rollouts.hidden, head, rollouts.tokens, **scored).logprobs
            if engine is not None:
                weights, mismatch = engine.compared(old_logprobs, engine.logprobs(sampled), rollouts.mask)
        with clock("advantages"):
            advantages = ESTIMATORS[advantage](rollouts, context)
        if beside is not None:
            with clock("full logits: sample"):
                beside.answer(sampler, task, *again, top_p)

        updates = []
        for rows in parts_of_groups(rollouts.episodes, task.group_size):
            batch = Batch.of(rollouts, rows, old_logprobs, advantages, weights)
            with clock("update"):
                hidden = hidden_states(model, batch.prompts, batch.tokens)
                given = batch.tokens, batch.old_logprobs, batch.advantages, batch.mask, batch.support
                out = loss_of(OBJECTIVES[objective], hidden, head, *given, rollout_weights=batch.rollout_weights)
                out.loss.backward()
            if beside is not None:  # before the weights change
                beside.check(out.loss, hidden, head.weight, batch)
                with clock("full logits: update"):
                    beside.update(batch)
            with clock("update"):
                optimizer.step()
                optimizer.zero_grad()
            updates.append({"loss": out.loss.item()} | {name: value.item() for name, value in out.metrics.items()})

        compared = {} if beside is None else beside.numbers()
        history.append(step_numbers(step, rollouts, advantages, updates, task.group_size) | mismatch | compared)
        progress.set_postfix_str(bar_words(history[-1]), refresh=False)
    return Training(history, dict(clock.seconds), loss_memory(hidden, head, batch))


def loss_of(
    objective: Objective,
    hidden: torch.Tensor,
    head: LMHead,
    tokens: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    support: Support | None,
    *,
    rollout_weights: torch.Tensor | None = None,
) -> PolicyLossOutput:
    """The loss in one pass over the vocabulary, or in two if the objective needs other tokens of the sequence or the batch."""
    if objective.needs_sequences or objective.needs_batch:
        logprobs = linear_logprobs(hidden, head, tokens, mask=mask, support=support).logprobs
        given = {"objective": objective, "mask": mask, "rollout_weights": rollout_weights}
        return policy_loss(logprobs, old_logprobs, advantages, **given)
    given = {"objective": objective, "rollout_weights": rollout_weights, "mask": mask, "support": support}
    return linear_policy_loss(hidden, head, tokens, old_logprobs, advantages, **given)


def parts_of_groups(episodes: torch.Tensor, group_size: int) -> Iterator[torch.Tensor]:
    """The rows of each update: an equal share of every group's episodes, so that every update has every prompt."""
    share = episodes % group_size * UPDATES // group_size
    for update in range(UPDATES):
        yield (share == update).nonzero()[:, 0]


def step_numbers(
    step: int, rollouts: Rollouts, advantages: torch.Tensor, updates: list[dict[str, float]], group_size: int
) -> dict[str, Any]:
    """One row of the history. Ratios are those of the last update. In the first the policy is still the sampler: they are 1."""
    rewards = rollouts.episode_rewards()
    solved, failed = alike(rewards, group_size)
    return {
        "step": step,
        "reward": rewards.mean().item(),
        "groups_solved": solved,
        "groups_failed": failed,
        "note": "" if advantages.any() else words_of(solved, failed),
        "loss": sum(update["loss"] for update in updates) / len(updates),
        "tokens": rollouts.mask.sum().item() / len(rewards),  # of an episode
        **{f"first_{name}": number for name, number in ratios(updates[0], "ratio_mean", "ratio_max").items()},
        **ratios(updates[-1], "ratio_mean", "ratio_max", "clip_fraction", "ess", "kl_k3"),
    }


def ratios(update: dict[str, float], *names: str) -> dict[str, float | None]:
    """None in an update whose advantages are all 0: its tokens are skipped and have no ratio."""
    return {name: update[name] if update["tokens"] else None for name in names}


def alike(rewards: torch.Tensor, group_size: int) -> tuple[float, float]:
    """The shares of the groups that are solved, all of their episodes rewarded, and that are failed, none of them."""
    by_group = rewards.view(-1, group_size)
    return (by_group.amin(1) > 0).float().mean().item(), (by_group.amax(1) <= 0).float().mean().item()


def words_of(solved: float, failed: float) -> str:
    """Why every advantage of a batch is 0."""
    if solved + failed < 1:
        return "all advantages 0"
    names = [name for name, share in (("solved", solved), ("failed", failed)) if share]
    return f"all groups {' or '.join(names)}"


def bar_words(row: dict[str, Any]) -> str:
    return f"reward {row['reward']:.2f}" + (f", {row['note']}" if row["note"] else "")


class Clock:
    """`with clock("phase"):` adds the time inside to `seconds["phase"]`."""

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start
