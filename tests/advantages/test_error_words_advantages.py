"""Every error of fastpg.advantages keeps its type and its words; see `test_error_words`."""

import math

import pytest
import torch
from raising import said

from fastpg.advantages import (
    discount_weights,
    gae,
    gigpo,
    grpo,
    monte_carlo_values,
    reinforce_plus_plus,
    reward_to_go,
    rloo,
    spread,
    value_baseline,
    vineppo,
)

INF, NAN = math.inf, math.nan
ROWS, PACK, MASK = torch.ones(2, 3), torch.ones(6), torch.ones(2, 3, dtype=torch.bool)
REWARDS, GROUPS, IDS = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
HOLE = torch.tensor([1.0, NAN, 3.0, 4.0])


def meta(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device="meta")


def never_rolled(state):
    raise AssertionError("a rollout was made before the error")


def of_gigpo(**changes):
    given = {
        "episode_rewards": torch.tensor([1.0, 2.0]), "step_rewards": torch.ones(4), "episode_ids": GROUPS,
        "group_ids": torch.tensor([0, 0]), "anchor_keys": list("abab"),
    }  # fmt: skip
    return gigpo(**given | changes)


OVER_TIME = {
    "rewards-list": (lambda: reward_to_go([1.0]), "TypeError: rewards must be a tensor of real numbers; got list"),
    "rewards-complex": (
        lambda: reward_to_go(torch.ones(2, 3, dtype=torch.complex64)),
        "TypeError: rewards must be a tensor of real numbers; got torch.complex64",
    ),
    "rewards-packed-alone": (
        lambda: reward_to_go(PACK),
        "ValueError: rewards must be (B, T), or packed (N,) with sequence_ids= (N,); got shape (6,) alone",
    ),
    "rewards-3d": (
        lambda: gae(ROWS[None], ROWS[None]),
        "ValueError: rewards must be (B, T), or packed (N,) with sequence_ids= (N,); got shape (1, 2, 3) alone",
    ),
    "rewards-rows-with-ids": (
        lambda: reward_to_go(ROWS, sequence_ids=IDS),
        "ValueError: rewards must be (n,) where sequence_ids are, one number per id; got shape (2, 3)",
    ),
    "rewards-nan": (
        lambda: reward_to_go(ROWS * NAN),
        "ValueError: rewards must not all be NaN: nothing was scored. Check the reward function, or skip this batch",
    ),
    "rewards-nan-gae": (
        lambda: gae(PACK * NAN, PACK, sequence_ids=IDS),
        "ValueError: rewards must not all be NaN: nothing was scored. Check the reward function, or skip this batch",
    ),
    "rewards-nan-kept": (
        lambda: reward_to_go(torch.tensor([[1.0, NAN]]), torch.tensor([[False, True]])),
        "ValueError: rewards must not all be NaN: nothing was scored. Check the reward function, or skip this batch",
    ),
    "ids-list": (
        lambda: reward_to_go(PACK, sequence_ids=[0] * 6),
        "TypeError: sequence_ids must be a tensor of integers; got list",
    ),
    "ids-float": (
        lambda: gae(PACK, PACK, sequence_ids=PACK),
        "TypeError: sequence_ids must be a tensor of integers; got torch.float32",
    ),
    "ids-bool": (
        lambda: vineppo(PACK, PACK, sequence_ids=IDS.bool()),
        "TypeError: sequence_ids must be a tensor of integers; got torch.bool",
    ),
    "ids-shape": (
        lambda: reward_to_go(PACK, sequence_ids=IDS[:5]),
        "ValueError: sequence_ids must have the shape of rewards, (6,); got (5,)",
    ),
    "ids-device": (
        lambda: reward_to_go(PACK, sequence_ids=IDS.to("meta")),
        "ValueError: sequence_ids is on meta but rewards is on cpu",
    ),
    "mask-int": (
        lambda: reward_to_go(ROWS, MASK.long()),
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.int64 (use mask.bool())",
    ),
    "mask-shape": (lambda: reward_to_go(ROWS, MASK[0]), "ValueError: mask must have the shape of rewards, (2, 3); got (3,)"),
    "mask-device": (lambda: gae(ROWS, ROWS, MASK.to("meta")), "ValueError: mask is on meta but rewards is on cpu"),
    "gamma-large": (lambda: reward_to_go(ROWS, gamma=1.5), "ValueError: gamma must be a number in [0, 1]; got 1.5"),
    "gamma-negative": (lambda: gae(ROWS, ROWS, gamma=-0.1), "ValueError: gamma must be a number in [0, 1]; got -0.1"),
    "gamma-bool": (lambda: vineppo(ROWS, ROWS, gamma=True), "ValueError: gamma must be a number in [0, 1]; got True"),
    "gamma-str": (lambda: discount_weights(MASK, gamma="1"), "ValueError: gamma must be a number in [0, 1]; got '1'"),
    "lam-nan": (lambda: gae(ROWS, ROWS, lam=NAN), "ValueError: lam must be a number in [0, 1]; got nan"),
    "weights-mask-none": (
        lambda: discount_weights(None, gamma=1.0),
        "TypeError: mask must be a bool tensor, True where a token counts; got NoneType",
    ),
    "weights-mask-float": (
        lambda: discount_weights(ROWS, gamma=1.0),
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.float32",
    ),
    "weights-mask-packed": (
        lambda: discount_weights(MASK[0], gamma=1.0),
        "ValueError: mask must be (B, T), or packed (N,) with sequence_ids= (N,); got shape (3,) alone",
    ),
    "returns-none": (lambda: value_baseline(None, ROWS), "TypeError: returns must be a tensor of real numbers; got NoneType"),
    "returns-nan": (
        lambda: value_baseline(ROWS * NAN, ROWS),
        "ValueError: returns must not all be NaN: nothing was scored. Check the reward function, or skip this batch",
    ),
    "returns-mask": (
        lambda: value_baseline(ROWS, ROWS, MASK[:1]),
        "ValueError: mask must have the shape of returns, (2, 3); got (1, 3)",
    ),
    "values-list": (lambda: value_baseline(ROWS, [1.0]), "TypeError: values must be a tensor of real numbers; got list"),
    "values-shape": (
        lambda: value_baseline(ROWS, ROWS[0]),
        "ValueError: values must have the shape of returns, (2, 3); got (3,)",
    ),
    "values-shape-gae": (lambda: gae(ROWS, PACK), "ValueError: values must have the shape of rewards, (2, 3); got (6,)"),
    "values-device": (lambda: gae(ROWS, meta(2, 3)), "ValueError: values is on meta but rewards is on cpu"),
    "bootstrap-list": (
        lambda: gae(ROWS, ROWS, bootstrap=[0.0]),
        "TypeError: bootstrap must be a tensor of real numbers; got list",
    ),
    "bootstrap-shape": (
        lambda: gae(ROWS, ROWS, bootstrap=torch.ones(3)),
        "ValueError: bootstrap must have the shape of rewards, without T if they are (B, T), (2,); got (3,)",
    ),
    "steps-list": (lambda: vineppo([1.0], ROWS), "TypeError: step_rewards must be a tensor of real numbers; got list"),
    "steps-values": (
        lambda: vineppo(ROWS, ROWS[:1]),
        "ValueError: step_values must have the shape of step_rewards, (2, 3); got (1, 3)",
    ),
    "steps-packed-alone": (
        lambda: vineppo(PACK, PACK),
        "ValueError: step_rewards must be (B, T), or packed (N,) with sequence_ids= (N,); got shape (6,) alone",
    ),
    "steps-mask": (
        lambda: vineppo(ROWS, ROWS, MASK[0]),
        "ValueError: mask must have the shape of step_rewards, (2, 3); got (3,)",
    ),
    "steps-nan": (
        lambda: vineppo(ROWS * NAN, ROWS),
        "ValueError: step_rewards must not all be NaN: nothing was scored. Check the reward function, or skip this batch",
    ),
}

