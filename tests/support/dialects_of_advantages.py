"""The advantages of other frameworks, written out in PyTorch: one number per sequence, from rewards of groups in any order."""

import torch


def by_group(formula):
    """formula(rewards of one group), for every group."""

    def advantages(x):
        result = torch.zeros_like(x.rewards)
        for group in x.group_ids.unique():
            result[x.group_ids == group] = formula(x.rewards[x.group_ids == group])
        return result

    return advantages


def trl_group(rewards):
    """trl/trainer/grpo_trainer.py: an unscored sample counts nowhere and gets 0."""
    mean = torch.nanmean(rewards)
    variance = torch.nanmean((rewards - mean) ** 2)
    count = (~rewards.isnan()).sum()
    return torch.nan_to_num((rewards - mean) / ((variance * count / (count - 1)).sqrt() + 1e-4), nan=0.0)


def trl_batch(x):
    """The same file: the mean of a group, and the std of all rewards; nanstd of trl/trainer/utils.py."""
    centred = by_group(lambda r: r - torch.nanmean(r))(x)
    variance, count = torch.nanmean((x.rewards - torch.nanmean(x.rewards)) ** 2), (~x.rewards.isnan()).sum()
    return torch.nan_to_num(centred / ((variance * count / (count - 1)).sqrt() + 1e-4), nan=0.0)


def areal_batch(x):
    """areal/utils/data.py, Normalization with mean_level="group" and std_level="batch"."""
    centred = by_group(lambda r: r - r.mean())(x)
    return centred / ((centred**2).sum() / (len(centred) - 1)).sqrt().add(1e-5)


def verl_gae(x):
    """verl/trainer/ppo/core_algos.py, compute_gae_advantage_return, without its last line, the whitening."""
    mask = x.mask.double()
    next_values, last = 0, 0
    reversed_advantages = []
    for t in reversed(range(mask.shape[1])):
        delta = x.token_rewards[:, t] + x.gamma * next_values - x.values[:, t]
        last = (delta + x.gamma * x.lam * last) * mask[:, t] + (1 - mask[:, t]) * last
        next_values = x.values[:, t] * mask[:, t] + (1 - mask[:, t]) * next_values
        reversed_advantages.append(last)
    return torch.stack(reversed_advantages[::-1], dim=1) * mask


def openrlhf_reinforce(x):
    """openrlhf/trainer/ppo_utils/experience_maker.py: with gamma = 1 and no KL the return of every token is the reward."""
    returns, mask = x.rewards[:, None].expand(x.mask.shape), x.mask.double()
    mean = (returns * mask).sum() / mask.sum()
    variance = ((returns - mean).pow(2) * mask).sum() / mask.sum()
    return (returns - mean) * variance.clamp(min=1e-8).rsqrt() * mask


THEIR_ADVANTAGES = {
    "trl-group": by_group(trl_group),
    "trl-none": by_group(lambda r: r - r.mean()),
    "trl-batch": trl_batch,
    "verl-group": by_group(lambda r: (r - r.mean()) / (r.std() + 1e-6)),
    "verl-rloo": by_group(lambda r: r * len(r) / (len(r) - 1) - r.mean() * len(r) / (len(r) - 1)),
    "verl-gae": verl_gae,
    "openrlhf-group": by_group(lambda r: (r - r.mean()) / (r.std() + 1e-9)),
    "openrlhf-reinforce": openrlhf_reinforce,
    "areal-batch": areal_batch,
    "oi-standard": by_group(lambda r: (r - r.mean()) / (r.std(correction=0) + 1e-8)),
}
