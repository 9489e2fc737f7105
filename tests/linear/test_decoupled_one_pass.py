"""The one-pass losses with `rollout_logprobs` beside `old_logprobs`, against the oracle; see `test_decoupled`.

The sweep is anchored by the proximal policy, and the weights of the two decide which rows it computes.
"""

import math
from functools import partial

import pytest
import torch
from corrections import CORRECTIONS, ZERO_UNSCORED
from objectives import OBJECTIVES
from problems import relative_error
from schedules import BACKENDS

import fastpg
from fastpg import (
    CISPO,
    GSPO,
    KLPenalty,
    LinearPolicyLoss,
    PPOClip,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    reference,
)
from fastpg.linear import anchored
from fastpg.rollout import masked_weights, mismatch_metrics

F16, F32, F64 = torch.float16, torch.float32, torch.float64
NAN = math.nan
H, V = 16, 60
every_correction = pytest.mark.parametrize("correction", CORRECTIONS)
TOLERANCE = {F64: 1e-10, F32: 1e-4, F16: 1e-2}


def batch(dtype=F64, rows=5, columns=7):
    """Arguments and options of `linear_policy_loss` for (B, T) tokens of ragged sequences with holes."""
    hidden, weight = torch.randn(rows, columns, H, dtype=dtype), torch.randn(V, H, dtype=dtype) / 2
    tokens = torch.randint(0, V, (rows, columns))
    mask = (torch.rand(rows, columns) > 0.25) & (torch.arange(rows) != 2)[:, None]
    logprobs, _ = reference.linear_logprobs(hidden, weight, tokens)
    means = torch.linspace(-0.3, 0.3, rows, dtype=F64)[:, None]
    old = (logprobs - 0.3 * torch.randn(rows, columns, dtype=F64)).to(logprobs)
    rollout = (old - means - 0.4 * torch.randn(rows, columns, dtype=F64)).to(logprobs)
    old, rollout = (torch.where(mask, x, NAN) for x in (old, rollout))
    return (hidden, weight, tokens, old, torch.randn(rows)), {"mask": mask, "rollout_logprobs": rollout}


def packed(arguments, options):
    """The same as one pack (N,) with sequence ids."""
    hidden, weight, tokens, old, advantages = arguments
    ids = torch.arange(len(tokens))[:, None].expand(tokens.shape).flatten()
    flat = {name: x.flatten() for name, x in options.items()}
    return (hidden.flatten(0, 1), weight, tokens.flatten(), old.flatten(), advantages), flat | {"sequence_ids": ids}


def result(arguments, function=linear_policy_loss, **options):
    """(out, dX, dW)"""
    hidden, weight, *others = arguments
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    out = function(*leaves, *others, **options)
    return out, *torch.autograd.grad(out.loss, leaves)


def oracle(arguments, objective, mask, rollout_logprobs, **options):
    hidden, weight, tokens, old, advantages = arguments
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logprobs, _ = reference.linear_logprobs(*leaves, tokens, mask=mask)
    advantages = advantages[options["sequence_ids"]] if "sequence_ids" in options else advantages
    loss = reference.policy_loss(
        logprobs, old.double(), advantages.double(), objective=objective, mask=mask,
        rollout_logprobs=rollout_logprobs.double(), **options,
    )  # fmt: skip
    return loss, *torch.autograd.grad(loss, leaves)


def check(got, want, tolerance):
    assert abs(got[0].loss - want[0]) <= tolerance * max(1, abs(want[0]))
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        assert relative_error(mine, theirs) <= tolerance


@every_correction
@BACKENDS
@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "pack"])
@pytest.mark.parametrize("name", ["reinforce", "cispo", "ppo-clip-higher", "sapo", "users-function"])
def test_loss_and_gradients_equal_the_oracle(name, layout, dtype, backend, correction):
    """float16 takes two passes inside."""
    if backend == "triton" and dtype == F64:
        dtype = F32
    arguments, options = batch(dtype)
    if layout == "pack":
        arguments, options = packed(arguments, options)
    ours, theirs = CORRECTIONS[correction]
    known = OBJECTIVES[name]
    reduction = "seq-mean-token-mean" if layout == "pack" else "token-mean"
    got = result(arguments, objective=known.objective, reduction=reduction, rollout_correction=ours, backend=backend, **options)
    check(got, oracle(arguments, known.oracle, reduction=reduction, rollout_correction=theirs, **options), TOLERANCE[dtype])
    del options["rollout_logprobs"]
    plain = result(arguments, objective=known.objective, reduction=reduction, backend=backend, **options)
    assert relative_error(got[1], plain[1].double()) > 0.05  # another loss


