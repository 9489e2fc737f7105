"""Every schedule on every backend against the float64 oracle: log-probabilities, loss, dX row by row, dW, db.

The kernels run on a GPU where there is one, and in Triton's interpreter elsewhere.
"""

from dataclasses import replace

import pytest
import torch
from problems import (
    Problem,
    Result,
    check_result,
    logprob_tolerance,
    oracle,
    random_problem,
    relative_error,
    row_errors,
)
from schedules import (
    ALL_DTYPES,
    BACKENDS,
    DTYPES,
    KERNEL_DEVICE,
    SCHEDULES,
    TORCH,
    TRITON,
    coefficient_conditioning,
    moderate_problem,
)

from fastpg import (
    CISPO,
    ImportanceWeighted,
    KLPenalty,
    LMHead,
    Reinforce,
    linear_logprobs,
    policy_loss,
    reference,
)

OBJECTIVES = {
    "reinforce": (Reinforce(), reference.reinforce),
    "importance-weighted": (ImportanceWeighted(), reference.importance_weighted),
    "cispo": (CISPO(), reference.cispo(5.0)),
    "cispo-both-bounds": (CISPO(2.0, 0.5), reference.cispo(2.0, 0.5)),
    "cispo-unclipped": (CISPO(None), reference.cispo(None)),
}


# no others, one other, ragged, several ragged tiles, many tiles; the interpreter is too slow for the largest
VOCABS = [(s, v) for s in TORCH for v in (1, 2, 17, 1000, 49152)] + [(s, v) for s in TRITON for v in (1, 2, 17, 1100, 4096)]


@ALL_DTYPES
@pytest.mark.parametrize("rows", [0, 1, 3, 257])  # none, one, fewer than a tile, one more than a tile of 256
@pytest.mark.parametrize(("schedule", "vocab"), VOCABS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_ragged_shapes(schedule, vocab, dtype, rows):
    problem = random_problem(rows, vocab, dtype)
    want, scale = oracle(problem, reference.cispo(5.0))
    check_result(problem, schedule(problem, CISPO()), want, scale)


@SCHEDULES
@ALL_DTYPES
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(schedule, dtype, name):
    ours, theirs = OBJECTIVES[name]
    problem = random_problem(100, 1000, dtype)
    want, scale = oracle(problem, theirs)
    check_result(problem, schedule(problem, ours), want, scale)


@SCHEDULES
@ALL_DTYPES
@pytest.mark.parametrize("importance_weighted", [False, True], ids=["k", "r k"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_kl_penalty_and_rollout_weights(schedule, dtype, name, estimator, importance_weighted):
    ours, theirs = OBJECTIVES[name]
    kl = (0.1, estimator, importance_weighted)
    problem = moderate_problem(64, dtype)
    want, scale = oracle(problem, theirs, kl=kl)
    conditioning = coefficient_conditioning(problem, want.logprobs, theirs, kl)
    check_result(problem, schedule(problem, ours, kl=KLPenalty(*kl)), want, scale, conditioning)


@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [(s, d) for s in TORCH + TRITON for d in (torch.float64, *DTYPES, torch.float16) if s in TORCH or d != torch.float64],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_every_head_option_at_once(schedule, dtype):
    problem = random_problem(100, 1000, dtype, bias=True, softcap=9.0, logit_scale=0.7, temperature="per-token", masked=True)
    want, scale = oracle(problem, reference.cispo(5.0), "token-mean")
    if dtype == torch.float16:  # its dX is meant for gradients that fp16 can hold: no ratio of e^-40, no mean over tokens
        problem = replace(problem, old_logprobs=want.logprobs.float())
        want, scale = oracle(problem, reference.cispo(5.0), "sum")
    got = schedule(problem, CISPO(), "sum" if dtype == torch.float16 else "token-mean")
    check_result(problem, got, want, scale)


@SCHEDULES
@ALL_DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"softcap": 30.0},
        {"softcap": 1.0},  # u / c up to 30: 1 - tanh^2 would be 0 or noise
        {"logit_scale": 0.0625},
        {"temperature": 0.6},
        {"temperature": "per-token"},
        {"masked": True},
    ],
    ids=str,
)
def test_each_head_option(schedule, dtype, options):
    problem = random_problem(64, 1000, dtype, **options)
    want, scale = oracle(problem, reference.cispo(5.0))
    check_result(problem, schedule(problem, CISPO()), want, scale)


