"""`fastpg.advantages` over time and in groups: against loops in Python, numbers by hand, and what must not matter.

tests/advantages/test_vineppo_gigpo.py has the estimators of multi-step environments, and the proofs by enumeration.
"""

import math
import random
import statistics

import pytest
import torch

from fastpg import advantages
from fastpg.advantages import discount_weights, gae, grpo, reinforce_plus_plus, reward_to_go, rloo, value_baseline

F32, F64 = torch.float32, torch.float64
INF, NAN = math.inf, math.nan

# Sequences: full, with holes, one token, none.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
every_gamma = pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])

# Ragged groups, shuffled: sizes 4, 3, 2, 1 and 2, the last one of equal rewards.
GROUP_IDS = torch.tensor([7, -3, 7, 2**40, 0, -3, 7, 55, 0, 7, -3, 55])
REWARDS = torch.tensor([1.0, 0.5, -2.0, 3.0, 0.25, 0.0, 1.0, 0.3, -0.5, 4.0, 0.75, 0.3], dtype=F64)


def close(actual, wanted, rtol=1e-13, atol=1e-13):
    wanted = wanted if isinstance(wanted, torch.Tensor) else torch.tensor(wanted, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)


def spoilt(x, mask=MASK):
    """NaN and infinities wherever the mask says nobody looks."""
    return torch.where(mask, x, torch.tensor([NAN, INF, -INF], dtype=x.dtype).repeat(x.numel() // 3).reshape(x.shape))


def packed(x, sequence_of_row=(9, -4, 3, 0)):
    """(B, T) as interleaved (N,): each sequence in order, one token of each at a time; and the ids of the sequences."""
    return x.T.reshape(-1), torch.tensor(sequence_of_row).repeat(x.shape[1])


def unpacked(x, like):
    return x.reshape(like.shape[1], like.shape[0]).T


# ---- over time


def returns_by_loop(rewards, gamma, mask=MASK):
    result = [[0.0] * rewards.shape[1] for _ in rewards]
    for row, kept, out in zip(rewards.tolist(), mask.tolist(), result, strict=True):
        places = [t for t, k in enumerate(kept) if k]
        for n, t in enumerate(places):
            out[t] = math.fsum(gamma**m * row[k] for m, k in enumerate(places[n:]))
    return result


def gae_by_loop(rewards, values, gamma, lam, bootstrap=(0, 0, 0, 0), mask=MASK):
    result = [[0.0] * rewards.shape[1] for _ in rewards]
    for b, out in enumerate(result):
        following, advantage = float(bootstrap[b]), 0.0
        for t in reversed([t for t in range(rewards.shape[1]) if mask[b, t]]):
            delta = rewards[b, t].item() + gamma * following - values[b, t].item()
            advantage = delta + gamma * lam * advantage
            following, out[t] = values[b, t].item(), advantage
    return result


@every_gamma
def test_reward_to_go_equals_a_loop(gamma):
    rewards = torch.randn(4, 6, dtype=F64)
    close(reward_to_go(spoilt(rewards), MASK, gamma=gamma), returns_by_loop(rewards, gamma))
    close(reward_to_go(rewards, gamma=gamma), returns_by_loop(rewards, gamma, torch.ones_like(MASK)))


def test_reward_to_go_by_hand():
    """gamma counts kept steps: the masked position between 1 and 4 costs nothing."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, NAN, 4.0, 8.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]).bool()
    assert reward_to_go(rewards, mask, gamma=0.5).tolist() == [[2.75, 3.5, 3.0, 0.0], [5.0, 0.0, 8.0, 8.0]]
    assert reward_to_go(torch.tensor([[0, 0, 1]])).tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@every_gamma
def test_gae_equals_a_loop(gamma, lam):
    rewards, values, bootstrap = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64), torch.randn(4, dtype=F64)
    actual = gae(spoilt(rewards), spoilt(values), MASK, gamma=gamma, lam=lam)
    close(actual, gae_by_loop(rewards, values, gamma, lam))
    actual = gae(spoilt(rewards), spoilt(values), MASK, gamma=gamma, lam=lam, bootstrap=bootstrap)
    close(actual, gae_by_loop(rewards, values, gamma, lam, bootstrap))


@every_gamma
def test_gae_of_lambda_one_is_reward_to_go_minus_value(gamma):
    rewards, values = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    returns = reward_to_go(rewards, MASK, gamma=gamma)
    close(gae(rewards, values, MASK, gamma=gamma), value_baseline(returns, spoilt(values), MASK))


def test_value_baseline_by_hand():
    returns, values = torch.tensor([3.0, NAN, 1.0]), torch.tensor([1, 2, 4])
    assert value_baseline(returns, values, torch.tensor([True, False, True])).tolist() == [2.0, 0.0, -3.0]


@every_gamma
def test_discount_weights_are_powers_of_the_kept_steps(gamma):
    wanted = [[gamma ** sum(row[:t]) if row[t] else 0.0 for t in range(6)] for row in MASK.tolist()]
    close(discount_weights(MASK, gamma=gamma, dtype=F64), wanted)
    flat, ids = packed(MASK)
    assert torch.equal(
        unpacked(discount_weights(flat, gamma=gamma, sequence_ids=ids), MASK), discount_weights(MASK, gamma=gamma)
    )


# name: a function of (rewards, values, mask, sequence_ids) with everything that a layout can hold
OVER_TIME = {
    "reward_to_go": lambda r, v, m, ids: reward_to_go(r, m, gamma=0.9, sequence_ids=ids),
    "gae": lambda r, v, m, ids: gae(r, v, m, gamma=0.9, lam=0.7, sequence_ids=ids),
    "vineppo": lambda r, v, m, ids: advantages.vineppo(r, v, m, gamma=0.9, sequence_ids=ids),
}
every_time = pytest.mark.parametrize("name", OVER_TIME)


@every_time
def test_masking_equals_deleting(name):
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    actual = OVER_TIME[name](spoilt(rewards), spoilt(values), MASK, None)
    for b, kept in enumerate(MASK):
        alone = OVER_TIME[name](rewards[b : b + 1, kept], values[b : b + 1, kept], None, None)
        assert torch.equal(actual[b, kept], alone[0])
    assert not actual[~MASK].any()


@every_time
def test_packed_equals_padded(name):
    """Bit by bit, whatever the ids, with tokens of other sequences in between, and whether padding is masked or deleted."""
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    padded = OVER_TIME[name](rewards, values, MASK, None)
    (r, ids), (v, _), (m, _) = packed(spoilt(rewards)), packed(spoilt(values)), packed(MASK)
    assert torch.equal(unpacked(OVER_TIME[name](r, v, m, ids), MASK), padded)
    assert torch.equal(OVER_TIME[name](r[m], v[m], None, ids[m].int()), padded.T[MASK.T])


def test_packed_bootstrap_is_read_at_the_last_kept_token():
    rewards, values, bootstrap = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4)
    last = MASK & (MASK.flip(1).cumsum(1).flip(1) == 1)
    (r, ids), (v, _), (m, _) = packed(rewards), packed(values), packed(MASK)
    b, _ = packed(torch.where(last, bootstrap[:, None], NAN))
    actual = gae(r, v, m, gamma=0.9, lam=0.7, bootstrap=b, sequence_ids=ids)
    assert torch.equal(unpacked(actual, MASK), gae(rewards, values, MASK, gamma=0.9, lam=0.7, bootstrap=bootstrap))


@every_time
def test_permuting_sequences_permutes_the_result(name):
    rewards, values, order = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([2, 0, 3, 1])
    permuted = OVER_TIME[name](rewards[order], values[order], MASK[order], None)
    assert torch.equal(permuted, OVER_TIME[name](rewards, values, MASK, None)[order])


@pytest.mark.parametrize("gamma", [0.5, 0.99, 1.0])
def test_long_sequences_neither_overflow_nor_drift(gamma):
    """gamma^-t would be 2^5000. In fp32, against a loop in float64."""
    rewards = torch.rand(1, 5001)
    wanted, running = [], 0.0
    for r in reversed(rewards[0].tolist()):
        running = r + gamma * running
        wanted.append(running)
    close(reward_to_go(rewards, gamma=gamma)[0], wanted[::-1], rtol=1e-6, atol=0)


def test_nan_reaches_what_depends_on_it_and_nothing_else():
    rewards = torch.ones(2, 4)
    rewards[0, 1] = NAN
    assert reward_to_go(rewards, gamma=0.5).isnan().tolist() == [[True, True, False, False], [False] * 4]
    assert gae(rewards, torch.zeros(2, 4), lam=0.0).isnan().tolist() == [[False, True, False, False], [False] * 4]


# ---- in groups


def in_groups(formula, rewards=REWARDS, group_ids=GROUP_IDS):
    """formula(reward, all rewards of its group) in Python; 0 in groups of one or of equal rewards."""
    groups = {}
    for r, g in zip(rewards.tolist(), group_ids.tolist(), strict=True):
        groups.setdefault(g, []).append(r)
    pairs = zip(rewards.tolist(), group_ids.tolist(), strict=True)
    return [formula(r, groups[g]) if len(set(groups[g])) > 1 else 0.0 for r, g in pairs]


def centred(r, group):
    return r - statistics.mean(group)


# name: (ours of (rewards, ids), the formula in a group)
IN_GROUPS = {
    "grpo": (grpo, lambda r, g: centred(r, g) / (statistics.stdev(g) + 1e-6)),
    "grpo-population": (
        lambda r, i: grpo(r, i, unbiased=False, eps=0.1),
        lambda r, g: centred(r, g) / (statistics.pstdev(g) + 0.1),
    ),
    "dr-grpo": (lambda r, i: grpo(r, i, scale=False), centred),
    "rloo": (rloo, lambda r, g: r - (sum(g) - r) / (len(g) - 1)),
    "group-baseline": (lambda r, i: reinforce_plus_plus(r, group_ids=i, whiten=False), centred),
    "whitened": (lambda r, i: reinforce_plus_plus(r, group_ids=i), None),
}
every_estimator = pytest.mark.parametrize("name", IN_GROUPS)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
@every_estimator
def test_group_advantages_equal_a_loop(name, dtype):
    ours, formula = IN_GROUPS[name]
    if formula is None:
        baseline = in_groups(centred)
        wanted = [(a - statistics.mean(baseline)) / (statistics.stdev(baseline) + 1e-8) for a in baseline]
    else:
        wanted = in_groups(formula)
    actual = ours(REWARDS.to(dtype), GROUP_IDS)
    assert actual.dtype == dtype
    tolerance = 1e-6 if dtype == F32 else 1e-13
    close(actual, wanted, tolerance, tolerance)


def test_group_advantages_by_hand():
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 5.0, 1.0]), torch.tensor([4, 4, 4, -1, 4])
    half, root = 0.5, math.sqrt(1 / 3)
    close(grpo(rewards, ids, eps=0.0), [half / root, -half / root, -half / root, 0, half / root], 1e-6)
    close(grpo(rewards, ids, eps=0.0, unbiased=False), [1.0, -1.0, -1.0, 0.0, 1.0], 1e-6)
    close(rloo(rewards, ids), [2 / 3, -2 / 3, -2 / 3, 0, 2 / 3], 1e-6)
    close(reinforce_plus_plus(torch.tensor([1, 2, 6]), whiten=False), [-2.0, -1.0, 3.0], 1e-6)
    close(reinforce_plus_plus(torch.tensor([0, 2]), unbiased=False, eps=0.0), [-1.0, 1.0], 1e-6)


@every_estimator
def test_neither_order_nor_labels_matter(name):
    """Permuting the samples permutes the result and renaming groups changes nothing, bit by bit."""
    ours, _ = IN_GROUPS[name]
    rewards, ids = torch.randn(200), torch.randint(-20, 20, (200,))
    result, order = ours(rewards, ids), torch.randperm(200)
    assert torch.equal(ours(rewards[order], ids[order]), result[order])
    assert torch.equal(ours(rewards, (-7 * ids + 3).short()), result)


@pytest.mark.parametrize("shift", [1.0, -4096.0, 2.0**30])
@every_estimator
def test_a_constant_added_to_a_group_changes_nothing(name, shift):
    """Not a bit, where the shifted rewards are exact, though the mean of the group of three is not."""
    ours, _ = IN_GROUPS[name]
    rewards = (REWARDS * 4).round() / 4
    shifted = torch.where((GROUP_IDS == 7) | (GROUP_IDS == -3), rewards + shift, rewards)
    assert torch.equal(ours(shifted, GROUP_IDS), ours(rewards, GROUP_IDS))


@every_estimator
@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
def test_equal_rewards_give_exactly_zero(name, dtype):
    """0.3 is no binary fraction: in fp32 the mean of six of them is another number, and their std is not 0."""
    rewards = torch.full((6,), 0.3, dtype=dtype)
    naive = (rewards - rewards.sum() / 6) / (rewards.std() + 1e-6)
    assert (naive.abs() > 0.01).all() == (dtype == F32)
    assert not IN_GROUPS[name][0](rewards, torch.zeros(6, dtype=torch.int64)).any()
    assert not reinforce_plus_plus(rewards).any()


def test_nearly_equal_rewards_do_not_explode():
    """One ulp apart at 1e4: E[x^2] - mean^2 in fp32 loses every digit. Two passes do not."""
    x = torch.tensor([1e4, 1e4, 1e4, 1e4])
    x[0] = torch.nextafter(x[0], torch.tensor(INF))
    ulp = (x[0] - x[1]).item()
    wanted = [0.75 * ulp / (0.5 * ulp + 1e-6)] + [-0.25 * ulp / (0.5 * ulp + 1e-6)] * 3
    close(grpo(x, torch.zeros(4, dtype=torch.int64)), wanted, 1e-6)
    assert grpo(torch.tensor([0.0, 1e-30]), torch.tensor([1, 1]), eps=0.0).abs().tolist() == pytest.approx([0.5**0.5] * 2)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
def test_grpo_divided_by_the_std_of_the_batch_equals_a_loop(dtype, unbiased):
    """The mean is that of the group. Groups of one get 0, and their rewards count in the std."""
    std = (statistics.stdev if unbiased else statistics.pstdev)(REWARDS.tolist())
    wanted = in_groups(lambda r, g: centred(r, g) / (std + 0.1))
    tolerance = 1e-6 if dtype == F32 else 1e-13
    actual = grpo(REWARDS.to(dtype), GROUP_IDS, std="batch", unbiased=unbiased, eps=0.1)
    assert actual.dtype == dtype
    close(actual, wanted, tolerance, tolerance)
    order = torch.randperm(len(REWARDS))
    assert torch.equal(grpo(REWARDS[order], GROUP_IDS[order], std="batch"), grpo(REWARDS, GROUP_IDS, std="batch")[order])
    assert torch.equal(grpo(REWARDS, GROUP_IDS, std="group"), grpo(REWARDS, GROUP_IDS))


def test_the_std_of_the_batch_by_hand():
    """Prompts that are easy and hard: 0, 2 | 9, 9. The batch's mean is 5 and its squares are 25, 9, 16, 16."""
    rewards, ids = torch.tensor([0.0, 2.0, 9.0, 9.0]), torch.tensor([0, 0, 1, 1])
    wanted = 1 / math.sqrt(66 / 3)
    close(grpo(rewards, ids, std="batch", eps=0.0), [-wanted, wanted, 0, 0], 1e-6)
    assert not grpo(torch.full((6,), 0.3), ids.repeat(2)[:6], std="batch", eps=0.0).any()
    assert grpo(torch.tensor([5.0]), torch.tensor([3]), std="batch").tolist() == [0.0]
    assert grpo(torch.zeros(0), torch.zeros(0, dtype=torch.int64), std="batch").shape == (0,)


def test_nan_rewards_and_the_std_of_the_batch():
    rewards, ids = torch.tensor([0.0, NAN, 2.0, 9.0, 9.0]), torch.tensor([0, 0, 0, 1, 1])
    assert grpo(rewards, ids, std="batch").isnan().tolist() == [True, True, True, False, False]
    clean = grpo(rewards[[0, 2, 3, 4]], ids[[0, 2, 3, 4]], std="batch")
    ignored = grpo(rewards, ids, std="batch", nan="ignore")
    assert torch.equal(ignored[[0, 2, 3, 4]], clean)
    assert ignored[1] == 0
    with pytest.raises(ValueError, match="groups of two or more; 5 has one"):
        grpo(rewards[2:], torch.tensor([5, 1, 1]), std="batch", singleton="raise")


@pytest.mark.parametrize("estimate", [grpo, rloo, reinforce_plus_plus], ids=lambda f: f.__name__)
def test_a_group_of_one_gives_zero_not_its_reward(estimate):
    rewards, ids = torch.tensor([5.0, 1.0, 2.0]), torch.tensor([1, 2, 2])
    assert estimate(rewards, group_ids=ids).sign().tolist() == [0.0, -1.0, 1.0]
    assert estimate(rewards[1:], group_ids=ids[1:], singleton="raise").sign().tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match="groups of two or more; 1 has one"):
        estimate(rewards, group_ids=ids, singleton="raise")
    assert reinforce_plus_plus(torch.tensor([5.0])).tolist() == [0.0]


@pytest.mark.parametrize("estimate", [grpo, rloo, reinforce_plus_plus], ids=lambda f: f.__name__)
def test_nan_rewards(estimate):
    """propagate: its group is NaN (the batch, if that is whitened). ignore: as if deleted, and 0."""

    def call(rewards, ids, **options):
        return estimate(rewards, group_ids=ids, **options)

    rewards = REWARDS.clone()
    rewards[2] = NAN  # of group 7
    kept = ~rewards.isnan()
    clean = call(rewards[kept], GROUP_IDS[kept])
    result = call(rewards, GROUP_IDS)
    if estimate is reinforce_plus_plus:
        assert result.isnan().all()
        result = call(rewards, GROUP_IDS, whiten=False)
    assert torch.equal(result.isnan(), GROUP_IDS == 7)
    ignored = call(rewards, GROUP_IDS, nan="ignore")
    assert torch.equal(ignored[kept], clean)
    assert ignored[2] == 0
    assert torch.equal(call(rewards[kept], GROUP_IDS[kept], nan="raise"), clean)


def test_an_ignored_sample_is_in_no_statistic_of_its_tokens_either():
    rewards, mask = torch.tensor([3.0, NAN, 0.0]), torch.ones(3, 2, dtype=torch.bool)
    for ids in (None, torch.tensor([1, 2, 1])):
        actual = reinforce_plus_plus(rewards, group_ids=ids, mask=mask, nan="ignore", eps=0.0)
        close(actual, torch.tensor([[0.75**0.5] * 2, [0.0] * 2, [-(0.75**0.5)] * 2]), 1e-6, 1e-6)


# ---- the batch of REINFORCE++


def test_whitening_over_tokens():
    """Long sequences count more, masked tokens not at all; packed or padded, and (B,) rewards as if copied to their tokens."""
    returns = torch.randn(4, 6, dtype=F64)
    tokens = returns[MASK].tolist()
    mean, std = statistics.mean(tokens), statistics.stdev(tokens)
    actual = reinforce_plus_plus(spoilt(returns), mask=MASK)
    close(actual[MASK], [(x - mean) / (std + 1e-8) for x in tokens])
    assert not actual[~MASK].any()
    flat, _ = packed(spoilt(returns))
    assert torch.equal(unpacked(reinforce_plus_plus(flat, mask=packed(MASK)[0]), MASK), actual)
    copied = returns[:, :1].expand(4, 6)
    assert torch.equal(reinforce_plus_plus(returns[:, 0], mask=MASK), reinforce_plus_plus(copied, mask=MASK))


def test_group_baseline_over_sequences_then_whitening_over_tokens():
    rewards, ids = torch.tensor([3.0, 1.0, 1.0, 0.0], dtype=F64), torch.tensor([5, 2, 5, 2])
    tokens = [1.0] * 6 + [0.5] * 3 + [-1.0]  # the fourth has no tokens
    mean, std = statistics.mean(tokens), statistics.pstdev(tokens)
    actual = reinforce_plus_plus(rewards, group_ids=ids, mask=MASK, unbiased=False)
    close(actual[MASK], [(x - mean) / (std + 1e-8) for x in tokens])
    assert not actual[~MASK].any()


def test_masked_sequences_are_in_no_statistic():
    rewards, ids, mask = (
        torch.tensor([3.0, 1.0, NAN, 0.0, 2.0]),
        torch.tensor([5, 5, 5, 2, 2]),
        torch.tensor([1, 1, 0, 1, 1]).bool(),
    )
    actual = reinforce_plus_plus(rewards, group_ids=ids, mask=mask)
    assert torch.equal(actual[mask], reinforce_plus_plus(rewards[mask], group_ids=ids[mask]))
    assert actual[2] == 0


# ---- dtypes, gradients, nothing


ONE_EACH = {
    "reward_to_go": lambda r: reward_to_go(r.reshape(2, -1)),
    "value_baseline": lambda r: value_baseline(r, r * 2),
    "gae": lambda r: gae(r.reshape(2, -1), r.reshape(2, -1) * 2, lam=0.5),
    "grpo": lambda r: grpo(r, torch.arange(len(r)) % 3),
    "rloo": lambda r: rloo(r, torch.arange(len(r)) % 3),
    "reinforce_plus_plus": lambda r: reinforce_plus_plus(r),
    "vineppo": lambda r: advantages.vineppo(r.reshape(2, -1), r.reshape(2, -1) * 2),
    "gigpo": lambda r: advantages.gigpo(
        r, r, episode_ids=torch.arange(len(r)), group_ids=torch.arange(len(r)) % 2, anchor_keys="a" * len(r)
    ),
    "spread": lambda r: advantages.spread(r, torch.arange(len(r))),
}
every_function = pytest.mark.parametrize("name", ONE_EACH)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, F32, F64], ids=str)
@every_function
def test_dtypes(name, dtype):
    """Whatever holds the rewards, they are the same numbers: computed in fp32, or in float64 if they are that."""
    numbers = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0])
    result = ONE_EACH[name](numbers.to(dtype))
    assert result.dtype == (F64 if dtype == F64 else F32)
    close(result.double(), ONE_EACH[name](numbers.double()), 1e-6, 1e-6)


