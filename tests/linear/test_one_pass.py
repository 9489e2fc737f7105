"""What only the one-pass loss has: anchors that are wrong, rows recomputed or skipped, counts of products, check=False."""

from dataclasses import replace

import pytest
import torch
from problems import Problem, check_result, opcheck, oracle, random_problem, relative_error, row_errors
from schedules import ALL_DTYPES, BACKENDS, coefficient_conditioning, one_pass, one_pass_triton, two_pass
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fastpg import (
    CISPO,
    ImportanceWeighted,
    KLPenalty,
    LinearPolicyLoss,
    LMHead,
    Objective,
    Reinforce,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    reference,
)
from fastpg.linear.operators import anchored_exp, gradient_products, target_logits
from fastpg.tiles.products import Sums
from fastpg.tiles.structures import Chunk, Head
from fastpg.tools.memory import transient_bytes

# names what a test calls `one_pass`
ONE_PASS = pytest.mark.parametrize("one_pass", [one_pass, one_pass_triton], ids=["torch", "triton"])


def logprobs_of(problem: Problem) -> torch.Tensor:
    return oracle(problem, reference.reinforce)[0].logprobs


# ---- Anchors that are wrong -----------------------------------------------------------------------------------------


@ONE_PASS
@ALL_DTYPES
@pytest.mark.parametrize("off", [-80, -20, 20, 80])
@pytest.mark.parametrize("name", ["cispo", "cispo-lower-bound", "reinforce", "kl"])
def test_old_logprobs_far_off(one_pass, dtype, off, name):
    """off = old - logp. A ratio of e^80 or e^-80 is clipped, or does not enter; the gradient is right all the same."""
    ours, theirs = {
        "cispo": (CISPO(), reference.cispo(5.0)),
        "cispo-lower-bound": (CISPO(5.0, 0.2), reference.cispo(5.0, 0.2)),
        "reinforce": (Reinforce(), reference.reinforce),
        "kl": (CISPO(), reference.cispo(5.0)),
    }[name]
    problem = random_problem(64, 1000, dtype)
    logprobs = logprobs_of(problem)
    problem = replace(problem, old_logprobs=(logprobs + off).float())
    kl, conditioning = None, 1.0
    if name == "kl":
        kl = (0.1, "k3", False)
        ref = (logprobs - torch.randn(64)).float()
        problem = replace(problem, ref_logprobs=ref, rollout_weights=torch.ones(64))
        conditioning = coefficient_conditioning(problem, logprobs, theirs, kl)
    want, scale = oracle(problem, theirs, kl=kl)
    got = one_pass(problem, ours, kl=None if kl is None else KLPenalty(*kl))
    # e^-80 is below the absolute scale of the row check where nothing but the ratio carries the gradient
    check_result(problem, got, want, scale, conditioning)


def far_target(gap: float, dtype: torch.dtype) -> Problem:
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
    want, scale = oracle(problem, reference.reinforce)
    got = one_pass(problem, Reinforce())
    expected = 4 if old == "zero" or gap == 160 else 0  # clamp(-90, -60) leaves 30 nats: no overflow
    assert got.metrics["recomputed_tokens"] == expected
    check_result(problem, got, want, scale)


@ONE_PASS
@ALL_DTYPES
def test_a_certain_token_that_was_thought_impossible_is_recomputed(one_pass, dtype):
    """1 - p = 1e-12 with old = -80: S underflows the range, since the anchor is 60 nats too high."""
    problem = random_problem(65, 1000, dtype)  # row 64 has 1 - p = 1e-12
    logprobs = logprobs_of(problem)
    assert logprobs[64] > -1e-10
    old = torch.where(torch.arange(65) == 64, -80.0, logprobs)
    problem = replace(problem, old_logprobs=old.float())
    want, scale = oracle(problem, reference.cispo(5.0))
    got = one_pass(problem, CISPO())
    assert got.metrics["recomputed_tokens"] == 1
    check_result(problem, got, want, scale)


