"""Estimators of multi-step environments, and every estimator's expected gradient by listing all that can happen."""

import functools
import math
import random
import statistics
from itertools import product

import pytest
import torch

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

F64 = torch.float64
NAN = math.nan


def close(actual, wanted, rtol=1e-12, atol=1e-12):
    wanted = wanted if isinstance(wanted, torch.Tensor) else torch.tensor(wanted, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)


# ---- enumeration: a softmax policy over 3 tokens and 3 steps, with other logits and rewards in each of its 13 prefixes

PREFIXES = [p for n in range(3) for p in product(range(3), repeat=n)]
TRAJECTORIES = list(product(range(3), repeat=3))
STATE = torch.tensor([[PREFIXES.index(tau[:t]) for t in range(3)] for tau in TRAJECTORIES])  # (27, 3)
ACTION = torch.tensor(TRAJECTORIES)
_GENERATOR = torch.Generator().manual_seed(1)
LOGITS = torch.randn(13, 3, generator=_GENERATOR, dtype=F64)
REWARD_OF = torch.randn(13, 3, generator=_GENERATOR, dtype=F64) + 1.5
REWARDS = REWARD_OF[STATE, ACTION]  # (27, 3)
RETURN = REWARDS.sum(1)
ON_POLICY = LOGITS.log_softmax(1)[STATE, ACTION].sum(1).exp()  # (27,), the probability of each trajectory

# d log pi(a_t | s_t) / d logits, (27, 3, 13, 3): at the logits of s_t, one at a_t minus the probabilities
SCORE = torch.zeros(27, 3, 13, 3, dtype=F64)
for _i, _t in product(range(27), range(3)):
    SCORE[_i, _t, STATE[_i, _t]] = torch.eye(3, dtype=F64)[ACTION[_i, _t]] - LOGITS.softmax(1)[STATE[_i, _t]]
TRAJECTORY_SCORE = SCORE.sum(1)

every_discount = pytest.mark.parametrize("gamma", [0.5, 1.0])


def exact_gradient(gamma=1.0):
    """Of the sum over all trajectories of their probability times their discounted reward, by autograd."""
    logits = LOGITS.clone().requires_grad_()
    probability = logits.log_softmax(1)[STATE, ACTION].sum(1).exp()
    (probability @ (REWARDS @ torch.tensor([1.0, gamma, gamma**2], dtype=F64))).backward()
    return logits.grad


def gradients(advantages):
    """The estimate of one trajectory, for each of the 27: sum_t A_t d log pi(a_t | s_t)."""
    return torch.einsum("it,itsa->isa", advantages, SCORE)


def expected_gradient(advantages, probability=ON_POLICY):
    return torch.einsum("i,isa->sa", probability, gradients(advantages))


def true_values(gamma):
    """V of each prefix, backwards over the tree."""
    policy = LOGITS.softmax(1)

    @functools.cache
    def value(prefix):
        if len(prefix) == 3:
            return 0.0
        s = PREFIXES.index(prefix)
        return sum(policy[s, a].item() * (REWARD_OF[s, a].item() + gamma * value((*prefix, a))) for a in range(3))

    return torch.tensor([value(p) for p in PREFIXES], dtype=F64)


def discounts(gamma):
    return discount_weights(torch.ones(27, 3, dtype=torch.bool), gamma=gamma, dtype=F64)


@every_discount
def test_discounted_reinforce_is_the_gradient(gamma):
    close(expected_gradient(discounts(gamma) * reward_to_go(REWARDS, gamma=gamma)), exact_gradient(gamma))


def test_reinforce_without_the_discount_of_time_is_biased():
    """gamma^t left out, as usual: right for gamma = 1, and for gamma < 1 not even the gradient's direction."""
    close(expected_gradient(reward_to_go(REWARDS)), exact_gradient())
    usual, exact = expected_gradient(reward_to_go(REWARDS, gamma=0.5)), exact_gradient(0.5)
    assert (usual - exact).norm() > 0.3 * exact.norm()
    assert torch.cosine_similarity(usual.flatten(), exact.flatten(), dim=0) < 0.99


