"""What only the one-pass loss has: anchors that are wrong, rows recomputed or skipped, counts of products, check=False."""

from dataclasses import replace

import pytest
import torch
from problems import check_result, logprobs_of, oracle, random_problem, relative_error, row_errors
from schedules import ALL_DTYPES, ONE_PASS, one_pass, two_pass
from torch.profiler import ProfilerActivity, profile

from fastpg import (
    CISPO,
    ImportanceWeighted,
    KLPenalty,
    LMHead,
    Objective,
    Reinforce,
    linear_logprobs,
    linear_policy_loss,
    reference,
)
from fastpg.crosscheck.cases import Inputs

# ---- Anchors that are wrong -----------------------------------------------------------------------------------------


@ONE_PASS
@ALL_DTYPES
@pytest.mark.parametrize("off", [-80, -20, 20, 80])
@pytest.mark.parametrize("name", ["cispo", "cispo-lower-bound", "reinforce", "kl"])
def test_old_logprobs_far_off(one_pass, dtype, off, name):
    """off = old - logp. A ratio of e^80 or e^-80 is clipped, or does not enter; the gradient is right all the same."""
    objective = {"cispo-lower-bound": CISPO(5.0, 0.2), "reinforce": Reinforce()}.get(name, CISPO())
    problem = random_problem(64, 1000, dtype)
    logprobs = logprobs_of(problem)
    problem = replace(problem, old_logprobs=(logprobs + off).float())
    kl = None
    if name == "kl":
        kl = KLPenalty(0.1, "k3")
        ref = (logprobs - torch.randn(64)).float()
        problem = replace(problem, ref_logprobs=ref, rollout_weights=torch.ones(64))
    # e^-80 is below the absolute scale of the row check where nothing but the ratio carries the gradient
    check_result(problem, one_pass(problem, objective, kl=kl))


def far_target(gap: float, dtype: torch.dtype) -> Inputs:
    """Four rows whose target lies `gap` below the top logit, among sixty ordinary ones."""
    problem = random_problem(64, 1000, dtype)
    hidden, weight = problem.hidden.float(), problem.head.weight.float()
    for row in range(4):
        away = weight[problem.tokens[row]]
        z = hidden[row] @ weight.T
        hidden[row] -= away * (gap - (z.max() - z[problem.tokens[row]])) / away.square().sum()
    return replace(problem, hidden=hidden.to(dtype))


@ONE_PASS
@ALL_DTYPES
@pytest.mark.parametrize("gap", [90, 160])
@pytest.mark.parametrize("old", ["zero", "logp"])
def test_a_target_far_below_the_top_is_recomputed(one_pass, dtype, gap, old):
    problem = far_target(gap, dtype)
    logprobs = logprobs_of(problem)
    assert (logprobs[:4] < -gap + 15).all()
    old_logprobs = torch.where(torch.arange(64) < 4, 0.0 if old == "zero" else logprobs, logprobs)
    problem = replace(problem, old_logprobs=old_logprobs.float())
    got = one_pass(problem, Reinforce())
    expected = 4 if old == "zero" or gap == 160 else 0  # clamp(-90, -60) leaves 30 nats: no overflow
    assert got.metrics["recomputed_tokens"] == expected
    check_result(problem, got)


@ONE_PASS
@ALL_DTYPES
def test_a_certain_token_that_was_thought_impossible_is_recomputed(one_pass, dtype):
    """1 - p = 1e-12 with old = -80: S underflows the range, since the anchor is 60 nats too high."""
    problem = random_problem(65, 1000, dtype)  # row 64 has 1 - p = 1e-12
    logprobs = logprobs_of(problem)
    assert logprobs[64] > -1e-10
    old = torch.where(torch.arange(65) == 64, -80.0, logprobs)
    problem = replace(problem, old_logprobs=old.float())
    got = one_pass(problem, CISPO())
    assert got.metrics["recomputed_tokens"] == 1
    check_result(problem, got)


@ONE_PASS
@ALL_DTYPES
def test_unclipped_importance_weights_of_e_80_are_recomputed(one_pass, dtype):
    problem = random_problem(64, 1000, dtype)
    logprobs = logprobs_of(problem)
    far = torch.arange(64) < 5
    problem = replace(problem, old_logprobs=torch.where(far, logprobs - 80, logprobs).float())
    got = one_pass(problem, ImportanceWeighted())
    assert got.metrics["recomputed_tokens"] == 5
    # the old log-probabilities of this size are rounded to 4e-6, and the ratio is judged on what was given
    check_result(problem, got)