@ONE_PASS
@ALL_DTYPES
def test_unclipped_importance_weights_of_e_80_are_recomputed(one_pass, dtype):
    problem = random_problem(64, 1000, dtype)
    logprobs = logprobs_of(problem)
    far = torch.arange(64) < 5
    problem = replace(problem, old_logprobs=torch.where(far, logprobs - 80, logprobs).float())
    want, scale = oracle(problem, reference.importance_weighted)
    got = one_pass(problem, ImportanceWeighted())
    assert got.metrics["recomputed_tokens"] == 5
    # the old log-probabilities of this size are rounded to 4e-6, and the ratio is judged on what was given
    check_result(problem, got, want, scale)


@ONE_PASS
@ALL_DTYPES
@pytest.mark.parametrize("workspace", [None, 2**22])
def test_many_recomputed_rows_in_several_chunks(one_pass, dtype, workspace):
    problem = random_problem(1100, 300, dtype, bias=True)
    logprobs = logprobs_of(problem)
    problem = replace(problem, old_logprobs=torch.where(torch.arange(1100) % 2 == 0, logprobs - 80, logprobs).float())
    want, scale = oracle(problem, reference.cispo(5.0))
    got = one_pass(problem, CISPO(), workspace=workspace)
    assert got.metrics["recomputed_tokens"] > 300
    check_result(problem, got, want, scale)


@ONE_PASS
@ALL_DTYPES
def test_a_row_recomputed_only_for_its_factor_keeps_the_bits_of_its_logprob(one_pass, dtype):
    problem = random_problem(64, 300, dtype)
    problem = replace(problem, old_logprobs=logprobs_of(problem).float())
    ordinary = one_pass(problem, CISPO())
    huge = torch.where(torch.arange(64) % 8 == 0, 1e34, problem.advantages)
    got = one_pass(replace(problem, advantages=huge), CISPO())
    assert got.metrics["recomputed_tokens"] == 8
    assert torch.equal(got.logprobs, ordinary.logprobs)


@ONE_PASS
def test_dweight_of_many_chunks_is_rounded_once(one_pass):
    """6 chunks: summed in bf16 its error would be several times that of one chunk."""
    problem = random_problem(1536, 300, torch.bfloat16)
    want, _ = oracle(problem, reference.cispo(5.0))
    one, many = (relative_error(one_pass(problem, CISPO(), workspace=w).dweight, want.dweight) for w in (None, 2_100_000))
    assert many <= 1.1 * one


def test_dweight_of_two_passes_over_many_chunks_is_rounded_once():
    """The slice of dlogits is rounded, and then the sum of all chunks: its error is that of float64 sums with these two."""
    problem = random_problem(1536, 300, torch.bfloat16)
    want, _ = oracle(problem, reference.cispo(5.0))
    many = relative_error(two_pass(problem, CISPO(), workspace=2_100_000).dweight, want.dweight)
    hidden, logits = problem.hidden.double(), problem.hidden.double() @ problem.head.weight.double().T
    logits.requires_grad_()
    logprobs, _ = reference.token_distribution(logits, problem.tokens)
    mask = torch.ones_like(problem.tokens, dtype=torch.bool)
    of_logprobs = {"objective": reference.cispo(5.0), "mask": mask, "reduction": "sum"}
    reference.policy_loss(logprobs, problem.old_logprobs.double(), problem.advantages.double(), **of_logprobs).backward()
    rounded = (logits.grad.bfloat16().double().T @ hidden).bfloat16()
    assert many <= 1.1 * relative_error(rounded, want.dweight)


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


def test_a_gradient_changed_in_place_leaves_the_next_one_alone():
    inputs, loss = small()
    value = loss()
    first, want = (torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(2))
    want = [x.clone() for x in want]
    for x in first:
        x.zero_()
    for a, b in zip(torch.autograd.grad(value, inputs), want, strict=True):
        assert torch.equal(a, b)
        assert b.any()