@every_discount
def test_a_baseline_of_the_state_changes_nothing_in_expectation(gamma):
    returns = reward_to_go(REWARDS, gamma=gamma)
    for baseline in (10 * torch.randn(13, dtype=F64), true_values(gamma)):
        advantages = value_baseline(returns, baseline[STATE])
        close(expected_gradient(discounts(gamma) * advantages), exact_gradient(gamma))
    sees_the_action = value_baseline(returns, torch.randn(13, 3, dtype=F64)[STATE, ACTION])
    assert (expected_gradient(discounts(gamma) * sees_the_action) - exact_gradient(gamma)).norm() > 0.1


def test_the_value_lowers_the_variance():
    def variance(advantages):
        deviation = gradients(advantages) - expected_gradient(advantages)
        return (ON_POLICY @ deviation.square().sum((1, 2))).item()

    whole_return = RETURN[:, None].expand(27, 3)
    returns, values = reward_to_go(REWARDS), true_values(1.0)[STATE]
    assert variance(returns) < variance(whole_return)  # rewards of the past are noise
    assert variance(value_baseline(returns, values)) < 0.5 * variance(returns)
    assert variance(gae(REWARDS, values, lam=0.0)) < variance(value_baseline(returns, values))


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@every_discount
def test_gae_and_vineppo_with_the_true_values_are_unbiased(gamma, lam):
    values = true_values(gamma)[STATE]
    close(expected_gradient(discounts(gamma) * gae(REWARDS, values, gamma=gamma, lam=lam)), exact_gradient(gamma))
    close(expected_gradient(discounts(gamma) * vineppo(REWARDS, values, gamma=gamma)), exact_gradient(gamma))


def test_gae_with_wrong_values_is_biased_unless_lambda_is_one():
    values = true_values(1.0)[STATE] + torch.randn(13, dtype=F64)[STATE]
    close(expected_gradient(gae(REWARDS, values)), exact_gradient())
    assert (expected_gradient(gae(REWARDS, values, lam=0.0)) - exact_gradient()).norm() > 0.1


def test_trajectory_weights_turn_old_samples_into_the_exact_gradient():
    """w(tau) = pi / pi_old of the whole trajectory; the ratio of the token alone is not enough."""
    old = torch.randn(13, 3, dtype=F64).log_softmax(1)[STATE, ACTION]
    log_ratio = LOGITS.log_softmax(1)[STATE, ACTION] - old
    sampled, returns = old.sum(1).exp(), reward_to_go(REWARDS)
    assert (expected_gradient(returns, sampled) - exact_gradient()).norm() > 0.1
    close(expected_gradient(log_ratio.sum(1, keepdim=True).exp() * returns, sampled), exact_gradient())
    assert (expected_gradient(log_ratio.exp() * returns, sampled) - exact_gradient()).norm() > 0.1


def expected_gradient_of_groups(estimate, size):
    """Over all 27^size groups of independent trajectories, with their probabilities, in one call of the estimator."""
    members = torch.tensor(list(product(range(27), repeat=size)))  # (27^size, size)
    ids = torch.arange(len(members))[:, None].expand(members.shape)
    advantages = estimate(RETURN[members].flatten(), ids.flatten()).reshape(members.shape)
    weights = ON_POLICY[members].prod(1)[:, None] * advantages / size
    per_trajectory = torch.zeros(27, dtype=F64).index_add_(0, members.flatten(), weights.flatten())
    return torch.einsum("i,isa->sa", per_trajectory, TRAJECTORY_SCORE)


@pytest.mark.parametrize("size", [2, 3])
def test_a_mean_that_includes_the_sample_only_scales_the_gradient(size):
    """By (B - 1) / B, to the last digit; leaving the sample out needs no factor."""
    with_itself = expected_gradient_of_groups(functools.partial(grpo, scale=False), size)
    close(with_itself, (size - 1) / size * exact_gradient())
    close(expected_gradient_of_groups(rloo, size), exact_gradient())


