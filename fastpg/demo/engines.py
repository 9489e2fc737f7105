"""Sampling engines that are not the trainer, for `fastpg demo --mismatch`.

Each is a copy of the model with something that tells real engines from trainers, larger than it is there, so that it shows.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .. import rollout
from .estimators import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Engine:
    """A copy of the model, which samples in its place. `train.sample` asks it for what it asks a model for."""

    corrected_by = 'truncated_weights(high=2.0), level="token"'

    def __init__(self, model: PreTrainedModel, corrected: bool) -> None:
        self.corrected = corrected
        self._copy = copy.deepcopy(model)

    @property
    def base_model(self) -> torch.nn.Module:
        return self._copy.base_model

    def get_output_embeddings(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._copy.get_output_embeddings()

    def read_weights(self, model: PreTrainedModel) -> None:
        """Before each batch of rollouts."""
        self._copy.load_state_dict(model.state_dict())

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts) -> torch.Tensor:
        """(B, T): what an engine returns with its tokens, from the logits that it has sampled from."""
        logits = self.get_output_embeddings()(rollouts.hidden)
        return logits.log_softmax(-1).gather(-1, rollouts.tokens[..., None])[..., 0]

    def compared(
        self, old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor | None, dict[str, float]]:
        """The rollout weights, None without correction, and how far the trainer is from the engine."""
        given = old_logprobs, rollout_logprobs, mask
        metrics = rollout.mismatch_metrics(*given).to_dict()
        weights = rollout.truncated_weights(*given, high=2.0) if self.corrected else None
        return weights, {name: metrics[name] for name in ("mismatch_kl_k3", "mismatch_ess")}


class Stale(Engine):
    """Its weights are those of 16 batches ago, as in asynchronous training."""

    batches = 16

    def __init__(self, model: PreTrainedModel, corrected: bool) -> None:
        super().__init__(model, corrected)
        self._past: deque[dict[str, torch.Tensor]] = deque(maxlen=self.batches + 1)

    def read_weights(self, model: PreTrainedModel) -> None:
        self._past.append({name: weight.clone() for name, weight in model.state_dict().items()})
        self._copy.load_state_dict(self._past[0])


class Broken(Engine):
    """Three of ten tokens come out wrong: any token of the vocabulary instead of one of the policy's."""

    share = 0.3

    def get_output_embeddings(self) -> Callable[[torch.Tensor], torch.Tensor]:
        head = self._copy.get_output_embeddings()

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            whole = head(hidden)
            return ((1 - self.share) * whole.softmax(-1) + self.share / whole.shape[-1]).log()

        return logits


class Rounded(Engine):
    """Its matrices are rounded to 4 bits, by one scale each."""

    largest = 2**3 - 1

    def read_weights(self, model: PreTrainedModel) -> None:
        super().read_weights(model)
        with torch.no_grad():
            for weight in self._copy.parameters():
                if weight.dim() > 1:
                    scale = weight.abs().amax() / self.largest
                    weight.copy_((weight / scale).round() * scale)


ENGINES: dict[str, type[Engine]] = {"stale": Stale, "broken": Broken, "rounded": Rounded}