@SCHEDULES
@ALL_DTYPES
def test_several_chunks_and_a_small_workspace_give_the_same(schedule, dtype):
    """With the smallest workspace: many chunks, dX and dW summed over them, still rounded once."""
    problem = random_problem(2049 if schedule in TORCH else 600, 300, dtype)
    want, scale = oracle(problem, reference.cispo(5.0))
    got = schedule(problem, CISPO(), workspace=3 * 2**20)
    check_result(problem, got, want, scale)
    assert torch.equal(got.logprobs, schedule(problem, CISPO()).logprobs)


@SCHEDULES
def test_weights_with_a_common_component(schedule):
    """Real embeddings have one. It cancels in dX, unless a row of bf16 dlogits does not sum to 0."""
    for common in (3, 10, 30):
        tokens = torch.randint(0, 500, (64,))
        weight = (0.2 * torch.randn(500, 64) + 0.2 * common * torch.randn(64)).bfloat16()
        hidden = torch.randn(64, 64).bfloat16()
        problem = Problem(hidden, LMHead(weight), tokens, torch.zeros(64), torch.ones(64))
        want, scale = oracle(problem, reference.reinforce)
        problem = replace(problem, old_logprobs=want.logprobs.float())
        check_result(problem, schedule(problem, Reinforce()), want, scale)


@SCHEDULES
@ALL_DTYPES
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("vocab", [1, 17])
def test_operands_in_memory_with_nan(schedule, dtype, rows, vocab):
    """hidden, weight and LoRA's factors are parts of larger matrices that hold NaN everywhere else."""
    problem = random_problem(rows, vocab, dtype, bias=True, lora=3, lora_dtype=torch.float32)

    def within(x):
        larger = torch.full((x.shape[0] + 2, x.shape[1] + 3), torch.nan, dtype=x.dtype, device=x.device)
        return larger[1:-1, 1:-2].copy_(x)

    a, b, scale = problem.head.lora
    head = replace(problem.head, weight=within(problem.head.weight), lora=(within(a), within(b), scale))
    strided = replace(problem, hidden=within(problem.hidden), head=head)
    want, scale = oracle(problem, reference.cispo(5.0))
    got = schedule(InPlace(strided), CISPO())
    check_result(problem, got, want, scale)
    assert torch.equal(got.logprobs, schedule(problem, CISPO()).logprobs)


class InPlace:
    """A problem whose leaves stay in the memory that they are in."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def to(self, device: str) -> "InPlace":
        assert device == "cpu", "a copy would be dense"
        return self

    def leaves(self) -> Problem:
        def leaf(x):
            return x.detach().requires_grad_()

        head = self.problem.head
        lora = leaf(head.lora.a), leaf(head.lora.b), head.lora.scale
        head = replace(head, weight=leaf(head.weight), bias=leaf(head.bias), lora=lora)
        return replace(self.problem, hidden=leaf(self.problem.hidden), head=head)


@SCHEDULES
def test_tokens_banned_by_a_bias_of_minus_infinity(schedule):
    problem = random_problem(40, 17, torch.float32, bias=True)
    bias = problem.head.bias
    bias[torch.arange(17) % 3 == 0] = -torch.inf
    kept = ~torch.isin(problem.tokens, torch.arange(17)[torch.arange(17) % 3 == 0])
    problem = replace(problem, mask=kept)
    want, scale = oracle(problem, reference.cispo(5.0))
    got = schedule(problem, CISPO())
    finite = replace(problem, head=replace(problem.head, bias=torch.where(bias.isinf(), 0, bias)))
    tolerance = logprob_tolerance(finite)  # of the logits that count
    assert (row_errors(got.dhidden, want.dhidden) <= tolerance).all()
    assert ((got.logprobs.double() - want.logprobs).abs() <= tolerance).all()
    assert relative_error(got.dbias, want.dbias) < 1e-5
    assert abs(got.loss - want.loss) <= 1e-5 * scale


@ALL_DTYPES
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_entropy_and_its_gradient(dtype, backend, vocab, softcap):
    problem = random_problem(100, vocab, dtype, bias=True, softcap=softcap, temperature="per-token", masked=True)
    g, h = torch.randn(100), torch.randn(100)
    check_entropy(problem, g, h, backend, {torch.bfloat16: 8e-3}.get(dtype), {torch.bfloat16: 5e-3}.get(dtype, 1e-5))


@BACKENDS
def test_entropies_over_several_tiles(backend):
    """The maximum rises from tile to tile: what was summed so far is moved to a new pivot, by several nats each time."""
    vocab = 3 * 4096 + 5
    problem = random_problem(4, vocab, torch.float32, bias=True)
    problem.head.bias.copy_(torch.linspace(-15, 15, vocab))
    check_entropy(problem, torch.randn(4), torch.randn(4), backend, None, 1e-5)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_fp16_slices_of_log_probabilities_and_entropies(size):
    """Rows of very different sizes in one slice; what comes out has to be within fp16's range all the same."""
    problem = random_problem(100, 300, torch.float16, bias=True, temperature="per-token")
    logprobs = oracle(problem, reference.reinforce)[0].logprobs
    g, h = (torch.where(logprobs > -0.1, 0, size * torch.randn(100)) for _ in range(2))
    g[::7] *= 1e-2
    check_entropy(problem, g, h, "triton", 2e-3, 2e-3)


