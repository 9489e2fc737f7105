"""`policy_loss` and its objectives: against the oracle, against formulas written out here, and against what must not matter."""

import math

import pytest
import torch

from fastpg import CISPO, ImportanceWeighted, KLPenalty, Reinforce, policy_loss, reference

F32, F64 = torch.float32, torch.float64
EPS = {F32: 2.0**-23, F64: 2.0**-52}
INF, NAN = math.inf, math.nan
REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"]


def soft_clipped(logprobs, old_logprobs, advantages):
    """A user's objective, not linear in anything."""
    return torch.tanh((logprobs - old_logprobs).exp() - 1) * advantages - 0.1 * (logprobs - old_logprobs).square()


# name: (objective, the oracle's, dl/dlogp as a function of logp, r, A)
OBJECTIVES = {
    "reinforce": (Reinforce(), reference.reinforce, lambda r, a: a),
    "importance-weighted": (ImportanceWeighted(), reference.importance_weighted, lambda r, a: r * a),
    "cispo": (CISPO(), reference.cispo(), lambda r, a: min(r, 5.0) * a),
    "cispo-unclipped": (CISPO(ratio_max=None), reference.cispo(None), lambda r, a: r * a),
    "cispo-two-sided": (CISPO(1.2, 0.8), reference.cispo(1.2, 0.8), lambda r, a: min(max(r, 0.8), 1.2) * a),
    "cispo-from-below": (CISPO(None, 0.5), reference.cispo(None, 0.5), lambda r, a: max(r, 0.5) * a),
    "users-function": (
        soft_clipped,
        soft_clipped,
        lambda r, a: (1 - math.tanh(r - 1) ** 2) * r * a - 0.2 * math.log(r),
    ),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

# Ragged sequences: full, one hole, one token, none.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()


def batch(dtype=F64, per_sequence=False):
    """logprobs (a leaf), old_logprobs, advantages; ratios between 0.05 and 20, so that every clip acts on both sides."""
    logprobs = -3 * torch.rand(4, 5, dtype=dtype) - 0.01
    old = logprobs - torch.linspace(-3, 3, 20, dtype=dtype)[torch.randperm(20)].reshape(4, 5)
    advantages = torch.randn(4, dtype=dtype) if per_sequence else torch.randn(4, 5, dtype=dtype)
    return logprobs.requires_grad_(), old, advantages


def loss_and_gradient(logprobs, *args, **kwargs):
    logprobs = logprobs.detach().clone().requires_grad_()
    output = policy_loss(logprobs, *args, **kwargs)
    output.loss.backward()
    return output, logprobs.grad


def token_weights(mask, reduction):
    """weight / D of each token by a loop over the table of the reductions."""
    lengths = [sum(row) for row in mask.tolist()]
    sequences = sum(n > 0 for n in lengths)
    weight = {
        "token-mean": lambda n: 1 / sum(lengths),
        "seq-mean-token-mean": lambda n: 1 / n / sequences,
        "seq-mean-token-sum": lambda n: 1 / sequences,
        "sum": lambda n: 1.0,
    }[reduction]
    return [[weight(n) if kept else 0.0 for kept in row] for row, n in zip(mask.tolist(), lengths, strict=True)]


# ---- values and gradients


@pytest.mark.parametrize("denominator", [None, 7.5, torch.tensor(7.5)], ids=["own-count", "number", "tensor"])
@pytest.mark.parametrize("per_sequence", [False, True], ids=["advantage-per-token", "advantage-per-sequence"])
@every_reduction
@every_objective
def test_loss_and_gradient_equal_the_oracle(name, reduction, per_sequence, denominator):
    objective, oracle, _ = OBJECTIVES[name]
    logprobs, old, advantages = batch(per_sequence=per_sequence)
    options = {"mask": MASK, "reduction": reduction, "denominator": denominator}
    output, gradient = loss_and_gradient(logprobs, old, advantages, objective=objective, **options)
    wanted = reference.policy_loss(logprobs, old, advantages, objective=oracle, **options)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logprobs)[0], rtol=1e-13, atol=0)