def test_the_mean_of_the_batch_only_scales_the_gradient():
    def batch_by_batch(rewards, ids):
        return torch.cat([reinforce_plus_plus(batch, whiten=False) for batch in rewards.reshape(-1, 2)])

    close(expected_gradient_of_groups(batch_by_batch, 2), exact_gradient() / 2)


@pytest.mark.parametrize("size", [2, 3])
def test_dividing_by_the_std_biases(size):
    """No factor makes it the gradient: the direction is another."""
    normed = expected_gradient_of_groups(grpo, size)
    assert torch.cosine_similarity(normed.flatten(), exact_gradient().flatten(), dim=0) < 0.999


# ---- a walk with known values: from 0 towards the goal at 3, right with probability 0.6, at most 6 steps, never below 0

GOAL, LIMIT, RIGHT = 3, 6, 0.6


def step(position, action):
    """Deterministic: a small cost for every step, 1 at the goal."""
    position = max(0, position + action)
    return position, (1.0 if position == GOAL else -0.05)


def walk(position, left, rng):
    """Positions before each step, and rewards, until the goal or until no step is left."""
    positions, rewards = [], []
    while position != GOAL and left:
        positions.append(position)
        position, reward = step(position, 1 if rng.random() < RIGHT else -1)
        rewards.append(reward)
        left -= 1
    return positions, rewards


@functools.cache
def walk_value(position, left):
    if position == GOAL or not left:
        return 0.0
    outcomes = [(RIGHT, step(position, 1)), (1 - RIGHT, step(position, -1))]
    return sum(p * (r + walk_value(there, left - 1)) for p, (there, r) in outcomes)


def episodes(count, seed=0):
    rng = random.Random(seed)
    return [walk(0, LIMIT, rng) for _ in range(count)]


# ---- VinePPO


def test_vineppo_equals_a_loop():
    """A_i = r_i + V(s_{i+1}) - V(s_i), over ragged episodes, padded and packed; their sum is the return minus V(s_0)."""
    walks = episodes(8)
    longest = max(len(r) for _, r in walks)
    rewards, values = torch.full((2, 8, longest), NAN, dtype=F64)
    mask = torch.zeros(8, longest, dtype=torch.bool)
    wanted = []
    for e, (positions, r) in enumerate(walks):
        v = [walk_value(p, LIMIT - i) for i, p in enumerate(positions)] + [0.0]
        rewards[e, : len(r)], values[e, : len(r)], mask[e, : len(r)] = (
            torch.tensor(r, dtype=F64),
            torch.tensor(v[:-1], dtype=F64),
            True,
        )
        wanted.append([r[i] + v[i + 1] - v[i] for i in range(len(r))])
    wanted_flat = torch.tensor([a for row in wanted for a in row], dtype=F64)
    padded = vineppo(rewards, values, mask)
    close(padded[mask], wanted_flat)
    ids = torch.arange(8)[:, None].expand(mask.shape)[mask]
    assert torch.equal(vineppo(rewards[mask], values[mask], sequence_ids=ids), padded[mask])
    close(padded.sum(1), torch.where(mask, rewards, 0).sum(1) - walk_value(0, LIMIT))


def test_monte_carlo_values_converge_to_the_true_values():
    """Within four standard errors (a return has a std below 0.6), and 16 times the rollouts bring them closer."""
    states = [(0, 6), (1, 5), (2, 4), (2, 1), (0, 2)]
    truth = torch.tensor([walk_value(*s) for s in states], dtype=F64)
    rng = random.Random(0)
    errors = {}
    for k in (250, 4000):
        values = monte_carlo_values(lambda s: sum(walk(*s, rng)[1]), states, k, dtype=F64)
        errors[k] = (values - truth).abs()
        assert (errors[k] < 4 * 0.6 / math.sqrt(k)).all()
    assert errors[4000].max() < 0.5 * errors[250].max()


