"""The device functions of `fastpg.kernels.objectives` against the PyTorch objectives, and autograd of these, in float64.

In Triton's interpreter, or on a GPU where there is one.
"""

import math
from dataclasses import replace
from functools import partialmethod
from math import inf, nan

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from fastpg import CISPO, DPPOKL, DPPOTV, SAPO, IcePop, ImportanceWeighted, KLPenalty, PPOClip, Reinforce
from fastpg.kernels import objectives as device
from fastpg.kernels.tile import INTERPRETED
from fastpg.loss.objectives import _clipped_surrogate
from fastpg.loss.policy_loss import token_losses
from fastpg.tiles.structures import TokenTerms

DEVICE = "cpu" if INTERPRETED else "cuda"
# What rounding may cost, in ulp of a result before anything in it cancels. Log ratios are exact here, so that it is what is
# left of exp's own, up to 2.5 ulp in numpy, in k3 at |e| = 1 (7), and less elsewhere; 2.9 was seen. A GPU's exp rounds its
# argument times log2 e.
ULP, ULPS = 2.0**-23, 8
FLUSHED = 2.0**-118  # subnormal ratios have few bits, or none; times |A logp| < 2^8
LARGEST = torch.finfo(torch.float32).max
ADVANTAGES = torch.tensor([0.0, 1.0, -1.0, 1.7, -0.3])


def dual_clip_at_1(logp, old, advantage):
    """PPOClip refuses it, but the ratio can be exactly that."""
    return _clipped_surrogate(logp - old, advantage, 0.8, 1.2, 1.0)


# name: (device function, PyTorch objective, bounds); some bounds as the integers that a user may write
CASES = {
    "reinforce": ("reinforce", Reinforce(), None),
    "importance-weighted": ("importance_weighted", ImportanceWeighted(), None),
    "sapo": ("sapo", SAPO(), device.Temperatures(1.0, 1.05)),
    "sapo-far-apart": ("sapo", SAPO(0.25, 3), device.Temperatures(0.25, 3)),
    # so small that the slope is not 0 where the log ratio is clamped
    "sapo-tiny": ("sapo", SAPO(1e-26, 2e-26), device.Temperatures(1e-26, 2e-26)),
    "ppo-dual-tie": ("ppo_clip", dual_clip_at_1, device.ClipBounds(0.8, 1.2, 1.0)),
}
for low, high in ((None, None), (None, 5.0), (0.25, None), (0.25, 5.0), (1.0, 1.0), (0, 1)):
    CASES[f"cispo-{low}-{high}"] = "cispo", CISPO(high, low), device.RatioBounds(low, high)
    CASES[f"icepop-{low}-{high}"] = "icepop", IcePop(high, low), device.RatioBounds(low, high)
for settings in ((0.2, 0.3, None), (0.05, 0.1, 3), (0, 0, None), (0.3, 0.2, None, True), (0.1, 0.1, 1.5, True)):
    objective = DPPOTV(*settings)
    CASES[f"dppo-tv-{settings}"] = "dppo_tv", objective, device.Divergences(*objective.device_numbers)
for settings in ((0.05, 0.08, None), (0.01, 0.02, 3), (0.3, 0.2, None)):
    CASES[f"dppo-kl-{settings}"] = "dppo_kl", DPPOKL(*settings), device.Divergences(*settings)
for eps_low, eps_high, dual in ((0.2, 0.28, None), (0.2, 0.2, 3.0), (0, 0.2, None), (0.2, 0, 1.5), (1, 1, 3)):
    objective = PPOClip(eps_low, eps_high, dual)
    bounds = device.ClipBounds(*objective.ratio_bounds, dual)
    CASES[f"ppo-{eps_low}-{eps_high}-{dual}"] = "ppo_clip", objective, bounds
ESTIMATORS = {"k1": device.kl_k1, "k2": device.kl_k2, "k3": device.kl_k3}
BOUNDS = [None, 1, 2.5, 20.0]  # of the log ratio; 20.0 is one of those that occur

of_each_case = pytest.mark.parametrize("case", CASES)
of_each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
of_each_bound = pytest.mark.parametrize("bound", BOUNDS, ids=lambda x: f"within-{x}")