@every_correction
@BACKENDS
def test_both_schedules_agree_and_report_the_same(backend, correction):
    arguments, options = batch(F32)
    ours = CORRECTIONS[correction][0]
    named = {"objective": PPOClip(), "rollout_correction": ours, "backend": backend}
    got = result(arguments, **named, **options)
    hidden, weight, tokens, old, advantages = arguments
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    logprobs = linear_logprobs(*leaves, tokens, mask=options["mask"], backend=backend).logprobs
    out = policy_loss(logprobs, old, advantages, **named, **options)
    check(got, (out.loss.detach(), *(x.double() for x in torch.autograd.grad(out.loss, leaves))), 1e-5)
    wanted = mismatch_metrics(old, options["rollout_logprobs"], options["mask"])
    for name, value in wanted.items():  # of all tokens, whichever are computed
        assert torch.equal(got[0].metrics[name], value), name
        assert torch.equal(out.metrics[name], value), name


def test_the_sweep_is_anchored_by_the_proximal_policy(monkeypatch):
    """However far the behaviour policy is, no row is computed again."""
    arguments, options = batch(F32)
    options["rollout_logprobs"] = options["rollout_logprobs"] - 60
    seen, sweep = [], anchored.one_pass

    def noted(rows, head, terms, *others):
        seen.append(terms.old_logprobs)
        return sweep(rows, head, terms, *others)

    monkeypatch.setattr("fastpg.linear.row_losses.one_pass", noted)
    out = linear_policy_loss(
        *arguments, objective=CISPO(), rollout_correction=lambda old, *_, **__: torch.ones_like(old), **options
    )
    assert out.metrics["recomputed_tokens"] == 0
    assert torch.equal(seen[0], arguments[3][options["mask"]])


# ---- which rows are computed


def computed(out):
    """Tokens that were: the log-probability of one that counts and was not is NaN."""
    return ~out.logprobs.isnan()


@BACKENDS
def test_tokens_that_the_correction_drops_cost_no_work(backend):
    arguments, options = batch(F32)
    mask, rollout, old = options["mask"], options["rollout_logprobs"], arguments[3]
    band = {"low": 0.8, "high": 1.25}
    ratio = (old - rollout).exp()
    dropped = mask & ~((ratio >= 0.8) & (ratio <= 1.25))
    assert 0 < dropped.sum() < mask.sum()
    options |= {"rollout_correction": partial(masked_weights, **band), "backend": backend}
    out = linear_cispo_loss(*arguments, **options)
    assert out.metrics["skipped_tokens"] == dropped.sum()
    assert torch.equal(computed(out), ~dropped)
    everything = linear_cispo_loss(*arguments, **options, skip_zero_weight=False)
    assert everything.metrics["skipped_tokens"] == 0
    torch.testing.assert_close(out.loss, everything.loss)
    with_kl = linear_cispo_loss(*arguments, **options, kl=KLPenalty(0.1), ref_logprobs=old)
    assert with_kl.metrics["skipped_tokens"] == 0


@BACKENDS
def test_a_token_that_was_not_scored_costs_no_work_by_choice(backend):
    arguments, options = batch(F32)
    place = tuple(options["mask"].nonzero()[0].tolist())
    wanted = result(arguments, linear_cispo_loss, rollout_correction=ZERO_UNSCORED, backend=backend, **options)
    options["rollout_logprobs"][place] = NAN
    got = result(arguments, linear_cispo_loss, rollout_correction=ZERO_UNSCORED, backend=backend, **options)
    assert (~computed(got[0])).nonzero().tolist() == [list(place)]
    assert got[0].metrics["unscored_tokens"] == got[0].metrics["skipped_tokens"] == 1
    assert not got[1][place].any()
    others = torch.ones_like(options["mask"]).index_put(tuple(map(torch.tensor, place)), torch.tensor(False))
    assert torch.equal(got[1][others], wanted[1][others])
    unchecked = linear_cispo_loss(*arguments, rollout_correction=ZERO_UNSCORED, check=False, backend=backend, **options)
    torch.testing.assert_close(unchecked.loss, got[0].loss)


@BACKENDS
def test_without_a_check_the_loss_is_nan(backend):
    arguments, options = batch(F32)
    place = tuple(options["mask"].nonzero()[0].tolist())
    options["rollout_logprobs"][place] = NAN
    out = linear_cispo_loss(*arguments, check=False, backend=backend, **options)
    assert out.loss.isnan()
    assert out.metrics["unscored_tokens"] == 1
    zero = (*arguments[:4], torch.zeros(len(arguments[4])))
    assert linear_cispo_loss(*zero, check=False, backend=backend, **options).loss.isnan()
    rows = fastpg.kept(options.pop("mask"), zero[4])
    assert linear_cispo_loss(*zero, mask=rows, check=False, backend=backend, **options).loss.isnan()


