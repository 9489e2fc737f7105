"""PPO's clip, GSPO, SAPO, ratios of sequences and trajectories, and packed sequences: `policy_loss` against the oracle, the
oracle against formulas written out here, and both against what must not matter. Bad input and hidden states: test_enumeration.
"""

import functools
import itertools
import math

import pytest
import torch
from objectives import INF, NAN, OBJECTIVES, OF_SEQUENCES, SEQUENCE, TOKEN, TRAJECTORY

from fastpg import GSPO, SAPO, ImportanceWeighted, KLPenalty, PPOClip, Reinforce, policy_loss, reference

F32, F64 = torch.float32, torch.float64


JUMPS = torch.tensor([0.7, 0.8, 1.2, 1.28, 1.3, 1.45, 1.6])
REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"]
LAYOUTS = ["rows", "pack-with-masked", "pack"]
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

# Ragged sequences: full, one hole, one token, none, and two more. In a pack, tokens of one sequence are not neighbours.
MASK = torch.tensor([[c == "x" for c in row] for row in ("xxxxx", "x.xx.", "..x..", ".....", "xxxx.", "...xx")])
ROWS = torch.arange(6)[:, None].expand(6, 5)
ORDER = torch.randperm(30, generator=torch.Generator().manual_seed(1))
KEPT = ORDER[MASK.reshape(-1)[ORDER]]


def batch(dtype=F64, per_sequence=False):
    """Arguments of policy_loss for (6, 5) tokens. Ratios of tokens and sequences are on both sides of every bound."""
    means = torch.tensor([0.5, -0.4, 0.05, 0.0, -0.3, 0.35], dtype=F64)[:, None]
    noise = torch.linspace(-0.9, 0.9, 30, dtype=F64)[torch.randperm(30)].reshape(6, 5)
    d = means + noise - torch.where(MASK, noise, 0).sum(1, keepdim=True) / MASK.sum(1, keepdim=True).clamp(min=1)
    logprobs = -3 * torch.rand(6, 5, dtype=dtype) - 0.01
    old = logprobs - d.to(dtype)
    ratios = (logprobs.double() - old.double()).exp()[MASK]
    assert (ratios[:, None] - JUMPS).abs().min() > 1e-3
    advantages = torch.tensor([1.5, -0.8, 0.6, 2.0, -1.2, 0.9]) if per_sequence else torch.randn(6, 5)
    return {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages.to(dtype), "mask": MASK}


def penalties(dtype):
    return {"ref_logprobs": -3 * torch.rand(6, 5, dtype=dtype), "rollout_weights": 2 * torch.rand(6, 5, dtype=dtype)}


def lay_out(inputs, layout):
    """The same tokens as rows (B, T), as a shuffled pack with the masked ones, or as a shuffled pack of the kept ones alone."""
    if layout == "rows":
        return dict(inputs)
    order = ORDER if layout == "pack-with-masked" else KEPT
    given = {k: x.reshape(-1)[order] if x.shape == MASK.shape else x for k, x in inputs.items()}
    return given | {"sequence_ids": ROWS.reshape(-1)[order]}


def as_rows(x, layout):
    """Undoes `lay_out`; 0 for tokens that were left out."""
    if layout == "rows":
        return x
    order = ORDER if layout == "pack-with-masked" else KEPT
    return torch.zeros(30, dtype=x.dtype).index_put((order,), x).reshape(6, 5)


def loss_and_gradient(logprobs, **arguments):
    logprobs = logprobs.detach().clone().requires_grad_()
    output = policy_loss(logprobs, **arguments)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output, gradient


def oracle_of(inputs, objective, **options):
    """(loss, gradient, sum of |terms|) of the float64 oracle."""
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    if "sequence_ids" in wide and wide["advantages"].shape != wide["logprobs"].shape:
        wide["advantages"] = wide["advantages"][wide["sequence_ids"]]
    logprobs = wide.pop("logprobs").detach().requires_grad_()
    absolute = functools.wraps(objective)(lambda *arguments: objective(*arguments).abs())
    loss = reference.policy_loss(logprobs, objective=objective, **wide, **options)
    if "kl" in options:
        options["kl"] = (-options["kl"][0], *options["kl"][1:])
    scale = -reference.policy_loss(logprobs.detach(), objective=absolute, **wide, **options)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], scale.item()


