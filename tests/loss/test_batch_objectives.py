"""Objectives that need other tokens of the sequence or of the batch: VESPO, ClipCov, KLCov, and LUSPO, which is GSPO summed."""

import itertools
import math
import statistics

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
    every_reduction,
    lay_out,
    loss_and_gradient,
    oracle_of,
    penalties,
    result_as_rows,
)
from objectives import INF, NAN, REDUCTIONS
from raising import said

from fastpg import (
    GSPO,
    VESPO,
    ClipCov,
    ImportanceWeighted,
    KLCov,
    KLPenalty,
    LinearPolicyLoss,
    Reinforce,
    linear_policy_loss,
    policy_loss,
    reference,
)
from fastpg.crosscheck import assert_matches_oracle, cases

CLIP = {"eps_low": 0.2, "eps_high": 0.3, "cov_min": 0.02, "cov_max": 0.7}
# name: (ours, the oracle's). With fraction=1 ClipCov leaves nothing to chance.
OBJECTIVES = {
    "vespo": (VESPO(1.5, 2.5, 3.0, 2.0), reference.vespo(1.5, 2.5, 3.0, 2.0)),
    "clip-cov": (ClipCov(**CLIP, fraction=1.0), reference.clip_cov(0.2, 0.3, 1.0, 0.02, 0.7)),
    "kl-cov": (KLCov(0.7, 0.3), reference.kl_cov(0.7, 0.3)),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
OF_BATCH = ["clip-cov", "kl-cov"]


def inputs_of(name, dtype=F64, **options):
    """One batch, whatever was drawn before it, in which every choice is taken: see the next test."""
    torch.manual_seed(17)
    return batch(dtype, **options)


def numbers(inputs):
    """(d, A, logp, covariance) of the kept tokens, as lists, row after row."""
    logp, old, a = (inputs[k][MASK].tolist() for k in ("logprobs", "old_logprobs", "advantages"))
    cov = [(x - statistics.fmean(a)) * (y - statistics.fmean(logp)) for x, y in zip(a, logp, strict=True)]
    return [y - o for y, o in zip(logp, old, strict=True)], a, logp, cov


def held(d, a):
    """Whether PPO's clip holds a token."""
    return (a > 0 and d > math.log(1.3)) or (a < 0 and d < math.log(0.8))


def largest(cov):
    """The 4 = int(0.3 * 15) tokens of largest covariance."""
    return sorted(range(15), key=lambda i: -cov[i])[:4]


def values_and_slopes(name, inputs):
    """l and dl/dlogp of the kept tokens, row after row, in Python."""
    d, a, logp, cov = numbers(inputs)
    if name == "vespo":
        rows = torch.arange(6)[:, None].expand(6, 5)[MASK].tolist()
        w = [math.exp(math.fsum(x for x, r in zip(d, rows, strict=True) if r == row)) for row in rows]
        phi = [x**1.5 * math.exp(2.5 * (1 - x)) if y >= 0 else x**3 * math.exp(2 * (1 - x)) for x, y in zip(w, a, strict=True)]
        return [p * y * x for p, y, x in zip(phi, a, logp, strict=True)], [p * y for p, y in zip(phi, a, strict=True)]
    if name == "kl-cov":
        chosen = [i in largest(cov) for i in range(15)]
        values = [math.exp(x) * y - 0.7 * abs(x) * c for x, y, c in zip(d, a, chosen, strict=True)]
        return values, [math.exp(x) * y - 0.7 * math.copysign(1, x) * c for x, y, c in zip(d, a, chosen, strict=True)]
    values, slopes = [], []
    for x, y, c in zip(d, a, cov, strict=True):
        bound = (1.3 if y > 0 else 0.8) * y
        drawn = 0.02 < c < 0.7 and not held(x, y)
        values.append(0.0 if drawn else bound if held(x, y) else math.exp(x) * y)
        slopes.append(0.0 if drawn or held(x, y) else math.exp(x) * y)
    return values, slopes


def test_the_batch_takes_every_choice():
    d, a, _, cov = numbers(inputs_of("clip-cov"))
    beyond = [held(x, y) for x, y in zip(d, a, strict=True)]
    inside = [0.02 < c < 0.7 for c in cov]
    kinds = {(b, i) for b, i in zip(beyond, inside, strict=True)}
    assert kinds == set(itertools.product([True, False], repeat=2))
    assert min(cov) < 0.02 < 0.7 < max(cov)
    assert {d[i] > 0 for i in largest(cov)} == {True, False}


@every_layout
@every_reduction
@every_objective
def test_oracle_and_fast_path_equal_the_formula_token_by_token(name, reduction, layout):
    inputs = inputs_of(name)
    found = (torch.tensor(x, dtype=F64) for x in values_and_slopes(name, inputs))
    values, slopes = (torch.zeros(6, 5, dtype=F64).masked_scatter(MASK, x) for x in found)
    lengths = MASK.sum(1, keepdim=True).clamp(min=1)
    weights = MASK.double() / {"token-mean": 15, "sum": 1}.get(reduction, 5)
    weights = weights / lengths if reduction == "seq-mean-token-mean" else weights
    ours, oracle = OBJECTIVES[name]
    loss, gradient = result_as_rows(inputs, layout, objective=ours, reduction=reduction)
    of_oracle = oracle_of(lay_out(inputs, layout), oracle, reduction=reduction)
    for found, slope in ((loss, gradient), (of_oracle[0], as_rows(of_oracle[1], layout))):
        torch.testing.assert_close(found, -(values * weights).sum(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(slope, -slopes * weights, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("per_sequence", [False, True], ids=["per-token", "per-sequence"])
@every_layout
@every_reduction
@every_objective
def test_loss_and_gradient_equal_the_oracle_with_penalties(name, reduction, layout, per_sequence, dtype):
    ours, oracle = OBJECTIVES[name]
    given = lay_out(inputs_of(name, dtype, per_sequence=per_sequence) | penalties(dtype), layout)
    options = {"reduction": reduction, "denominator": 7.5}
    output, gradient = loss_and_gradient(**given, objective=ours, kl=KLPenalty(0.1, "k3", True), **options)
    loss, wanted, scale = oracle_of(given, oracle, kl=(0.1, "k3", True), **options)
    assert output.loss.dtype == gradient.dtype == dtype
    eps = 64 * EPS[dtype]  # VESPO's exponent is a sum of five d times 3, and of W times 2.5
    assert abs(output.loss.double() - loss).item() <= eps * scale
    torch.testing.assert_close(gradient.double(), wanted, rtol=eps, atol=eps * wanted.abs().max().item())


def test_the_oracles_pass_gradcheck():
    """Their stop-gradients apart: VESPO's derivative is not that of its value."""
    given = lay_out(inputs_of("kl-cov"), "pack")
    logprobs = given["logprobs"].requires_grad_()
    torch.autograd.gradcheck(lambda x: OBJECTIVES["kl-cov"][1](x, given["old_logprobs"], per_token(given)), logprobs)


def per_token(given):
    a = given["advantages"]
    return a if a.shape == given["logprobs"].shape else a[given["sequence_ids"]]


# ---- VESPO


def test_vespo_by_hand():
    """Sequence 0 has r = 2, 1/2, 3: W = 3; sequence 1 has r = 1/2. phi = 9 e^-6 where A > 0, e^1 / 8 where A < 0."""
    logprobs, ids = torch.tensor([2.0, 0.5, 0.5, 3.0], dtype=F64).log(), torch.tensor([0, 1, 0, 0])
    a = torch.tensor([1.0, -2.0], dtype=F64)
    output, gradient = loss_and_gradient(
        logprobs, torch.zeros(4, dtype=F64), a, objective=VESPO(), sequence_ids=ids, reduction="sum"
    )
    positive, negative = 9 * math.exp(-6), -2 * math.e / 8
    assert gradient.tolist() == pytest.approx([-positive, -negative, -positive, -positive], rel=1e-14)
    assert output.loss.item() == pytest.approx(-(positive * math.log(3) + negative * math.log(0.5)), rel=1e-14)


def test_vespos_weight_is_1_on_policy_and_falls_on_both_sides_of_k_over_lambda():
    x = {"advantages": torch.ones(1, dtype=F64), "objective": VESPO(k_pos=3.0, lambda_pos=2.0), "reduction": "sum"}

    def phi(w):
        return -loss_and_gradient(torch.zeros(1, 1, dtype=F64), -torch.tensor([[w]], dtype=F64).log(), **x)[1].item()

    assert phi(1.0) == 1.0
    assert phi(1.4) < phi(1.5) > phi(1.6)
    assert phi(0.01) < 1e-5
    assert phi(30.0) < 1e-20


@pytest.mark.parametrize("d", [-500.0, 89.0, 500.0])
def test_vespo_of_ratios_out_of_range(d):
    """W = e^89 and e^500 are inf in fp32, and W^k is sooner; the weight is 0 and not NaN."""
    for a in (1.0, -1.0):
        given = {"old_logprobs": torch.tensor([[-1.0 - d]]), "advantages": torch.tensor([a])}
        output, gradient = loss_and_gradient(torch.tensor([[-1.0]]), **given, objective=VESPO())
        assert output.loss.item() == 0
        assert gradient.item() == 0


def test_vespo_sums_over_micro_batches_of_sequences():
    inputs = inputs_of("vespo")
    whole = result_as_rows(inputs, "rows", objective=VESPO())
    parts = [{k: x[rows] for k, x in inputs.items()} for rows in (slice(0, 2), slice(2, 6))]
    found = [loss_and_gradient(**part, objective=VESPO(), denominator=15) for part in parts]
    torch.testing.assert_close(sum(x[0].loss for x in found), whole[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([x[1] for x in found]), whole[1], rtol=1e-13, atol=0)


def test_luspo_is_gspo_times_the_length_of_each_sequence():
    """(arXiv 2602.05261) sum over sequences of T min(rho A, clip(rho) A) / S."""
    inputs = inputs_of("luspo", per_sequence=True)
    loss, gradient = result_as_rows(inputs, "rows", objective=GSPO(0.2, 0.3), reduction="seq-mean-token-sum")
    logprobs = inputs["logprobs"].clone().requires_grad_()
    lengths = MASK.sum(1)
    rho = (torch.where(MASK, logprobs - inputs["old_logprobs"], 0).sum(1) / lengths.clamp(min=1)).exp()
    values = torch.minimum(rho * inputs["advantages"], rho.clamp(0.8, 1.3) * inputs["advantages"])
    wanted = -(values * lengths).sum() / 5
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logprobs)[0], rtol=1e-12, atol=1e-15)


# ---- ClipCov and KLCov


def test_clip_cov_and_kl_cov_by_hand():
    """A = 3, -1, -1, -1 around 0, logp = 0, -2, -2, -4 around -2: covariances 6, 0, 0, 2."""
    logprobs = torch.tensor([0.0, -2.0, -2.0, -4.0], dtype=F64)
    a, d = torch.tensor([3.0, -1.0, -1.0, -1.0], dtype=F64), torch.tensor([0.1, 0.1, 0.1, -0.1], dtype=F64)
    r = d.exp()
    for objective, slopes in (
        (ClipCov(1.0, 1.0), [r[0] * 3, -r[1], -r[2], 0.0]),  # 1 < cov < 5
        (ClipCov(1.0, 1.0, 1.0, 1.0, 7.0), [0.0, -r[1], -r[2], 0.0]),
        (ClipCov(1.0, 1.0, 1.0, -1.0, 2.0), [r[0] * 3, 0.0, 0.0, -r[3]]),  # the bounds are outside
        (ClipCov(0.05, 1.0, 1.0, 1.0, 7.0), [0.0, -r[1], -r[2], 0.0]),  # the clip holds the last
        (KLCov(), [r[0] * 3 - 1, -r[1], -r[2], -r[3]]),  # max(int(2e-4 * 4), 1) = 1
        (KLCov(2.0, 0.5), [r[0] * 3 - 2, -r[1], -r[2], -r[3] + 2]),
        (KLCov(1.0, 0.8), [r[0] * 3 - 1, -r[1] - 1, -r[2], -r[3] + 1]),  # int(3.2), and of equal ones the first
    ):
        _, gradient = loss_and_gradient(logprobs, logprobs - d, a, objective=objective, reduction="sum")
        assert (-gradient).tolist() == pytest.approx([float(x) for x in slopes], rel=1e-13), objective


def drawn(objective, logprobs, a):
    """Which tokens a call leaves out; on-policy no other has a slope of 0."""
    return loss_and_gradient(logprobs, None, a, objective=objective, reduction="sum")[1] == 0


def test_clip_cov_draws_its_number_from_the_candidates_anew_each_time():
    logprobs, a = -torch.rand(1000, dtype=F64), torch.randn(1000, dtype=F64)
    cov = (a - a.mean()) * (logprobs - logprobs.mean())
    candidates = (cov > 0.1) & (cov < 0.3)
    generator = torch.Generator().manual_seed(3)
    objective = ClipCov(fraction=0.0297, cov_min=0.1, cov_max=0.3, generator=generator)
    first, second = drawn(objective, logprobs, a), drawn(objective, logprobs, a)
    assert first.sum() == second.sum() == 29 < candidates.sum()
    assert not (first & ~candidates).any()
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(drawn(objective, logprobs, a), first)
    torch.manual_seed(5)
    unseeded = ClipCov(fraction=0.0297, cov_min=0.1, cov_max=0.3)
    of_torch = drawn(unseeded, logprobs, a)
    assert not torch.equal(of_torch, drawn(unseeded, logprobs, a))
    torch.manual_seed(5)
    assert torch.equal(drawn(unseeded, logprobs, a), of_torch)


def test_clip_cov_draws_evenly():
    """One of 4 candidates among 12 tokens, 2000 times: each 500 times, with a standard deviation of 19."""
    a = torch.tensor([1.0, -1.0] * 6, dtype=F64)
    logprobs = torch.where(torch.arange(12) < 4, -2.5 - a, -2.5).double()
    cov = (a - a.mean()) * (logprobs - logprobs.mean())
    assert cov.tolist() == [-1.0] * 4 + [0.0] * 8
    objective = ClipCov(1.0, 1.0, 2e-4, -2.0, -0.5, torch.Generator().manual_seed(0))
    counts = sum(drawn(objective, logprobs, a).int() for _ in range(2000))
    assert counts[cov >= -0.5].sum() == 0
    assert counts.sum() == 2000
    assert (counts[cov < -0.5] - 500).abs().max() < 80


def test_a_chosen_tokens_ratio_may_overflow():
    """r = e^100 is inf in fp32, and so is the slope of r A; 0 times it must not be NaN."""
    old, a = torch.tensor([-101.0, -3.0, -3.0]), torch.tensor([-1.0, 1.0, 1.0])
    objective = ClipCov(fraction=1.0, cov_min=-5.0, cov_max=-1.0)
    output, gradient = loss_and_gradient(torch.tensor([-1.0, -3.0, -3.0]), old, a, objective=objective, reduction="sum")
    assert gradient.tolist() == [0.0, -1.0, -1.0]
    assert output.loss.item() == -2.0


def test_a_micro_batch_is_a_batch_of_its_own():
    """Its means are its own, and it chooses at least one token: two halves choose two where the whole chooses one."""
    logprobs, a = -torch.rand(10, dtype=F64), torch.randn(10, dtype=F64)
    old = logprobs - 0.1

    def penalised(rows):
        options = {"reduction": "sum"}
        found = [
            loss_and_gradient(logprobs[rows], old[rows], a[rows], objective=o, **options)[1] for o in (KLCov(), KLCov(0.0))
        ]
        return ((found[0] - found[1]).abs() > 0.5).sum().item()

    assert penalised(slice(None)) == 1
    assert penalised(slice(0, 5)) + penalised(slice(5, 10)) == 2


@pytest.mark.parametrize("objective", [KLCov(1.0, 0.3), ClipCov(0.2, 0.2, 0.1, 0.0, 100.0)], ids=["kl-cov", "clip-cov"])
def test_masked_tokens_are_never_chosen(objective):
    """All A are near -5 and all logp near -3. The zeros that stand at masked tokens would have a covariance of 15."""
    logprobs, a = -3 + 0.1 * torch.randn(20, dtype=F64), -5 + 0.1 * torch.randn(20, dtype=F64)
    mask = torch.arange(20) % 2 == 0
    old = logprobs + 0.01
    found, gradient = loss_and_gradient(logprobs, old, a, objective=objective, mask=mask, reduction="sum")
    reference_loss = loss_and_gradient(logprobs[mask], old[mask], a[mask], objective=ImportanceWeighted(), reduction="sum")[0]
    assert gradient[~mask].abs().max() == 0
    if isinstance(objective, KLCov):  # int(0.3 * 10) tokens pay 0.01 each
        assert (found.loss - reference_loss.loss).item() == pytest.approx(0.03)
    else:
        assert (gradient[mask] == 0).sum() == 1


@pytest.mark.parametrize("name", OF_BATCH)
def test_objectives_of_the_batch_need_no_sequences(name):
    flat = lay_out(inputs_of(name), "pack")
    flat.pop("sequence_ids")
    values = OBJECTIVES[name][0](flat["logprobs"], flat["old_logprobs"], flat["advantages"])  # called as a function
    wanted, wanted_gradient = loss_and_gradient(**flat, objective=OBJECTIVES[name][0])
    for shape in ((3, 5), (5, 3, 1), (15,)):
        shaped = {k: x.reshape(shape) for k, x in flat.items()}
        output, gradient = loss_and_gradient(**shaped, objective=OBJECTIVES[name][0])
        torch.testing.assert_close(output.loss, -values.mean(), rtol=1e-13, atol=0)
        torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient.flatten(), wanted_gradient, rtol=1e-13, atol=0)


def test_metrics():
    """clip_fraction counts ratios outside PPO's bounds; of VESPO and KLCov it is 0."""
    inputs = inputs_of("clip-cov")
    d = (inputs["logprobs"] - inputs["old_logprobs"])[MASK]
    outside = ((d.exp() < 0.8) | (d.exp() > 1.3)).double().mean().item()
    for name, share in (("clip-cov", outside), ("kl-cov", 0.0), ("vespo", 0.0)):
        metrics = policy_loss(**inputs, objective=OBJECTIVES[name][0]).metrics
        assert metrics["clip_fraction"].item() == pytest.approx(share)
        assert metrics["ratio_mean"].item() == pytest.approx(d.exp().mean().item())
    assert 0 < outside < 1


# ---- what must not be seen, and what must not be hidden


@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages", "rollout_weights", "ref_logprobs", "sequence_ids"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@every_objective
def test_masked_garbage_changes_no_bit(name, layout, where):
    options = {"objective": OBJECTIVES[name][0], "kl": KLPenalty(0.1)}
    clean = lay_out(inputs_of(name, F32) | penalties(F32), layout)
    masked = ~clean["mask"]
    wanted, wanted_gradient = loss_and_gradient(**clean, **options)
    for garbage in ([-1, 99] if where == "sequence_ids" else [NAN, INF, -INF]) if where in clean else []:
        actual, gradient = loss_and_gradient(**clean | {where: clean[where].masked_fill(masked, garbage)}, **options)
        assert actual.loss.isfinite()
        assert torch.equal(actual.loss, wanted.loss)
        assert torch.equal(gradient, wanted_gradient)
        assert (gradient[masked] == 0).all()


@pytest.mark.parametrize(
    ("where", "bad"),
    [("logprobs", NAN), *itertools.product(["old_logprobs", "advantages"], [NAN, INF, -INF])],  # a clip bounds r = inf
)
@every_objective
def test_bad_numbers_at_a_kept_token_show_in_the_loss(name, where, bad):
    for layout, reduction in itertools.product(LAYOUTS, REDUCTIONS):
        inputs = inputs_of(name)
        inputs[where][2, 2] = bad
        loss = policy_loss(**lay_out(inputs, layout), objective=OBJECTIVES[name][0], reduction=reduction).loss
        assert loss.isnan() if bad is NAN or where == "old_logprobs" else not loss.isfinite()


@every_reduction
@every_objective
def test_no_tokens_and_one_token(name, reduction):
    for shape in ((0, 4), (3, 0), (2, 3)):
        bad, mask = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
        output, gradient = loss_and_gradient(bad, bad, bad, objective=OBJECTIVES[name][0], mask=mask, reduction=reduction)
        assert output.loss.item() == 0
        assert torch.equal(gradient, torch.zeros(shape))
    given = {"old_logprobs": torch.tensor([[-1.5]]), "advantages": torch.tensor([2.0]), "reduction": reduction}
    gradient = loss_and_gradient(torch.tensor([[-1.0]]), **given, objective=OBJECTIVES[name][0])[1].item()
    r = math.exp(0.5)
    wanted = {"vespo": r**1.5 * math.exp(2.5 * (1 - r)) * 2, "clip-cov": 0.0, "kl-cov": r * 2 - 0.7}[name]
    assert gradient == pytest.approx(-wanted, rel=1e-6)  # its covariance is 0, which is not above 0.02; 1.64 is clipped


@every_objective
def test_on_policy_the_tokens_that_are_not_chosen_are_reinforce(name):
    inputs = inputs_of(name) | {"old_logprobs": None}
    gradient = loss_and_gradient(**inputs, objective=OBJECTIVES[name][0])[1]
    wanted = loss_and_gradient(**inputs, objective=Reinforce())[1]
    if name == "clip-cov":
        assert ((gradient == 0) & MASK).any()
        wanted = torch.where(gradient == 0, 0, wanted)
    torch.testing.assert_close(gradient, wanted, rtol=1e-14, atol=0)


def test_no_value_is_read_by_the_host():
    logprobs, old, advantages, mask = (x.to("meta") for x in batch().values())
    for objective, _ in OBJECTIVES.values():
        assert policy_loss(logprobs, old, advantages, objective=objective, mask=mask).loss.shape == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own
@every_objective
def test_compiled(name):
    inputs = inputs_of(name)
    start = inputs.pop("logprobs").requires_grad_()

    def step(logprobs):
        return policy_loss(logprobs, **inputs, objective=OBJECTIVES[name][0]).loss

    torch._dynamo.reset()
    want, got = step(start), torch.compile(step, fullgraph=True, backend="aot_eager")(start)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, start)[0] for x in (got, want)), rtol=1e-12, atol=1e-15)