STEPS = {
    "rollout-none": (
        lambda: monte_carlo_values(None, [0], 2),
        "TypeError: rollout must be a function from a state to its return; got NoneType",
    ),
    "k-zero": (
        lambda: monte_carlo_values(never_rolled, [0], 0),
        "ValueError: k must be a positive integer, the number of rollouts per state; got 0",
    ),
    "k-float": (
        lambda: monte_carlo_values(never_rolled, [0], 2.0),
        "ValueError: k must be a positive integer, the number of rollouts per state; got 2.0",
    ),
    "k-bool": (
        lambda: monte_carlo_values(never_rolled, [0], True),
        "ValueError: k must be a positive integer, the number of rollouts per state; got True",
    ),
    "batched-int": (
        lambda: monte_carlo_values(never_rolled, [0], 2, batched=1),
        "ValueError: batched must be one of True, False; got 1",
    ),
    "returns-too-few": (
        lambda: monte_carlo_values(lambda states: states[1:], [0, 1], 2, batched=True),
        "ValueError: rollout must return a number per state, 4, with batched=True; got 3",
    ),
    "returns-str": (
        lambda: monte_carlo_values(lambda state: "1", [0], 1),
        "TypeError: rollout must return a number, the return from the state on; got str",
    ),
    "returns-tensor": (
        lambda: monte_carlo_values(lambda state: ROWS, [0], 1),
        "TypeError: rollout must return a number, the return from the state on; got torch.float32",
    ),
    "spread-list": (lambda: spread([1.0], IDS), "TypeError: step_advantages must be a tensor of real numbers; got list"),
    "spread-ids-float": (lambda: spread(REWARDS, PACK), "TypeError: step_ids must be a tensor of integers; got torch.float32"),
    "spread-mask": (lambda: spread(REWARDS, IDS, MASK), "ValueError: mask must have the shape of step_ids, (6,); got (2, 3)"),
    "spread-shapes": (
        lambda: spread(ROWS, IDS),
        "ValueError: step_advantages must be (S,), or (B, I) with step_ids (B, T); got (2, 3) with (6,)",
    ),
    "spread-rows": (
        lambda: spread(ROWS, IDS[None]),
        "ValueError: step_advantages must be (S,), or (B, I) with step_ids (B, T); got (2, 3) with (1, 6)",
    ),
    "spread-device": (lambda: spread(REWARDS, IDS.to("meta")), "ValueError: step_ids is on meta but step_advantages is on cpu"),
    "spread-large": (
        lambda: spread(REWARDS, IDS + 3),
        "ValueError: step_ids must be in [0, 4), the steps of step_advantages (mask tokens that belong to none); got 4",
    ),
    "spread-negative": (
        lambda: spread(ROWS, IDS.view(2, 3) - 2, IDS.view(2, 3) == 1),
        "ValueError: step_ids must be in [0, 3), the steps of step_advantages (mask tokens that belong to none); got -1",
    ),
}