def assert_same(actual, wanted, tolerance=1e-12):
    """Losses, and gradients (rows) with errors measured on the largest."""
    torch.testing.assert_close(actual[0], wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual[1], wanted[1], rtol=tolerance, atol=tolerance * wanted[1].abs().max().item())


def result_as_rows(inputs, layout, **options):
    output, gradient = loss_and_gradient(**lay_out(inputs, layout), **options)
    return output.loss, as_rows(gradient, layout)


# ---- the oracles


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


def formula(name, d, advantages, members):
    """l by torch.minimum, maximum and sigmoid, and sums over sequences as products with `members`, (S, N) of 0 and 1."""
    ours, _, level, _ = OBJECTIVES[name]
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
    return ratio * advantages / (lengths @ members if level == TRAJECTORY else 1)


NEW = [name for name in OBJECTIVES if name not in ("reinforce", "cispo")]


@pytest.mark.parametrize("name", NEW)
def test_oracle_equals_the_formula_and_passes_gradcheck(name):
    inputs = lay_out(batch(), "pack")
    logprobs, old, advantages, ids = (inputs[k] for k in ("logprobs", "old_logprobs", "advantages", "sequence_ids"))
    _, oracle, level, _ = OBJECTIVES[name]
    members = torch.stack([ids == number for number in ids.unique()]).double()
    logprobs = logprobs.requires_grad_()

    def value(logprobs):
        return oracle(logprobs, old, advantages, *((ids,) if level != TOKEN else ()))

    wanted = formula(name, logprobs - old, advantages, members)
    torch.testing.assert_close(value(logprobs), wanted, rtol=1e-13, atol=0)
    weights = torch.rand_like(wanted)
    got, want = (torch.autograd.grad((x * weights).sum(), logprobs)[0] for x in (value(logprobs), wanted))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    assert torch.autograd.gradcheck(value, logprobs)


def gradient_by_loops(name, inputs, reduction):
    """dL/dlogp_t = -sum_s weight_s dl_s/dlogp_t / D, one number after the other; only s = t for ratios of tokens."""
    _, _, level, slope = OBJECTIVES[name]
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
                gradient[b, t] = -weight * r * slope(r, row[t])
            else:
                total = math.fsum(d[b][s] for s in kept)
                r = math.exp(total / n if level == SEQUENCE else total)
                gradient[b, t] = -weight * math.fsum(r / n * slope(r, row[s]) for s in kept)
    return gradient


@every_reduction
@every_objective
def test_gradient_equals_the_formula_token_by_token(name, reduction):
    """Through the fast path and the oracle: the column dl/dlogp of semantics.md 1.2."""
    inputs = batch()
    wanted = gradient_by_loops(name, inputs, reduction)
    objective, oracle, _, _ = OBJECTIVES[name]
    for layout in LAYOUTS:
        _, gradient = result_as_rows(inputs, layout, objective=objective, reduction=reduction)
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)
        oracles = as_rows(oracle_of(lay_out(inputs, layout), oracle, reduction=reduction)[1], layout)
        torch.testing.assert_close(oracles, wanted, rtol=1e-12, atol=1e-15)


# ---- the fast path against the oracle


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "sequence-advantages-kl-rollout-denominator"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
@every_layout
@every_reduction
@every_objective
def test_loss_and_gradient_equal_the_oracle(name, reduction, layout, dtype, everything):
    objective, oracle, _, _ = OBJECTIVES[name]
    inputs, options, oracles = batch(dtype, per_sequence=everything), {"reduction": reduction}, {}
    if everything:
        inputs |= penalties(dtype)
        options["denominator"] = 7.5
        options["kl"], oracles["kl"] = KLPenalty(0.1, "k3", True), (0.1, "k3", True)
    given = lay_out(inputs, layout)
    output, gradient = loss_and_gradient(**given, objective=objective, **options)
    loss, wanted, scale = oracle_of(given, oracle, **options | oracles)
    assert output.loss.dtype == gradient.dtype == dtype
    # an error of d is 4 eps (logp and old are below 8 and their sums of 5 are), r inherits it, and there are 15 terms
    eps = 32 * torch.finfo(dtype).eps
    assert abs(output.loss.double() - loss).item() <= eps * scale
    torch.testing.assert_close(gradient.double(), wanted, rtol=eps, atol=eps * wanted.abs().max().item())


