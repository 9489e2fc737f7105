"""`policy_loss` with `rollout_logprobs` beside `old_logprobs`: behaviour, proximal and current policy, against the oracle.

The one pass: `test_decoupled_one_pass`. What is unbiased: `test_rollout_enumeration`. AReaL and TRL: `test_rollout_dialects`.
"""

import copy
import math
import pickle

import pytest
import torch
from batches import (
    F32,
    F64,
    MASK,
    as_rows,
    assert_same,
    batch,
    every_layout,
    every_reduction,
    lay_out,
    loss_and_gradient,
    oracle_of,
    result_as_rows,
)
from corrections import CORRECTIONS, ZERO_UNSCORED
from objectives import OBJECTIVES
from schedules import BACKENDS

import fastpg
from fastpg import CISPO, ImportanceWeighted, KLPenalty, PPOClip, Reinforce, policy_loss
from fastpg.rollout import mismatch_metrics, truncated_weights

INF, NAN = math.inf, math.nan
every_correction = pytest.mark.parametrize("correction", CORRECTIONS)


def inputs(dtype=F64, **options):
    """Of (6, 5) tokens, with log-probabilities of the behaviour policy whose ratios leave every bound on both sides."""
    given = batch(dtype, **options)
    means = torch.tensor([0.3, -0.3, 0.1, 0.0, -0.1, 0.2], dtype=F64)[:, None]
    d = means + 0.5 * torch.randn(6, 5, dtype=F64)
    return given | {"rollout_logprobs": given["old_logprobs"] - d.to(dtype)}


# ---- values and gradients


@every_correction
@every_layout
@every_reduction
@pytest.mark.parametrize("name", ["reinforce", "cispo", "ppo", "ppo-dual", "sapo", "gspo", "iw-trajectory", "users-function"])
def test_loss_and_gradient_equal_the_oracle(name, reduction, layout, correction):
    given, (ours, theirs) = inputs(per_sequence=True), CORRECTIONS[correction]
    known = OBJECTIVES[name]
    actual = result_as_rows(given, layout, objective=known.objective, reduction=reduction, rollout_correction=ours)
    laid = lay_out(given, layout)
    loss, gradient, _ = oracle_of(laid, known.oracle, reduction=reduction, rollout_correction=theirs)
    assert_same(actual, (loss, as_rows(gradient, layout)))
    plain = result_as_rows({k: x for k, x in given.items() if k != "rollout_logprobs"}, layout, objective=known.objective)
    assert (actual[1] - plain[1]).norm() > 0.01 * plain[1].norm()  # another loss


@every_correction
@BACKENDS
def test_in_fp32_on_both_backends(backend, correction):
    """On Triton one kernel computes the loss; the weights go into it."""
    given, (ours, theirs) = inputs(F32), CORRECTIONS[correction]
    actual = loss_and_gradient(**given, objective=PPOClip(), rollout_correction=ours, backend=backend)
    loss, gradient, scale = oracle_of(given, OBJECTIVES["ppo"].oracle, rollout_correction=theirs)
    assert abs(actual[0].loss - loss) <= 1e-5 * scale
    assert (actual[1] - gradient).norm() <= 1e-5 * gradient.norm()


def test_by_hand():
    """w = 2 and 1/2, r = 1.1 and 3: l = 2 * 1.1 A; 1/2 * 1.2 A, which the clip holds; and no gradient reaches the weights."""
    rollout = torch.tensor([0.1, 0.4], dtype=F64).log()
    old = (rollout + torch.tensor([2.0, 0.5], dtype=F64).log()).requires_grad_()
    logprobs = (old.detach() + torch.tensor([1.1, 3.0], dtype=F64).log()).requires_grad_()
    out = policy_loss(
        logprobs, old, torch.ones(2, dtype=F64), objective=PPOClip(0.2, 0.2), reduction="sum",
        rollout_logprobs=rollout.requires_grad_(),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-(2.2 + 0.6), rel=1e-14)
    assert logprobs.grad.tolist() == pytest.approx([-2.2, 0])
    assert old.grad is None
    assert rollout.grad is None