# ---- from hidden states: two passes, and what one pass says


@every_objective
def test_from_hidden_states(name):
    hidden, weight, tokens = torch.randn(4, 5, 16), torch.randn(40, 16) / 4, torch.randint(0, 40, (4, 5))
    logprobs, _ = reference.linear_logprobs(hidden.double(), weight.double(), tokens)
    old = (logprobs - 0.3 * torch.randn(4, 5)).float()
    assert_matches_oracle(hidden, weight, tokens, old, torch.randn(4, 5), objective=OBJECTIVES[name][0])


@every_objective
def test_the_judges_formula_is_the_oracles(name):
    logprobs, old, a = -torch.rand(6, dtype=F64), -torch.rand(6, dtype=F64), torch.randn(6, dtype=F64)
    ids = (torch.tensor([0, 1, 0, 2, 1, 0]),) if name == "vespo" else ()
    found = cases.reference_objective(OBJECTIVES[name][0])
    assert torch.equal(found(logprobs, old, a, *ids), OBJECTIVES[name][1](logprobs, old, a, *ids))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@every_objective
def test_one_pass_refuses_by_name_before_any_work(name, backend):
    objective = OBJECTIVES[name][0]
    why = "one ratio for a sequence" if name == "vespo" else "compares the tokens of the batch"
    arguments = torch.full((2, 3, 8), NAN), torch.randn(20, 8), torch.zeros(2, 3, dtype=torch.long), None, torch.ones(2, 3)
    for call in (linear_policy_loss, lambda *x, **o: LinearPolicyLoss(**o)(*x)):
        words = said(lambda call=call: call(*arguments, objective=objective, backend=backend))
        assert words.startswith(f"ValueError: objective={type(objective).__name__}(")
        assert why in words
        assert words.endswith("; use linear_logprobs and policy_loss")