@every_layout
@every_objective
def test_metrics_and_clip_fraction_on_the_objectives_own_ratio(name, layout):
    inputs = batch(per_sequence=True)
    metrics = policy_loss(**lay_out(inputs, layout), objective=OBJECTIVES[name][0]).metrics
    d = torch.where(MASK, inputs["logprobs"] - inputs["old_logprobs"], 0)
    lengths = MASK.sum(1, keepdim=True)
    own = d if OBJECTIVES[name][2] == TOKEN else (d.sum(1, keepdim=True) / lengths.clamp(min=1)).expand(6, 5)
    low, high = {
        "cispo": (0.8, 1.3),
        "ppo": (0.8, 1.2),
        "ppo-clip-higher": (0.7, 1.45),
        "ppo-dual": (0.8, 1.28),
        "gspo": (0.7, 1.45),
        "gspo-default": (1 - 3e-4, 1 + 4e-4),
    }.get(name, (0, INF))
    outside = ((own.exp() < low) | (own.exp() > high))[MASK].double().mean()
    assert metrics["clip_fraction"].item() == pytest.approx(outside.item(), rel=1e-13)
    if high < INF:
        assert outside > 0
    if name == "gspo":  # the shares of sequences 0 (5 tokens) and 1 (3 tokens); on the ratios of tokens it would be another
        assert metrics["clip_fraction"].item() == pytest.approx(8 / 15)
    assert metrics["ratio_mean"].item() == pytest.approx(d[MASK].exp().mean().item(), rel=1e-13)
    assert metrics["tokens"].item() == 15


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


# ---- ratios that are far off, in fp32

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


# ---- what must not matter


def random_options(dtype=F64, per_sequence=True):
    inputs = batch(dtype, per_sequence) | penalties(dtype)
    return inputs, {"kl": KLPenalty(0.1, importance_weighted=True)}


@pytest.mark.parametrize("per_sequence", [False, True], ids=["per-token", "per-sequence"])
@every_reduction
@every_objective
def test_rows_and_both_packs_are_equal(name, reduction, per_sequence):
    """Masking equals deleting, and a pack in any order equals (B, T)."""
    inputs, options = random_options(per_sequence=per_sequence)
    options |= {"objective": OBJECTIVES[name][0], "reduction": reduction}
    wanted = result_as_rows(inputs, "rows", **options)
    for layout in LAYOUTS[1:]:
        assert_same(result_as_rows(inputs, layout, **options), wanted)
    rows, pack = (policy_loss(**lay_out(inputs, x), **options) for x in ("rows", "pack"))
    for key, value in rows.metrics.items():
        torch.testing.assert_close(pack.metrics[key], value, rtol=1e-12, atol=1e-15)


@every_reduction
@every_objective
def test_permuting_sequences_or_the_pack_permutes_the_gradient(name, reduction):
    inputs, options = random_options()
    options |= {"objective": OBJECTIVES[name][0], "reduction": reduction}
    wanted = result_as_rows(inputs, "rows", **options)
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    output, gradient = loss_and_gradient(**{k: x[order] for k, x in inputs.items()}, **options)
    assert_same((output.loss, gradient[order.argsort()]), wanted)

    pack = lay_out(inputs, "pack")
    output, gradient = loss_and_gradient(**pack, **options)
    shuffle = torch.randperm(15)
    other = {k: x if k == "advantages" else x[shuffle] for k, x in pack.items()}
    assert_same((lambda o, g: (o.loss, g))(*loss_and_gradient(**other, **options)), (output.loss, gradient[shuffle]))
    # sequences numbered in another way, with gaps and an unused number that has a NaN for its advantage
    numbers = torch.tensor([7, 2, 9, 0, 5, 3])
    advantages = torch.full((10,), NAN, dtype=F64).index_put((numbers,), inputs["advantages"])
    renumbered = pack | {"sequence_ids": numbers[pack["sequence_ids"]].int(), "advantages": advantages}
    assert_same((lambda o, g: (o.loss, g))(*loss_and_gradient(**renumbered, **options)), (output.loss, gradient))