@ONE_PASS
@ALL_DTYPES
@pytest.mark.parametrize("workspace", [None, 2**22])
def test_many_recomputed_rows_in_several_chunks(one_pass, dtype, workspace):
    problem = random_problem(1100, 300, dtype, bias=True)
    logprobs = logprobs_of(problem)
    problem = replace(problem, old_logprobs=torch.where(torch.arange(1100) % 2 == 0, logprobs - 80, logprobs).float())
    got = one_pass(problem, CISPO(), workspace=workspace)
    assert got.metrics["recomputed_tokens"] > 300
    check_result(problem, got)


@ONE_PASS
@ALL_DTYPES
def test_a_row_recomputed_only_for_its_factor_keeps_the_bits_of_its_logprob(one_pass, dtype):
    problem = random_problem(64, 300, dtype)
    problem = replace(problem, old_logprobs=logprobs_of(problem).float())
    ordinary = one_pass(problem, CISPO())
    huge = torch.where(torch.arange(64) % 8 == 0, 1e34, problem.advantages)
    got = one_pass(replace(problem, advantages=huge), CISPO())
    assert got.metrics["recomputed_tokens"] == 8
    assert torch.equal(got["logp"], ordinary["logp"])


@ONE_PASS
def test_dweight_of_many_chunks_is_rounded_once(one_pass):
    """6 chunks: summed in bf16 its error would be several times that of one chunk."""
    problem = random_problem(1536, 300, torch.bfloat16)
    want = oracle(problem, CISPO())
    one, many = (relative_error(one_pass(problem, CISPO(), workspace=w)["dW"], want["dW"]) for w in (None, 2_100_000))
    assert many <= 1.1 * one


@ONE_PASS
@ALL_DTYPES
def test_dweight_with_recomputed_rows_is_rounded_once(one_pass, dtype):
    """One chunk has rounded dW to bf16 before its flagged rows are known: dW is computed once more, and this is counted."""
    problem = random_problem(512, 300, dtype)
    logprobs = logprobs_of(problem).float()
    ordinary = replace(problem, old_logprobs=logprobs)
    wrong = replace(problem, old_logprobs=torch.where(torch.arange(512) % 4 == 0, logprobs - 80, logprobs))
    errors = []
    for given in (ordinary, wrong):
        got = one_pass(given, Reinforce())
        errors.append(relative_error(got["dW"], oracle(given, Reinforce())["dW"]))
        flagged = given is wrong
        assert (got.metrics["recomputed_tokens"] > 0) == flagged
        assert got.metrics["repeated_products"] == (flagged and dtype == torch.bfloat16)
    assert errors[1] <= 1.1 * errors[0] + 1e-6


def test_dweight_of_two_passes_over_many_chunks_is_rounded_once():
    """The slice of dlogits is rounded, and then the sum of all chunks: its error is that of float64 sums with these two."""
    problem = random_problem(1536, 300, torch.bfloat16)
    want = oracle(problem, CISPO())
    many = relative_error(two_pass(problem, CISPO(), workspace=2_100_000)["dW"], want["dW"])
    hidden, logits = problem.hidden.double(), problem.hidden.double() @ problem.head.weight.double().T
    logits.requires_grad_()
    logprobs, _ = reference.token_distribution(logits, problem.tokens)
    mask = torch.ones_like(problem.tokens, dtype=torch.bool)
    of_logprobs = {"objective": reference.cispo(5.0), "mask": mask, "reduction": "sum"}
    reference.policy_loss(logprobs, problem.old_logprobs.double(), problem.advantages.double(), **of_logprobs).backward()
    rounded = (logits.grad.bfloat16().double().T @ hidden).bfloat16()
    assert many <= 1.1 * relative_error(rounded, want["dW"])


def test_entropy_metric_without_host_reads():
    problem = replace(random_problem(40, 50, torch.float32, bias=True, masked=True), old_logprobs=torch.zeros(40))
    problem = replace(problem, old_logprobs=logprobs_of(problem).float())
    problem.head.bias[0] = -torch.inf
    problem = replace(problem, mask=problem.mask & (problem.tokens != 0))
    arguments = problem.hidden, problem.head, problem.tokens, problem.old_logprobs, problem.advantages
    checked, unchecked = (
        linear_policy_loss(*arguments, objective=CISPO(), mask=problem.mask, entropy=True, check=c).metrics
        for c in (True, False)
    )
    _, entropies = reference.linear_logprobs(problem.hidden, problem.head, problem.tokens, mask=problem.mask)
    assert torch.allclose(checked["entropy"], entropies.sum() / problem.mask.sum(), rtol=1e-5)
    assert torch.allclose(unchecked["entropy"], checked["entropy"], rtol=1e-6)