@every_correction
def test_on_policy_the_proximal_policy_is_the_current_one(correction):
    """old_logprobs=None: weights of detached logprobs, and a ratio of 1."""
    given, (ours, theirs) = inputs(), CORRECTIONS[correction]
    del given["old_logprobs"]
    options = {"objective": PPOClip()}
    actual = loss_and_gradient(**given, old_logprobs=None, rollout_correction=ours, **options)
    loss, gradient, _ = oracle_of({**given, "old_logprobs": None}, OBJECTIVES["ppo"].oracle, rollout_correction=theirs)
    assert_same((actual[0].loss, actual[1]), (loss, gradient))
    explicit = loss_and_gradient(**given, old_logprobs=given["logprobs"], rollout_correction=ours, **options)
    assert torch.equal(actual[1], explicit[1])
    assert actual[0].metrics.to_dict() == explicit[0].metrics.to_dict()


def test_a_ratio_of_1_is_no_correction():
    given = inputs()
    rollout = given.pop("rollout_logprobs")
    rollout[0] = given["old_logprobs"][0]
    plain = loss_and_gradient(**given, objective=CISPO(), denominator=7)[1]
    gradient = loss_and_gradient(**given, rollout_logprobs=rollout, objective=CISPO(), denominator=7)[1]
    assert torch.equal(gradient[0], plain[0])
    assert not torch.equal(gradient[1], plain[1])
    assert torch.equal(
        loss_and_gradient(**given, rollout_logprobs=given["old_logprobs"], objective=CISPO(), denominator=7)[1], plain
    )


def test_weights_made_outside_are_the_same_loss():
    given = inputs()
    rollout = given.pop("rollout_logprobs")
    for correction, _ in CORRECTIONS.values():
        function = correction or (lambda *x, **more: truncated_weights(*x, high=None, **more))
        weights = function(given["old_logprobs"], rollout, mask=MASK, sequence_ids=None).double()
        wanted = loss_and_gradient(**given, rollout_weights=weights, objective=PPOClip())[1]
        actual = loss_and_gradient(**given, rollout_logprobs=rollout, rollout_correction=correction, objective=PPOClip())[1]
        assert torch.equal(actual, wanted)


def test_the_kl_penalty_and_the_entropy_bonus_have_no_such_weight():
    given = inputs()
    options = {"objective": CISPO(), "kl": KLPenalty(0.3, "k2"), "ref_logprobs": -3 * torch.rand(6, 5, dtype=F64)}
    actual = loss_and_gradient(**given, **options, rollout_correction=lambda old, *_, **__: torch.zeros_like(old))
    zero = {"objective": lambda logprobs, old, advantages: 0 * logprobs}
    without = loss_and_gradient(**{k: x for k, x in given.items() if k != "rollout_logprobs"}, **options | zero)
    assert_same((actual[0].loss, actual[1]), (without[0].loss, without[1]))


@pytest.mark.parametrize(
    "correction", ["plain", "truncated", "icepop", "band", "sequence", "sequence-masked", "users-function"]
)
def test_micro_batches_sum_to_the_batch(correction):
    """Of whole sequences; those of single tokens may be cut anywhere."""
    given, ours = inputs(), CORRECTIONS[correction][0]
    options = {"objective": PPOClip(), "rollout_correction": ours, "denominator": int(MASK.sum())}
    whole = loss_and_gradient(**given, **options)
    cuts = [(slice(0, 2), slice(None)), (slice(2, 6), slice(None))]
    if "sequence" not in correction:
        cuts = [(slice(None), slice(0, 3)), (slice(None), slice(3, 5))]
    gradient, total = torch.zeros(6, 5, dtype=F64), 0
    for rows, columns in cuts:
        out, of_part = loss_and_gradient(**{k: x[rows, columns].contiguous() for k, x in given.items()}, **options)
        total, gradient[rows, columns] = total + out.loss, of_part
    torch.testing.assert_close(total, whole[0].loss, rtol=1e-14, atol=0)
    assert torch.equal(gradient, whole[1])