@ONE_PASS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_users_function_with_an_infinite_slope_at_masked_zeros(one_pass, dtype):
    problem = random_problem(30, 50, dtype, masked=True)
    problem = replace(problem, mask=problem.mask & (logprobs_of(problem) < -0.1))
    got = one_pass(problem, lambda logp, old, a: a * (-torch.expm1(logp)).sqrt(), check=False)
    assert got.loss.isfinite()
    assert got.dweight.isfinite().all()


@ONE_PASS
def test_what_zero_advantage_may_not_skip(one_pass):
    class Bonus(Objective):
        def __call__(self, logprobs, old_logprobs, advantages):
            return advantages * logprobs + 0.1 * logprobs

    problem = random_problem(20, 30, torch.float32)
    zero = replace(problem, advantages=torch.zeros(20))
    assert one_pass(zero, Bonus()).loss > 0
    bad_old = replace(zero, old_logprobs=torch.where(torch.arange(20) == 3, torch.nan, zero.old_logprobs))
    assert one_pass(bad_old, CISPO()).loss.isnan()


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
    assert count(True, True, half, skip_zero_weight=False) == 3
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
    want, scale = oracle(problem, reference.cispo(5.0), "token-mean")
    got = one_pass(problem, CISPO(), "token-mean")
    assert torch.equal(got.logprobs.isnan(), zero)
    check_result(problem, replace(got, logprobs=want.logprobs), want, scale)
    assert not got.dhidden[zero].any()
    assert got.metrics["skipped_tokens"] == zero.sum()
    assert got.metrics["tokens"] == 64 - zero.sum()
    ratios = (want.logprobs - problem.old_logprobs).exp()[~zero]
    assert torch.allclose(got.metrics["ratio_mean"].double(), ratios.mean(), rtol=1e-4)

    everything = one_pass(problem, CISPO(), "token-mean", skip_zero_weight=False)
    assert everything.metrics["skipped_tokens"] == 0
    assert everything.metrics["tokens"] == 64
    check_result(problem, everything, want, scale)


@ONE_PASS
def test_zero_rollout_weights_are_skipped_too_and_what_may_not_be_skipped_is_not(one_pass):
    problem = replace(random_problem(30, 50, torch.float32), rollout_weights=(torch.arange(30) % 2).float())
    assert one_pass(problem, CISPO()).metrics["skipped_tokens"] == 15
    assert one_pass(problem, lambda logp, old, a: logp * a).metrics["skipped_tokens"] == 0  # a user's function
    with_ref = replace(problem, ref_logprobs=problem.old_logprobs)
    assert one_pass(with_ref, CISPO(), kl=KLPenalty(0.1)).metrics["skipped_tokens"] == 0
    assert one_pass(problem, CISPO(), check=False).metrics["skipped_tokens"] == 0


# ---- Bits, sums, masks ----------------------------------------------------------------------------------------------


@ALL_DTYPES
def test_on_policy_ratio_is_exactly_one(dtype):
    problem = random_problem(100, 300, dtype)
    out = linear_policy_loss(
        problem.hidden, problem.head, problem.tokens, None, problem.advantages, objective=ImportanceWeighted()
    )
    assert out.metrics["ratio_mean"] == out.metrics["ratio_max"] == out.metrics["ess"] == 1
    assert out.metrics["kl_k3"] == 0
    want, _ = oracle(problem, reference.reinforce)
    leaves = problem.leaves()
    loss = linear_policy_loss(
        leaves.hidden, leaves.head, leaves.tokens, None, leaves.advantages, objective=CISPO(), reduction="sum"
    ).loss
    loss.backward()
    assert (row_errors(leaves.hidden.grad, want.dhidden) < (8e-3 if dtype == torch.bfloat16 else 5e-5)).all()


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
    assert unchecked.dweight.isfinite().all()
    assert torch.equal(checked.logprobs, unchecked.logprobs)
    assert not unchecked.dhidden[~problem.mask].any()
    assert relative_error(unchecked.dweight, checked.dweight.double()) < (1e-6 if dtype == torch.float32 else 5e-3)


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


# ---- Autograd -------------------------------------------------------------------------------------------------------