def check_entropy(problem, g, h, backend, row_limit, limit):
    want, got = problem.leaves(torch.float64), problem.to(KERNEL_DEVICE if backend == "triton" else "cpu").leaves()
    logprobs, entropy = reference.linear_logprobs(
        want.hidden, want.head, want.tokens, mask=want.mask, temperature=want.temperature
    )
    (logprobs * g + entropy * h).sum().backward()
    options = {"mask": got.mask, "temperature": got.temperature, "backend": backend}
    out = linear_logprobs(got.hidden, got.head, got.tokens, entropy=True, **options)
    (out.logprobs.cpu() * g + out.entropy.cpu() * h).sum().backward()

    tolerance = logprob_tolerance(problem)
    assert ((out.entropy.cpu().double() - entropy).abs() <= tolerance).all()
    without = linear_logprobs(got.hidden, got.head, got.tokens, **options)
    assert torch.equal(out.logprobs, without.logprobs)  # asking for the entropy changes no bit
    # two terms that may cancel: errors are judged on the scale of the row's gradient without cancellation
    coefficient = problem.leaves(torch.float64)
    logprobs, _ = reference.linear_logprobs(
        coefficient.hidden, coefficient.head, coefficient.tokens, mask=problem.mask, temperature=coefficient.temperature
    )
    (logprobs * g).sum().backward()
    size = coefficient.hidden.grad.norm(dim=1).maximum(want.hidden.grad.norm(dim=1)).clamp(min=2.0**-100)
    error = (got.hidden.grad.cpu().double() - want.hidden.grad).norm(dim=1) / size
    assert (error <= (2 * tolerance if row_limit is None else row_limit)).all()
    assert relative_error(got.head.weight.grad.cpu(), want.head.weight.grad) <= limit
    assert relative_error(got.head.bias.grad.cpu(), want.head.bias.grad) <= limit


def test_full_logits_code_fails_the_row_check():
    """The check bites: full-logits fp32 code loses the gradient of confident tokens, and bf16 code the log-probabilities."""
    problem = random_problem(257, 1000, torch.float32)
    want, _ = oracle(problem, reference.cispo(5.0))
    leaves = problem.leaves()
    logits = leaves.hidden @ leaves.head.weight.T
    logprobs = torch.log_softmax(logits, -1).gather(1, leaves.tokens[:, None])[:, 0]
    out = policy_loss(logprobs, leaves.old_logprobs, leaves.advantages, objective=CISPO(), reduction="sum")
    full = Result.of(leaves, out.logprobs, out.loss)
    errors = row_errors(full.dhidden, want.dhidden) / logprob_tolerance(problem)
    probability = want.logprobs.exp()
    assert errors[probability > 0.9999].max() > 1e3  # not a near miss
    assert (errors[probability < 0.9] <= 1).all()  # and only there: elsewhere plain fp32 code is accurate enough

    bf16 = random_problem(257, 1000, torch.bfloat16)
    logits = (bf16.hidden @ bf16.head.weight.T).float()
    logprobs = torch.log_softmax(logits, -1).gather(1, bf16.tokens[:, None])[:, 0]
    want, _ = oracle(bf16, reference.cispo(5.0))
    assert (logprobs - want.logprobs).abs().max() > 100 * logprob_tolerance(bf16).max()
