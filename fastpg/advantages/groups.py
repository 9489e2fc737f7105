"""Advantages over groups: a reward beside those of other samples of its prompt, its state or its batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeAlias

import torch

from ..validation import check_mask, require
from .checks import (
    OnNaN,
    OnSingleton,
    check_ids,
    check_keys,
    check_like,
    check_numbers,
    check_options,
    places_of,
    real,
    which_count,
)
from .returns import placed, reward_to_go


def grpo(
    rewards: torch.Tensor,  # (B,)
    group_ids: torch.Tensor,  # (B,)
    *,
    scale: bool = True,
    std: Literal["group", "batch"] = "group",
    unbiased: bool = True,
    eps: float = 1e-6,
    singleton: OnSingleton = "zero",
    nan: OnNaN = "propagate",
) -> torch.Tensor:
    """A = (R - mean) / (std + eps) over the samples of one prompt. (DeepSeekMath, arXiv 2402.03300, section 4.1)

    scale=False: A = R - mean (Dr.GRPO, arXiv 2503.20783; its loss is "sum" with a constant denominator).
    std: "batch" divides by the std of all rewards around their common mean, which is one number for all prompts: a prompt whose
        samples are nearly alike then has small advantages (Lite PPO, arXiv 2508.08221; TRL's scale_rewards="batch"). The mean
        stays that of the prompt. All rewards that count enter this std, those of groups of one too; a NaN spoils all prompts
        whose samples differ. Under data parallelism gather the rewards first. AReaL's std_level="batch" takes the std around
        the prompts' means: reinforce_plus_plus with group_ids.
    unbiased: the std divides by n - 1 (TRL, verl, slime), or else by n (numpy's default; open-instruct).
    eps: 1e-6 in verl and slime, 1e-4 in TRL, 1e-8 in open-instruct. Some use max(std, eps) or sqrt(var + eps): for nearly equal
        rewards the advantages then differ by orders of magnitude.
    """
    rewards = real("rewards", rewards)
    check_ids("group_ids", group_ids, "rewards", rewards)
    check_numbers(sys.float_info.max, eps=eps)
    check_options(singleton, nan, scale=scale, unbiased=unbiased)
    if std not in ("group", "batch"):
        raise ValueError(f'std must be "group" or "batch", whose std the advantages are divided by; got {std!r}')
    if std == "batch" and not scale:
        raise ValueError('std="batch" was given with scale=False, which divides by no std; leave one of them out')
    counted = which_count("rewards", rewards, None, nan)
    formula = _standardised(scale, unbiased, eps)
    if std == "batch":
        formula = _over_std(_std(rewards[counted], unbiased), eps)
    return _in_groups(rewards, counted, "group_ids", group_ids, formula, singleton)


def rloo(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, singleton: OnSingleton = "zero", nan: OnNaN = "propagate"
) -> torch.Tensor:
    """A_i = R_i - mean of the others in its group = n / (n - 1) (R_i - mean), unbiased; all (B,). (RLOO, arXiv 2402.14740)"""
    rewards = real("rewards", rewards)
    check_ids("group_ids", group_ids, "rewards", rewards)
    check_options(singleton, nan)
    counted = which_count("rewards", rewards, None, nan)

    def leave_one_out(centred: torch.Tensor, squares: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return centred * count / (count - 1).clamp(min=1)

    return _in_groups(rewards, counted, "group_ids", group_ids, leave_one_out, singleton)


def reinforce_plus_plus(
    rewards: torch.Tensor,  # (B,), or per token (B, T) or (N,)
    *,
    group_ids: torch.Tensor | None = None,  # (B,), for (B,) rewards
    mask: torch.Tensor | None = None,  # like rewards, or (B, T) for (B,) rewards
    whiten: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    singleton: OnSingleton = "zero",
    nan: OnNaN = "propagate",
) -> torch.Tensor:
    """Advantages from the statistics of the whole batch instead of one prompt's group. (REINFORCE++, arXiv 2501.03262)

        whiten=False             A = R - mean, over the batch
        default                  A = (R - mean) / (std + eps), over the batch
        group_ids                A' = R - mean of its group, then A = (A' - mean) / (std + eps) of A' over the batch
        group_ids, whiten=False  A = A' (Dr.GRPO)

    The batch is all kept entries: with (B,) rewards each sequence counts once. The paper whitens over tokens, so that long
    sequences count more. For that, pass the reward-to-go of each token (with its KL penalty), or (B,) rewards with the (B, T)
    mask of the tokens. The latter are copied to the kept tokens after the groups' and before the batch's statistics; the result
    is then (B, T). For packed tokens `spread` the result of whiten=False and whiten that. A NaN spoils the whole batch.
    Under data parallelism gather the rewards first.
    verl has n - 1 and sqrt(var + eps), OpenRLHF n and sqrt(max(var, eps)), ms-swift eps 1e-4.
    """
    rewards = real("rewards", rewards)
    per_token = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[:1] == rewards.shape
    check_mask(mask, "rewards", rewards[:, None].expand(mask.shape) if per_token else rewards)
    check_numbers(sys.float_info.max, eps=eps)
    check_options(singleton, nan, whiten=whiten, unbiased=unbiased)
    counted = which_count("rewards", rewards, None if per_token else mask, nan)
    if group_ids is not None:
        check_ids("group_ids", group_ids, "rewards", rewards)
        rewards = _in_groups(rewards, counted, "group_ids", group_ids, _standardised(False), singleton)
    if per_token:
        rewards, counted = rewards[:, None].expand(mask.shape), mask & counted[:, None]
    if whiten or group_ids is None:
        one = torch.zeros_like(counted, dtype=torch.int64)
        rewards = _in_groups(rewards, counted, "rewards", one, _standardised(whiten, unbiased, eps), "zero")
    return torch.where(counted, rewards, 0)


def gigpo(
    episode_rewards: torch.Tensor,  # (E,)
    step_rewards: torch.Tensor,  # (S,)
    *,
    episode_ids: torch.Tensor,  # (S,): the episode of each step, a place in episode_rewards or an id listed in episodes
    group_ids: torch.Tensor,  # (E,): which episodes share task and start
    anchor_keys: Sequence[Hashable],  # S keys: the state in which each step was taken
    episodes: torch.Tensor | None = None,  # (E,): the episode ids in the order of episode_rewards; default 0 to E - 1
    gamma: float = 1.0,
    step_weight: float = 1.0,
    scale: bool = False,
    unbiased: bool = True,
    eps: float = 1e-6,
    singleton: OnSingleton = "zero",
    nan: OnNaN = "propagate",
) -> torch.Tensor:
    """A = A_episode + step_weight A_step for every step, (S,). (GiGPO, arXiv 2505.10978, eq. 3 and 5 to 8)

        A_episode = (R - mean) / F over the episodes of its group, each counted once
        A_step    = (G - mean) / F over the steps of its group taken in the same state, G_i = sum_k gamma^k r_{i+k}

    F = std + eps with scale=True, else 1 (the default of the authors' code). The steps of an episode are in order. `spread`
    gives the result to tokens.
    anchor_keys: strings, numbers, tuples; arrays as .tobytes(). They are compared by ==, within a group only. If an episode
        visits a state twice, both visits count. A step alone in its state has A_step = 0.
    singleton: for episodes alone in a group. The authors' code gives these their raw reward.
    By default the authors' code counts an episode once per step in A_episode.
    """
    episode_rewards, step_rewards = real("episode_rewards", episode_rewards), real("step_rewards", step_rewards)
    check_like("step_rewards", step_rewards, "episode_rewards", episode_rewards, same_shape=False)
    check_ids("group_ids", group_ids, "episode_rewards", episode_rewards)
    check_ids("episode_ids", episode_ids, "step_rewards", step_rewards)
    check_numbers(1, gamma=gamma)
    check_numbers(sys.float_info.max, step_weight=step_weight, eps=eps)
    check_options(singleton, nan, scale=scale, unbiased=unbiased)
    check_keys(anchor_keys, len(step_rewards))
    episode = places_of(episode_ids, episodes, episode_rewards)
    counted_episodes = which_count("episode_rewards", episode_rewards, None, nan)
    which_count("step_rewards", step_rewards, None, nan)

    formula = _standardised(scale, unbiased, eps)
    of_episodes = _in_groups(episode_rewards, counted_episodes, "group_ids", group_ids, formula, singleton)
    returns = reward_to_go(step_rewards, gamma=gamma, sequence_ids=episode_ids)
    counted = ~returns.isnan() | (nan != "ignore")
    numbered: dict[Hashable, int] = {}
    states = [numbered.setdefault(key, len(numbered)) for key in zip(group_ids[episode].tolist(), anchor_keys, strict=True)]
    state_ids = torch.tensor(states, dtype=torch.int64, device=returns.device)
    of_steps = _in_groups(returns, counted, "anchor_keys", state_ids, formula, "zero")
    return of_episodes[episode] + step_weight * of_steps


# ---- statistics of groups

# (samples minus the mean of their group, the sum of their squares in the group, the group's size) -> advantages; all float64
_Formula: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _standardised(scale: bool, unbiased: bool = True, eps: float = 0.0) -> _Formula:
    def formula(centred: torch.Tensor, squares: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        std = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
        return centred / (std + eps) if scale else centred

    return formula


def _over_std(std: torch.Tensor, eps: float) -> _Formula:
    """The formula that divides by one number for all groups."""
    return lambda centred, squares, count: centred / (std + eps)


def _std(x: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """The std of x (n,), () float64. Sums run in ascending order, so that the order of the samples changes no bit."""
    x = x.double().sort().values
    squares = (x - x.mean()).square().sum()
    return (squares / max(len(x) - int(unbiased), 1)).sqrt()


def _in_groups(
    values: torch.Tensor, counted: torch.Tensor, ids_name: str, ids: torch.Tensor, formula: _Formula, singleton: OnSingleton
) -> torch.Tensor:
    """Applies the formula to the counted values. Exactly 0 for a group of equal values, and for values that are not counted.

    Sums run over each group in ascending order: on a CPU neither the order of the samples nor other groups change a bit.
    """
    positions = counted.flatten().nonzero()[:, 0]
    x = values.flatten()[positions].double()
    names, group, counts = torch.unique(ids.flatten()[positions], return_inverse=True, return_counts=True)
    if singleton == "raise":
        remedy = 'and so no baseline. Sample it again, drop it, or take singleton="zero"'
        require(counts > 1, lambda: f"{ids_name} must have groups of two or more; {names[counts == 1][0]} has one, {remedy}")
    order = x.argsort()
    order = order[group[order].argsort(stable=True)]
    x, group, positions = x[order], group[order], positions[order]
    ends = counts.cumsum(0)
    low, high, count = x[ends - counts][group], x[ends - 1][group], counts[group].double()

    def total(terms: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(counts, dtype=torch.float64).index_add_(0, group, terms)[group]

    centred = x - low - total(x - low) / count
    result = torch.where(low == high, 0, formula(centred, total(centred.square()), count))
    return placed(result.to(values.dtype), positions, values.shape)
