"""Values and gradients of `policy_loss`: the oracle against formulas written out here, the fast path against the oracle."""

import math

import pytest
import torch
from batches import (
    EPS,
    F32,
    F64,
    LAYOUTS,
    MASK,
    as_rows,
    batch,
    every_layout,
    every_objective,
    every_reduction,
    lay_out,
    loss_and_gradient,
    oracle_of,
    penalties,
    result_as_rows,
)
from objectives import ANY_RATIO, LEAVE_OUT, OBJECTIVES, OF_SEQUENCES, PLAIN, SEQUENCE, TOKEN, TRAJECTORY, WEIGHTS
from torch.distributions import Bernoulli, kl_divergence

from fastpg import CISPO, DPPOKL, GSPO, SAPO, ImportanceWeighted, KLPenalty, PPOClip, Reinforce, policy_loss, reference

# ---- by hand


def test_ppo_and_dual_clip_by_hand():
    """r = 1.5, 0.5, 1.5, 0.5, 1.1, 4 with A = 2, 2, -2, -2, 1, -1: where the clip holds l = (1 +- eps) A and the slope is 0."""
    r, a = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 4.0], dtype=F64), torch.tensor([2.0, 2, -2, -2, 1, -1], dtype=F64)
    wanted = [2.4, 1.0, -3.0, -1.6, 1.1, -4.0], [0, 1.0, -3.0, 0, 1.1, -4.0]
    dual = [2.4, 1.0, -3.0, -1.6, 1.1, -3.0], [0, 1.0, -3.0, 0, 1.1, 0]
    higher = [2.56, 1.0, -3.0, -1.8, 1.1, -3.0], [0, 1.0, -3.0, 0, 1.1, 0]
    for objective, (values, slopes) in (
        (reference.ppo_clip(0.2, 0.2), wanted),
        (reference.ppo_clip(0.2, 0.2, 3.0), dual),
        (reference.ppo_clip(0.1, 0.28, 3.0), higher),
        (PPOClip(), wanted),
        (PPOClip(dual_clip=3.0), dual),
        (PPOClip(0.1, 0.28, 3.0), higher),
    ):
        logprobs = r.log().requires_grad_()
        value = objective(logprobs, torch.zeros(6, dtype=F64), a)
        assert value.tolist() == pytest.approx(values, rel=1e-14)
        assert torch.autograd.grad(value.sum(), logprobs)[0].tolist() == pytest.approx(slopes, rel=1e-14)


def test_sequence_ratios_by_hand():
    """Sequence 0 has r = 2, 1/2, 8: rho = 2, w = 8; sequence 1 has r = 1/4: rho = w = 1/4. Tokens shuffled."""
    logprobs, ids = torch.tensor([2.0, 0.25, 0.5, 8.0], dtype=F64).log(), torch.tensor([0, 1, 0, 0])
    arguments = logprobs, torch.zeros(4, dtype=F64), torch.tensor([3.0, -4.0, 3.0, 3.0], dtype=F64)
    for oracle, objective, wanted in (
        (reference.importance_weighted_by("sequence"), ImportanceWeighted("sequence"), [6.0, -1.0, 6.0, 6.0]),
        (reference.importance_weighted_by("trajectory"), ImportanceWeighted("trajectory"), [8.0, -1.0, 8.0, 8.0]),
        (reference.gspo(0.5, 0.25), GSPO(0.5, 0.25), [3.75, -2.0, 3.75, 3.75]),
    ):
        assert oracle(*arguments, ids).tolist() == pytest.approx(wanted, rel=1e-14)
        loss = policy_loss(*arguments, objective=objective, sequence_ids=ids, reduction="seq-mean-token-mean").loss
        assert loss.item() == pytest.approx(-(wanted[0] + wanted[1]) / 2, rel=1e-14)