def small(dtype=torch.float32):
    problem = random_problem(20, 40, dtype, bias=True).leaves()
    inputs = (problem.hidden, problem.head.weight, problem.head.bias)

    def loss(hidden=problem.hidden, **options):
        arguments = problem.tokens, problem.old_logprobs, problem.advantages
        return linear_policy_loss(hidden, problem.head, *arguments, objective=CISPO(), **options).loss

    return inputs, loss


def test_gradients_scale_with_the_incoming_gradient_and_survive_retain_graph():
    inputs, loss = small()
    value = loss()
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    again = torch.autograd.grad(value, inputs, retain_graph=True)
    scaled = torch.autograd.grad(-0.5 * value, inputs, retain_graph=True)
    expanded = torch.autograd.grad(value.expand(3).sum(), inputs)
    for a, b, c, d in zip(first, again, scaled, expanded, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(c, -0.5 * a)
        assert torch.allclose(d, 3 * a)
        assert a.data_ptr() != b.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_the_last_backward_scales_in_place_to_the_same_bits():
    problem = random_problem(64, 3000, torch.float32)
    found, used = [], []
    for keep in (True, False):
        hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden, problem.head.weight))
        arguments = problem.tokens, problem.old_logprobs, problem.advantages
        loss = -0.3 * linear_policy_loss(hidden, LMHead(weight), *arguments, objective=CISPO()).loss
        used.append(transient_bytes(lambda loss=loss, keep=keep: loss.backward(retain_graph=keep)))
        found.append((hidden.grad, weight.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert used[0] >= weight.nbytes > 20 * used[1], used


def test_double_backward_raises():
    inputs, loss = small()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(), inputs, create_graph=True)


def test_checkpointing_and_no_grad():
    inputs, loss = small()
    plain = torch.autograd.grad(loss(), inputs)
    through = torch.autograd.grad(checkpoint(loss, inputs[0], use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, through, strict=True))
    with torch.no_grad():
        assert not loss().requires_grad
    assert torch.equal(loss().detach(), loss(hidden=inputs[0].detach()).detach())


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    inputs, loss = small()
    want = torch.autograd.grad(loss(), inputs)
    for i in frozen:
        inputs[i].requires_grad_(False)
    loss().backward()
    for i, (x, g) in enumerate(zip(inputs, want, strict=True)):
        assert x.grad is None if i in frozen else torch.equal(x.grad, g)


def test_nothing_to_compute_is_a_differentiable_zero():
    inputs, loss = small()
    empty = linear_policy_loss(
        inputs[0][:0], LMHead(*inputs[1:]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0),
        objective=CISPO(), entropy=True,
    )  # fmt: skip
    for value in (loss(mask=torch.zeros(20, dtype=torch.bool)), empty.loss):
        assert value == 0
        for x, g in zip(inputs, torch.autograd.grad(value, inputs), strict=True):
            assert g.shape == x.shape
            assert not g.any()
    assert empty.metrics["ess"] == 1
    assert empty.metrics["ratio_max"] == empty.metrics["tokens"] == empty.metrics["entropy"] == 0


def test_float16_takes_two_passes():
    """Where dX is large enough for fp16: tokens with 1 - p > 1e-3."""
    problem = random_problem(100, 300, torch.float16)
    logprobs = logprobs_of(problem)
    problem = replace(problem, old_logprobs=logprobs.float(), mask=logprobs < -1e-3)
    want, scale = oracle(problem, reference.cispo(5.0))
    check_result(problem, one_pass(problem, CISPO()), want, scale)


def test_the_module_and_the_cispo_function_are_the_same_loss():
    problem = random_problem(20, 40, torch.float32)
    inputs = problem.hidden, problem.head, problem.tokens, problem.old_logprobs, problem.advantages
    ref = problem.old_logprobs - 0.1
    module = LinearPolicyLoss(objective=CISPO(2.0, 0.5), temperature=0.7, kl=KLPenalty(0.1), reduction="sum", entropy=True)
    a = module(*inputs, ref_logprobs=ref, denominator=3.0)
    b = linear_cispo_loss(
        *inputs, ratio_max=2.0, ratio_min=0.5, temperature=0.7, kl=KLPenalty(0.1), reduction="sum", entropy=True,
        ref_logprobs=ref, denominator=3.0,
    )  # fmt: skip
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.metrics["entropy"], b.metrics["entropy"])
    assert list(module.parameters()) == []
    assert "CISPO(ratio_max=2.0" in repr(module)