@every_function
def test_results_are_constants(name):
    rewards = torch.randn(8, requires_grad=True)
    assert not ONE_EACH[name](rewards).requires_grad
    assert not discount_weights(MASK, gamma=0.5).requires_grad


@every_function
def test_nothing_in_nothing_out(name):
    assert ONE_EACH[name](torch.zeros(0)).numel() == 0


def test_empty_sequences():
    for shape in [(0, 5), (3, 0)]:
        empty = torch.zeros(shape)
        for result in (reward_to_go(empty), gae(empty, empty, bootstrap=torch.ones(shape[0])), reinforce_plus_plus(empty)):
            assert result.shape == shape
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert not reward_to_go(torch.full((2, 3), NAN), nothing).any()
    assert not reinforce_plus_plus(torch.ones(2), mask=nothing).any()


def test_a_pair_of_loops_at_random():
    """Many small batches of every shape: groups of any size, sequences of any length, masks of any density."""
    rng = random.Random(0)
    for _ in range(100):
        rows, columns = rng.randint(1, 6), rng.randint(1, 9)
        rewards, values = torch.randn(rows, columns, dtype=F64), torch.randn(rows, columns, dtype=F64)
        mask, gamma, lam = torch.rand(rows, columns) < rng.random(), rng.random(), rng.random()
        close(reward_to_go(rewards, mask, gamma=gamma), returns_by_loop(rewards, gamma, mask))
        wanted = gae_by_loop(rewards, values, gamma, lam, [0] * rows, mask)
        close(gae(rewards, values, mask, gamma=gamma, lam=lam), wanted)
        ids = torch.randint(-3, 3, (columns,))
        for name in ("grpo", "rloo"):
            ours, formula = IN_GROUPS[name]
            close(ours(rewards[0], ids), in_groups(formula, rewards[0], ids), 1e-11, 1e-11)