def test_sapo_by_hand():
    """r = 2, A = 3, tau = 2: l = 2 sigmoid(2) 3; r = 1: l = (2 / tau) A with slope A, whatever tau is."""
    logprobs = torch.tensor([2.0, 1.0, 1.0], dtype=F64).log().requires_grad_()
    arguments = logprobs, torch.zeros(3, dtype=F64), torch.tensor([3.0, 3.0, -5.0], dtype=F64)
    s = 1 / (1 + math.exp(-2))
    for objective in (reference.sapo(2.0, 0.5), SAPO(2.0, 0.5)):
        value = objective(*arguments)
        assert value.tolist() == pytest.approx([6 * s, 3.0, -20.0], rel=1e-14)
        slopes = torch.autograd.grad(value.sum(), logprobs)[0].tolist()
        assert slopes == pytest.approx([4 * s * (1 - s) * 2 * 3, 3.0, -5.0], rel=1e-14)


def test_cispo_by_hand():
    """r = 2, 1/2, 8 and clip at 5: -(2 * 1 * -1 + 1/2 * -2 * -3 + 5 * 3 * -3) / 3 = 44 / 3; gradients -(2, -1, 15) / 3."""
    logprobs = torch.tensor([-1.0, -3.0, -3.0], dtype=F64)
    old = logprobs - torch.tensor([2.0, 0.5, 8.0], dtype=F64).log()
    output, gradient = loss_and_gradient(logprobs, old, torch.tensor([1.0, -2.0, 3.0], dtype=F64), objective=CISPO())
    assert output.loss.item() == pytest.approx(44 / 3, rel=1e-14)
    assert gradient.tolist() == pytest.approx([-2 / 3, 1 / 3, -5], rel=1e-14)


def test_cispo_bounds_are_on_the_ratio_itself():
    """Not 1 + epsilon: ratio_max=0.2 multiplies by at most 0.2. No lower bound unless asked for; the default upper one is 5."""
    logprobs = torch.zeros(4, dtype=F64)
    old = -torch.tensor([1e-6, 0.1, 1.0, 100.0], dtype=F64).log()

    def coefficients(objective):
        return loss_and_gradient(logprobs, old, -torch.ones(4), objective=objective, reduction="sum")[1].tolist()

    assert coefficients(CISPO()) == pytest.approx([1e-6, 0.1, 1.0, 5.0])
    assert coefficients(CISPO(ratio_max=0.2)) == pytest.approx([1e-6, 0.1, 0.2, 0.2])
    assert coefficients(CISPO(ratio_max=None)) == pytest.approx([1e-6, 0.1, 1.0, 100.0])
    assert coefficients(CISPO(ratio_max=4.0, ratio_min=0.5)) == pytest.approx([0.5, 0.5, 1.0, 4.0])


# ---- by formula


def formula(name, logprobs, old, advantages, members):
    """l by torch.minimum, maximum and sigmoid, and sums over sequences as products with `members`, (S, N) of 0 and 1."""
    d = logprobs - old
    ours, _, level, *_ = OBJECTIVES[name]
    if level == TOKEN:
        ratio = d.exp()
    else:
        lengths = members.sum(1)
        ratio = (members @ d / lengths if level == SEQUENCE else members @ d).exp() @ members
    if isinstance(ours, SAPO):
        tau = torch.full_like(d, ours.tau_neg).masked_fill(advantages > 0, ours.tau_pos)
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    if isinstance(ours, PPOClip | GSPO):
        values = torch.minimum(ratio * advantages, ratio.clamp(1 - ours.eps_low, 1 + ours.eps_high) * advantages)
        dual = getattr(ours, "dual_clip", None)
        return values if dual is None else torch.where(advantages < 0, torch.maximum(values, dual * advantages), values)
    if name in LEAVE_OUT:
        new_and_old = [Bernoulli(x.detach().exp()) for x in (logprobs, old)]
        far = (
            kl_divergence(*new_and_old[::-1])
            if isinstance(ours, DPPOKL)
            else (new_and_old[0].probs - new_and_old[1].probs).abs()
        )
        matters = True if name.endswith("two-sided") else advantages.sign() == d.sign()
        return ratio * advantages * ~(matters & (far > torch.where(d > 0, ours.delta_high, ours.delta_low)))
    return ratio * advantages / (lengths @ members if level == TRAJECTORY else 1)