@every_reduction
@every_objective
def test_gradient_equals_the_formula(name, reduction):
    """dL/dlogp = -(dl/dlogp) weight / D, token by token in Python. A clipped CISPO token keeps its gradient."""
    objective, _, coefficient = OBJECTIVES[name]
    logprobs, old, advantages = batch()
    _, gradient = loss_and_gradient(logprobs, old, advantages, objective=objective, mask=MASK, reduction=reduction)
    weights = token_weights(MASK, reduction)
    for b in range(4):
        for t in range(5):
            ratio = math.exp(logprobs[b, t].item() - old[b, t].item())
            wanted = -coefficient(ratio, advantages[b, t].item()) * weights[b][t] if MASK[b, t] else 0.0
            assert gradient[b, t].item() == pytest.approx(wanted, rel=1e-13, abs=0)


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


@every_objective
def test_on_policy_ratio_is_exactly_one(name):
    """old_logprobs=None: the gradient flows through logp alone, not through the old one that equals it."""
    objective, _, coefficient = OBJECTIVES[name]
    logprobs, _, advantages = batch(F32)
    output, gradient = loss_and_gradient(logprobs, None, advantages, objective=objective, reduction="sum")
    assert torch.equal(gradient, -torch.tensor([[coefficient(1.0, a) for a in row] for row in advantages.tolist()]))
    assert output.metrics["ratio_mean"] == output.metrics["ratio_max"] == output.metrics["ess"] == 1
    assert output.metrics["kl_k1"] == output.metrics["kl_k3"] == output.metrics["clip_fraction"] == 0


@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("d", [-40, -20.5, -1, 0, 1, 20.5, 40])
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "users-function"])
def test_ratios_of_any_size(name, d, dtype):
    """r from e^-40 to e^40: no clamp of the log-ratio (some frameworks have one at 20), no underflow, no overflow."""
    objective, _, coefficient = OBJECTIVES[name]
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


@every_objective
def test_positive_old_logprobs_are_computed_as_given(name):
    objective, oracle, _ = OBJECTIVES[name]
    logprobs, old, advantages = batch()
    old = old.detach().abs()
    output, gradient = loss_and_gradient(logprobs, old, advantages, objective=objective)
    wanted = reference.policy_loss(logprobs, old, advantages, objective=oracle)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logprobs)[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("objective", [Reinforce(), CISPO()], ids=["reinforce", "cispo"])
def test_advantage_per_sequence_is_never_taken_for_one_per_token(objective):
    """B = T, the one shape where both readings fit."""
    logprobs, old, advantages = -torch.rand(3, 3), -torch.rand(3, 3), torch.tensor([1.0, -2.0, 4.0])
    actual = loss_and_gradient(logprobs, old, advantages, objective=objective)
    wanted = loss_and_gradient(logprobs, old, advantages[:, None].repeat(1, 3), objective=objective)
    assert torch.equal(actual[0].loss, wanted[0].loss)
    assert torch.equal(actual[1], wanted[1])


def test_everything_but_logprobs_is_a_constant():
    logprobs, *constants = batch()
    constants += [torch.rand(4, 5), -torch.rand(4, 5)]
    old, advantages, rollout_weights, ref_logprobs = (t.requires_grad_() for t in constants)
    kl = {"kl": KLPenalty(0.1, importance_weighted=True), "ref_logprobs": ref_logprobs}
    output = policy_loss(logprobs, old, advantages, objective=ImportanceWeighted(), rollout_weights=rollout_weights, **kl)
    output.loss.backward()
    assert [t.grad for t in constants] == [None] * 4
    assert logprobs.grad is not None


# ---- a KL penalty and rollout weights

every_kl = pytest.mark.parametrize(
    "kl",
    [KLPenalty(0.25, estimator, weighted) for estimator in ("k1", "k2", "k3") for weighted in (False, True)],
    ids=lambda kl: kl.estimator + ("-importance-weighted" if kl.importance_weighted else ""),
)


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@every_reduction
@every_kl
def test_kl_and_rollout_weights_equal_the_oracle(kl, reduction, on_policy):
    logprobs, old, advantages = batch()
    old = None if on_policy else old
    options = {"mask": MASK, "reduction": reduction}
    options |= {"ref_logprobs": -3 * torch.rand(4, 5, dtype=F64), "rollout_weights": 2 * torch.rand(4, 5, dtype=F64)}
    output, gradient = loss_and_gradient(logprobs, old, advantages, objective=CISPO(), kl=kl, **options)
    oracle = {"objective": reference.cispo(), "kl": (kl.coef, kl.estimator, kl.importance_weighted)}
    wanted = reference.policy_loss(logprobs, old, advantages, **oracle, **options)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logprobs)[0], rtol=1e-12, atol=0)