def test_monte_carlo_values_calls_the_rollout_k_times_per_state():
    calls = []

    def rollout(state):
        calls.append(state)
        return len(calls)

    assert monte_carlo_values(rollout, ["a", "b"], 3).tolist() == [2.0, 5.0]
    assert calls == ["a", "a", "a", "b", "b", "b"]

    def rollouts(states):
        assert states == calls
        return torch.arange(1.0, 7.0)

    assert monte_carlo_values(rollouts, ["a", "b"], 3, batched=True).tolist() == [2.0, 5.0]
    assert monte_carlo_values(rollout, [], 3).shape == monte_carlo_values(rollouts, [], 3, batched=True).shape == (0,)
    assert monte_carlo_values(lambda s: True, [0], 1).dtype == torch.float32


def test_spread_copies_steps_to_tokens():
    advantages = torch.tensor([10.0, 20.0, 30.0])
    first = torch.tensor([0, 1, 0, 0, 1, 0, 1, 0]).bool()  # a token of the prompt, then steps of 3, 2 and 2 tokens
    assert spread(advantages, first.cumsum(0) - 1, torch.arange(8) > 0).tolist() == [0, 10, 10, 10, 20, 20, 30, 30]
    assert spread(advantages, torch.tensor([[2, 2], [0, 1]], dtype=torch.int32)).tolist() == [[30, 30], [10, 20]]


def test_spread_row_by_row():
    advantages = torch.tensor([[1.0, 2.0], [3.0, NAN]])
    ids, mask = torch.tensor([[0, 1, 1, 9], [-1, 0, 0, 7]]), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]]).bool()
    assert spread(advantages, ids, mask).tolist() == [[1, 2, 2, 0], [0, 3, 3, 0]]


# ---- GiGPO


def gigpo_by_loop(walks, group_of, keys, gamma, weight, normed):
    """From the paper's definitions, episode by episode: a list of advantages for each."""

    def relative(x, group):
        if len(set(group)) == 1:
            return 0.0
        return (x - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6 if normed else 1.0)

    totals = [math.fsum(r) for _, r in walks]
    returns = [[math.fsum(gamma ** (k - i) * r[k] for k in range(i, len(r))) for i in range(len(r))] for _, r in walks]
    result = []
    for e, (_, rewards) in enumerate(walks):
        mates = [f for f in range(len(walks)) if group_of[f] == group_of[e]]
        macro = relative(totals[e], [totals[f] for f in mates])
        row = []
        for i in range(len(rewards)):
            same = [returns[f][j] for f in mates for j in range(len(returns[f])) if keys[f][j] == keys[e][i]]
            row.append(macro + weight * relative(returns[e][i], same))
        result.append(row)
    return result


@pytest.mark.parametrize("scale", [False, True], ids=["mean", "mean-std"])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
def test_gigpo_equals_a_loop(weight, gamma, scale):
    """Ragged episodes whose steps are interleaved, two groups and an episode alone, ids out of order and negative."""
    walks, group_of = episodes(9), [4, -2, 4, 4, -2, -2, 4, 100, -2]
    keys = [[f"at {p}" for p in positions] for positions, _ in walks]
    wanted = gigpo_by_loop(walks, group_of, keys, gamma, weight, scale)
    places = sorted((i, e) for e, (_, r) in enumerate(walks) for i in range(len(r)))  # all first steps, then all second ones
    ids = torch.tensor([50, -7, 3, 12, 0, 99, 2**40, 1, -1])
    options = {"group_ids": torch.tensor(group_of), "gamma": gamma, "step_weight": weight, "scale": scale}
    totals = torch.tensor([math.fsum(r) for _, r in walks], dtype=F64)
    steps = torch.tensor([walks[e][1][i] for i, e in places], dtype=F64)
    anchors = [keys[e][i] for i, e in places]
    episode = torch.tensor([e for _, e in places])
    actual = gigpo(totals, steps, episode_ids=episode, anchor_keys=anchors, **options)
    close(actual, [wanted[e][i] for i, e in places], 1e-9, 1e-9)
    renamed = gigpo(totals, steps, episode_ids=ids[episode], episodes=ids, anchor_keys=anchors, **options)
    assert torch.equal(renamed, actual)