# those that differ from their formula in a stop-gradient, or are formulas of their own, apart
WRITTEN_OUT = [name for name in OBJECTIVES if name not in (*PLAIN, *WEIGHTS) or name == "importance-weighted"]


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_oracle_equals_the_formula_and_passes_gradcheck(name):
    inputs = lay_out(batch(), "pack")
    logprobs, old, advantages, ids = (inputs[k] for k in ("logprobs", "old_logprobs", "advantages", "sequence_ids"))
    _, oracle, level, *_ = OBJECTIVES[name]
    members = torch.stack([ids == number for number in ids.unique()]).double()
    logprobs = logprobs.requires_grad_()

    def value(logprobs):
        return oracle(logprobs, old, advantages, *((ids,) if level != TOKEN else ()))

    wanted = formula(name, logprobs, old, advantages, members)
    torch.testing.assert_close(value(logprobs), wanted, rtol=1e-13, atol=0)
    weights = torch.rand_like(wanted)
    got, want = (torch.autograd.grad((x * weights).sum(), logprobs)[0] for x in (value(logprobs), wanted))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    assert torch.autograd.gradcheck(value, logprobs)


def gradient_by_loops(name, inputs, reduction):
    """dL/dlogp_t = -sum_s weight_s dl_s/dlogp_t / D, one number after the other; only s = t for ratios of tokens."""
    _, _, level, coefficient, left_out = OBJECTIVES[name]
    logprobs, old = inputs["logprobs"].tolist(), inputs["old_logprobs"].tolist()
    d = (inputs["logprobs"] - inputs["old_logprobs"]).tolist()
    gradient = torch.zeros(6, 5, dtype=F64)
    lengths = MASK.sum(1).tolist()
    count = {"token-mean": sum(lengths), "sum": 1}.get(reduction, sum(n > 0 for n in lengths))
    for b, row in enumerate(inputs["advantages"].tolist()):
        kept, n = [t for t in range(5) if MASK[b, t]], lengths[b]
        for t in kept:
            weight = 1 / count / (n if reduction == "seq-mean-token-mean" else 1)
            if level == TOKEN:
                r = math.exp(d[b][t])
                gradient[b, t] = 0 if left_out(logprobs[b][t], old[b][t], row[t]) else -weight * coefficient(r, row[t])
            else:
                total = math.fsum(d[b][s] for s in kept)
                r = math.exp(total / n if level == SEQUENCE else total)
                gradient[b, t] = -weight * math.fsum(coefficient(r, row[s]) / n for s in kept)
    return gradient


@every_reduction
@every_objective
def test_gradient_equals_the_formula_token_by_token(name, reduction):
    """Through the fast path and the oracle: the column dl/dlogp of semantics.md 1.2."""
    inputs = batch()
    wanted = gradient_by_loops(name, inputs, reduction)
    objective, oracle, level, *_ = OBJECTIVES[name]
    tolerance = {"rtol": 1e-13, "atol": 0} if level == TOKEN else {"rtol": 1e-12, "atol": 1e-15}
    for layout in LAYOUTS:
        _, gradient = result_as_rows(inputs, layout, objective=objective, reduction=reduction)
        torch.testing.assert_close(gradient, wanted, **tolerance)
        oracles = as_rows(oracle_of(lay_out(inputs, layout), oracle, reduction=reduction)[1], layout)
        torch.testing.assert_close(oracles, wanted, **tolerance)


# ---- the fast path against the oracle


