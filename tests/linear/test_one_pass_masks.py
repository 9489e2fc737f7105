"""The one-pass loss: bits that do not depend on the batch, sums over parts of it, and what masks keep out."""

from dataclasses import replace

import pytest
import torch
from problems import logprobs_of, oracle, random_problem, relative_error, row_errors
from schedules import ALL_DTYPES, BACKENDS, ONE_PASS

from fastpg import (
    CISPO,
    ImportanceWeighted,
    KLPenalty,
    Reinforce,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    reference,
)


@ALL_DTYPES
def test_on_policy_ratio_is_exactly_one(dtype):
    problem = random_problem(100, 300, dtype)
    out = linear_policy_loss(
        problem.hidden, problem.head, problem.tokens, None, problem.advantages, objective=ImportanceWeighted()
    )
    assert out.metrics["ratio_mean"] == out.metrics["ratio_max"] == out.metrics["ess"] == 1
    assert out.metrics["kl_k3"] == 0
    want = oracle(problem, Reinforce())
    leaves = problem.leaves()
    loss = linear_policy_loss(
        leaves.hidden, leaves.head, leaves.tokens, None, leaves.advantages, objective=CISPO(), reduction="sum"
    ).loss
    loss.backward()
    assert (row_errors(leaves.hidden.grad, want["dX"]) < (8e-3 if dtype == torch.bfloat16 else 5e-5)).all()


@ALL_DTYPES
def test_bits_of_a_row_do_not_depend_on_the_batch(dtype):
    problem = random_problem(700, 5003, dtype, bias=True, softcap=20.0, temperature="per-token")

    def logprobs(rows, **options):
        return linear_policy_loss(
            problem.hidden[rows], problem.head, problem.tokens[rows], problem.old_logprobs[rows],
            problem.advantages[rows], objective=CISPO(), temperature=problem.temperature[rows], **options,
        ).logprobs  # fmt: skip

    whole = logprobs(slice(None))
    for rows in (slice(0, 1), slice(255, 258), slice(100, 613), slice(None, None, 3)):
        assert torch.equal(logprobs(rows), whole[rows])
    assert torch.equal(logprobs(slice(None), workspace=2**26), whole)
    leaves = problem.leaves()
    with_gradients = linear_policy_loss(
        leaves.hidden, leaves.head, leaves.tokens, leaves.old_logprobs, leaves.advantages,
        objective=CISPO(), temperature=leaves.temperature, entropy=True,
    ).logprobs  # fmt: skip
    assert torch.equal(with_gradients, whole)


@ALL_DTYPES
def test_micro_batches_with_a_global_denominator_sum_to_the_whole_batch(dtype):
    problem = random_problem(300, 500, dtype, masked=True)
    count = int(problem.mask.sum())

    def gradients(parts):
        leaves = problem.leaves(torch.float32) if dtype == torch.float32 else problem.leaves()
        total = 0.0
        dhidden, dweight = torch.zeros_like(leaves.hidden), torch.zeros(leaves.head.weight.shape)
        for rows in parts:
            out = linear_cispo_loss(
                leaves.hidden[rows], leaves.head, leaves.tokens[rows], leaves.old_logprobs[rows],
                leaves.advantages[rows], mask=leaves.mask[rows], denominator=count,
            )  # fmt: skip
            h, w = torch.autograd.grad(out.loss, (leaves.hidden, leaves.head.weight))
            total, dhidden, dweight = total + out.loss.item(), dhidden + h, dweight + w.float()
        return total, dhidden, dweight

    whole, parts = gradients([slice(None)]), gradients([slice(0, 100), slice(100, 101), slice(101, 300)])
    limit = 1e-6 if dtype == torch.float32 else 5e-3  # bf16: each part's dW is rounded
    assert parts[0] == pytest.approx(whole[0], abs=1e-6)
    assert relative_error(parts[1], whole[1].double()) <= 1e-6
    assert relative_error(parts[2], whole[2].double()) <= limit


@BACKENDS
@ALL_DTYPES
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kl", [KLPenalty(0.1), None], ids=["kl", "no-kl"])
def test_garbage_at_masked_positions_changes_no_bit(backend, dtype, check, kl):
    problem = random_problem(100, 300, dtype, bias=True, temperature="per-token", masked=True)
    ref, rollout = torch.randn(100) - 3, torch.rand(100)

    def run(garbage: float | None):
        leaves = problem.leaves()
        hidden, tokens = leaves.hidden, problem.tokens.clone()
        per_token = [problem.old_logprobs, problem.advantages, problem.temperature, ref, rollout]
        if garbage is not None:
            hidden = torch.where(problem.mask[:, None], hidden, garbage)
            per_token = [torch.where(problem.mask, x, garbage) for x in per_token]
            tokens[~problem.mask] = 10**9
        old, advantages, temperature, ref_logprobs, rollout_weights = per_token
        out = linear_policy_loss(
            hidden, leaves.head, tokens, old, advantages, objective=CISPO(), mask=problem.mask, temperature=temperature,
            kl=kl, ref_logprobs=ref_logprobs if kl else None, rollout_weights=rollout_weights, entropy=True, check=check,
            backend=backend,
        )  # fmt: skip
        out.loss.backward()
        head = leaves.head
        return [out.loss, out.logprobs, *out.metrics.values(), leaves.hidden.grad, head.weight.grad, head.bias.grad]

    clean = run(None)
    assert not clean[-3][~problem.mask].any()
    for garbage in (torch.nan, torch.inf, -torch.inf):
        assert all(torch.equal(a, b) for a, b in zip(clean, run(garbage), strict=True))


