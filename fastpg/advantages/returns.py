"""Returns, and advantages over time: sums over the positions of a sequence."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..validation import check_mask, kind, require
from .checks import check_ids, check_layout, check_like, check_numbers, check_options, check_scored, real


def reward_to_go(
    rewards: torch.Tensor,  # (B, T), or (N,) with sequence_ids
    mask: torch.Tensor | None = None,  # like rewards
    *,
    gamma: float = 1.0,  # in [0, 1]
    sequence_ids: torch.Tensor | None = None,  # (N,)
) -> torch.Tensor:
    """G_t = sum_{k>=t} gamma^(k-t) r_k over the kept positions of t's sequence. (Sutton and Barto, section 3.3)

    The exponent counts kept steps: k - t is the number of kept positions from t to k, as if the others were deleted.

    With reduction "seq-mean-token-sum", `logp G` is REINFORCE. For gamma < 1 this is common practice, but it is not the
    gradient of E[sum_t gamma^t r_t]. That one weights step t by gamma^t as well: `discount_weights(...) * G`.
    """
    rewards = real("rewards", rewards)
    check_layout("rewards", rewards, mask, sequence_ids)
    check_numbers(1, gamma=gamma)
    positions, sequence = _kept(rewards, mask, sequence_ids)
    kept = rewards.flatten()[positions]
    check_scored("rewards", kept)
    return placed(_discounted_sums(kept, sequence, gamma), positions, rewards.shape)


def discount_weights(
    mask: torch.Tensor, *, gamma: float, sequence_ids: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """gamma^t, t the number of kept positions before this one in its sequence; 0 where masked. Layouts as in reward_to_go.

    The advantages discount_weights * (G - b) give the exact gradient of the discounted return, for any baseline b that does
    not depend on the action.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where a token counts; got {kind(mask)}")
    check_layout("mask", mask, None, sequence_ids)
    check_numbers(1, gamma=gamma)
    positions, sequence = _kept(mask, mask, sequence_ids)
    t = torch.arange(len(sequence), device=mask.device) - torch.searchsorted(sequence, sequence)
    powers = torch.tensor(float(gamma), dtype=torch.float64, device=mask.device) ** t
    return placed(powers.to(dtype), positions, mask.shape)