@pytest.mark.parametrize(
    ("penalised", "per_sequence", "spread", "denominator"),
    [(False, False, 1.0, None), (False, True, 3.0, 7.5), (True, True, 1.0, torch.tensor(7.5)), (True, False, 3.0, None)],
    ids=["plain", "far-with-advantage-per-sequence", "kl-rollout-weights-and-advantage-per-sequence", "kl-rollout-weights-far"],
)
@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
@every_layout
@every_reduction
@every_objective
def test_loss_and_gradient_equal_the_oracle(name, reduction, layout, dtype, penalised, per_sequence, spread, denominator):
    objective, oracle, *_ = OBJECTIVES[name]
    inputs, oracles = batch(dtype, per_sequence, spread), {}
    options = {"reduction": reduction, "denominator": denominator}
    if penalised:
        inputs |= penalties(dtype)
        options["kl"], oracles["kl"] = KLPenalty(0.1, "k3", True), (0.1, "k3", True)
    given = lay_out(inputs, layout)
    output, gradient = loss_and_gradient(**given, objective=objective, **options)
    loss, wanted, scale = oracle_of(given, oracle, **options | oracles)
    assert output.loss.dtype == gradient.dtype == dtype
    # an error of d is 4 eps (logp and old are below 8 and their sums of 5 are), r inherits it, and there are 15 terms
    eps = 32 * torch.finfo(dtype).eps
    assert abs(output.loss.double() - loss).item() <= eps * scale
    torch.testing.assert_close(gradient.double(), wanted, rtol=eps, atol=eps * wanted.abs().max().item())


@every_objective
def test_positive_old_logprobs_are_computed_as_given(name):
    objective, oracle, *_ = OBJECTIVES[name]
    inputs = batch()
    inputs["old_logprobs"] = inputs["old_logprobs"].abs()
    output, gradient = loss_and_gradient(**inputs, objective=objective)
    wanted, wanted_gradient, _ = oracle_of(inputs, oracle)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-13, atol=0)


@every_reduction
@every_objective
def test_on_policy_every_objective_is_reinforce(name, reduction):
    """At r = 1 every coefficient is A, and the gradient flows through logp alone."""
    for layout in LAYOUTS:
        given = lay_out(batch(per_sequence=True), layout) | {"old_logprobs": None}
        output, gradient = loss_and_gradient(**given, objective=OBJECTIVES[name][0], reduction=reduction)
        _, wanted = loss_and_gradient(**given, objective=Reinforce(), reduction=reduction)
        torch.testing.assert_close(gradient, wanted, rtol=1e-14, atol=0)
        assert output.metrics["clip_fraction"] == 0


@pytest.mark.parametrize(
    "name", [*PLAIN, *LEAVE_OUT, *WEIGHTS[2:], "ppo", "ppo-clip-higher", "ppo-dual"]
)  # SAPO divides by tau
def test_on_policy_ratio_is_exactly_one(name):
    """old_logprobs=None: the gradient flows through logp alone, not through the old one that equals it."""
    objective, _, _, coefficient, _ = OBJECTIVES[name]
    logprobs, _, advantages, _ = batch(F32).values()
    output, gradient = loss_and_gradient(logprobs, None, advantages, objective=objective, reduction="sum")
    assert torch.equal(gradient, -torch.tensor([[coefficient(1.0, a) for a in row] for row in advantages.tolist()]))
    assert output.metrics["ratio_mean"] == output.metrics["ratio_max"] == output.metrics["ess"] == 1
    assert output.metrics["kl_k1"] == output.metrics["kl_k3"] == output.metrics["clip_fraction"] == 0


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize(
    ("objective", "ratio"),
    [
        (PPOClip(0.0, 0.0), 1.0),
        (PPOClip(0.5, 1.0), 0.5),
        (PPOClip(0.5, 1.0), 2.0),
        (PPOClip(0.5, 0.5, 2.0), 2.0),
        (GSPO(0, 0), 1.0),
    ],
    ids=str,
)
def test_a_ratio_on_the_bound_has_the_whole_gradient(objective, ratio, sign):
    """Where the terms tie it is r A, and no half of it; on-policy with eps = 0 too."""
    ids, old = torch.zeros(1, dtype=torch.long), torch.tensor([-math.log(ratio)], dtype=F64)
    assert (-old).exp().item() == ratio
    given = {"old_logprobs": old, "advantages": torch.tensor([sign], dtype=F64), "sequence_ids": ids}
    _, gradient = loss_and_gradient(torch.zeros(1, dtype=F64), **given, objective=objective)
    clipped = isinstance(objective, PPOClip) and objective.dual_clip is not None and sign > 0
    assert gradient.item() == (0 if clipped else -ratio * sign)


