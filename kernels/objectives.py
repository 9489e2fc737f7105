"""The loss of one token and its gradient, in registers: the objectives of `fastpg.loss.objectives` as device functions.

    objective(logp, old, advantage, bounds) -> l, dl/dlogp             l is maximised; old and A are constants
    estimator(e)                            -> k, dk/dlogp, k + dk/dlogp         e = ref - logp
    token_loss(...)                         -> -w (rollout l - coef k) and its slope g, for any two of them

All of them are elementwise on fp32 registers. A kernel takes the objective and the estimator as compile-time constants, so it
is compiled with these two and nothing else. The numbers of an objective are one argument, `bounds`: a NamedTuple of this file,
whose fields of None are constants too.

Slopes are written out in closed form. They equal automatic differentiation of the PyTorch objectives except in three cases:

    SAPO, NaN                        the loss is NaN; PyTorch's clamp hides the NaN from its gradient, and g here is NaN
    a NaN in a weight, or in old     the loss is NaN; g here is NaN even where the slope is 0
    k3 weighted by the ratio         in PyTorch's fp32 derivative exp(e) cancels; here it does not
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl


class RatioBounds(NamedTuple):
    """The bounds of `cispo`, on the ratio itself; None is no bound."""

    ratio_min: float | None
    ratio_max: float | None


class ClipBounds(NamedTuple):
    """The bounds of `ppo_clip`: 1 - eps_low, 1 + eps_high, and an upper bound of the ratio where A < 0, or None."""

    ratio_min: float
    ratio_max: float
    dual_clip: float | None


class Temperatures(NamedTuple):
    """The temperatures of `sapo`, where A > 0 and elsewhere."""

    tau_pos: float
    tau_neg: float


class Divergences(NamedTuple):
    """The bounds of `dppo_tv` and `dppo_kl`: on the divergence, and on the ratio as a weight (None: the ratio is no weight)."""

    low: float
    high: float
    ratio_max: float | None
    two_sided: float | None = None  # not None: M = 0 beyond either bound, whatever the sign of A


class RatioRange(NamedTuple):
    """The bounds of the ratio that `clip_fraction` counts by; None is no bound."""

    low: Any = None
    high: Any = None


class Loss(NamedTuple):
    """A loss to compute: device functions of this file, and their numbers."""

    objective: Callable
    bounds: Any
    kl: Callable | None
    kl_coef: float | None
    kl_is_weighted: bool
    kl_max_log_ratio: float | None  # a bound of |ref - logp|, or None
    # Of kernel 3. True: a row whose sum is not below 2^99, or whose factor is not finite, gets NaN. False: rows out of range
    # are flagged, for the schedule to compute again.
    show_lost: bool
    ratio_range: RatioRange = RatioRange()


class Numbers(NamedTuple):
    """The numbers of a loss that a kernel is given when it is launched."""

    bounds: Any
    kl_coef: Any
    kl_max_log_ratio: Any
    ratio_range: Any


def numbers_of(loss: Loss) -> Numbers:
    return Numbers(loss.bounds, loss.kl_coef, loss.kl_max_log_ratio, loss.ratio_range)


@triton.jit
def reinforce(logp, old, advantage, bounds):
    """l = A logp, slope A. (Williams 1992) bounds: None."""
    return advantage * logp, advantage


@triton.jit
def importance_weighted(logp, old, advantage, bounds):
    """l = r A, slope r A, with r = exp(logp - old) of the token alone. bounds: None."""
    surrogate = tl.exp(logp - old) * advantage
    return surrogate, surrogate


@triton.jit
def clipped(ratio, ratio_min, ratio_max):
    """clip(ratio, ratio_min, ratio_max); None is no bound. NaN stays NaN, which tl.minimum alone would drop."""
    if ratio_min is not None:
        ratio = tl.maximum(ratio, ratio_min, propagate_nan=tl.PropagateNan.ALL)
    if ratio_max is not None:
        ratio = tl.minimum(ratio, ratio_max, propagate_nan=tl.PropagateNan.ALL)
    return ratio


@triton.jit
def cispo(logp, old, advantage, bounds):
    """l = c logp, slope c = clip(r) A: the ratio is held constant. (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5)

    bounds: RatioBounds.
    """
    coefficient = clipped(tl.exp(logp - old), bounds.ratio_min, bounds.ratio_max) * advantage
    return coefficient * logp, coefficient


@triton.jit
def ppo_clip(logp, old, advantage, bounds):
    """l = min(r A, clip(r) A), and with dual_clip c, where A < 0, max(that, c A). bounds: ClipBounds.

    (PPO, arXiv 1707.06347, eq. 7; dual clip: arXiv 1912.09729, eq. 4.) The slope is r A where l is r A, also at a tie. It is
    exactly 0 where a clip holds or A = 0, however large the ratio: a computed 0 * inf would be NaN.
    """
    ratio = tl.exp(logp - old)
    surrogate = ratio * advantage
    constant = clipped(ratio, bounds.ratio_min, bounds.ratio_max) * advantage
    is_constant = surrogate > constant  # False for NaN, which stays in the result
    if bounds.dual_clip is not None:
        beyond = (advantage < 0) & (ratio > bounds.dual_clip)
        constant = tl.where(beyond, bounds.dual_clip * advantage, constant)
        is_constant = is_constant | beyond
    value = tl.where(is_constant, constant, surrogate)
    slope = tl.where(is_constant, 0.0, surrogate)
    return tl.where(advantage == 0, 0.0, value), tl.where(advantage == 0, 0.0, slope)


@triton.jit
def sapo(logp, old, advantage, bounds):
    """l = (4 / tau) s A, slope 4 s (1 - s) r A, with s = sigmoid(x), x = tau (r - 1). (SAPO, arXiv 2511.20347)

    bounds: Temperatures. With q = exp(-|x|), s is 1 / (1 + q) or q / (1 + q), and s (1 - s) = q / (1 + q)^2: nothing cancels.
    The log ratio is clamped at 60, so that r stays finite. Beyond 60 the slope is 0, as q is 0 there for any tau in use.
    """
    log_ratio = logp - old
    ratio = tl.exp(tl.minimum(log_ratio, 60.0, propagate_nan=tl.PropagateNan.ALL))
    tau = tl.where(advantage > 0, bounds.tau_pos, bounds.tau_neg)
    x = tau * (ratio - 1.0)
    q = tl.exp(-tl.abs(x))
    s = tl.where(x < 0, q, 1.0) / (1.0 + q)
    slope = 4.0 * q / ((1.0 + q) * (1.0 + q)) * ratio * advantage
    return 4.0 / tau * s * advantage, tl.where(log_ratio > 60.0, 0.0, slope)


@triton.jit
def unless(dropped, logp, weight, advantage):
    """l = w A logp and slope w A; exactly 0 where dropped or A = 0, however large w is, and NaN where A is."""
    dropped = (dropped & (advantage == advantage)) | (advantage == 0)
    slope = tl.where(dropped, 0.0, weight * advantage)
    return tl.where(dropped, 0.0, slope * logp), slope


@triton.jit
def within_divergence(rose, fell, logp, old, advantage, bounds):
    """l = r A, or sg(min(r, ratio_max)) A logp, and slope min(r, ratio_max) A; 0 where A > 0 and rose, or A < 0 and fell."""
    dropped = tl.where(advantage > 0, rose, fell)
    if bounds.two_sided is not None:
        dropped = rose | fell
    value, slope = unless(dropped, logp, clipped(tl.exp(logp - old), None, bounds.ratio_max), advantage)
    if bounds.ratio_max is None:
        value = slope
    return value, slope


@triton.jit
def dppo_tv(logp, old, advantage, bounds):
    """Left out: p - q > high where A > 0, q - p > low where A < 0; p = exp(logp), q = exp(old). bounds: Divergences.

    (DPPO, arXiv 2602.04879, eq. 13)
    """
    change = tl.exp(logp) - tl.exp(old)
    return within_divergence(change > bounds.high, change < -bounds.low, logp, old, advantage, bounds)


@triton.jit
def one_minus_exp(x):
    """1 - exp(x), at least 0. Near 0, where the difference would cancel, by the Taylor series of exp(x) - 1."""
    x = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    series = 1.0
    for n in tl.static_range(9, 1, -1):
        series = 1.0 + series * x * (1.0 / n)
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def dppo_kl(logp, old, advantage, bounds):
    """Left out: KL > high where A > 0 and p > q, KL > low where A < 0 and p < q. (DPPO, arXiv 2602.04879, eq. 14)

    KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), with p = exp(logp) and q = exp(old). bounds: Divergences.
    """
    others_new, others_old = one_minus_exp(logp), one_minus_exp(old)
    some = tl.where(others_old == 0, 1.0, others_old)
    of_others = tl.where(others_new == 0, float("inf"), some * tl.log(some / tl.where(others_new == 0, 1.0, others_new)))
    divergence = tl.exp(old) * (old - logp) + tl.where(others_old == 0, 0.0, of_others)
    rose, fell = (logp > old) & (divergence > bounds.high), (logp < old) & (divergence > bounds.low)
    return within_divergence(rose, fell, logp, old, advantage, bounds)


@triton.jit
def icepop(logp, old, advantage, bounds):
    """l = r A logp, slope r A, the ratio held constant; both 0 where it is not between its bounds. bounds: RatioBounds.

    (GLM-5, arXiv 2602.15763, section 4.1.2)
    """
    ratio = tl.exp(logp - old)
    dropped = ratio < 0  # False for NaN, which stays in the result
    if bounds.ratio_min is not None:
        dropped = dropped | (ratio <= bounds.ratio_min)
    if bounds.ratio_max is not None:
        dropped = dropped | (ratio >= bounds.ratio_max)
    return unless(dropped, logp, ratio, advantage)


# The estimators of KL(pi, ref), from e = ref - logp: Schulman, "Approximating KL divergence", 2020.


@triton.jit
def kl_k1(e):
    """k = -e, slope 1."""
    return -e, 1.0, 1.0 - e


@triton.jit
def kl_k2(e):
    """k = e^2 / 2, slope -e."""
    k = e * e * 0.5
    return k, -e, k - e


@triton.jit
def kl_k3(e):
    """k = exp(e) - 1 - e, slope -(exp(e) - 1), and their sum -e, in which exp(e) would cancel.

    k itself would cancel at |e| < 1. There it is its Taylor polynomial e^2 / 2! + ... + e^11 / 11!, whose first neglected term
    is below 6e-9 of k, and exp(e) - 1 = e + k.
    """
    series = 1.0
    for n in tl.static_range(11, 2, -1):
        series = 1.0 + series * e * (1.0 / n)
    near = e * e * 0.5 * series
    far = tl.exp(e) - 1.0
    is_near = tl.abs(e) < 1.0
    k = tl.where(is_near, near, far - e)
    return k, -tl.where(is_near, e + near, far), tl.where(k == k, -e, k)  # a k of NaN (inf - inf) makes the sum NaN too


@triton.jit
def weighted_kl(k, k_and_slope, logp, old):
    """r k and its slope r (k + dk/dlogp). r = exp(logp - old) is not held constant. (DeepSeek-V3.2)"""
    ratio = tl.exp(logp - old)
    return ratio * k, ratio * k_and_slope


@triton.jit
def kl_penalty(logp, old, ref, KL: tl.constexpr, max_log_ratio, IS_WEIGHTED: tl.constexpr):
    """k, or r k, and its slope. max_log_ratio: e = ref - logp ends there, on both sides, and the slope is 0 beyond; or None."""
    e = ref - logp
    if max_log_ratio is None:
        k, slope, k_and_slope = KL(e)
    else:
        beyond = tl.abs(e) > max_log_ratio  # False for NaN, which stays in the result
        k, slope, k_and_slope = KL(tl.where(beyond, tl.where(e < 0, -max_log_ratio, max_log_ratio), e))
    if IS_WEIGHTED:
        k, slope = weighted_kl(k, k_and_slope, logp, old)
    if max_log_ratio is not None:
        slope = tl.where(beyond, 0.0, slope)
    return k, slope


@triton.jit
def token_loss(
    logp,
    old,  # None: on-policy, the ratio is exactly 1
    advantage,
    weight,  # weight_n / D of the reduction
    rollout,  # None: 1
    ref,  # None without KL
    OBJECTIVE: tl.constexpr,
    bounds,
    KL: tl.constexpr,  # None: no KL term
    kl_coef,
    kl_max_log_ratio,
    KL_IS_WEIGHTED: tl.constexpr,
):
    """loss = -weight (rollout l - coef k) and g = dloss/dlogp; the caller drops masked tokens.

    The formula is that of `fastpg.loss.policy_loss.token_losses`. `rollout` multiplies the objective and not the KL term. An
    old log-probability that is not finite makes both NaN: a ratio of 0 or inf is never meant, and a clip would hide it.
    """
    if old is None:
        old = logp
    else:
        weight = tl.where(tl.abs(old) < float("inf"), weight, float("nan"))
    value, slope = OBJECTIVE(logp, old, advantage, bounds)
    if rollout is not None:
        value, slope = value * rollout, slope * rollout
    if KL is not None:
        k, k_slope = kl_penalty(logp, old, ref, KL, kl_max_log_ratio, KL_IS_WEIGHTED)
        value, slope = value - kl_coef * k, slope - kl_coef * k_slope
    return -value * weight, -slope * weight


_BOUNDS = {
    cispo: RatioBounds, ppo_clip: ClipBounds, sapo: Temperatures,
    dppo_tv: Divergences, dppo_kl: Divergences, icepop: RatioBounds,
}  # fmt: skip


def bounds_of(objective, numbers):
    """The bounds of an objective from its numbers, in the order of their fields."""
    kind = _BOUNDS.get(objective)
    if kind is None:
        return None
    return kind(*(None if x is None else float(x) for x in numbers[: len(kind._fields)]))