GROUPED = {
    "rewards-list": (lambda: grpo([1.0], GROUPS), "TypeError: rewards must be a tensor of real numbers; got list"),
    "ids-none": (lambda: grpo(REWARDS, None), "TypeError: group_ids must be a tensor of integers; got NoneType"),
    "ids-float": (lambda: rloo(REWARDS, REWARDS), "TypeError: group_ids must be a tensor of integers; got torch.float32"),
    "ids-shape": (lambda: rloo(REWARDS, GROUPS[:3]), "ValueError: group_ids must have the shape of rewards, (4,); got (3,)"),
    "ids-device": (lambda: grpo(REWARDS, GROUPS.to("meta")), "ValueError: group_ids is on meta but rewards is on cpu"),
    "rewards-rows": (
        lambda: grpo(ROWS, IDS.view(2, 3)),
        "ValueError: rewards must be (n,) where group_ids are, one number per id; got shape (2, 3)",
    ),
    "eps-negative": (lambda: grpo(REWARDS, GROUPS, eps=-1e-6), "ValueError: eps must be a number >= 0 and finite; got -1e-06"),
    "eps-inf": (lambda: reinforce_plus_plus(REWARDS, eps=INF), "ValueError: eps must be a number >= 0 and finite; got inf"),
    "singleton": (
        lambda: grpo(REWARDS, GROUPS, singleton="keep"),
        "ValueError: singleton must be one of 'zero', 'raise'; got 'keep'",
    ),
    "nan": (lambda: rloo(REWARDS, GROUPS, nan=None), "ValueError: nan must be one of 'propagate', 'raise', 'ignore'; got None"),
    "scale": (lambda: grpo(REWARDS, GROUPS, scale=1), "ValueError: scale must be one of True, False; got 1"),
    "std": (
        lambda: grpo(REWARDS, GROUPS, std="prompt"),
        'ValueError: std must be "group" or "batch", whose std the advantages are divided by; got \'prompt\'',
    ),
    "std-none": (
        lambda: grpo(REWARDS, GROUPS, std=None),
        'ValueError: std must be "group" or "batch", whose std the advantages are divided by; got None',
    ),
    "std-without-scale": (
        lambda: grpo(REWARDS, GROUPS, std="batch", scale=False),
        'ValueError: std="batch" was given with scale=False, which divides by no std; leave one of them out',
    ),
    "unbiased": (lambda: grpo(REWARDS, GROUPS, unbiased="no"), "ValueError: unbiased must be one of True, False; got 'no'"),
    "whiten": (lambda: reinforce_plus_plus(REWARDS, whiten=None), "ValueError: whiten must be one of True, False; got None"),
    "all-nan": (
        lambda: grpo(REWARDS * NAN, GROUPS),
        "ValueError: rewards must not all be NaN: nothing was scored. Check the reward function, or skip this batch",
    ),
    "one-nan": (
        lambda: grpo(HOLE, GROUPS, nan="raise"),
        'ValueError: rewards must not be NaN; it is at (1,): give it a number, or take nan="ignore" to leave it out',
    ),
    "one-nan-rows": (
        lambda: reinforce_plus_plus(torch.tensor([[1.0, 2.0], [NAN, 3.0]]), nan="raise"),
        'ValueError: rewards must not be NaN; it is at (1, 0): give it a number, or take nan="ignore" to leave it out',
    ),
    "one-nan-masked-before": (
        lambda: reinforce_plus_plus(torch.tensor([NAN, 1.0, NAN]), mask=torch.tensor([False, True, True]), nan="raise"),
        'ValueError: rewards must not be NaN; it is at (2,): give it a number, or take nan="ignore" to leave it out',
    ),
    "alone": (
        lambda: grpo(REWARDS, torch.tensor([0, 0, 7, 0]), singleton="raise"),
        "ValueError: group_ids must have groups of two or more; 7 has one, and so no baseline. Sample it again, drop it, or "
        'take singleton="zero"',
    ),
    "alone-left": (
        lambda: rloo(HOLE, GROUPS, singleton="raise", nan="ignore"),
        "ValueError: group_ids must have groups of two or more; 0 has one, and so no baseline. Sample it again, drop it, or "
        'take singleton="zero"',
    ),
    "batch-mask": (
        lambda: reinforce_plus_plus(REWARDS, mask=MASK),
        "ValueError: mask must have the shape of rewards, (4,); got (2, 3)",
    ),
    "batch-mask-int": (
        lambda: reinforce_plus_plus(REWARDS[:2], mask=MASK.long()),
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.int64 (use mask.bool())",
    ),
    "batch-ids": (
        lambda: reinforce_plus_plus(REWARDS, group_ids=GROUPS[:2]),
        "ValueError: group_ids must have the shape of rewards, (4,); got (2,)",
    ),
}