@BACKENDS
@pytest.mark.parametrize("check", [True, False])
def test_kept_of_the_advantages_and_of_the_weights(backend, check):
    """Either fits; with the weights the tokens that the correction drops are left out too, also without a check."""
    arguments, options = batch(F32)
    mask, rollout, advantages = options.pop("mask"), options["rollout_logprobs"], arguments[4]
    correction = partial(masked_weights, low=0.8, high=1.25)
    weights = correction(arguments[3], rollout, mask=mask)
    options |= {"objective": PPOClip(), "rollout_correction": correction, "backend": backend}
    want = result(arguments, mask=mask, **options)
    for rows in (fastpg.kept(mask), fastpg.kept(mask, advantages), fastpg.kept(mask, advantages, weights)):
        got = result(arguments, mask=rows, check=check, **options)
        torch.testing.assert_close(got[0].loss, want[0].loss, rtol=1e-6, atol=1e-7)
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert got[0].metrics["skipped_tokens"] == want[0].metrics["skipped_tokens"] > 0
    fewer = fastpg.kept(mask, advantages, weights * torch.tensor([0.0, 1, 1, 1, 1])[:, None])
    if check:
        with pytest.raises(ValueError, match=r"mask leaves out .* rows that the loss needs"):
            linear_policy_loss(*arguments, mask=fewer, **options)
    else:
        assert linear_policy_loss(*arguments, mask=fewer, check=False, **options).loss.isnan()


@pytest.mark.parametrize("correction", CORRECTIONS)
@BACKENDS
def test_micro_batches_sum_to_the_batch(backend, correction):
    """Of whole sequences; those of single tokens may be cut anywhere."""
    (hidden, weight, tokens, old, advantages), options = batch(F64 if backend == "torch" else F32)
    count = int(options["mask"].sum())
    named = {"objective": PPOClip(), "denominator": count, "rollout_correction": CORRECTIONS[correction][0], "backend": backend}
    whole = result((hidden, weight, tokens, old, advantages), **named, **options)
    cuts = [(slice(0, 2), slice(None)), (slice(2, 5), slice(None))]
    if "sequence" not in correction:
        cuts = [(slice(None), slice(0, 3)), (slice(None), slice(3, 7))]
    loss, of_hidden, of_weight = 0, torch.zeros_like(hidden), torch.zeros_like(weight)
    for cut in cuts:
        part = hidden[cut], weight, tokens[cut], old[cut], advantages[cut[0]]
        out, dx, dw = result(part, **named, **{name: x[cut] for name, x in options.items()})
        of_hidden[cut] = dx
        loss, of_weight = loss + out.loss, of_weight + dw
    tolerance = 1e-12 if backend == "torch" else 1e-5
    check((whole[0], *whole[1:]), (loss.detach(), of_hidden.double(), of_weight.double()), tolerance)


# ---- masks, few tokens, the module


@every_correction
@BACKENDS
@pytest.mark.parametrize("checked", [True, False])
def test_all_masked_none_and_one(backend, checked, correction):
    named = {"objective": PPOClip(), "rollout_correction": CORRECTIONS[correction][0], "check": checked, "backend": backend}
    arguments, options = batch(F32)
    nothing = {**options, "mask": torch.zeros_like(options["mask"])}
    out, dx, dw = result(arguments, **named, **nothing)
    assert out.loss == 0
    assert not dx.any()
    assert not dw.any()
    assert out.metrics["scored_tokens"] == 0
    empty, options = batch(F32, rows=0)
    assert result(empty, **named, **options)[0].loss == 0
    one, options = batch(F32, rows=1, columns=1)
    options["mask"][:] = True
    one = (*one[:3], -torch.ones(1, 1), torch.ones(1))
    options["rollout_logprobs"] = -torch.ones(1, 1)  # a ratio of 1, which no correction changes but the user's
    got = result(one, **named, **options)[1]
    plain = result(one, objective=PPOClip(), mask=options["mask"], backend=backend)[1]
    torch.testing.assert_close(got, plain * (2 if correction == "users-function" else 1))


def test_module_and_cispo_take_it():
    arguments, options = batch(F32)
    correction = CORRECTIONS["icepop"][0]
    want = linear_policy_loss(*arguments, objective=CISPO(2.0), rollout_correction=correction, **options)
    assert torch.equal(linear_cispo_loss(*arguments, ratio_max=2.0, rollout_correction=correction, **options).loss, want.loss)
    module = LinearPolicyLoss(objective=CISPO(2.0), rollout_correction=correction)
    assert torch.equal(module(*arguments, **options).loss, want.loss)


def test_statistics_beside_it():
    arguments, options = batch(F32)
    out = linear_policy_loss(*arguments, objective=CISPO(), outputs=("rank",), **options)
    assert torch.equal(out.loss, linear_policy_loss(*arguments, objective=CISPO(), **options).loss)
    assert "mismatch_ess" in out.metrics


def test_no_rows_are_read_and_nothing_is_called_before_an_error():
    """What one pass cannot do, it says before the correction runs."""

    def never(*_, **__):
        raise AssertionError("the correction was called")

    arguments, options = batch(F32)
    options |= {"rollout_correction": never}
    with pytest.raises(ValueError, match="one ratio for a sequence"):
        linear_policy_loss(*arguments, objective=GSPO(), **options)
    with pytest.raises(ValueError, match="old_logprobs must be given with rollout_logprobs in the one-pass loss"):
        linear_policy_loss(*arguments[:3], None, arguments[4], objective=CISPO(), **options)