@every_layout
@every_reduction
@every_objective
def test_micro_batches_of_sequences_with_the_global_denominator_sum_to_the_whole(name, reduction, layout):
    """The last part is the sequence without a token."""
    inputs, options = random_options()
    count = {"token-mean": 15, "sum": 1}.get(reduction, 5)
    options |= {"objective": OBJECTIVES[name][0], "reduction": reduction}
    whole = result_as_rows(inputs, "rows", **options)
    loss, total = torch.zeros((), dtype=F64), torch.zeros(6, 5, dtype=F64)
    for rows in ([0, 2], [1, 4, 5], [3]):
        part = {k: x[rows] for k, x in inputs.items()}
        if layout != "rows":
            keep = part["mask"] if layout == "pack" else torch.ones_like(part["mask"])
            ids = torch.arange(len(rows))[:, None].expand_as(keep)
            part = {k: x[keep] if x.dim() == 2 else x for k, x in (part | {"sequence_ids": ids}).items()}
        output, gradient = loss_and_gradient(**part, **options, denominator=torch.tensor(count))
        loss = loss + output.loss
        if layout != "rows":
            gradient = torch.zeros(len(rows), 5, dtype=F64).masked_scatter(keep, gradient)
        total[rows] = gradient
    assert_same((loss, total), whole)


@pytest.mark.parametrize("per_sequence", [False, True], ids=["per-token", "per-sequence"])
@every_objective
def test_zero_advantages_give_exactly_zero(name, per_sequence):
    inputs = batch(F32, per_sequence)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    for layout in LAYOUTS:
        output, gradient = loss_and_gradient(**lay_out(inputs, layout), objective=OBJECTIVES[name][0])
        assert output.loss == 0
        assert (gradient == 0).all()


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


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@every_objective
def test_masked_garbage_changes_no_bit(name, layout):
    inputs, options = random_options(F32, per_sequence=False)
    options |= {"objective": OBJECTIVES[name][0], "reduction": "seq-mean-token-mean"}
    clean = lay_out(inputs, layout)
    masked = ~clean["mask"]
    wanted, wanted_gradient = loss_and_gradient(**clean, **options)
    dirty = [{k: clean[k].masked_fill(masked, bad)} for k in inputs if k != "mask" for bad in (NAN, INF, -INF)]
    if layout != "rows":
        dirty += [{"sequence_ids": clean["sequence_ids"].masked_fill(masked, bad)} for bad in (-1, 30, 10**12, -(2**63))]
    for changes in dirty:
        actual, gradient = loss_and_gradient(**clean | changes, **options)
        assert actual.loss.isfinite()
        assert torch.equal(actual.loss, wanted.loss), list(changes)
        assert torch.equal(gradient, wanted_gradient), list(changes)
        assert all(torch.equal(actual.metrics[key], value) for key, value in wanted.metrics.items()), list(changes)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@every_objective
def test_old_logprobs_that_are_not_finite_at_a_kept_token_give_a_nan_loss(name, bad):
    inputs = batch(F32, per_sequence=True)
    inputs["old_logprobs"][4, 1] = bad
    for layout, reduction in itertools.product(LAYOUTS, REDUCTIONS):
        assert policy_loss(**lay_out(inputs, layout), objective=OBJECTIVES[name][0], reduction=reduction).loss.isnan()


def check_no_tokens(objective, tokens, sequences):
    bad = torch.full((tokens,), NAN)
    given = {"old_logprobs": bad, "advantages": torch.full((sequences,), NAN), "sequence_ids": torch.full((tokens,), 99)}
    for reduction in REDUCTIONS:
        mask = torch.zeros(tokens, dtype=torch.bool)
        output, gradient = loss_and_gradient(bad, **given, objective=objective, reduction=reduction, mask=mask)
        assert output.loss.item() == 0
        assert torch.equal(gradient, torch.zeros(tokens))
        assert output.metrics["tokens"] == output.metrics["clip_fraction"] == 0


@pytest.mark.parametrize(("tokens", "sequences"), [(4, 2), (4, 4), (0, 2), (0, 0)], ids=lambda n: str(n))
@every_objective
def test_a_pack_without_tokens_is_a_differentiable_zero(name, tokens, sequences):
    """All masked, whatever the ids are; and a pack of length 0."""
    check_no_tokens(OBJECTIVES[name][0], tokens, sequences)


@pytest.mark.parametrize("name", ["cispo", "gspo"])
def test_a_pack_of_no_sequences_is_a_differentiable_zero(name):
    """A rank whose share of the batch is padding alone: no advantages, and every token masked."""
    check_no_tokens(OBJECTIVES[name][0], 4, 0)