def test_gigpo_by_hand():
    """Two episodes of one task meet in "door": returns from there are 1 and 0. A third, of another task, is alone."""
    actual = gigpo(
        torch.tensor([1.0, 0.0, 7.0]),
        torch.tensor([0.0, 1.0, 0.0, 0.0, 7.0]),
        episode_ids=torch.tensor([0, 0, 1, 1, 2]),
        group_ids=torch.tensor([0, 0, 1]),
        anchor_keys=["start", "door", "yard", "door", "door"],
        step_weight=2.0,
    )
    assert actual.tolist() == [0.5, 1.5, -0.5, -1.5, 0.0]


def test_gigpo_where_no_state_recurs_is_grpo_of_the_episodes():
    rewards, ids, episode = torch.randn(6), torch.tensor([0, 1, 0, 1, 1, 0]), torch.arange(12) // 2
    options = {"episode_ids": episode, "group_ids": ids, "anchor_keys": range(12)}
    assert torch.equal(gigpo(rewards, torch.randn(12), scale=True, **options), grpo(rewards, ids)[episode])


def test_gigpo_order_of_episodes_and_groups_does_not_matter():
    rewards, steps = torch.randn(6), torch.randn(18)
    episode, ids, keys = torch.arange(18) % 6, torch.tensor([3, 3, -1, 3, -1, -1]), [i * i % 4 for i in range(18)]
    result = gigpo(rewards, steps, episode_ids=episode, group_ids=ids, anchor_keys=keys)
    order = torch.tensor([4, 0, 5, 3, 1, 2])
    moved = gigpo(rewards[order], steps, episode_ids=order.argsort()[episode], group_ids=5 - 2 * ids[order], anchor_keys=keys)
    assert torch.equal(moved, result)


def test_gigpo_with_an_episode_that_was_not_scored():
    """NaN spoils its group of episodes; ignored, it is 0 and counts in no mean, and its steps still do."""
    rewards, steps = torch.tensor([NAN, 1.0, 3.0, 5.0, 6.0]), torch.tensor([2.0, 4.0, 0.0, 0.0, 0.0])
    options = {
        "episode_ids": torch.arange(5),
        "group_ids": torch.tensor([0, 0, 0, 1, 1]),
        "anchor_keys": ["a", "a", "b", "a", "b"],
    }
    assert gigpo(rewards, steps, **options).isnan().tolist() == [True] * 3 + [False] * 2
    assert gigpo(rewards, steps, nan="ignore", **options).tolist() == [-1.0, 0.0, 1.0, -0.5, 0.5]
    rewards, steps[0] = rewards.nan_to_num(5.0), NAN  # now a step, in the same state as the second one
    assert gigpo(rewards, steps, **options).isnan().tolist() == [True] * 2 + [False] * 3
    assert gigpo(rewards, steps, nan="ignore", **options).tolist() == [2.0, -2.0, 0.0, -0.5, 0.5]


# ---- bad input


def gigpo_with(**changes):
    options = {
        "episode_rewards": torch.zeros(2),
        "step_rewards": torch.zeros(3),
        "episode_ids": torch.tensor([0, 1, 1]),
        "group_ids": torch.tensor([0, 0]),
        "anchor_keys": ["a", "b", "a"],
    }
    options |= changes
    return lambda: gigpo(options.pop("episode_rewards"), options.pop("step_rewards"), **options)


def never(state):
    raise AssertionError("a rollout was started")


