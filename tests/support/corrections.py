"""Corrections of a decoupled loss by name, each beside the oracle's formula of (old, rollout, sequence numbers), all (n,)."""

from functools import partial

import torch

from fastpg import rollout


def of_sequences(old, behaviour, numbers):
    """exp(sum d) of each token's sequence, by a loop."""
    weights = torch.zeros_like(old)
    for number in numbers.unique():
        tokens = numbers == number
        weights[tokens] = (old - behaviour)[tokens].sum().exp()
    return weights


def banded(ratio, low, high):
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0)


CORRECTIONS = {
    "plain": (None, None),
    "truncated": (
        partial(rollout.truncated_weights, high=1.3),
        lambda old, behaviour, _: (old - behaviour).exp().clamp(max=1.3),
    ),
    "icepop": (
        partial(rollout.icepop, alpha=0.7, beta=1.4),
        lambda old, behaviour, _: banded((old - behaviour).exp(), 0.7, 1.4),
    ),
    "band": (  # a bool mask
        partial(rollout.within_band, low=0.7, high=1.4),
        lambda old, behaviour, _: (banded((old - behaviour).exp(), 0.7, 1.4) > 0).to(old),
    ),
    "sequence": (partial(rollout.truncated_weights, high=None, level="sequence"), of_sequences),
    "sequence-masked": (
        partial(rollout.masked_weights, low=0.8, high=2.0, level="sequence"),
        lambda *given: banded(of_sequences(*given), 0.8, 2.0),
    ),
    "users-function": (
        lambda old, rollout, mask, sequence_ids: torch.where(mask, 2 - torch.tanh(old - rollout), torch.nan),
        lambda old, behaviour, _: 2 - torch.tanh(old - behaviour),
    ),
}
ZERO_UNSCORED = partial(rollout.truncated_weights, high=None, unscored="zero")