@every_kl
def test_rollout_weights_leave_the_kl_term_alone(kl):
    logprobs, old, advantages = batch()
    options = {"objective": CISPO(), "kl": kl, "ref_logprobs": -torch.rand(4, 5, dtype=F64)}
    zeros = torch.zeros(4, 5, dtype=F64)
    actual, gradient = loss_and_gradient(logprobs, old, advantages, rollout_weights=zeros, **options)
    wanted, wanted_gradient = loss_and_gradient(logprobs, old, zeros, **options)
    assert actual.loss.item() != 0
    torch.testing.assert_close(actual.loss, wanted.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-14, atol=0)


def test_rollout_weights_scale_the_objective():
    logprobs, old, advantages = batch()
    factors = torch.rand(4, 5, dtype=F64)
    actual = loss_and_gradient(logprobs, old, advantages, objective=CISPO(), rollout_weights=factors)
    wanted = loss_and_gradient(logprobs, old, advantages * factors, objective=CISPO())
    torch.testing.assert_close(actual[0].loss, wanted[0].loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-14, atol=0)


def test_incoming_gradient_scales_the_gradient():
    logprobs, old, advantages = batch()
    loss = policy_loss(logprobs, old, advantages, objective=CISPO(), mask=MASK).loss
    (once,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, logprobs, torch.tensor(-3.0, dtype=F64))
    torch.testing.assert_close(scaled, -3 * once, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64], ids=["bf16", "fp16", "fp32", "fp64"])
@every_objective
def test_computes_in_fp32_at_least(name, dtype):
    objective, oracle, _ = OBJECTIVES[name]
    logprobs, old, advantages = (t.detach().to(dtype) for t in batch(F32))
    output, gradient = loss_and_gradient(logprobs, old, advantages, objective=objective, mask=MASK)
    wide = F64 if dtype == F64 else F32
    assert output.loss.dtype == output.logprobs.dtype == output.metrics["ratio_mean"].dtype == wide
    assert gradient.dtype == dtype

    exact = logprobs.double().requires_grad_()
    wanted = reference.policy_loss(exact, old.double(), advantages.double(), objective=oracle, mask=MASK)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact)
    # d has an error of eps * max(|logp|, |old|) < 8 eps, and so have r and l; the sum of 9 tokens, against their mean size
    size = oracle(exact.detach(), old.double(), advantages.double())[MASK].abs().mean().item()
    torch.testing.assert_close(output.loss.double(), wanted.detach(), rtol=0, atol=16 * EPS[wide] * size)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=32 * EPS[wide] + rounding, atol=EPS[wide])


def test_dtypes_may_differ():
    """Rewards are often counted in integers, and samplers' log-probabilities often come in another dtype."""
    logprobs, old, _ = (t.detach() for t in batch(F32))
    advantages = torch.tensor([1, -2, 3, 0])
    wanted = loss_and_gradient(logprobs, old, advantages.float(), objective=CISPO())
    for given in ((old, advantages), (old.double(), advantages.double())):
        actual = loss_and_gradient(logprobs, *given, objective=CISPO())
        assert actual[0].loss.dtype == F32
        assert torch.equal(actual[0].loss, wanted[0].loss)
        assert torch.equal(actual[1], wanted[1])


# ---- what must not matter

every_garbage = pytest.mark.parametrize("garbage", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])