# ---- masks, and no tokens


@every_correction
@every_layout
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_garbage_at_masked_positions_changes_no_bit(garbage, layout, correction):
    given, ours = lay_out(inputs(), layout), CORRECTIONS[correction][0]
    mask = given["mask"]
    spoilt = {k: torch.where(mask, x, garbage) if x.is_floating_point() else x for k, x in given.items()}
    if "sequence_ids" in given:
        spoilt["sequence_ids"] = torch.where(mask, given["sequence_ids"], 10**9)
    options = {"objective": CISPO(), "rollout_correction": ours}
    (out, gradient), (clean, wanted) = (loss_and_gradient(**x, **options) for x in (spoilt, given))
    assert torch.equal(gradient, wanted)
    assert torch.equal(out.loss, clean.loss)
    assert out.metrics.to_dict() == clean.metrics.to_dict()


@every_correction
@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0), (2, 3)], ids=str)
def test_no_tokens(shape, correction):
    x = torch.full(shape, NAN, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.long) if len(shape) == 1 else None
    out = policy_loss(
        x, torch.full(shape, NAN), torch.full(shape, NAN), mask=torch.zeros(shape, dtype=torch.bool), sequence_ids=ids,
        objective=CISPO(), rollout_logprobs=torch.full(shape, NAN), rollout_correction=CORRECTIONS[correction][0],
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0
    assert not x.grad.any()
    found = out.metrics.to_dict()
    assert (found["scored_tokens"], found["unscored_tokens"], found["mismatch_ess"]) == (0, 0, 1)
    assert all(math.isfinite(value) for value in found.values())


def test_one_token():
    out = policy_loss(
        torch.tensor([-1.0]), torch.tensor([-1.5]), torch.tensor([2.0]), objective=ImportanceWeighted(),
        rollout_logprobs=torch.tensor([-1.2]),
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(-2 * math.exp(-0.3) * math.exp(0.5), rel=1e-6)


# ---- tokens that the engine did not score


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_token_that_was_not_scored_has_the_weight_0_by_choice_and_is_counted(value):
    given = inputs()
    given["rollout_logprobs"][0, 1] = value
    out, gradient = loss_and_gradient(**given, objective=CISPO(), rollout_correction=ZERO_UNSCORED)
    assert gradient[0, 1] == 0
    assert out.metrics["unscored_tokens"] == 1
    assert out.metrics["scored_tokens"] == MASK.sum() - 1
    assert out.metrics["tokens"] == MASK.sum()
    rest = loss_and_gradient(
        **{**given, "rollout_logprobs": given["rollout_logprobs"].nan_to_num(-1, -1, -1)}, objective=CISPO()
    )
    keep = torch.ones_like(MASK).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(False))
    assert torch.equal(gradient[keep], rest[1][keep])  # it counts in the denominator


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_without_a_check_the_loss_is_nan(value):
    given = inputs()
    given["rollout_logprobs"][0, 1] = value
    assert policy_loss(**given, objective=CISPO(), check=False).loss.isnan()
    given["advantages"] = given["advantages"] * 0  # never hidden
    assert policy_loss(**given, objective=CISPO(), check=False).loss.isnan()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_old_log_probability_that_is_not_finite_is_never_hidden(value):
    given = inputs()
    given["old_logprobs"][0, 1] = value
    for correction in (None, ZERO_UNSCORED, CORRECTIONS["icepop"][0]):
        assert policy_loss(**given, objective=CISPO(), rollout_correction=correction).loss.isnan()


def test_the_exponent_is_clamped_to_20():
    out = policy_loss(
        torch.zeros(2), torch.zeros(2), torch.ones(2), objective=ImportanceWeighted(), reduction="sum",
        rollout_logprobs=torch.tensor([-50.0, 50.0]),
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(-math.exp(20), rel=1e-6)


# ---- metrics


@every_layout
def test_metrics_are_those_of_mismatch_metrics(layout):
    given = lay_out(inputs(), layout)
    given["rollout_logprobs"][given["mask"].nonzero(as_tuple=True)[0][0]] = NAN
    given["rollout_logprobs"] = given["rollout_logprobs"].requires_grad_()
    out = policy_loss(**given, objective=PPOClip(), rollout_correction=ZERO_UNSCORED)
    names = ("old_logprobs", "rollout_logprobs", "mask")
    wanted = mismatch_metrics(*(given[name] for name in names), sequence_ids=given.get("sequence_ids"))
    assert len(wanted) == 11
    assert out.metrics["unscored_tokens"] > 0
    for name, value in wanted.items():
        assert torch.equal(out.metrics[name], value), name
        assert not out.metrics[name].requires_grad
    assert {*wanted, "ratio_mean", "clip_fraction"} <= {*out.metrics}
    assert {*(out.metrics | {"more": out.loss})} == {*out.metrics, "more"}
    assert {*wanted}.isdisjoint(
        policy_loss(**{k: x for k, x in given.items() if k != "rollout_logprobs"}, objective=PPOClip()).metrics
    )


def test_metrics_are_copies_which_may_be_copied_and_pickled():
    given = inputs()
    given["mask"] = MASK.clone()
    out = policy_loss(**given, objective=PPOClip())
    wanted = out.metrics.to_dict()
    for x in given.values():
        x.zero_()
    assert out.metrics.to_dict() == wanted
    for again in (copy.deepcopy(out.metrics), pickle.loads(pickle.dumps(out.metrics))):
        assert again.to_dict() == wanted


def test_metrics_of_single_tokens_have_no_sequences():
    out = policy_loss(-torch.ones(3), -torch.ones(3), torch.ones(3), objective=PPOClip(), rollout_logprobs=-torch.ones(3))
    assert "mismatch_chi2" in out.metrics
    assert "mismatch_chi2_seq" not in out.metrics


def test_old_and_rollout_may_have_other_dtypes():
    given = inputs()
    given["rollout_logprobs"], given["old_logprobs"] = given["rollout_logprobs"].bfloat16(), given["old_logprobs"].float()
    out = policy_loss(**given, objective=Reinforce())
    wide = policy_loss(**{k: x.double() if x.is_floating_point() else x for k, x in given.items()}, objective=Reinforce())
    torch.testing.assert_close(out.loss, wide.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.metrics["mismatch_ess"].double(), wide.metrics["mismatch_ess"], rtol=1e-6, atol=0)


def test_compiled_it_is_the_same():
    given = inputs(F32)

    def step(correction):
        return policy_loss(**given, objective=PPOClip(), rollout_correction=correction)

    torch._dynamo.reset()
    for correction in (None, ZERO_UNSCORED):
        compiled = torch.compile(step, backend="eager", fullgraph=True)(correction)
        eager = step(correction)
        torch.testing.assert_close(compiled.loss, eager.loss)
        assert compiled.metrics.to_dict() == pytest.approx(eager.metrics.to_dict())


def test_the_correction_is_called_once_with_whole_constants():
    calls = []

    def noted(old, rollout, **more):
        calls.append((old, rollout, more))
        assert not torch.is_grad_enabled()
        return torch.ones_like(old)

    given = inputs()
    given["old_logprobs"].requires_grad_()
    fastpg.policy_loss(**given, objective=CISPO(), rollout_correction=noted)
    ((old, rollout, more),) = calls
    assert torch.equal(old, given["old_logprobs"])
    assert torch.equal(rollout, given["rollout_logprobs"])
    assert not old.requires_grad
    assert torch.equal(more["mask"], MASK)
    assert more["sequence_ids"] is None
