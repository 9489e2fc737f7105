"""`fastpg demo`: reinforcement learning of a small language model, on a GPU or a CPU, with a loss that never builds the logits.

The algorithm is `train`: sample answers in groups, verify them, estimate advantages, take two steps of the objective. The
functions that it calls follow in the same order. `command` has the options and the report, `estimators` the estimators and the
objectives by name.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm import tqdm

from ..linear.linear_logprobs import linear_logprobs
from ..linear.linear_policy_loss import linear_policy_loss
from ..linear.support import Support
from ..lm_head import LMHead
from ..loss.objectives import CISPO, Objective
from ..loss.policy_loss import PolicyLossOutput, policy_loss
from ..tools.memory import transient_bytes
from .engines import Engine
from .estimators import ESTIMATORS, OBJECTIVES, Context, Critic, Rollouts
from .nucleus import draw
from .tasks import Task
from .walk import Walk, rollout_values, walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED_TOKENS = 2048  # for the memory in the report
UPDATES = 2  # optimiser steps for each batch of rollouts: in the second one ratios differ from 1


class LossMemory(NamedTuple):
    """Transient bytes of the loss and its gradients for `tokens` tokens, without dX and dW themselves."""

    tokens: int
    vocab: int
    fastpg: int
    full_logits: int


class Training(NamedTuple):
    history: list[dict[str, float]]  # the numbers of each step
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
) -> Training:
    """Trains by policy gradient, with the named estimator and objective, on the model's device.

    With top_p < 1 every log-probability is over the tokens that the sampler kept, in the updates as at the time of sampling.
    engine: samples in the model's place (`--mismatch`); the old log-probabilities are the model's all the same.
    """
    clock, device = Clock(), model.device
    random, generator = Random(seed), torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.0)
    head = LMHead.from_model(model)  # the tied embedding itself
    context = Context(Critic(head.hidden_size, device), rollout_values(model, task, generator, top_p), generator)
    history = []
    progress = tqdm(range(1, steps + 1), unit="step")
    for step in progress:
        with clock("sample"):
            if engine is not None:
                engine.read_weights(model)
            rollouts = (walk if isinstance(task, Walk) else sample)(engine or model, task, random, generator, top_p)
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

        updates = []
        for rows in parts_of_groups(rollouts.episodes, task.group_size):
            tokens, mask, support = rollouts.tokens[rows], rollouts.mask[rows], rollouts.support_of(rows)
            with clock("update"):
                prompts = rollouts.prompts[rows] if len(rollouts.prompts) == len(rollouts.tokens) else rollouts.prompts
                hidden = hidden_states(model, prompts, tokens)
                old, dealt = old_logprobs[rows], advantages[rows]
                by_rollout = None if weights is None else weights[rows]
                out = loss_of(
                    OBJECTIVES[objective], hidden, head, tokens, old, dealt, mask, support, rollout_weights=by_rollout
                )
                out.loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            updates.append({"loss": out.loss.item()} | {name: value.item() for name, value in out.metrics.items()})

        history.append(step_numbers(step, rollouts, updates) | mismatch)
        shown = ("reward", "loss", "ratio_mean", "ratio_max", "clip_fraction")
        progress.set_postfix({name: f"{history[-1][name]:.3g}" for name in shown}, refresh=False)
    memory = loss_memory(hidden, head, tokens, mask, old_logprobs[rows])
    return Training(history, dict(clock.seconds), memory)


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


def parts_of_groups(episodes: torch.Tensor, group_size: int) -> Iterator[torch.Tensor]:
    """The rows of each update: an equal share of every group's episodes, so that every update has every prompt."""
    share = episodes % group_size * UPDATES // group_size
    for update in range(UPDATES):
        yield (share == update).nonzero()[:, 0]


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


def step_numbers(step: int, rollouts: Rollouts, updates: list[dict[str, float]]) -> dict[str, float]:
    """One row of the history. Ratios are those of the last update. In the first the policy is still the sampler: they are 1."""
    # A group whose answers are all right or all wrong has advantage 0. Its tokens are skipped and have no ratio.
    last = {
        name: updates[-1][name] if updates[-1]["tokens"] else math.nan
        for name in ("ratio_mean", "ratio_max", "clip_fraction", "ess", "kl_k3")
    }
    return {
        "step": step,
        "reward": rollouts.episode_rewards().mean().item(),
        "loss": sum(update["loss"] for update in updates) / len(updates),
        "tokens": rollouts.mask.sum(1).float().mean().item(),
        "first_ratio_mean": updates[0]["ratio_mean"],
        "first_ratio_max": updates[0]["ratio_max"],
        **last,
    }


class Clock:
    """`with clock("phase"):` adds the time inside to `seconds["phase"]`."""

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


# ---- The report -----------------------------------------------------------------------------------------------------


def loss_memory(
    hidden: torch.Tensor,  # (B, T, H)
    head: LMHead,
    tokens: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T)
    old_logprobs: torch.Tensor,  # (B, T)
) -> LossMemory:
    """Measures the loss and its gradients, as in `train` and with full logits, for a batch of about 2048 tokens.

    The given batch is repeated, since the demo's own are smaller than any that a trainer would use.
    """
    copies = max(1, round(MEASURED_TOKENS / tokens.numel()))
    tokens, mask, old_logprobs = (x.repeat(copies, 1) for x in (tokens, mask, old_logprobs))
    hidden, advantages = hidden.detach().repeat(copies, 1, 1).requires_grad_(), torch.ones(len(tokens), device=hidden.device)
    mask, objective = torch.ones_like(mask), CISPO()  # both sides compute all tokens

    def fastpg() -> None:
        out = linear_policy_loss(hidden, head, tokens, old_logprobs, advantages, objective=objective, mask=mask)
        torch.autograd.grad(out.loss, (hidden, head.weight))

    def full_logits() -> None:
        logprobs = torch.log_softmax(hidden @ head.weight.T, -1).gather(-1, tokens[..., None])[..., 0]
        out = policy_loss(logprobs, old_logprobs, advantages, objective=objective, mask=mask)
        torch.autograd.grad(out.loss, (hidden, head.weight))

    gradients = hidden.nbytes + head.weight.nbytes
    used = (transient_bytes(call, hidden.device) - gradients for call in (fastpg, full_logits))
    return LossMemory(tokens.numel(), head.vocab_size, *used)