@every_garbage
@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages", "ref_logprobs", "rollout_weights"])
@every_reduction
@every_objective
def test_masked_garbage_changes_no_bit(name, reduction, where, garbage):
    logprobs, old, advantages = batch(F32)
    clean = {"logprobs": logprobs.detach(), "old_logprobs": old, "advantages": advantages}
    clean |= {"ref_logprobs": -torch.rand(4, 5), "rollout_weights": torch.rand(4, 5)}
    dirty = clean | {where: clean[where].detach().masked_fill(~MASK, garbage)}
    options = {"objective": OBJECTIVES[name][0], "mask": MASK, "reduction": reduction}
    options["kl"] = KLPenalty(0.1, importance_weighted=True)
    wanted, wanted_gradient = loss_and_gradient(**clean, **options)
    actual, gradient = loss_and_gradient(**dirty, **options)
    assert actual.loss.isfinite()
    assert torch.equal(actual.loss, wanted.loss)
    assert torch.equal(actual.logprobs, wanted.logprobs)
    assert torch.equal(gradient, wanted_gradient)
    assert (gradient[~MASK] == 0).all()
    for key, value in wanted.metrics.items():
        assert torch.equal(actual.metrics[key], value), key


def test_masked_garbage_with_advantages_per_sequence():
    """The advantage of a sequence without tokens, for example of a group in which everything failed."""
    logprobs, old, advantages = batch(per_sequence=True)
    wanted = loss_and_gradient(logprobs, old, advantages, objective=CISPO(), mask=MASK)
    advantages[3] = NAN
    actual = loss_and_gradient(logprobs, old, advantages, objective=CISPO(), mask=MASK)
    assert torch.equal(actual[0].loss, wanted[0].loss)
    assert torch.equal(actual[1], wanted[1])


def test_masked_garbage_on_policy():
    logprobs, _, advantages = batch()
    wanted = loss_and_gradient(logprobs, None, advantages, objective=ImportanceWeighted(), mask=MASK)
    dirty = logprobs.detach().masked_fill(~MASK, -INF)
    actual = loss_and_gradient(dirty, None, advantages, objective=ImportanceWeighted(), mask=MASK)
    assert torch.equal(actual[0].loss, wanted[0].loss)
    assert torch.equal(actual[1], wanted[1])


def test_users_function_never_sees_masked_garbage():
    """So that it may mix tokens: a mean over its arguments, an assertion on them."""
    seen = []

    def spy(*arguments):
        seen.extend(arguments)
        return arguments[0]

    policy_loss(*(t.detach().masked_fill(~MASK, NAN) for t in batch()), objective=spy, mask=MASK)
    assert len(seen) == 3
    assert all(t.isfinite().all() for t in seen)


