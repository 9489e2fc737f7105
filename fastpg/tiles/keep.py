"""Which tokens of a call count, and how many: the tile op in PyTorch."""

from __future__ import annotations

import torch

from ..kernels.limits import IGNORED_TOKEN
from .structures import Keep, TokenInputs


def keep(given: TokenInputs) -> Keep:
    """Which tokens count and which of these are computed; see `Keep`.

    A token whose advantage times rollout weight is exactly 0 adds nothing to the loss, and is not computed. One with a value of
    NaN or inf is, so that it makes the loss NaN. Advantages, rollout weights, old log-probabilities and the weight are in the
    accumulation dtype: in 16 bits a product may underflow to 0.
    """
    tokens, temperature = given.tokens, given.temperature
    found, computed = tokens != IGNORED_TOKEN, None
    if given.mask is not None:
        found = found & given.mask
    if given.advantages is not None:
        factor = given.advantages
        if given.rollout_weights is not None:
            factor = factor * given.rollout_weights
        nothing = factor == 0
        for other in (given.old_logprobs, given.weight):
            nothing = nothing if other is None else nothing & other.isfinite()
        computed = found & ~nothing
    needed = found if computed is None else computed
    numbers = [found.sum(), needed.sum(), *(tokens.new_zeros(()).long(),) * 4]
    if given.vocab is not None:
        numbers[2] = (found & ((tokens < 0) | (tokens >= given.vocab))).sum()
    if temperature is not None:
        numbers[3] = (found & ~((temperature > 0) & temperature.isfinite())).sum()
    if given.indices is not None:
        numbers[1], numbers[4:] = numbers[1] * 0 + len(given.indices), _faults_of_indices(given.indices, found, needed)
    return Keep(found, computed, torch.stack(numbers))


def _faults_of_indices(indices: torch.Tensor, found: torch.Tensor, needed: torch.Tensor) -> list[torch.Tensor]:
    """The last two numbers of `Keep`."""
    place = indices.clamp(0, max(found.numel() - 1, 0))
    inside = place == indices
    is_good = inside & found.reshape(-1)[place]
    is_good[1:] &= indices[1:] > indices[:-1]
    return [(~is_good).sum(), needed.sum() - (inside & needed.reshape(-1)[place]).sum()]