S2, R22 = torch.zeros(2), torch.zeros(2, 2)
BAD = {
    "keys-count": (gigpo_with(anchor_keys=["a"]), ValueError, "anchor_keys must have one key per step, 3 .* got 1"),
    "keys-unhashable": (gigpo_with(anchor_keys=["a", [1], "a"]), TypeError, r"anchor_keys must be hashable.* got list at 1"),
    "keys-nested": (gigpo_with(anchor_keys=["a", ("b", [1]), "a"]), TypeError, "anchor_keys must be hashable.* got tuple at 1"),
    "keys-tensors": (gigpo_with(anchor_keys=list(torch.zeros(3))), TypeError, "anchor_keys must be hashable.* got Tensor at 0"),
    "keys-tensor": (gigpo_with(anchor_keys=torch.zeros(3)), TypeError, "anchor_keys must be a sequence.* got torch.float32"),
    "episode-unknown": (
        gigpo_with(episode_ids=torch.tensor([0, 5, 1])),
        ValueError,
        r"episode_ids must be in .* 0 to 1.* got 5",
    ),
    "episode-unlisted": (gigpo_with(episodes=torch.tensor([1, 7])), ValueError, "episode_ids must be in episodes.* got 0"),
    "episode-twice": (gigpo_with(episodes=torch.tensor([1, 1])), ValueError, "episodes must list every id once"),
    "episodes-shape": (gigpo_with(episodes=torch.tensor([1])), ValueError, "episodes must have the shape of episode_rewards"),
    "episode-ids-shape": (
        gigpo_with(episode_ids=torch.tensor([0])),
        ValueError,
        "episode_ids must have the shape of step_rewards",
    ),
    "group-ids-shape": (
        gigpo_with(group_ids=torch.zeros(3).int()),
        ValueError,
        "group_ids must have the shape of episode_rewards",
    ),
    "group-of-one": (
        gigpo_with(group_ids=torch.tensor([0, 4]), singleton="raise"),
        ValueError,
        "group_ids must have groups of two or more; 0 has one",
    ),
    "step-weight": (gigpo_with(step_weight=-1), ValueError, "step_weight must be a number >= 0 and finite; got -1"),
    "gigpo-gamma": (gigpo_with(gamma=1.5), ValueError, r"gamma must be a number in \[0, 1\]; got 1.5"),
    "gigpo-all-nan": (gigpo_with(step_rewards=torch.full((3,), NAN)), ValueError, "step_rewards must not all be NaN"),
    "step-rewards-nan": (
        gigpo_with(step_rewards=torch.tensor([0.0, NAN, 0.0]), nan="raise"),
        ValueError,
        r"step_rewards must not be NaN; it is at \(1,\)",
    ),
    "k-zero": (lambda: monte_carlo_values(never, [1], 0), ValueError, "k must be a positive integer.* got 0"),
    "k-float": (lambda: monte_carlo_values(never, [1], 2.0), ValueError, "k must be a positive integer.* got 2.0"),
    "rollout": (lambda: monte_carlo_values(0.5, [1], 1), TypeError, "rollout must be a function.* got float"),
    "rollout-returns": (lambda: monte_carlo_values(str, [1], 1), TypeError, "rollout must return a number.* got str"),
    "rollout-batched": (
        lambda: monte_carlo_values(lambda s: [1.0], [1, 2], 2, batched=True),
        ValueError,
        "rollout must return a number per state, 4, with batched=True; got 1",
    ),
    "vineppo-shape": (lambda: vineppo(R22, torch.zeros(2, 3)), ValueError, r"step_values must have the shape of step_rewards"),
    "vineppo-alone": (lambda: vineppo(S2, S2), ValueError, r"step_rewards must be \(B, T\), or packed"),
    "vineppo-all-nan": (lambda: vineppo(R22 * NAN, R22), ValueError, "step_rewards must not all be NaN"),
    "spread-range": (
        lambda: spread(S2, torch.tensor([0, 2])),
        ValueError,
        r"step_ids must be in \[0, 2\).*mask tokens.* got 2",
    ),
    "spread-negative": (lambda: spread(R22, torch.tensor([[0, -1], [0, 0]])), ValueError, r"step_ids must be in .* got -1"),
    "spread-shape": (
        lambda: spread(R22, torch.tensor([0, 1])),
        ValueError,
        r"step_advantages must be \(S,\), or .*\(2, 2\) with \(2,\)",
    ),
    "spread-ids": (lambda: spread(S2, torch.zeros(2)), TypeError, "step_ids must be a tensor of integers; got torch.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