def test_users_function_may_be_singular_where_masked():
    """Whatever stands in for a masked token, a user's function may be infinite there, in value or in slope."""

    def singular(logprobs, old_logprobs, advantages):
        return advantages * ((-logprobs).log() + (-logprobs).sqrt() + 1 / (logprobs - old_logprobs) + 1 / advantages)

    logprobs, old, advantages = batch()
    output, gradient = loss_and_gradient(logprobs, old, advantages, objective=singular, mask=MASK)
    wanted = reference.policy_loss(logprobs, old, advantages, objective=singular, mask=MASK)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logprobs)[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("reduction", ["token-mean", "sum"])
@every_objective
def test_masking_equals_deletion(name, reduction):
    logprobs, old, advantages = batch()
    options = {"objective": OBJECTIVES[name][0], "reduction": reduction}
    masked, gradient = loss_and_gradient(logprobs, old, advantages, mask=MASK, **options)
    deleted, wanted = loss_and_gradient(logprobs[MASK], old[MASK], advantages[MASK], **options)
    torch.testing.assert_close(masked.loss, deleted.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient[MASK], wanted, rtol=1e-13, atol=0)
    for key, value in deleted.metrics.items():
        torch.testing.assert_close(masked.metrics[key], value, rtol=1e-13, atol=0)


@every_reduction
@every_objective
def test_padding_on_either_side_does_not_matter(name, reduction):
    """For the sequence reductions too: more columns, and a whole empty sequence, change nothing."""
    logprobs, old, advantages = (t.detach() for t in batch())
    options = {"objective": OBJECTIVES[name][0], "reduction": reduction}
    plain, wanted = loss_and_gradient(logprobs, old, advantages, mask=MASK, **options)

    def pad(x, value):
        return torch.nn.functional.pad(x, (2, 3, 1, 0), value=value)

    padded, gradient = loss_and_gradient(
        pad(logprobs, 0.0), pad(old, 9.0), pad(advantages, 5.0), mask=pad(MASK, False), **options
    )
    torch.testing.assert_close(padded.loss, plain.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, pad(wanted, 0.0), rtol=1e-13, atol=0)


@every_objective
def test_inputs_are_left_alone(name):
    logprobs, old, advantages = batch()
    copies = [t.detach().clone() for t in (logprobs, old, advantages, MASK)]
    loss_and_gradient(logprobs, old, advantages, objective=OBJECTIVES[name][0], mask=MASK)
    for tensor, copy in zip((logprobs, old, advantages, MASK), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_no_value_is_read_by_the_host():
    """Tensors without data have no values to read; on a GPU a read would be a synchronisation."""
    logprobs, old, advantages, mask = (t.detach().to("meta") for t in (*batch(), MASK))
    for reduction in REDUCTIONS:
        output = policy_loss(logprobs, old, advantages, objective=CISPO(), mask=mask, reduction=reduction)
        assert output.loss.shape == ()


# ---- what must be noticed


@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages"])
@every_reduction
@every_objective
def test_nan_at_a_kept_token_gives_a_nan_loss(name, reduction, where):
    inputs = dict(zip(("logprobs", "old_logprobs", "advantages"), (t.detach() for t in batch()), strict=True))
    inputs[where][2, 2] = NAN
    assert policy_loss(**inputs, objective=OBJECTIVES[name][0], mask=MASK, reduction=reduction).loss.isnan()


@pytest.mark.parametrize("old", [INF, -INF, NAN], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("advantage", [1.0, 0.0], ids=["", "zero-advantage"])
@every_objective
def test_infinite_old_logprob_gives_a_nan_loss(name, advantage, old):
    """A ratio of 0 or infinity is never meant. Reinforce does not read the old one, a bound would hide it: all the same."""
    logprobs, olds = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, old])
    output = policy_loss(logprobs, olds, torch.tensor([1.0, advantage]), objective=OBJECTIVES[name][0])
    assert output.loss.isnan()


# ---- no tokens, and parts of a batch


EMPTY = {"no-sequence": (0, 4), "no-position": (3, 0), "all-masked": (2, 3)}


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@every_reduction
@every_objective
def test_no_tokens_is_a_differentiable_zero(name, reduction, shape, on_policy):
    logprobs = torch.full(shape, NAN)
    output, gradient = loss_and_gradient(
        logprobs,
        None if on_policy else logprobs,
        logprobs,
        objective=OBJECTIVES[name][0],
        mask=torch.zeros(shape, dtype=torch.bool),
        reduction=reduction,
    )
    assert output.loss.item() == 0
    assert torch.equal(gradient, torch.zeros(shape))
    assert torch.equal(output.logprobs, torch.zeros(shape))
    assert {k: v.item() for k, v in output.metrics.items()} == {
        "ratio_mean": 0,
        "ratio_max": 0,
        "clip_fraction": 0,
        "ess": 1,
        "kl_k1": 0,
        "kl_k3": 0,
        "tokens": 0,
        "skipped_tokens": 0,
        "recomputed_tokens": 0,
    }


def test_no_tokens_at_all():
    output, gradient = loss_and_gradient(torch.empty(0), torch.empty(0), torch.empty(0), objective=CISPO())
    assert output.loss.item() == 0
    assert gradient.shape == (0,)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@every_reduction
@every_objective
def test_micro_batches_with_the_global_count_sum_to_the_batch(name, reduction, as_tensor):
    """What gradient accumulation and data parallelism do. The last part has no token; its own mean would count it as one."""
    logprobs, old, advantages = batch()
    count = {"token-mean": MASK.sum().item(), "sum": 1}.get(reduction, MASK.any(1).sum().item())
    options = {"objective": OBJECTIVES[name][0], "reduction": reduction}
    whole, wanted = loss_and_gradient(logprobs, old, advantages, mask=MASK, **options)
    parts = [
        loss_and_gradient(
            logprobs[rows], old[rows], advantages[rows], mask=MASK[rows],
            denominator=torch.tensor(count) if as_tensor else count, **options,
        )
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]  # fmt: skip
    torch.testing.assert_close(sum(output.loss for output, _ in parts), whole.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), wanted, rtol=1e-13, atol=0)


