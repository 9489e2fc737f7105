"""Returns and advantages: from rewards to the number A that multiplies the log-probability of a token (or sequence).

| function            | A                                                           | use it                                   |
|---------------------|-------------------------------------------------------------|------------------------------------------|
| reward_to_go        | G_t = sum_{k>=t} gamma^(k-t) r_k                            | with dense rewards, or under a baseline  |
| value_baseline, gae | G_t - V(s_t), and its lambda-weighted form                  | with a value model                       |
| grpo, rloo          | (R - mean) / std, or R - mean, over the samples of a prompt | with several samples per prompt          |
| reinforce_plus_plus | (R - mean) / std over the batch                             | with one sample a prompt, similar tasks  |
| gigpo               | grpo of episodes + w (grpo of steps from equal states)      | in environments whose states recur       |
| vineppo             | r_i + V(s_{i+1}) - V(s_i) per step, V from fresh rollouts   | where credit is worth K rollouts a step  |

Why a baseline may contain the sample's own reward: the mean over B samples contains R_i / B, and its other terms do not depend
on sample i's actions. So R_i - mean has the expected gradient of (1 - 1/B) R_i: the exact one times (B - 1) / B, without bias.
`rloo` leaves R_i out and needs no factor. Dividing by the std does bias: the std depends on the action, and it multiplies.

Rules of all functions:
ids: integers in any order. Groups may have any size and need not be contiguous.
layout: sequences are (B, T) with a mask, or packed (N,) with sequence_ids. The tokens of a sequence are in order; tokens of
    others may stand between them.
mask: masked values never reach the arithmetic and get 0. Masking equals deleting.
results: constants, float64 if an input is, else float32; integers and bools are converted. Empty in, empty out.
statistics: two-pass, in float64. Equal rewards give exactly 0, whatever the rounding of their mean.
singleton: a group of one has no baseline. It gets 0, or is an error with "raise". (Some frameworks return the raw reward.)
nan: with "propagate" (and in functions without this keyword) all that depends on a NaN reward is NaN. With "raise" it is an
    error. With "ignore" it counts in no statistic and gets 0 (as in TRL). Rewards that are all NaN are always an error.
errors: arguments that do not fit raise a TypeError or ValueError with the argument's name, before any work.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeAlias

import torch

from .validation import check_mask, kind, require

OnSingleton = Literal["zero", "raise"]
OnNaN = Literal["propagate", "raise", "ignore"]

# ---- returns, and advantages over time


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
    rewards = _real("rewards", rewards)
    _check_layout("rewards", rewards, mask, sequence_ids)
    _check_numbers(1, gamma=gamma)
    positions, sequence = _kept(rewards, mask, sequence_ids)
    kept = rewards.flatten()[positions]
    _check_scored("rewards", kept)
    return _placed(_discounted_sums(kept, sequence, gamma), positions, rewards.shape)


def discount_weights(
    mask: torch.Tensor, *, gamma: float, sequence_ids: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """gamma^t, t the number of kept positions before this one in its sequence; 0 where masked. Layouts as in reward_to_go.

    The advantages discount_weights * (G - b) give the exact gradient of the discounted return, for any baseline b that does
    not depend on the action.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where a token counts; got {kind(mask)}")
    _check_layout("mask", mask, None, sequence_ids)
    _check_numbers(1, gamma=gamma)
    positions, sequence = _kept(mask, mask, sequence_ids)
    t = torch.arange(len(sequence), device=mask.device) - torch.searchsorted(sequence, sequence)
    powers = torch.tensor(float(gamma), dtype=torch.float64, device=mask.device) ** t
    return _placed(powers.to(dtype), positions, mask.shape)