@pytest.fixture(autouse=True)
def _minimum_and_maximum_drop_nan_unless_told_to_propagate_it(monkeypatch):
    """As on a GPU. In the interpreter they are numpy's, which always propagate it."""
    for name, function in {"create_minnumf": np.fmin, "create_maxnumf": np.fmax}.items():
        monkeypatch.setattr(InterpreterBuilder, name, partialmethod(InterpreterBuilder.binary_op, op=function))


@triton.jit
def objective_kernel(LOGP, OLD, ADVANTAGE, VALUE, SLOPE, bounds, OBJECTIVE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value, slope = OBJECTIVE(tl.load(LOGP + i), tl.load(OLD + i), tl.load(ADVANTAGE + i), bounds)
    tl.store(VALUE + i, value)
    tl.store(SLOPE + i, slope)


@triton.jit
def kl_kernel(LOGP, REF, OLD, VALUE, SLOPE, max_log_ratio, KL: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    logp, old, ref = tl.load(LOGP + i), tl.load(OLD + i), tl.load(REF + i)
    k, slope = device.kl_penalty(logp, old, ref, KL, max_log_ratio, WEIGHTED)
    tl.store(VALUE + i, k)
    tl.store(SLOPE + i, slope)


@triton.jit
def token_loss_kernel(
    LOGP, OLD, ADVANTAGE, WEIGHT, ROLLOUT, REF, LOSS, G, bounds, kl_coef, kl_max_log_ratio,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_IS_WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    old = None if OLD is None else tl.load(OLD + i)
    rollout = None if ROLLOUT is None else tl.load(ROLLOUT + i)
    ref = None if REF is None else tl.load(REF + i)
    loss, g = device.token_loss(
        tl.load(LOGP + i), old, tl.load(ADVANTAGE + i), tl.load(WEIGHT + i), rollout, ref,
        OBJECTIVE, bounds, KL, kl_coef, kl_max_log_ratio, KL_IS_WEIGHTED,
    )  # fmt: skip
    tl.store(LOSS + i, loss)
    tl.store(G + i, g)


def launched(kernel, inputs, *rest, **constants):
    """Two vectors that `kernel` makes of others, each of as many entries."""
    out = tuple(torch.empty(len(inputs[0]), device=DEVICE) for _ in range(2))
    kernel[(1,)](*(x if x is None else x.to(DEVICE) for x in inputs), *out, *rest, **constants, BLOCK=len(inputs[0]))
    return tuple(x.cpu() for x in out)


def to_a_power_of_two(*columns):
    """Repeated from the start, as tl.arange wants it."""
    places = torch.arange(triton.next_power_of_2(len(columns[0]))) % len(columns[0])
    return tuple(x[places].contiguous() for x in columns)


def log_probabilities():
    """(logp, other), every difference exact in fp32: 0, tiny, ordinary, around SAPO's clamp, and beyond an fp32 exp."""
    small = torch.tensor([0.0, 2.0**-20, 2.0**-10, 0.5, 1.0, 3.0, 20.0, 60.0, 61.0, 100.0])
    differences = torch.cat([small, -small, (torch.randn(44) * 2**12).round() / 2**12])
    logp = torch.cat([torch.tensor([0.0, -0.5, -60.0]), -(torch.rand(5) * 10 * 2**12).round() / 2**12])
    logp, difference = torch.cartesian_prod(logp, differences).T
    other = logp - difference
    assert torch.equal((logp - other).double(), logp.double() - other.double())
    return logp, other


def with_specials(*columns):
    """The rows, and some of them again with NaN and both infinities in each column in turn."""
    rows = torch.stack(columns, 1)
    some = rows[torch.randperm(len(rows))[:60]]
    spoilt = [some.clone().index_fill_(1, torch.tensor([i]), value) for i in range(len(columns)) for value in (nan, inf, -inf)]
    return to_a_power_of_two(*torch.cat([rows, *spoilt]).T)


def tokens():
    """(logp, old, A), with A of both signs and 0."""
    logp, old = log_probabilities()
    logp, old = (x.repeat_interleave(len(ADVANTAGES)) for x in (logp, old))
    return with_specials(logp, old, ADVANTAGES.repeat(len(logp) // len(ADVANTAGES)))


def differentiated(function, logp):
    """(value, dvalue/dlogp)."""
    x = logp.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def both_precisions(function, logp, *others):
    """(value, slope) of function(logp, *others) by PyTorch in float64, and in fp32."""
    return tuple(
        differentiated(lambda x, dtype=dtype: function(x, *(y.to(dtype) for y in others)), logp.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )


def assert_agrees(got, exact, single, sizes, log_ratio):
    """got within ULPS of `exact` at that size, NaN and infinities equal; or what PyTorch's fp32 has that is not finite."""
    exact = torch.where(exact.abs() > LARGEST, exact.sign() * inf, exact)
    rounding = ULPS if INTERPRETED else ULPS + 2 * log_ratio.double().abs().nan_to_num(0, 0, 0)
    near = (got.double() - exact).abs() <= rounding * ULP * sizes + FLUSHED
    good = near | same(got.double(), exact) | (~single.isfinite() & same(got, single))
    assert good.all(), f"{(~good).sum()} of {len(good)}, {got[~good][:4]} instead of {exact[~good][:4]}"


def same(a, b):
    return (a == b) | (a.isnan() & b.isnan())


def condition(objective, log_ratio, advantage):
    """How many ulp of a SAPO one of its ratio is: exp(-x), x = tau (r - 1), turns one into |x|."""
    if not isinstance(objective, SAPO):
        return 1.0
    tau = torch.where(advantage > 0, objective.tau_pos, objective.tau_neg)
    return 1 + (tau * log_ratio.double().clamp(max=60).exp().sub(1)).abs().clamp(max=100)


@of_each_case
def test_an_objective_against_autograd_in_float64(case):
    name, objective, bounds = CASES[case]
    logp, old, advantage = tokens()
    got = launched(objective_kernel, (logp, old, advantage), bounds, getattr(device, name))
    want, single = both_precisions(objective, logp, old, advantage)
    log_ratio = logp - old
    if isinstance(objective, SAPO):
        want[1][log_ratio.isnan()] = nan  # PyTorch's clamp drops it
    for mine, exact, fp32 in zip(got, want, single, strict=True):
        assert_agrees(mine, exact, fp32, condition(objective, log_ratio, advantage) * exact.abs(), log_ratio)


@pytest.mark.parametrize("bounds", [(None, None), (None, 5.0), (0.2, None), (0.2, 5.0), (0.0, 1.0)], ids=str)
def test_the_slope_of_cispo_is_the_objectives_but_for_exp(bounds):
    """In fp32, bit by bit: numpy's exp, the interpreter's, is up to 2 ulp from torch's; a GPU's multiplies by log2 e first."""
    logp, old, advantage = -torch.rand(4096) * 10, -torch.rand(4096) * 10, torch.randn(4096)
    logp[:3], old[3:6], advantage[6:9], old[9:12], old[12:15] = nan, nan, nan, inf, -inf
    _, want = differentiated(lambda x: CISPO(bounds[1], bounds[0])(x, old, advantage), logp)
    _, got = launched(objective_kernel, (logp, old, advantage), device.RatioBounds(*bounds), device.cispo)
    number = ~want.isnan()
    assert torch.equal(~got.isnan(), number)
    ulps = (got.view(torch.int32) - want.view(torch.int32))[number].abs()
    assert ulps.max() <= (3 if INTERPRETED else 32)
    if INTERPRETED:  # everything but the exp has the objective's bits
        with np.errstate(over="ignore"):
            ratio = torch.from_numpy(np.exp((logp - old).numpy()))
        exact = (ratio if bounds == (None, None) else ratio.clamp(*bounds)) * advantage
        assert torch.equal(got[number], exact[number])


def test_where_a_clip_holds_the_slope_is_exactly_zero():
    """And where A = 0, whether the ratio is infinite or NaN."""
    log_ratio = torch.tensor([200.0, 200.0, -200.0, 200.0, nan, 0.5, 0.5, -0.5])
    advantage = torch.tensor([0.0, 1.0, -1.0, -2.0, 0.0, 1.0, -4.0, -1.0])
    bounds = device.ClipBounds(0.8, 1.2, 1.5)
    value, slope = launched(objective_kernel, (log_ratio, torch.zeros(8), advantage), bounds, device.ppo_clip)
    torch.testing.assert_close(value, torch.tensor([0, 1.2, -0.8, -3.0, 0, 1.2, -6, -0.8]), rtol=ULP, atol=0)
    assert torch.equal(slope, torch.zeros(8))


def kl_sizes(penalty, logp, old, ref):
    """The size of (k, dk/dlogp) before anything cancels: k and its slope in a weighted k1 or k2, and nothing else.

    For a weighted k3 as much of exp(e) as cancels in float64, in terms of fp32.
    """
    logp, old, ref = (x.double() for x in (logp, old, ref))
    plain = replace(penalty, importance_weighted=False)
    k, slope = differentiated(lambda x: plain(x, old, ref), logp)
    if not penalty.importance_weighted:
        return k.abs(), slope.abs()
    ratio, size = (logp - old).exp(), k.abs() + slope.abs()
    size_of_slope = ratio * (size if penalty.estimator != "k3" else (ref - logp).abs() + 2.0**-27 * size)
    beyond = (ref - logp).abs() > (penalty.max_log_ratio or inf)
    return ratio * k.abs(), torch.where(beyond, 0, size_of_slope)


def accept_infinities(slope, exact, logp, old, ref):
    """An infinite ratio makes the slope r k + r k' of PyTorch inf - inf, NaN, where r (k + k') may be an infinity."""
    both = (logp - old == inf) & ~ref.isnan() & exact.isnan()
    assert not slope[both].isfinite().any()
    exact[both] = slope[both].double()


@of_each_bound
@of_each_estimator
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_an_estimator_against_autograd_in_float64(estimator, weighted, bound):
    """Where the log ratio is exactly at its bound, the slope is the whole one."""
    logp, ref = log_probabilities()
    sweep = torch.cat([torch.linspace(-3, 3, 1001), torch.logspace(-6, 2, 200), -torch.logspace(-6, 2, 200)])
    logp, ref = torch.cat([logp, torch.zeros(len(sweep))]), torch.cat([ref, sweep])
    logp, ref, old = with_specials(logp, ref, logp[torch.randperm(len(logp))])
    got = launched(kl_kernel, (logp, ref, old), bound, KL=ESTIMATORS[estimator], WEIGHTED=weighted)
    penalty = KLPenalty(1.0, estimator, weighted, bound)
    want, single = both_precisions(penalty, logp, old, ref)
    if weighted:
        accept_infinities(got[1], want[1], logp, old, ref)
    log_ratio = (ref - logp).abs() + (logp - old).abs()
    for mine, exact, fp32, size in zip(got, want, single, kl_sizes(penalty, logp, old, ref), strict=True):
        assert_agrees(mine, exact, fp32, size, log_ratio)
    if bound is not None:
        beyond = (ref - logp).abs() > bound
        assert beyond.any()
        assert (got[1][beyond] == 0).all()


def test_k3_of_a_small_difference_is_exact_to_two_ulp():
    """There it is a polynomial, without the error of an exp."""
    sizes = torch.logspace(-12, 0, 1024).clamp(max=1 - ULP)
    e = torch.cat([sizes, -sizes])
    k, slope = launched(kl_kernel, (torch.zeros(2048), e, torch.zeros(2048)), None, KL=device.kl_k3, WEIGHTED=False)
    e = e.double()
    terms = torch.stack([e**n / math.factorial(n) for n in range(2, 20)])  # float64's exp(e) - 1 - e cancels at 1e-12
    torch.testing.assert_close(k.double(), terms.sum(0), rtol=2 * ULP, atol=0)
    torch.testing.assert_close(slope.double(), -e.expm1(), rtol=2 * ULP, atol=0)


PENALTIES = [None, *(KLPenalty(0.3, k, w, m) for k in ESTIMATORS for w in (False, True) for m in (None, 2.5))]


# a case without a penalty, and with every third: the two are only added up
CASES_AND_PENALTIES = [
    pytest.param(case, penalty, marks=[] if not p or (c + p) % 3 == 0 else pytest.mark.full, id=f"{case}-{penalty}")
    for c, case in enumerate(CASES)
    for p, penalty in enumerate(PENALTIES)
]


@pytest.mark.parametrize(("case", "penalty"), CASES_AND_PENALTIES)
def test_token_loss_is_that_of_the_losses(case, penalty):
    """With rollout weights and without, off-policy and on-policy."""
    name, objective, bounds = CASES[case]
    kl = penalty is not None
    estimator, weighted, bound = (
        (penalty.estimator, penalty.importance_weighted, penalty.max_log_ratio) if kl else (None, False, None)
    )
    logp, old, advantage, ref = with_specials(*off_policy_tokens())
    weight, rollout = torch.rand(len(logp)) * 2 - 0.5, torch.rand(len(logp)) * 2
    for old_given, rollout_given in ((old, rollout), (old, None), (None, rollout)):
        inputs = logp, old_given, advantage, weight, rollout_given, ref if kl else None
        coef = 0.3 if kl else None
        functions = getattr(device, name), ESTIMATORS.get(estimator), weighted
        got = launched(token_loss_kernel, inputs, bounds, coef, bound, *functions)
        terms = TokenTerms(None, old_given, advantage, weight, rollout_given, ref)
        want, single = (differentiated(*at) for at in losses_of(terms, logp, objective, penalty))
        on = logp if old_given is None else old
        sizes = differentiated(lambda x: objective(x, on.double(), advantage.double()), logp.double())  # noqa: B023
        factor = condition(objective, logp - on, advantage) * (1 if rollout_given is None else rollout)
        sizes = [factor * x.abs() for x in sizes]
        if kl:
            sizes = [a + 0.3 * b for a, b in zip(sizes, kl_sizes(penalty, logp, on, ref), strict=True)]
        if old_given is not None:  # its NaN meets every slope, also one of 0
            want[1][~old.isfinite()] = nan
        if isinstance(objective, SAPO):
            want[1][(logp - on).isnan()] = nan
        if isinstance(objective, DPPOTV):  # of log-probabilities inf and 99.5 the difference p - q is NaN in fp32, and inf else
            got[1][(logp > 88) & (on > 88)] = want[1][(logp > 88) & (on > 88)] = 0
        if weighted:
            accept_infinities(got[1], want[1], logp, on, ref)
        log_ratio = (logp - on).abs() + (ref - logp).abs()
        for mine, exact, fp32, size in zip(got, want, single, sizes, strict=True):
            assert_agrees(mine, exact, fp32, weight.abs() * size, log_ratio)


def off_policy_tokens():
    """(logp, old, A, ref), finite, of ordinary ratios and of those that overflow in fp32."""
    logp, old = log_probabilities()
    order = torch.randperm(len(logp))
    ref = logp - (logp - old)[order].clamp(-30, 30)
    return logp, old, ADVANTAGES[torch.arange(len(logp)) % len(ADVANTAGES)], ref


def losses_of(terms, logp, objective, kl):
    """(function, logp) of `token_losses` in float64 and in fp32."""
    for dtype in (torch.float64, torch.float32):
        cast = TokenTerms(*(x if x is None or x.dtype == torch.bool else x.to(dtype) for x in terms))
        yield (lambda x, cast=cast: token_losses(x, cast, objective, kl)), logp.to(dtype)


@pytest.mark.parametrize("spoilt", [3, 4], ids=["weight", "rollout"])
@of_each_case
def test_a_nan_that_multiplies_is_not_hidden_by_a_slope_of_zero(case, spoilt):
    """Nor by an advantage of 0."""
    name, _, bounds = CASES[case]
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 2.0, -2.0])
    inputs = [torch.zeros(8), torch.tensor([-2.0, -2.0, 2.0, 2.0, 0.0, 1.0, 0.0, 0.0]), advantage, torch.ones(8), torch.ones(8)]
    inputs[spoilt] = torch.full((8,), nan)
    loss, g = launched(token_loss_kernel, (*inputs, None), bounds, None, None, getattr(device, name), None, False)
    assert loss.isnan().all()
    assert g.isnan().all()