STATES = {
    "episodes-list": (
        lambda: of_gigpo(episode_rewards=[1.0]),
        "TypeError: episode_rewards must be a tensor of real numbers; got list",
    ),
    "steps-list": (lambda: of_gigpo(step_rewards=[1.0]), "TypeError: step_rewards must be a tensor of real numbers; got list"),
    "steps-device": (
        lambda: of_gigpo(step_rewards=meta(4)),
        "ValueError: step_rewards is on meta but episode_rewards is on cpu",
    ),
    "groups-shape": (
        lambda: of_gigpo(group_ids=GROUPS),
        "ValueError: group_ids must have the shape of episode_rewards, (2,); got (4,)",
    ),
    "episode-ids-float": (
        lambda: of_gigpo(episode_ids=REWARDS),
        "TypeError: episode_ids must be a tensor of integers; got torch.float32",
    ),
    "episode-ids-shape": (
        lambda: of_gigpo(episode_ids=GROUPS[:2]),
        "ValueError: episode_ids must have the shape of step_rewards, (4,); got (2,)",
    ),
    "steps-rows": (
        lambda: of_gigpo(step_rewards=ROWS),
        "ValueError: step_rewards must be (n,) where episode_ids are, one number per id; got shape (2, 3)",
    ),
    "gamma": (lambda: of_gigpo(gamma=2), "ValueError: gamma must be a number in [0, 1]; got 2"),
    "step-weight": (lambda: of_gigpo(step_weight=-1.0), "ValueError: step_weight must be a number >= 0 and finite; got -1.0"),
    "singleton": (lambda: of_gigpo(singleton=True), "ValueError: singleton must be one of 'zero', 'raise'; got True"),
    "keys-none": (
        lambda: of_gigpo(anchor_keys=None),
        "TypeError: anchor_keys must be a sequence of hashable keys, such as a list of strings; got NoneType",
    ),
    "keys-tensor": (
        lambda: of_gigpo(anchor_keys=GROUPS),
        "TypeError: anchor_keys must be a sequence of hashable keys, such as a list of strings; got torch.int64",
    ),
    "keys-few": (
        lambda: of_gigpo(anchor_keys="aba"),
        "ValueError: anchor_keys must have one key per step, 4 as in step_rewards; got 3",
    ),
    "keys-list": (
        lambda: of_gigpo(anchor_keys=["a", [1], "a", "b"]),
        "TypeError: anchor_keys must be hashable by value (tuples, .tobytes()); got list at 1",
    ),
    "keys-of-tensors": (
        lambda: of_gigpo(anchor_keys=[*"aba", ROWS]),
        "TypeError: anchor_keys must be hashable by value (tuples, .tobytes()); got Tensor at 3",
    ),
    "episodes-float": (
        lambda: of_gigpo(episodes=torch.ones(2)),
        "TypeError: episodes must be a tensor of integers; got torch.float32",
    ),
    "episodes-shape": (
        lambda: of_gigpo(episodes=GROUPS),
        "ValueError: episodes must have the shape of episode_rewards, (2,); got (4,)",
    ),
    "episodes-twice": (
        lambda: of_gigpo(episodes=torch.tensor([1, 1])),
        "ValueError: episodes must list every id once; got one twice",
    ),
    "episode-unknown": (
        lambda: of_gigpo(episode_ids=torch.tensor([0, 5, 1, 6])),
        "ValueError: episode_ids must be in episodes= (by default 0 to 1, places in episode_rewards); got 5",
    ),
    "episode-unlisted": (
        lambda: of_gigpo(episodes=torch.tensor([1, 9])),
        "ValueError: episode_ids must be in episodes= (by default 0 to 1, places in episode_rewards); got 0",
    ),
    "episodes-all-nan": (
        lambda: of_gigpo(episode_rewards=torch.full((2,), NAN)),
        "ValueError: episode_rewards must not all be NaN: nothing was scored. Check the reward function, or skip this batch",
    ),
    "episode-nan": (
        lambda: of_gigpo(episode_rewards=torch.tensor([NAN, 1.0]), nan="raise"),
        'ValueError: episode_rewards must not be NaN; it is at (0,): give it a number, or take nan="ignore" to leave it out',
    ),
    "steps-all-nan": (
        lambda: of_gigpo(step_rewards=torch.full((4,), NAN)),
        "ValueError: step_rewards must not all be NaN: nothing was scored. Check the reward function, or skip this batch",
    ),
    "step-nan": (
        lambda: of_gigpo(step_rewards=HOLE, nan="raise"),
        'ValueError: step_rewards must not be NaN; it is at (1,): give it a number, or take nan="ignore" to leave it out',
    ),
    "episode-alone": (
        lambda: of_gigpo(group_ids=torch.tensor([4, 3]), singleton="raise"),
        "ValueError: group_ids must have groups of two or more; 3 has one, and so no baseline. Sample it again, drop it, or "
        'take singleton="zero"',
    ),
}