def test_everything_but_logprobs_is_a_constant():
    logprobs, *constants, _ = batch().values()
    constants += [torch.rand(6, 5), -torch.rand(6, 5)]
    logprobs.requires_grad_()
    old, advantages, rollout_weights, ref_logprobs = (t.requires_grad_() for t in constants)
    kl = {"kl": KLPenalty(0.1, importance_weighted=True), "ref_logprobs": ref_logprobs}
    output = policy_loss(logprobs, old, advantages, objective=ImportanceWeighted(), rollout_weights=rollout_weights, **kl)
    output.loss.backward()
    assert [t.grad for t in constants] == [None] * 4
    assert logprobs.grad is not None


def test_incoming_gradient_scales_the_gradient():
    inputs = batch()
    logprobs = inputs["logprobs"].requires_grad_()
    loss = policy_loss(**inputs, objective=CISPO()).loss
    (once,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, logprobs, torch.tensor(-3.0, dtype=F64))
    torch.testing.assert_close(scaled, -3 * once, rtol=1e-14, atol=0)


@every_layout
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_stride_0_incoming_gradients(name, layout):
    given = lay_out(batch(), layout)
    logprobs = given.pop("logprobs").requires_grad_()
    loss = policy_loss(logprobs, **given, objective=OBJECTIVES[name][0]).loss
    (once,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (thrice,) = torch.autograd.grad(loss.expand(3), logprobs, torch.ones(()).double().expand(3), retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, logprobs, torch.tensor(-2.0, dtype=F64))
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-14, atol=0)
    torch.testing.assert_close(scaled, -2 * once, rtol=1e-14, atol=0)


# ---- ratios that are far off


@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("d", [-40, -20.5, -1, 0, 1, 20.5, 40])
@pytest.mark.parametrize("name", ANY_RATIO)
def test_ratios_of_any_size(name, d, dtype):
    """r from e^-40 to e^40: no clamp of the log-ratio (some frameworks have one at 20), no underflow, no overflow."""
    objective, _, _, coefficient, _ = OBJECTIVES[name]
    logprobs, old = torch.tensor([-50.0], dtype=dtype), torch.tensor([-50.0 - d], dtype=dtype)
    output, gradient = loss_and_gradient(logprobs, old, torch.tensor([1.5], dtype=dtype), objective=objective)
    wanted = coefficient(math.exp(d), 1.5)
    value = math.exp(d) * 1.5 if name == "importance-weighted" else -50 * wanted
    assert gradient.item() == pytest.approx(-wanted, rel=4 * EPS[dtype], abs=0)
    assert output.loss.item() == pytest.approx(-value, rel=4 * EPS[dtype], abs=0)


def test_a_ratio_that_overflows_is_clipped():
    """e^100 is inf in fp32; a clip at 5 still makes it 5."""
    output, gradient = loss_and_gradient(torch.tensor([-1.0]), torch.tensor([-101.0]), torch.tensor([2.0]), objective=CISPO())
    assert gradient.item() == -10
    assert output.loss.item() == 10