# ---- metrics


def test_metrics_equal_their_definitions():
    logprobs, old, advantages = (t.detach() for t in batch())
    old[0, :2] = logprobs[0, :2] - torch.tensor([0.1, 2.0])  # one ratio inside the bounds, one outside
    metrics = policy_loss(logprobs, old, advantages, objective=CISPO(2.0, 0.5), mask=MASK).metrics
    d = [logprobs[b, t].item() - old[b, t].item() for b in range(4) for t in range(5) if MASK[b, t]]
    r, n = [math.exp(x) for x in d], len(d)
    wanted = {
        "ratio_mean": sum(r) / n,
        "ratio_max": max(r),
        "clip_fraction": sum(x < 0.5 or x > 2.0 for x in r) / n,
        "ess": sum(r) ** 2 / (n * sum(x * x for x in r)),
        "kl_k1": -sum(d) / n,
        "kl_k3": sum(math.expm1(x) - x for x in d) / n,
        "tokens": n,
        "skipped_tokens": 0,
        "recomputed_tokens": 0,
    }
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(wanted, rel=1e-13, abs=1e-14)
    assert 0 < wanted["clip_fraction"] < 1


# r = 1/4, 1/2, 1, 2, 4, exactly
CLIPPED = {
    "cispo-default": (CISPO(), 0.0),
    "cispo-3": (CISPO(3.0), 0.2),
    "cispo-3-below": (CISPO(3.0, 0.75), 0.6),
    "a-bound-is-inside": (CISPO(2.0, 0.5), 0.4),
    "unclipped": (CISPO(None), 0.0),
    "reinforce": (Reinforce(), 0.0),
    "importance-weighted": (ImportanceWeighted(), 0.0),
    "users-function": (soft_clipped, 0.0),
}


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize(("objective", "share"), CLIPPED.values(), ids=CLIPPED)
def test_clip_fraction_counts_ratios_outside_the_bounds_whatever_the_advantage(objective, share, sign):
    ratios = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=F64)
    old = -ratios.log()
    old[1], old[3] = math.log(2), -math.log(2)
    output = policy_loss(torch.zeros(5, dtype=F64), old, torch.full((5,), sign), objective=objective)
    assert output.metrics["clip_fraction"].item() == pytest.approx(share)


@pytest.mark.parametrize("top", [60.0, 88.0, 300.0, -300.0])
def test_ess_of_huge_and_tiny_ratios(top):
    """Ratios e^top and e^(top - 1) of fp32: squares of either leave its range; (1 + 1/e)^2 / (2 (1 + 1/e^2)) does not."""
    old = torch.tensor([-top, 1.0 - top])
    metrics = policy_loss(torch.zeros(2), old, torch.ones(2), objective=Reinforce()).metrics
    wanted = (1 + math.exp(-1)) ** 2 / (2 * (1 + math.exp(-2)))
    assert metrics["ess"].item() == pytest.approx(wanted, rel=1e-6)


def test_ess_is_the_share_of_effective_samples():
    """One ratio that dwarfs the other three: 1 of 4."""
    old = torch.tensor([-50.0, 0.0, 0.0, 0.0])
    assert policy_loss(torch.zeros(4), old, torch.ones(4), objective=Reinforce()).metrics["ess"].item() == 0.25


@every_objective
def test_outputs_other_than_the_loss_are_detached(name):
    logprobs, old, advantages = batch(F32)
    output = policy_loss(logprobs, old, advantages, objective=OBJECTIVES[name][0], mask=MASK)
    assert output.loss.requires_grad
    assert output.loss.shape == ()
    assert torch.equal(output.logprobs, torch.where(MASK, logprobs.detach(), 0))
    for key, value in output.metrics.items():
        assert isinstance(value, torch.Tensor), key
        assert value.shape == (), key
        assert not value.requires_grad, key
    assert not output.logprobs.requires_grad


def test_metrics_do_not_share_storage():
    """Accumulating one metric in place must not change another."""
    metrics = policy_loss(*batch(), objective=CISPO()).metrics
    assert len({v.data_ptr() for v in metrics.values()}) == len(metrics)