@ONE_PASS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_users_function_with_an_infinite_slope_at_masked_zeros(one_pass, dtype):
    problem = random_problem(30, 50, dtype, masked=True)
    problem = replace(problem, mask=problem.mask & (logprobs_of(problem) < -0.1))
    got = one_pass(problem, lambda logp, old, a: a * (-torch.expm1(logp)).sqrt(), check=False)
    assert got["loss"].isfinite()
    assert got["dW"].isfinite().all()


@ONE_PASS
def test_what_zero_advantage_may_not_skip(one_pass):
    class Bonus(Objective):
        def __call__(self, logprobs, old_logprobs, advantages):
            return advantages * logprobs + 0.1 * logprobs

    problem = random_problem(20, 30, torch.float32)
    zero = replace(problem, advantages=torch.zeros(20))
    assert one_pass(zero, Bonus())["loss"] > 0
    bad_old = replace(zero, old_logprobs=torch.where(torch.arange(20) == 3, torch.nan, zero.old_logprobs))
    assert one_pass(bad_old, CISPO())["loss"].isnan()


@ALL_DTYPES
def test_entropies_of_all_rows_recomputed_ones_included(dtype):
    problem = replace(far_target(160, dtype), temperature=0.8)
    wide = problem.leaves(torch.float64)
    _, entropies = reference.linear_logprobs(wide.hidden, wide.head, wide.tokens, temperature=0.8)
    out = linear_policy_loss(
        problem.hidden, problem.head, problem.tokens, torch.zeros(64), problem.advantages,
        objective=CISPO(), temperature=0.8, entropy=True,
    )  # fmt: skip
    assert out.metrics["recomputed_tokens"] >= 4
    assert (out.metrics["entropy"] - entropies.mean()).abs() < 2e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_factor_that_underflows_is_no_zero(backend):
    """old far above logp: g = 2e-33 and D = e^54, so that u = -g / D is no number of fp32, while g w is."""
    hidden, weight = torch.tensor([[1.5]]), torch.tensor([[40.0], [4.0]])
    problem = Inputs(hidden, LMHead(weight), torch.tensor([1]), torch.tensor([21.9]), torch.tensor([-1.3]))
    for objective in (CISPO(), ImportanceWeighted()):
        want = oracle(problem, objective)
        got = one_pass(problem, objective, backend=backend)
        assert want["dX"].abs() > 1e-33
        assert row_errors(got["dX"], want["dX"]) < 1e-4
        assert got.metrics["recomputed_tokens"] == 1


def test_check_false_shows_overflow_as_nan_and_keeps_low_sums():
    problem = far_target(160, torch.float32)
    out = linear_policy_loss(
        problem.hidden, problem.head, problem.tokens, torch.zeros(64), problem.advantages, objective=Reinforce(), check=False
    )
    assert out.loss.isnan()
    assert torch.equal(out.logprobs.isnan(), torch.arange(64) < 4)
    low = random_problem(65, 1000, torch.float32)
    low = replace(low, old_logprobs=torch.where(torch.arange(65) == 64, -50.0, low.old_logprobs.clamp(max=0)))
    out = linear_policy_loss(low.hidden, low.head, low.tokens, low.old_logprobs, low.advantages, objective=CISPO(), check=False)
    assert out.loss.isfinite()


# ---- What is skipped ------------------------------------------------------------------------------------------------