def test_vespo_needs_sequences():
    with pytest.raises(ValueError, match=r"objective=VESPO\(.*needs sequences: .*packed \(N,\) with sequence_ids="):
        policy_loss(torch.zeros(4), None, torch.ones(4), objective=VESPO())


BAD = {
    "k": (lambda: VESPO(k_pos=-1.0), "ValueError: k_pos must be >= 0 and finite, an exponent of the ratio; got -1.0"),
    "k-neg": (lambda: VESPO(k_neg=NAN), "ValueError: k_neg must be >= 0 and finite, an exponent of the ratio; got nan"),
    "lambda": (
        lambda: VESPO(lambda_pos=0),
        "ValueError: lambda_pos must be positive and finite, so that large ratios weigh nothing; got 0",
    ),
    "lambda-neg": (
        lambda: VESPO(lambda_neg="2"),
        "ValueError: lambda_neg must be positive and finite, so that large ratios weigh nothing; got '2'",
    ),
    "eps": (lambda: ClipCov(1.5), "ValueError: eps_low must be in [0, 1], so that 1 - eps_low bounds a ratio; got 1.5"),
    "fraction": (
        lambda: ClipCov(fraction=0),
        "ValueError: fraction must be in (0, 1], a share of the tokens that count; got 0",
    ),
    "fraction-above-1": (
        lambda: KLCov(fraction=20),
        "ValueError: fraction must be in (0, 1], a share of the tokens that count; got 20",
    ),
    "cov": (lambda: ClipCov(cov_min=NAN), "ValueError: cov_min must be a finite number, a bound on the covariance; got nan"),
    "cov-none": (
        lambda: ClipCov(cov_max=None),
        "ValueError: cov_max must be a finite number, a bound on the covariance; got None",
    ),
    "cov-crossed": (
        lambda: ClipCov(cov_min=5.0),
        "ValueError: cov_min must be below cov_max; got cov_min=5.0, cov_max=5.0",
    ),
    "generator": (lambda: ClipCov(generator=3), "TypeError: generator must be a torch.Generator or None; got int"),
    "generator-device": (
        lambda: policy_loss(
            torch.zeros(3, device="meta"), None, torch.ones(3, device="meta"), objective=ClipCov(generator=torch.Generator())
        ),
        "ValueError: generator is on cpu but logprobs is on meta",
    ),
    "coef": (lambda: KLCov(-1.0), "ValueError: coef must be a number >= 0; got -1.0"),
}


@pytest.mark.parametrize(("call", "words"), BAD.values(), ids=BAD)
def test_settings_that_do_not_fit(call, words):
    assert said(call) == words