def value_baseline(returns: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A = G - V, all of one shape. (Williams 1992; Sutton and Barto, section 13.4)

    Any baseline that does not depend on the action leaves the gradient unbiased. The value of the state removes most variance.
    """
    returns = real("returns", returns)
    values = real("values", values, "returns", returns)
    check_mask(mask, "returns", returns)
    keep = torch.ones_like(returns, dtype=torch.bool) if mask is None else mask
    check_scored("returns", returns[keep])
    return torch.where(keep, returns - values, 0)


def gae(
    rewards: torch.Tensor,  # (B, T), or (N,) with sequence_ids
    values: torch.Tensor,  # like rewards: V(s_t), of the state before the action
    mask: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap: torch.Tensor | None = None,  # (B,), or (N,) with sequence_ids
    sequence_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """A_t = sum_{k>=t} (gamma lam)^(k-t) delta_k, delta_t = r_t + gamma V(s_{t+1}) - V(s_t). (GAE, arXiv 1506.02438, eq. 16)

    s_{t+1} is the state of the next kept position: masked ones are skipped (OpenRLHF and SkyRL read V there). After the last
    position V is 0, or `bootstrap`: the value of the state in which a sequence was cut off, 0 for sequences that ended. It
    has one value per row; in packed form one per token, read at the last kept token of each sequence.
    lam = 1 is reward-to-go minus V, lam = 0 a single step; between them bias is traded for variance. Nothing is whitened.
    """
    rewards = real("rewards", rewards)
    values = real("values", values, "rewards", rewards)
    check_layout("rewards", rewards, mask, sequence_ids)
    check_numbers(1, gamma=gamma, lam=lam)
    zeros = rewards.new_zeros(rewards.shape[:1])
    bootstrap = zeros if bootstrap is None else real("bootstrap", bootstrap, "rewards, without T if they are (B, T)", zeros)
    positions, sequence = _kept(rewards, mask, sequence_ids)
    reward, value = rewards.flatten()[positions], values.flatten()[positions]
    check_scored("rewards", reward)
    beyond = bootstrap[positions // rewards.shape[1] if sequence_ids is None else positions]
    last = torch.ones_like(sequence, dtype=torch.bool)
    last[:-1] = sequence[1:] != sequence[:-1]
    delta = reward + float(gamma) * torch.where(last, beyond, value.roll(-1)) - value
    return placed(_discounted_sums(delta, sequence, gamma * lam), positions, rewards.shape)


def vineppo(
    step_rewards: torch.Tensor,  # (B, I), or (S,) with sequence_ids
    step_values: torch.Tensor,  # like step_rewards: V(s_i), at the start of step i
    mask: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    sequence_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """A_i = r_i + gamma V(s_{i+1}) - V(s_i); the value after the last step is 0. (VinePPO, arXiv 2410.01679, section 4)

    V is from `monte_carlo_values`, and `spread` gives a step's advantage to its tokens. gamma is 1 in the paper. The authors'
    code then whitens over tokens, as reinforce_plus_plus(unbiased=False). For a cut-off episode use gae, lam=0 and bootstrap.
    """
    step_rewards = real("step_rewards", step_rewards)
    step_values = real("step_values", step_values, "step_rewards", step_rewards)
    check_layout("step_rewards", step_rewards, mask, sequence_ids)
    check_scored("step_rewards", step_rewards if mask is None else step_rewards[mask])
    return gae(step_rewards, step_values, mask, gamma=gamma, lam=0.0, sequence_ids=sequence_ids)


def monte_carlo_values(
    rollout: Callable[[Any], Any], states: Sequence[Any], k: int, *, batched: bool = False, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """V(s) = mean return of k fresh rollouts from s, for each state: (len(states),). A state may be a prompt plus steps so far.

    rollout: maps a state to one number, the sum of the rewards from there on (not those before). Called k times per state.
    batched: rollout is called once, with a list of k * len(states) states, k copies in a row, and returns as many numbers.
    """
    if not callable(rollout):
        raise TypeError(f"rollout must be a function from a state to its return; got {kind(rollout)}")
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a positive integer, the number of rollouts per state; got {k!r}")
    check_options(batched=batched)
    starts = [state for state in states for _ in range(k)]
    returns = list(rollout(starts)) if batched and starts else [rollout(state) for state in starts]
    if len(returns) != len(starts):
        raise ValueError(f"rollout must return a number per state, {len(starts)}, with batched=True; got {len(returns)}")
    for value in returns:
        if not isinstance(value, numbers.Real) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
            raise TypeError(f"rollout must return a number, the return from the state on; got {kind(value)}")
    return torch.tensor([float(value) for value in returns], dtype=torch.float64).reshape(-1, k).mean(1).to(dtype)


def spread(step_advantages: torch.Tensor, step_ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Gives every token the advantage of its step: step_advantages[step_ids], 0 where masked; the shape of step_ids.

    step_advantages: (S,) with step_ids of any shape, or (B, I) with step_ids (B, T).
    step_ids: the step of each token, counted from 0 (within its row for (B, I)); not read where masked. If the bool tensor
        `first` marks the first token of every step, they are first.cumsum(-1) - 1.
    """
    step_advantages = real("step_advantages", step_advantages)
    check_ids("step_ids", step_ids)
    check_mask(mask, "step_ids", step_ids)
    by_row = step_advantages.dim() == step_ids.dim() == 2 and len(step_advantages) == len(step_ids)
    if step_advantages.dim() != 1 and not by_row:
        got = f"{tuple(step_advantages.shape)} with {tuple(step_ids.shape)}"
        raise ValueError(f"step_advantages must be (S,), or (B, I) with step_ids (B, T); got {got}")
    check_like("step_ids", step_ids, "step_advantages", step_advantages, same_shape=False)
    steps = step_advantages.shape[-1]
    keep = torch.ones_like(step_ids, dtype=torch.bool) if mask is None else mask
    known = ((step_ids >= 0) & (step_ids < steps)) | ~keep
    wanted = f"in [0, {steps}), the steps of step_advantages (mask tokens that belong to none)"
    require(known, lambda: f"step_ids must be {wanted}; got {step_ids[~known][0].item()}")
    before = steps * torch.arange(len(step_ids), device=step_ids.device)[:, None] if by_row else 0
    result = step_advantages.new_zeros(step_ids.shape)
    result[keep] = step_advantages.flatten()[(step_ids.long() + before)[keep]]
    return result


# ---- sums over time


def _kept(like: torch.Tensor, mask: torch.Tensor | None, ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept tokens' positions in like.flatten() and their sequence ids, sequence after sequence, each in order."""
    if ids is None:
        ids = torch.arange(len(like), device=like.device)[:, None].expand(like.shape)
    keep = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
    positions = keep.flatten().nonzero()[:, 0]
    sequence, order = ids.flatten()[positions].sort(stable=True)
    return positions[order], sequence


def placed(values: torch.Tensor, positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    result = values.new_zeros(shape.numel())
    result[positions] = values
    return result.reshape(shape)


def _discounted_sums(x: torch.Tensor, sequence: torch.Tensor, factor: float) -> torch.Tensor:
    """y_t = sum_{k>=t} factor^(k-t) x_k over each run of equal ids, in log2(longest run) passes. (factor^-t would overflow.)"""
    reach = 1
    while factor and reach < len(x) and bool((same := sequence[reach:] == sequence[:-reach]).any()):
        x = torch.cat([x[:-reach] + torch.where(same, x[reach:], 0) * float(factor) ** reach, x[-reach:]])
        reach *= 2  # x_t is now the sum over positions t to t + reach - 1 of its run
    return x
