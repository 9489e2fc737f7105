"""Every schedule on every backend against the float64 oracle: log-probabilities, loss, dX row by row, dW, db.

The kernels run on a GPU where there is one, and in Triton's interpreter elsewhere.
"""

from dataclasses import replace

import pytest
import torch
from objectives import ANY_RATIO, OBJECTIVES
from problems import Result, check_result, logprobs_of, moderate_problem, oracle, random_problem
from schedules import ALL_DTYPES, BACKENDS, DTYPES, KERNEL_DEVICE, SCHEDULES, TORCH, TRITON

from fastpg import CISPO, KLPenalty, LMHead, Reinforce
from fastpg.crosscheck import cases, judge
from fastpg.crosscheck.cases import Inputs, Settings

# no others, one other, ragged, several ragged tiles, many tiles; the interpreter is too slow for the largest
VOCABS = [(s, v) for s in TORCH for v in (1, 2, 17, 1000, 16384)] + [(s, v) for s in TRITON for v in (1, 2, 17, 1100, 4096)]


@ALL_DTYPES
@pytest.mark.parametrize("rows", [0, 1, 3, 257])  # none, one, fewer than a tile, one more than a tile of 256
@pytest.mark.parametrize(("schedule", "vocab"), VOCABS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_ragged_shapes(schedule, vocab, dtype, rows):
    problem = random_problem(rows, vocab, dtype)
    check_result(problem, schedule(problem, CISPO()))


@SCHEDULES
@ALL_DTYPES
@pytest.mark.parametrize("name", ANY_RATIO)
def test_objectives(schedule, dtype, name):
    problem = random_problem(100, 1000, dtype)
    check_result(problem, schedule(problem, OBJECTIVES[name].objective))


@SCHEDULES
@ALL_DTYPES
@pytest.mark.parametrize("max_log_ratio", [None, 0.5], ids=["", "within 0.5"])
@pytest.mark.parametrize("importance_weighted", [False, True], ids=["k", "r k"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", ANY_RATIO)
def test_kl_penalty_and_rollout_weights(schedule, dtype, name, estimator, importance_weighted, max_log_ratio):
    kl = KLPenalty(0.1, estimator, importance_weighted, max_log_ratio)
    problem = moderate_problem(64, dtype)
    log_ratio = problem.ref_logprobs - logprobs_of(problem)
    assert (log_ratio.abs() > 0.5).float().mean() > 0.4
    check_result(problem, schedule(problem, OBJECTIVES[name].objective, kl=kl))


@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [(s, d) for s in TORCH + TRITON for d in (torch.float64, *DTYPES, torch.float16) if s in TORCH or d != torch.float64],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_every_head_option_at_once(schedule, dtype):
    problem = random_problem(100, 1000, dtype, bias=True, softcap=9.0, logit_scale=0.7, temperature="per-token", masked=True)
    want = oracle(problem, CISPO(), "token-mean")
    if dtype == torch.float16:  # its dX is meant for gradients that fp16 can hold: no ratio of e^-40, no mean over tokens
        problem = replace(problem, old_logprobs=want["logp"].float())
    got = schedule(problem, CISPO(), "sum" if dtype == torch.float16 else "token-mean")
    check_result(problem, got)


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
    check_result(problem, schedule(problem, CISPO()))


@SCHEDULES
@ALL_DTYPES
def test_several_chunks_and_a_small_workspace_give_the_same(schedule, dtype):
    """With the smallest workspace: many chunks, dX and dW summed over them, still rounded once."""
    problem = random_problem(2049 if schedule in TORCH else 600, 300, dtype)
    got = schedule(problem, CISPO(), workspace=3 * 2**20)
    check_result(problem, got)
    assert torch.equal(got["logp"], schedule(problem, CISPO())["logp"])


@SCHEDULES
def test_weights_with_a_common_component(schedule):
    """Real embeddings have one. It cancels in dX, unless a row of bf16 dlogits does not sum to 0."""
    for common in (3, 10, 30):
        tokens = torch.randint(0, 500, (64,))
        weight = (0.2 * torch.randn(500, 64) + 0.2 * common * torch.randn(64)).bfloat16()
        hidden = torch.randn(64, 64).bfloat16()
        problem = Inputs(hidden, LMHead(weight), tokens, torch.zeros(64), torch.ones(64))
        want = oracle(problem, Reinforce())
        problem = replace(problem, old_logprobs=want["logp"].float())
        check_result(problem, schedule(problem, Reinforce()))


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
    got = schedule(strided, CISPO())  # whose leaves stay in the memory that they are in
    check_result(problem, got)
    assert torch.equal(got["logp"], schedule(problem, CISPO())["logp"])


@SCHEDULES
def test_tokens_banned_by_a_bias_of_minus_infinity(schedule):
    problem = random_problem(40, 17, torch.float32, bias=True)
    bias = problem.head.bias
    bias[torch.arange(17) % 3 == 0] = -torch.inf
    kept = ~torch.isin(problem.tokens, torch.arange(17)[torch.arange(17) % 3 == 0])
    problem = replace(problem, mask=kept)
    check_result(problem, schedule(problem, CISPO()))


@ALL_DTYPES
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_entropy_and_its_gradient(dtype, backend, vocab, softcap):
    problem = random_problem(100, vocab, dtype, bias=True, softcap=softcap, temperature="per-token", masked=True)
    check_entropy(replace(problem, advantages=torch.randn(100)), backend)


@BACKENDS
def test_entropies_over_several_tiles(backend):
    """The maximum rises from tile to tile: what was summed so far is moved to a new pivot, by several nats each time."""
    vocab = 3 * 4096 + 5
    problem = random_problem(4, vocab, torch.float32, bias=True)
    problem.head.bias.copy_(torch.linspace(-15, 15, vocab))
    check_entropy(replace(problem, advantages=torch.randn(4)), backend)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_fp16_slices_of_log_probabilities_and_entropies(size):
    """Rows of very different sizes in one slice; what comes out has to be within fp16's range all the same."""
    problem = random_problem(100, 300, torch.float16, bias=True, temperature="per-token")
    g = size * torch.randn(100)
    g[::7] *= 1e-2
    check_entropy(replace(problem, advantages=g, mask=logprobs_of(problem) < -0.1), "triton")


def check_entropy(problem: Inputs, backend: str) -> None:
    """Errors of two terms that may cancel are judged on the scale of the row's gradient without cancellation."""
    x = problem.to(KERNEL_DEVICE if backend == "triton" else "cpu")
    with_entropy = cases.two_pass(x, Settings(), backend, entropy=True)
    assert torch.equal(with_entropy["logp"], cases.two_pass(x, Settings(), backend)["logp"])  # asking for it changes no bit
    check_result(problem, Result(with_entropy, Settings()), cases.oracle(problem, Settings(), entropy=True))


def test_full_logits_code_fails_the_row_check():
    """The check bites: full-logits fp32 code loses the gradient of confident tokens, and bf16 code the log-probabilities."""
    problem = random_problem(257, 1000, torch.float32)
    want = oracle(problem, CISPO())
    certain, rest = (replace(problem, mask=mask) for mask in (want["logp"].exp() > 0.9999, want["logp"].exp() < 0.9))
    assert multiples(certain, CISPO())["dX, a row"] > 1e3  # not a near miss
    assert multiples(rest, CISPO())["dX, a row"] <= 1  # and only there: elsewhere plain fp32 code is accurate enough
    assert multiples(random_problem(257, 1000, torch.bfloat16), CISPO())["logp"] > 100


def multiples(x: Inputs, objective) -> dict[str, float]:
    """Errors of full-logits code, in tolerances."""
    settings = Settings(objective, "sum")
    found = judge.deviations(x, settings, cases.full_logits(x, settings), cases.oracle(x, settings))
    return {d.quantity: d.multiple for d in found}