def products(call) -> int:
    """The sum of 2 M N K over the matrix products of a call, seen by the profiler inside registered ops too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    flops = 0
    for event in profiler.events():
        if event.name in FACTORS and not any(parent.name in FACTORS for parent in _parents(event)):
            (m, k), (_, n) = (event.input_shapes[i] for i in FACTORS[event.name])
            flops += 2 * m * n * k
    return flops


# where the two factors stand among the arguments
FACTORS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}


def _parents(event):
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


@ALL_DTYPES
def test_counts_of_products(dtype):
    rows, vocab, size = 1024, 3000, 64
    one = 2 * rows * vocab * size
    hidden, weight = torch.randn(rows, size).to(dtype), (torch.randn(vocab, size) * 0.2).to(dtype)
    tokens, advantages = torch.randint(0, vocab, (rows,)), torch.randn(rows)
    old = linear_logprobs(hidden, weight, tokens).logprobs

    def count(hidden_grad, weight_grad, advantages=advantages, **options):
        h, w = hidden.clone().requires_grad_(hidden_grad), weight.clone().requires_grad_(weight_grad)

        def step():
            out = linear_policy_loss(h, w, tokens, old, advantages, objective=CISPO(), **options)
            if out.loss.requires_grad:
                out.loss.backward()

        return products(step) / one

    assert count(True, True) == 3
    assert count(True, True, workspace=14 * 2**20) == 3  # several chunks
    assert count(True, False) == count(False, True) == 2
    assert count(False, False) == 1
    with torch.no_grad():
        assert count(True, True) == 1
    half = torch.where(torch.arange(rows) % 2 == 0, 0, advantages)
    assert count(True, True, half) == 1.5
    assert count(True, True, half, skip_zero_weight=False) == 2  # after product 1 their gradients are 0
    assert count(True, True, half, skip_zero_weight=False, skip_silenced=False) == 3
    assert count(True, True, torch.zeros(rows)) == 0


def test_no_other_pass_over_the_scores():
    """Apart from products and product 1's epilogue, nothing reads or writes a tensor with all columns of a chunk but the
    scatter of the target, one number per row."""
    rows, vocab, size = 512, 12000, 64  # three tiles of 4096 columns
    hidden, weight = torch.randn(rows, size, requires_grad=True), (torch.randn(vocab, size) * 0.2).requires_grad_()
    tokens, advantages = torch.randint(0, vocab, (rows,)), torch.randn(rows)
    old = linear_logprobs(hidden, weight, tokens).logprobs.detach()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        linear_policy_loss(hidden, weight, tokens, old, advantages, objective=CISPO()).loss.backward()
    views = {
        "aten::t",
        "aten::numpy_T",
        "aten::permute",
        "aten::resolve_conj",
        "aten::transpose",
        "aten::as_strided",
        "aten::slice",
        "aten::select",
        "aten::empty",
        "aten::expand",
    }
    bookkeeping = {
        "aten::index_put_",
        "aten::_index_put_impl_",
        "aten::index_fill_",
        "aten::resize_",
        "aten::fill_",
    }  # of no row, without flags
    allowed = views | bookkeeping | {"aten::mm", "aten::addmm", "aten::addmm_"}
    wide = {
        event.name
        for event in profiler.events()
        if event.name.startswith("aten::")
        and any(list(shape) in ([rows, vocab], [vocab, rows]) for shape in event.input_shapes)
        and not (event.name == "aten::gather" and list(event.input_shapes[2]) == [rows, 1])  # one number per row
    }
    assert {"aten::mm", "aten::index_put_"} <= wide  # the count sees what is there
    assert wide <= allowed, wide - allowed


@ONE_PASS
def test_zero_weight_tokens(one_pass):
    """No work and no gradient, NaN for their log-probability, a place in the denominator, none in the means."""
    problem = random_problem(64, 300, torch.float32)
    zero = torch.arange(64) % 3 == 0
    problem = replace(problem, advantages=torch.where(zero, 0, problem.advantages))
    want = oracle(problem, CISPO(), "token-mean")
    got = one_pass(problem, CISPO(), "token-mean")
    assert torch.equal(got["logp"].isnan(), zero)
    check_result(problem, got)
    assert not got["dX"][zero].any()
    assert got.metrics["skipped_tokens"] == zero.sum()
    assert got.metrics["tokens"] == 64 - zero.sum()
    ratios = (want["logp"] - problem.old_logprobs).exp()[~zero]
    assert torch.allclose(got.metrics["ratio_mean"].double(), ratios.mean(), rtol=1e-4)

    everything = one_pass(problem, CISPO(), "token-mean", skip_zero_weight=False)
    assert everything.metrics["skipped_tokens"] == 0
    assert everything.metrics["tokens"] == 64
    check_result(problem, everything)


@ONE_PASS
def test_zero_rollout_weights_are_skipped_too_and_what_may_not_be_skipped_is_not(one_pass):
    problem = replace(random_problem(30, 50, torch.float32), rollout_weights=(torch.arange(30) % 2).float())
    assert one_pass(problem, CISPO()).metrics["skipped_tokens"] == 15
    assert one_pass(problem, lambda logp, old, a: logp * a).metrics["skipped_tokens"] == 0  # a user's function
    with_ref = replace(problem, ref_logprobs=problem.old_logprobs)
    assert one_pass(with_ref, CISPO(), kl=KLPenalty(0.1)).metrics["skipped_tokens"] == 0
    assert one_pass(problem, CISPO(), check=False).metrics["skipped_tokens"] == 0