# ---- Operators and compilation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype, entropy):
    wide = torch.promote_types(dtype, torch.float32)
    lora_hidden, b = (torch.randn(256, 3).to(wide), torch.randn(33, 3).to(dtype)) if entropy else (None, None)
    temperature = torch.rand(256, 1).to(wide) + 0.5
    chunk = Chunk(torch.randn(256, 8).to(dtype).to(wide), lora_hidden, torch.randint(0, 33, (256,)), temperature)
    softcap = 5.0 if entropy else None
    head = Head(torch.randn(33, 8).to(dtype), b, torch.randn(33).to(dtype), softcap, 0.9)
    exps, anchor = torch.zeros(256, 33, dtype=dtype), -torch.rand(256).to(wide)
    target = opcheck(target_logits, chunk, head, "torch")
    assert (target.slope is None) == (softcap is None)
    opcheck(anchored_exp, chunk, head, anchor, target, None, entropy, "torch")
    sums = opcheck(anchored_exp, chunk, head, anchor, target, exps, entropy, "torch")
    assert (sums.weighted is not None, sums.residual is not None) == (entropy, dtype == torch.bfloat16)
    factor = torch.randn(256).to(wide)
    for of_weight in (dtype, wide):
        lora = (torch.zeros(256, 3, dtype=wide), torch.zeros(33, 3, dtype=wide)) if entropy else (None, None)
        into = Sums(
            torch.zeros(256, 8, dtype=dtype), lora[0], torch.zeros(33, 8, dtype=of_weight), lora[1], torch.zeros(33, dtype=wide)
        )
        opcheck(gradient_products, exps, factor, sums.residual, chunk, head, into, of_weight == wide)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
@pytest.mark.parametrize("name", ["cispo", "user", "kl"])
def test_compiles_without_graph_breaks_when_nothing_reads_the_host(name):
    objective = (lambda logp, old, a: (logp - old).exp() * a) if name == "user" else CISPO()
    kl = KLPenalty(0.1) if name == "kl" else None
    problem = random_problem(300, 64, torch.float32, bias=True, masked=True).leaves()
    problem = replace(problem, old_logprobs=logprobs_of(problem).float() - 0.1)
    inputs = problem.hidden, problem.head.weight, problem.head.bias
    ref = problem.old_logprobs if kl else None

    def step(hidden, weight, bias):
        out = linear_policy_loss(
            hidden, LMHead(weight, bias), problem.tokens, problem.old_logprobs, problem.advantages, objective=objective,
            kl=kl, ref_logprobs=ref, mask=problem.mask, check=False, workspace=2**21 + 2**20,
        )  # fmt: skip
        return out.loss, out.metrics["ratio_mean"]

    want = step(*inputs)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.allclose(got[0], want[0], rtol=1e-6)
    assert torch.allclose(got[1], want[1], rtol=1e-6)
    grads = (torch.autograd.grad(x[0], inputs) for x in (got, want))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_factor_that_underflows_is_no_zero(backend):
    """old far above logp: g = 2e-33 and D = e^54, so that u = -g / D is no number of fp32, while g w is."""
    hidden, weight = torch.tensor([[1.5]]), torch.tensor([[40.0], [4.0]])
    problem = Problem(hidden, LMHead(weight), torch.tensor([1]), torch.tensor([21.9]), torch.tensor([-1.3]))
    for objective in (CISPO(), ImportanceWeighted()):
        want, _ = oracle(problem, reference.cispo(5.0) if isinstance(objective, CISPO) else reference.importance_weighted)
        got = one_pass(problem, objective, backend=backend)
        assert want.dhidden.abs() > 1e-33
        assert row_errors(got.dhidden, want.dhidden) < 1e-4
        assert got.metrics["recomputed_tokens"] == 1
