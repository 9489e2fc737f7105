"""The choices of the demo's `--advantage` and `--objective`, and the way each estimator gets its inputs from rollouts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from .. import advantages
from ..linear.support import Support
from ..loss.batch_objectives import VESPO, ClipCov, KLCov
from ..loss.objectives import CISPO, GSPO, SAPO, ImportanceWeighted, Objective, PPOClip, Reinforce
from ..loss.trust_regions import DPPOKL, DPPOTV, IcePop

OBJECTIVES: dict[str, Objective] = {
    "cispo": CISPO(ratio_max=5.0),
    "reinforce": Reinforce(),
    "importance-weighted": ImportanceWeighted(),
    "sequence-weighted": ImportanceWeighted("sequence"),
    "trajectory-weighted": ImportanceWeighted("trajectory"),
    "ppo": PPOClip(eps_low=0.2, eps_high=0.28),
    "gspo": GSPO(eps_low=0.2, eps_high=0.2),  # the demo's sequences are too short for the paper's 3e-4
    "sapo": SAPO(),
    "vespo": VESPO(),
    # shares of a batch of few tokens, whose covariances are small
    "clip-cov": ClipCov(eps_low=0.2, eps_high=0.28, fraction=0.02, cov_min=0.5),
    "kl-cov": KLCov(fraction=0.02),
    "dppo-tv": DPPOTV(),
    "dppo-kl": DPPOKL(),
    "icepop": IcePop(),
}


class Rollouts(NamedTuple):
    """B rows, each a completion of a prompt and a step of an episode. Where answers take one step, a row is a whole episode.

    Rows of an episode are in order. Episodes that began in the same state form a group.
    """

    prompts: torch.Tensor  # (B, L), or (P, L) where B / P consecutive rows share one; all of one length
    tokens: torch.Tensor  # (B, T); tokens after a stop token are padding
    mask: torch.Tensor  # (B, T) bool, True up to and including the stop token
    hidden: torch.Tensor  # (B, T, H) of the policy that sampled; hidden[:, t] predicts tokens[:, t]
    rewards: torch.Tensor  # (B,), one for each row
    episodes: torch.Tensor  # (B,) int64, the row's episode
    groups: torch.Tensor  # (E,) int64, the episode's group
    states: list[Hashable]  # of each row
    support: Support | None = None  # B T sets of tokens that could be drawn; None: the whole vocabulary everywhere

    def support_of(self, rows: torch.Tensor) -> Support | None:
        """The sets of the tokens in some rows."""
        if self.support is None:
            return None
        places = torch.arange(self.tokens.numel(), device=self.tokens.device).view_as(self.tokens)
        return self.support.select(places[rows])

    def episode_rewards(self) -> torch.Tensor:
        """(E,): the total reward of each episode."""
        return self.rewards.new_zeros(len(self.groups)).index_add(0, self.episodes, self.rewards)


class Critic:
    """A value model V(s) = w . hidden + b, s the state before an action. It is fitted to the returns that followed."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self.linear = torch.nn.Linear(hidden_size, 1, device=device)
        self.optimizer = torch.optim.Adam(self.linear.parameters(), lr=1e-2)

    @torch.no_grad()
    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (...)"""
        return self.linear(hidden.float())[..., 0]

    def fit(self, hidden: torch.Tensor, returns: torch.Tensor, steps: int = 10) -> None:
        for _ in range(steps):
            loss = (self.linear(hidden.float())[..., 0] - returns).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Context(NamedTuple):
    """Inputs of the estimators beside the rollouts."""

    critic: Critic
    state_values: Callable[[list[Hashable]], torch.Tensor] | None  # by fresh rollouts from each; None if that is impossible
    generator: torch.Generator  # on the device of the rollouts


# (rollouts, context) -> advantages of the rows (B,), or of their tokens (B, T)
Estimator = Callable[[Rollouts, Context], torch.Tensor]


def _of_episodes(estimate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Estimator:
    """An estimator that compares whole episodes: each row gets its episode's advantage."""
    return lambda rollouts, context: estimate(rollouts.episode_rewards(), rollouts.groups)[rollouts.episodes]


def shuffled(rollouts: Rollouts, context: Context) -> torch.Tensor:
    """A control: the advantages of `group`, shuffled over the rows."""
    dealt = ESTIMATORS["group"](rollouts, context)
    return dealt[torch.randperm(len(dealt), generator=context.generator, device=dealt.device)]


def reward_to_go(rollouts: Rollouts, context: Context) -> torch.Tensor:
    return _by_token(rollouts, lambda rewards, hidden, ids: advantages.reward_to_go(rewards, sequence_ids=ids))


def value(rollouts: Rollouts, context: Context) -> torch.Tensor:
    def estimate(rewards: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        returns = advantages.reward_to_go(rewards, sequence_ids=ids)
        values = context.critic.values(hidden)  # from a critic that has not seen these returns
        context.critic.fit(hidden, returns)
        return advantages.value_baseline(returns, values)

    return _by_token(rollouts, estimate)


def gae(rollouts: Rollouts, context: Context) -> torch.Tensor:
    def estimate(rewards: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        values = context.critic.values(hidden)
        context.critic.fit(hidden, advantages.reward_to_go(rewards, sequence_ids=ids))
        return advantages.gae(rewards, values, lam=0.95, sequence_ids=ids)

    return _by_token(rollouts, estimate)


def _by_token(rollouts: Rollouts, estimate: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Packs the kept tokens of all rows, with episodes as sequences, and puts the results back as (B, T).

    estimate: (rewards (n,), hidden (n, H), sequence_ids (n,)) -> (n,)
    """
    mask = rollouts.mask
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    rewards = torch.where(is_last, rollouts.rewards[:, None], 0.0)[mask]
    episodes = rollouts.episodes[:, None].expand(mask.shape)[mask]
    return rewards.new_zeros(mask.shape).masked_scatter(mask, estimate(rewards, rollouts.hidden[mask], episodes))


def gigpo(rollouts: Rollouts, context: Context) -> torch.Tensor:
    return advantages.gigpo(
        rollouts.episode_rewards(),
        rollouts.rewards,
        episode_ids=rollouts.episodes,
        group_ids=rollouts.groups,
        anchor_keys=[tuple(prompt) for prompt in rollouts.prompts.tolist()],
    )


def vineppo(rollouts: Rollouts, context: Context) -> torch.Tensor:
    values = context.state_values(rollouts.states).to(rollouts.rewards.device)
    steps = advantages.vineppo(rollouts.rewards, values, sequence_ids=rollouts.episodes)
    step_of_token = torch.arange(len(steps), device=steps.device)[:, None].expand(rollouts.mask.shape)
    return advantages.spread(steps, step_of_token, rollouts.mask)


ESTIMATORS: dict[str, Estimator] = {
    "group": _of_episodes(advantages.grpo),
    "dr-grpo": _of_episodes(lambda rewards, groups: advantages.grpo(rewards, groups, scale=False)),
    "rloo": _of_episodes(advantages.rloo),
    "reinforce++": _of_episodes(lambda rewards, groups: advantages.reinforce_plus_plus(rewards)),
    "reinforce++-baseline": _of_episodes(lambda rewards, groups: advantages.reinforce_plus_plus(rewards, group_ids=groups)),
    "reward-to-go": reward_to_go,
    "value": value,
    "gae": gae,
    "gigpo": gigpo,
    "vineppo": vineppo,
    "none": shuffled,
}
NEED_STEPS = ("gigpo", "vineppo")
