"""Bad input of `fastpg.advantages` raises an error that names the argument."""

import math

import pytest
import torch

from fastpg.advantages import discount_weights, gae, grpo, reinforce_plus_plus, reward_to_go, rloo, value_baseline

INF, NAN = math.inf, math.nan
MASK = torch.ones(4, 6, dtype=torch.bool)
R23, IDS = torch.zeros(2, 3), torch.tensor([0, 1, 1])
BAD = {
    "gamma-negative": (lambda: reward_to_go(R23, gamma=-0.1), ValueError, r"gamma must be a number in \[0, 1\]; got -0.1"),
    "gamma-above-one": (lambda: gae(R23, R23, gamma=1.01), ValueError, r"gamma must be a number in \[0, 1\]; got 1.01"),
    "gamma-nan": (lambda: discount_weights(MASK, gamma=NAN), ValueError, "gamma must be .* got nan"),
    "gamma-tensor": (lambda: reward_to_go(R23, gamma=torch.tensor(0.5)), ValueError, "gamma must be a number"),
    "lam": (lambda: gae(R23, R23, lam=2), ValueError, r"lam must be a number in \[0, 1\]; got 2"),
    "eps-negative": (lambda: grpo(R23[0], IDS, eps=-1e-6), ValueError, "eps must be a number >= 0 and finite; got -1e-06"),
    "eps-infinite": (lambda: reinforce_plus_plus(R23[0], eps=INF), ValueError, "eps must be .* got inf"),
    "rewards-list": (lambda: grpo([1.0, 2.0], IDS), TypeError, "rewards must be a tensor of real numbers; got list"),
    "rewards-complex": (lambda: rloo(torch.ones(3) * 1j, IDS), TypeError, "rewards must be .* got torch.complex64"),
    "rewards-2d": (lambda: grpo(R23, IDS), ValueError, r"rewards must be \(n,\) where group_ids are.* got shape \(2, 3\)"),
    "rewards-packed-alone": (lambda: reward_to_go(torch.zeros(3)), ValueError, r"rewards must be \(B, T\), or packed .*\(3,\)"),
    "rewards-padded-with-ids": (
        lambda: reward_to_go(R23, sequence_ids=IDS),
        ValueError,
        "rewards must be .* where sequence_ids",
    ),
    "ids-shape": (
        lambda: rloo(torch.zeros(2), IDS),
        ValueError,
        r"group_ids must have the shape of rewards, \(2,\); got \(3,\)",
    ),
    "ids-float": (
        lambda: grpo(torch.zeros(3), IDS.float()),
        TypeError,
        "group_ids must be a tensor of integers; got torch.float32",
    ),
    "ids-bool": (lambda: grpo(torch.zeros(3), IDS.bool()), TypeError, "group_ids must be a tensor of integers; got torch.bool"),
    "ids-list": (lambda: grpo(torch.zeros(3), [0, 1, 1]), TypeError, "group_ids must be a tensor of integers; got list"),
    "ids-device": (lambda: grpo(torch.zeros(3), IDS.to("meta")), ValueError, "group_ids is on meta but rewards is on cpu"),
    "sequence-ids": (
        lambda: gae(torch.zeros(2), torch.zeros(2), sequence_ids=IDS),
        ValueError,
        r"sequence_ids must have the shape of rewards, \(2,\)",
    ),
    "group-ids-of-tokens": (
        lambda: reinforce_plus_plus(R23, group_ids=IDS[:2]),
        ValueError,
        "rewards must be .* where group_ids",
    ),
    "values-shape": (
        lambda: gae(R23, torch.zeros(2, 4)),
        ValueError,
        r"values must have the shape of rewards, \(2, 3\); got \(2, 4\)",
    ),
    "values-of-returns": (lambda: value_baseline(R23, torch.zeros(2)), ValueError, "values must have the shape of returns"),
    "bootstrap": (
        lambda: gae(R23, R23, bootstrap=torch.zeros(3)),
        ValueError,
        r"bootstrap must have the shape .*\(2,\); got \(3,\)",
    ),
    "mask-int": (lambda: reward_to_go(R23, torch.ones(2, 3)), TypeError, "mask must be a bool tensor"),
    "mask-shape": (lambda: reinforce_plus_plus(R23, mask=MASK), ValueError, r"mask must have the shape of rewards, \(2, 3\)"),
    "mask-missing": (lambda: discount_weights(None, gamma=1.0), TypeError, "mask must be a bool tensor.* got NoneType"),
    "singleton": (
        lambda: rloo(R23[0], IDS, singleton="skip"),
        ValueError,
        "singleton must be one of 'zero', 'raise'; got 'skip'",
    ),
    "nan": (lambda: grpo(R23[0], IDS, nan="drop"), ValueError, "nan must be one of 'propagate', 'raise', 'ignore'; got 'drop'"),
    "scale": (lambda: grpo(R23[0], IDS, scale="batch"), ValueError, "scale must be one of True, False; got 'batch'"),
    "whiten": (lambda: reinforce_plus_plus(R23[0], whiten=None), ValueError, "whiten must be one of True, False; got None"),
    "group-of-one": (
        lambda: grpo(R23[0], IDS - 9, singleton="raise"),
        ValueError,
        'group_ids must have groups of two or more; -9 has one.*singleton="zero"',
    ),
    "nan-raise": (
        lambda: rloo(torch.tensor([0.0, NAN, 1.0]), IDS, nan="raise"),
        ValueError,
        r'rewards must not be NaN; it is at \(1,\).*nan="ignore"',
    ),
    "all-nan": (lambda: grpo(R23[0] * NAN, IDS, nan="ignore"), ValueError, "rewards must not all be NaN: .*Check the reward"),
    "all-nan-kept": (
        lambda: reward_to_go(torch.tensor([[NAN, 1.0]]), torch.tensor([[True, False]])),
        ValueError,
        "rewards must not all be NaN",
    ),
    "all-nan-returns": (lambda: value_baseline(R23 * NAN, R23), ValueError, "returns must not all be NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