FIRST = {
    "rewards, mask": (lambda: reward_to_go(None, 1), "TypeError: rewards must be a tensor of real numbers; got NoneType"),
    "mask, layout": (
        lambda: reward_to_go(PACK, [True]),
        "TypeError: mask must be a bool tensor, True where a token counts; got list (use mask.bool())",
    ),
    "layout, gamma": (
        lambda: reward_to_go(PACK, gamma=2),
        "ValueError: rewards must be (B, T), or packed (N,) with sequence_ids= (N,); got shape (6,) alone",
    ),
    "gamma, values": (lambda: reward_to_go(ROWS * NAN, gamma=2), "ValueError: gamma must be a number in [0, 1]; got 2"),
    "gamma, lam": (lambda: gae(ROWS, ROWS, gamma=2, lam=3), "ValueError: gamma must be a number in [0, 1]; got 2"),
    "ids, eps": (lambda: grpo(REWARDS, None, eps=-1), "TypeError: group_ids must be a tensor of integers; got NoneType"),
    "eps, singleton": (
        lambda: grpo(REWARDS, GROUPS, eps=-1, singleton=""),
        "ValueError: eps must be a number >= 0 and finite; got -1",
    ),
    "singleton, nan": (
        lambda: rloo(REWARDS, GROUPS, singleton="", nan=""),
        "ValueError: singleton must be one of 'zero', 'raise'; got ''",
    ),
    "nan, alone": (
        lambda: rloo(HOLE, torch.arange(4), singleton="raise", nan="raise"),
        'ValueError: rewards must not be NaN; it is at (1,): give it a number, or take nan="ignore" to leave it out',
    ),
    "keys, episodes": (
        lambda: of_gigpo(anchor_keys=None, episodes=1),
        "TypeError: anchor_keys must be a sequence of hashable keys, such as a list of strings; got NoneType",
    ),
    "episodes, rewards": (
        lambda: of_gigpo(episode_ids=GROUPS + 2, step_rewards=HOLE, nan="raise"),
        "ValueError: episode_ids must be in episodes= (by default 0 to 1, places in episode_rewards); got 2",
    ),
}

ALL = [
    (f"{table}-{name}", *case)
    for table, cases in {"over time": OVER_TIME, "steps": STEPS, "groups": GROUPED, "states": STATES, "first": FIRST}.items()
    for name, case in cases.items()
]


@pytest.mark.parametrize(("call", "words"), [pytest.param(call, words, id=name) for name, call, words in ALL])
def test_advantages_that_do_not_fit(call, words):
    assert said(call) == words


def test_the_inputs_without_changes_fit():
    assert said(of_gigpo) == said(lambda: grpo(REWARDS, GROUPS)) == said(lambda: spread(REWARDS, IDS)) == "nothing"
    assert said(lambda: gae(PACK, PACK, sequence_ids=IDS)) == said(lambda: vineppo(ROWS, ROWS, MASK)) == "nothing"
