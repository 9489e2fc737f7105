"""`--compare`: the same steps with full logits beside fastpg's, and the memory that both ways take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import reference
from ..crosscheck.cases import reference_objective
from ..linear.linear_policy_loss import linear_policy_loss
from ..linear.support import Support
from ..lm_head import LMHead
from ..loss.objectives import CISPO, Objective
from ..tools.memory import transient_bytes
from .estimators import Rollouts
from .sampling import hidden_states
from .tasks import Task
from .walk import Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED_TOKENS = 2048  # for the memory in the report


class Batch(NamedTuple):
    """What an update learns from: R rows of rollouts."""

    prompts: torch.Tensor  # (R, L), or (P, L) where R / P consecutive rows share one
    tokens: torch.Tensor  # (R, T)
    mask: torch.Tensor  # (R, T) bool
    old_logprobs: torch.Tensor  # (R, T)
    advantages: torch.Tensor  # (R,) or (R, T)
    support: Support | None = None  # the sets of tokens that could be drawn
    rollout_weights: torch.Tensor | None = None  # (R, T)

    @classmethod
    def of(
        cls,
        rollouts: Rollouts,
        rows: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        rollout_weights: torch.Tensor | None,
    ) -> Batch:
        prompts = rollouts.prompts[rows] if len(rollouts.prompts) == len(rollouts.tokens) else rollouts.prompts
        tokens, mask, support = rollouts.tokens[rows], rollouts.mask[rows], rollouts.support_of(rows)
        weights = None if rollout_weights is None else rollout_weights[rows]
        return cls(prompts, tokens, mask, old_logprobs[rows], advantages[rows], support, weights)


def adamw(model: PreTrainedModel, task: Task | Walk) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.0)


def same_draws(random: Random, generator: torch.Generator) -> tuple[Random, torch.Generator]:
    """Copies that draw what the originals are about to draw."""
    again = Random()
    again.setstate(random.getstate())
    return again, torch.Generator(generator.device).set_state(generator.get_state())


class FullLogits:
    """A copy of the model that learns from the same batches, by plain code: all logits, log_softmax and autograd.

    Nothing in it is computed by fastpg: its objective is the oracle's formula. Both models go their own ways from the first
    update on, so the rounding errors of one step are in the weights of the next.
    """

    def __init__(self, model: PreTrainedModel, task: Task | Walk, objective: Objective) -> None:
        self.model = copy.deepcopy(model)
        self._optimizer = adamw(self.model, task)
        self._objective = reference_objective(objective)
        self._reward = 0.0
        self._losses: list[float] = []  # of each update of the step
        self._differences: list[float] = []

    def answer(self, sampler: Callable[..., Rollouts], *drawn_as: object) -> None:
        """Samples the copy's own answers to the step's prompts, which are the model's answers while both are equal."""
        self._reward = sampler(self.model, *drawn_as).episode_rewards().mean().item()
        self._losses, self._differences = [], []

    def update(self, batch: Batch) -> None:
        """An optimiser step from a batch that fastpg learns from."""
        hidden = hidden_states(self.model, batch.prompts, batch.tokens)
        loss = full_logits_loss(hidden, self.model.get_output_embeddings().weight, batch, self._objective)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._losses.append(loss.item())

    @torch.no_grad()
    def check(self, loss: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> None:
        """fastpg's loss beside that of full logits of the same hidden states and weights."""
        self._differences.append((loss - full_logits_loss(hidden, weight, batch, self._objective)).abs().item())

    def numbers(self) -> dict[str, float]:
        """Of the last step, for its row of the history."""
        return {
            "reward_full_logits": self._reward,
            "loss_full_logits": sum(self._losses) / len(self._losses),
            "loss_difference": max(self._differences),  # on the same weights
        }


def full_logits_loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch, objective: reference.Objective) -> torch.Tensor:
    """What fastpg replaces: (R, T, V) logits, and autograd back through them."""
    logits = hidden @ weight.T
    if batch.support is not None:
        logits = logits.masked_fill(~batch.support.mask(len(weight)).view(logits.shape), -torch.inf)
    logprobs = torch.log_softmax(logits, -1).gather(-1, batch.tokens[..., None])[..., 0]
    del logits  # autograd does not need them
    given = {"objective": objective, "mask": batch.mask, "rollout_weights": batch.rollout_weights}
    return reference.policy_loss(logprobs, batch.old_logprobs, batch.advantages, **given)


# ---- Memory ---------------------------------------------------------------------------------------------------------


class LossMemory(NamedTuple):
    """Transient bytes of the loss and its gradients for `tokens` tokens, without dX and dW themselves."""

    tokens: int
    vocab: int
    fastpg: int
    full_logits: int


def loss_memory(hidden: torch.Tensor, head: LMHead, batch: Batch) -> LossMemory:
    """Measures the CISPO loss and its gradients, by fastpg and with full logits, for a batch of about 2048 tokens.

    hidden: (R, T, H). The given batch is repeated, since the demo's own are smaller than any that a trainer would use.
    """
    copies = max(1, round(MEASURED_TOKENS / batch.tokens.numel()))
    tokens, old = batch.tokens.repeat(copies, 1), batch.old_logprobs.repeat(copies, 1)
    hidden, advantages = hidden.detach().repeat(copies, 1, 1).requires_grad_(), torch.ones(len(tokens), device=hidden.device)
    whole = Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), old, advantages)  # both compute all tokens
    objective = CISPO()

    def fastpg() -> None:
        out = linear_policy_loss(hidden, head, tokens, old, advantages, objective=objective, mask=whole.mask)
        torch.autograd.grad(out.loss, (hidden, head.weight))

    def full_logits() -> None:
        loss = full_logits_loss(hidden, head.weight, whole, reference_objective(objective))
        torch.autograd.grad(loss, (hidden, head.weight))

    gradients = hidden.nbytes + head.weight.nbytes
    used = (transient_bytes(call, hidden.device) - gradients for call in (fastpg, full_logits))
    return LossMemory(tokens.numel(), head.vocab_size, *used)