def value_baseline(returns: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A = G - V, all of one shape. (Williams 1992; Sutton and Barto, section 13.4)

    Any baseline that does not depend on the action leaves the gradient unbiased. The value of the state removes most variance.
    """
    returns = _real("returns", returns)
    values = _real("values", values, "returns", returns)
    check_mask(mask, "returns", returns)
    keep = torch.ones_like(returns, dtype=torch.bool) if mask is None else mask
    _check_scored("returns", returns[keep])
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
    rewards = _real("rewards", rewards)
    values = _real("values", values, "rewards", rewards)
    _check_layout("rewards", rewards, mask, sequence_ids)
    _check_numbers(1, gamma=gamma, lam=lam)
    zeros = rewards.new_zeros(rewards.shape[:1])
    bootstrap = zeros if bootstrap is None else _real("bootstrap", bootstrap, "rewards, without T if they are (B, T)", zeros)
    positions, sequence = _kept(rewards, mask, sequence_ids)
    reward, value = rewards.flatten()[positions], values.flatten()[positions]
    _check_scored("rewards", reward)
    beyond = bootstrap[positions // rewards.shape[1] if sequence_ids is None else positions]
    last = torch.ones_like(sequence, dtype=torch.bool)
    last[:-1] = sequence[1:] != sequence[:-1]
    delta = reward + float(gamma) * torch.where(last, beyond, value.roll(-1)) - value
    return _placed(_discounted_sums(delta, sequence, gamma * lam), positions, rewards.shape)


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
    step_rewards = _real("step_rewards", step_rewards)
    step_values = _real("step_values", step_values, "step_rewards", step_rewards)
    _check_layout("step_rewards", step_rewards, mask, sequence_ids)
    _check_scored("step_rewards", step_rewards if mask is None else step_rewards[mask])
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
    _check_options(batched=batched)
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
    step_advantages = _real("step_advantages", step_advantages)
    _check_ids("step_ids", step_ids)
    check_mask(mask, "step_ids", step_ids)
    by_row = step_advantages.dim() == step_ids.dim() == 2 and len(step_advantages) == len(step_ids)
    if step_advantages.dim() != 1 and not by_row:
        got = f"{tuple(step_advantages.shape)} with {tuple(step_ids.shape)}"
        raise ValueError(f"step_advantages must be (S,), or (B, I) with step_ids (B, T); got {got}")
    _check_like("step_ids", step_ids, "step_advantages", step_advantages, same_shape=False)
    steps = step_advantages.shape[-1]
    keep = torch.ones_like(step_ids, dtype=torch.bool) if mask is None else mask
    known = ((step_ids >= 0) & (step_ids < steps)) | ~keep
    wanted = f"in [0, {steps}), the steps of step_advantages (mask tokens that belong to none)"
    require(known, lambda: f"step_ids must be {wanted}; got {step_ids[~known][0].item()}")
    before = steps * torch.arange(len(step_ids), device=step_ids.device)[:, None] if by_row else 0
    result = step_advantages.new_zeros(step_ids.shape)
    result[keep] = step_advantages.flatten()[(step_ids.long() + before)[keep]]
    return result


# ---- advantages over groups


def grpo(
    rewards: torch.Tensor,  # (B,)
    group_ids: torch.Tensor,  # (B,)
    *,
    scale: bool = True,
    unbiased: bool = True,
    eps: float = 1e-6,
    singleton: OnSingleton = "zero",
    nan: OnNaN = "propagate",
) -> torch.Tensor:
    """A = (R - mean) / (std + eps) over the samples of one prompt. (DeepSeekMath, arXiv 2402.03300, section 4.1)

    scale=False: A = R - mean (Dr.GRPO, arXiv 2503.20783; its loss is "sum" with a constant denominator).
    unbiased: the std divides by n - 1 (TRL, verl, slime), or else by n (numpy's default; open-instruct).
    eps: 1e-6 in verl and slime, 1e-4 in TRL, 1e-8 in open-instruct. Some use max(std, eps) or sqrt(var + eps): for nearly equal
        rewards the advantages then differ by orders of magnitude.
    """
    rewards = _real("rewards", rewards)
    _check_ids("group_ids", group_ids, "rewards", rewards)
    _check_numbers(sys.float_info.max, eps=eps)
    _check_options(singleton, nan, scale=scale, unbiased=unbiased)
    counted = _counted("rewards", rewards, None, nan)
    return _in_groups(rewards, counted, "group_ids", group_ids, _standardised(scale, unbiased, eps), singleton)


def rloo(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, singleton: OnSingleton = "zero", nan: OnNaN = "propagate"
) -> torch.Tensor:
    """A_i = R_i - mean of the others in its group = n / (n - 1) (R_i - mean), unbiased; all (B,). (RLOO, arXiv 2402.14740)"""
    rewards = _real("rewards", rewards)
    _check_ids("group_ids", group_ids, "rewards", rewards)
    _check_options(singleton, nan)
    counted = _counted("rewards", rewards, None, nan)

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
    rewards = _real("rewards", rewards)
    per_token = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[:1] == rewards.shape
    check_mask(mask, "rewards", rewards[:, None].expand(mask.shape) if per_token else rewards)
    _check_numbers(sys.float_info.max, eps=eps)
    _check_options(singleton, nan, whiten=whiten, unbiased=unbiased)
    counted = _counted("rewards", rewards, None if per_token else mask, nan)
    if group_ids is not None:
        _check_ids("group_ids", group_ids, "rewards", rewards)
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
    episode_rewards, step_rewards = _real("episode_rewards", episode_rewards), _real("step_rewards", step_rewards)
    _check_like("step_rewards", step_rewards, "episode_rewards", episode_rewards, same_shape=False)
    _check_ids("group_ids", group_ids, "episode_rewards", episode_rewards)
    _check_ids("episode_ids", episode_ids, "step_rewards", step_rewards)
    _check_numbers(1, gamma=gamma)
    _check_numbers(sys.float_info.max, step_weight=step_weight, eps=eps)
    _check_options(singleton, nan, scale=scale, unbiased=unbiased)
    _check_keys(anchor_keys, len(step_rewards))
    episode = _places(episode_ids, episodes, episode_rewards)
    counted_episodes = _counted("episode_rewards", episode_rewards, None, nan)
    _counted("step_rewards", step_rewards, None, nan)

    formula = _standardised(scale, unbiased, eps)
    of_episodes = _in_groups(episode_rewards, counted_episodes, "group_ids", group_ids, formula, singleton)
    returns = reward_to_go(step_rewards, gamma=gamma, sequence_ids=episode_ids)
    counted = ~returns.isnan() | (nan != "ignore")
    numbered: dict[Hashable, int] = {}
    states = [numbered.setdefault(key, len(numbered)) for key in zip(group_ids[episode].tolist(), anchor_keys, strict=True)]
    state_ids = torch.tensor(states, dtype=torch.int64, device=returns.device)
    of_steps = _in_groups(returns, counted, "anchor_keys", state_ids, formula, "zero")
    return of_episodes[episode] + step_weight * of_steps


# ---- sums over time


def _kept(like: torch.Tensor, mask: torch.Tensor | None, ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept tokens' positions in like.flatten() and their sequence ids, sequence after sequence, each in order."""
    if ids is None:
        ids = torch.arange(len(like), device=like.device)[:, None].expand(like.shape)
    keep = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
    positions = keep.flatten().nonzero()[:, 0]
    sequence, order = ids.flatten()[positions].sort(stable=True)
    return positions[order], sequence


def _placed(values: torch.Tensor, positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
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


# ---- statistics of groups

# (samples minus the mean of their group, the sum of their squares in the group, the group's size) -> advantages; all float64
_Formula: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _standardised(scale: bool, unbiased: bool = True, eps: float = 0.0) -> _Formula:
    def formula(centred: torch.Tensor, squares: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        std = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
        return centred / (std + eps) if scale else centred

    return formula


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
    return _placed(result.to(values.dtype), positions, values.shape)


# ---- checks


def _real(name: str, value: torch.Tensor, like_name: str = "", like: torch.Tensor | None = None) -> torch.Tensor:
    """The value as a constant: float64 stays, all else becomes float32. Checks that it has the shape of `like`, if given."""
    if not isinstance(value, torch.Tensor) or value.is_complex():
        raise TypeError(f"{name} must be a tensor of real numbers; got {kind(value)}")
    if like is not None:
        _check_like(name, value, like_name, like)
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _check_like(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor, same_shape: bool = True) -> None:
    if same_shape and value.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {like_name}, {tuple(like.shape)}; got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}")


def _check_ids(name: str, ids: torch.Tensor, like_name: str = "", like: torch.Tensor | None = None) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} must be a tensor of integers; got {kind(ids)}")
    if like is not None:
        if like.dim() != 1:
            raise ValueError(f"{like_name} must be (n,) where {name} are, one number per id; got shape {tuple(like.shape)}")
        _check_like(name, ids, like_name, like)


def _check_layout(name: str, like: torch.Tensor, mask: torch.Tensor | None, sequence_ids: torch.Tensor | None) -> None:
    check_mask(mask, name, like)
    if sequence_ids is not None:
        _check_ids("sequence_ids", sequence_ids, name, like)
    elif like.dim() != 2:
        raise ValueError(f"{name} must be (B, T), or packed (N,) with sequence_ids= (N,); got shape {tuple(like.shape)} alone")


def _check_numbers(most: float, **given: float) -> None:
    for name, value in given.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"{name} must be a number {'in [0, 1]' if most == 1 else '>= 0 and finite'}; got {value!r}")


def _check_options(singleton: OnSingleton = "zero", nan: OnNaN = "propagate", **flags: bool) -> None:
    options = {"singleton": (singleton, "zero", "raise"), "nan": (nan, "propagate", "raise", "ignore")}
    for name, (value, *choices) in (options | {name: (flag, True, False) for name, flag in flags.items()}).items():
        if type(value) is not type(choices[0]) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _check_scored(name: str, kept: torch.Tensor) -> None:
    some = ~kept.isnan().all() | (kept.numel() == 0)
    require(some, lambda: f"{name} must not all be NaN: nothing was scored. Check the reward function, or skip this batch")


def _counted(name: str, rewards: torch.Tensor, mask: torch.Tensor | None, nan: OnNaN) -> torch.Tensor:
    """A bool tensor like rewards: which of them enter the statistics."""
    keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    _check_scored(name, rewards[keep])
    scored = ~rewards.isnan()
    if nan == "raise":
        holds = scored | ~keep
        remedy = 'give it a number, or take nan="ignore" to leave it out'
        require(holds, lambda: f"{name} must not be NaN; it is at {tuple((~holds).nonzero()[0].tolist())}: {remedy}")
    return keep & scored if nan == "ignore" else keep


def _check_keys(keys: Sequence[Hashable], count: int) -> None:
    if isinstance(keys, torch.Tensor) or not hasattr(keys, "__len__"):
        raise TypeError(f"anchor_keys must be a sequence of hashable keys, such as a list of strings; got {kind(keys)}")
    if len(keys) != count:
        raise ValueError(f"anchor_keys must have one key per step, {count} as in step_rewards; got {len(keys)}")
    for i, key in enumerate(keys):
        try:
            usable = hash(key) is not None and not isinstance(key, torch.Tensor)  # tensors hash by identity: never equal
        except TypeError:
            usable = False
        if not usable:
            raise TypeError(f"anchor_keys must be hashable by value (tuples, .tobytes()); got {type(key).__name__} at {i}")


def _places(episode_ids: torch.Tensor, episodes: torch.Tensor | None, episode_rewards: torch.Tensor) -> torch.Tensor:
    """The index in episode_rewards of each step's episode."""
    places = torch.arange(len(episode_rewards), device=episode_rewards.device)
    episodes = places if episodes is None else episodes
    _check_ids("episodes", episodes, "episode_rewards", episode_rewards)
    names, inverse = torch.unique(torch.cat([episodes.long(), episode_ids.long()]), return_inverse=True)
    place_of = torch.full_like(names, -1)
    place_of[inverse[: len(places)]] = places
    found = place_of[inverse[len(places) :]]
    require((place_of >= 0).sum() == len(places), lambda: "episodes must list every id once; got one twice")
    wanted = f"in episodes= (by default 0 to {len(places) - 1}, places in episode_rewards)"
    require(found >= 0, lambda: f"episode_ids must be {wanted}; got {episode_ids[found < 0][0].item()}")
    return found