@ONE_PASS
@ALL_DTYPES
def test_masked_rows_are_harmless_where_their_placeholder_token_is_banned(one_pass, dtype):
    """With check=False masked rows are computed, as token 0; a bias of -inf there makes their logits NaN."""
    problem = random_problem(60, 50, dtype, bias=True, masked=True)
    problem.head.bias[:2] = -torch.inf
    problem = replace(problem, mask=problem.mask & (problem.tokens > 1))
    checked, unchecked = (one_pass(problem, CISPO(), check=check) for check in (True, False))
    assert unchecked["dW"].isfinite().all()
    assert torch.equal(checked["logp"], unchecked["logp"])
    assert not unchecked["dX"][~problem.mask].any()
    assert relative_error(unchecked["dW"], checked["dW"].double()) < (1e-6 if dtype == torch.float32 else 5e-3)


@BACKENDS
@pytest.mark.parametrize("check", [True, False])
def test_infinite_hidden_states_are_not_a_certainty(backend, check):
    """The target's logit is +inf and the other's -inf, whose softmax is NaN."""
    hidden, weight = torch.tensor([[torch.inf]]), torch.tensor([[1.0], [-1.0]])
    arguments = hidden, weight, torch.tensor([0])
    assert linear_logprobs(*arguments, backend=backend, check=check).logprobs.isnan()
    out = linear_cispo_loss(*arguments, torch.tensor([-1.0]), torch.tensor([1.0]), backend=backend, check=check)
    assert out.loss.isnan()


@BACKENDS
@pytest.mark.parametrize("check", [True, False])
def test_a_transposed_weight_where_nothing_is_kept(backend, check):
    weight = torch.randn(8, 12).T.requires_grad_()
    tokens, mask = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    out = linear_cispo_loss(torch.randn(3, 8), weight, tokens, None, torch.ones(3), mask=mask, backend=backend, check=check)
    (gradient,) = torch.autograd.grad(out.loss, weight)
    assert torch.equal(gradient, torch.zeros(12, 8))


@BACKENDS
def test_a_hidden_size_of_one(backend):
    """Rows of one number have no stride of their own."""
    hidden, weight, tokens = torch.randn(1, 5).T, torch.randn(3, 1), torch.tensor([0, 1, 2, 0, 1])
    got = linear_logprobs(hidden, weight, tokens, backend=backend).logprobs
    assert torch.allclose(got, reference.linear_logprobs(hidden, weight, tokens)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["hidden", "old_logprobs", "advantages"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("check", [True, False])
@BACKENDS
def test_bad_values_at_kept_positions_make_the_loss_nan(backend, name, bad, check):
    problem = random_problem(20, 30, torch.float32).leaves()
    values = getattr(problem, name).detach().clone()
    values.view(20, -1)[3, 0] = bad
    problem = replace(problem, **{name: values})
    out = linear_policy_loss(
        problem.hidden,
        problem.head,
        problem.tokens,
        problem.old_logprobs,
        problem.advantages,
        objective=CISPO(),
        check=check,
        backend=backend,
    )
    assert not out.loss.isfinite()
    assert name == "advantages" or out.loss.isnan()
    out.loss.backward()
    assert not problem.head.weight.grad.isfinite().all()
    if name == "hidden":
        assert torch.equal(out.logprobs.isnan(), torch.arange(20) == 3)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"])
def test_reductions_and_sequence_advantages(reduction):
    """(B, T) tokens with advantages (B,), through both schedules."""
    problem = random_problem(24, 100, torch.float32)
    shape, mask = (4, 6), torch.rand(4, 6) > 0.4
    mask[2] = False
    hidden, tokens = problem.hidden.view(4, 6, -1), problem.tokens.view(shape)
    old = (logprobs_of(problem) - 0.3).float().view(shape)
    advantages = torch.randn(4)
    h, w = hidden.clone().requires_grad_(), problem.head.weight.clone().requires_grad_()
    logprobs = linear_logprobs(h, w, tokens, mask=mask).logprobs
    want = policy_loss(logprobs, old, advantages, objective=CISPO(), mask=mask, reduction=reduction)
    expected = torch.autograd.grad(want.loss, (h, w))
    out = linear_policy_loss(h, w, tokens, old, advantages, objective=CISPO(), mask=mask, reduction=reduction)
    assert out.logprobs.shape == shape
    assert torch.allclose(out.loss, want.loss, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(out.loss, (h, w)), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    for name, value in want.metrics.items():
        assert torch.allclose(out.metrics[name].float(), value.float(), rtol=1e-4, atol=1e-6), name