BOUNDED = {
    "ppo-positive": (PPOClip(), 1.0, 1.2),
    "ppo-dual-negative": (PPOClip(dual_clip=3.0), -1.0, -3.0),
    "ppo-zero": (PPOClip(), 0.0, 0.0),
    "gspo-positive": (GSPO(0.2, 0.2), 1.0, 1.2),
    "sapo-positive": (SAPO(), 1.0, 4.0),
    "sapo-negative": (SAPO(), -1.0, -4 / 1.05),
}


@pytest.mark.parametrize(("objective", "advantage", "value"), BOUNDED.values(), ids=BOUNDED)
def test_a_ratio_that_overflows_has_its_clipped_value_and_no_gradient(objective, advantage, value):
    """r = e^100 is inf in fp32; l is bounded all the same, and 0 times the infinite slope of the other term must not be NaN."""
    arguments = {"old_logprobs": torch.tensor([-101.0]), "advantages": torch.tensor([advantage])}
    arguments["sequence_ids"] = torch.zeros(1, dtype=torch.long)
    output, gradient = loss_and_gradient(torch.tensor([-1.0]), **arguments, objective=objective)
    assert output.loss.item() == pytest.approx(-value, rel=1e-6)
    assert gradient.item() == 0


@pytest.mark.parametrize("ratio", [1e-6, 0.1, 1.0, 3.0, 10.0, 15.0, 20.0, 30.0, 60.0])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_sapo_coefficients_in_fp32(sign, ratio):
    """s (1 - s) at large r is small, not rounding noise: its error is that of r times the slope, dlog c/dlogp = 1 + tau r."""
    old = torch.tensor([-1.0 - math.log(ratio)])
    given = {"logprobs": torch.tensor([-1.0]), "old_logprobs": old, "advantages": torch.tensor([sign])}
    gradient = loss_and_gradient(**given, objective=SAPO())[1]
    wanted = oracle_of(given, reference.sapo())[1]
    assert gradient.item() == pytest.approx(wanted.item(), rel=4 * 2**-23 * (2 + 1.05 * ratio), abs=0)


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64], ids=["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("name", PLAIN)
def test_computes_in_fp32_at_least(name, dtype):
    objective, oracle, *_ = OBJECTIVES[name]
    logprobs, old, advantages, _ = (t.to(dtype) for t in batch(F32, spread=3.0).values())
    output, gradient = loss_and_gradient(logprobs, old, advantages, objective=objective, mask=MASK)
    wide = F64 if dtype == F64 else F32
    assert output.loss.dtype == output.logprobs.dtype == output.metrics["ratio_mean"].dtype == wide
    assert gradient.dtype == dtype

    exact = logprobs.double().requires_grad_()
    wanted = reference.policy_loss(exact, old.double(), advantages.double(), objective=oracle, mask=MASK)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact)
    # d has an error of eps * max(|logp|, |old|) < 8 eps, and so have r and l; the sum of 15 tokens, against their mean size
    size = oracle(exact.detach(), old.double(), advantages.double())[MASK].abs().mean().item()
    torch.testing.assert_close(output.loss.double(), wanted.detach(), rtol=0, atol=16 * EPS[wide] * size)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=32 * EPS[wide] + rounding, atol=EPS[wide])


def test_dtypes_may_differ():
    """Rewards are often counted in integers, and samplers' log-probabilities often come in another dtype."""
    logprobs, old, *_ = batch(F32).values()
    advantages = torch.tensor([1, -2, 3, 0, 2, -1])
    wanted = loss_and_gradient(logprobs, old, advantages.float(), objective=CISPO())
    for given in ((old, advantages), (old.double(), advantages.double())):
        actual = loss_and_gradient(logprobs, *given, objective=CISPO())
        assert actual[0].loss.dtype == F32
        assert torch.equal(actual[0].loss, wanted[0].loss)
        assert torch.equal(actual[1], wanted[1])
