"""`LMHead(weight_grad=buffer)`: the weight's gradient is added to the caller's fp32 buffer, `weight.grad` stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import logprobs_of, oracle, random_problem, relative_error

from fastpg import CISPO, LMHead, linear_cispo_loss, linear_logprobs, policy_loss, reference
from fastpg.crosscheck.accuracy import WEIGHT_TOLERANCE
from fastpg.crosscheck.cases import Inputs
from fastpg.tools.memory import transient_bytes

SCHEDULES = pytest.mark.parametrize("schedule", ["one-pass", "two-pass"])
NAMES = ["torch"] if torch.cuda.is_available() else ["torch", "triton"]
BACKENDS = pytest.mark.parametrize("backend", NAMES)
# the kernels have no float64
CALLS = [(b, d) for b in NAMES for d in (torch.bfloat16, torch.float16, torch.float32)] + [("torch", torch.float64)]


def buffer_for(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(weight.shape, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)


def with_buffer(problem: Inputs) -> tuple[Inputs, torch.Tensor]:
    leaves = problem.leaves()
    buffer = buffer_for(problem.head.weight)
    return replace(leaves, head=replace(leaves.head, weight_grad=buffer)), buffer


def loss_of(schedule: str, problem: Inputs, **options) -> torch.Tensor:
    inputs = problem.hidden, problem.head, problem.tokens
    options |= {"mask": problem.mask, "temperature": problem.temperature}
    if schedule == "one-pass":
        return linear_cispo_loss(*inputs, problem.old_logprobs, problem.advantages, reduction="sum", **options).loss
    logprobs = linear_logprobs(*inputs, **options).logprobs
    arguments = logprobs, problem.old_logprobs, problem.advantages
    return policy_loss(*arguments, objective=CISPO(), mask=problem.mask, reduction="sum").loss


def small(dtype: torch.dtype, rows: int = 50, vocab: int = 203, **options) -> Inputs:
    problem = random_problem(rows, vocab, dtype, hidden_size=32, **options)
    if dtype == torch.float16:  # whose range ends at 6e-8: ratios and 1 - p of order 1
        logprobs = logprobs_of(problem).float()
        problem = replace(problem, old_logprobs=logprobs - torch.randn(rows), mask=logprobs < -0.01)
    return problem


@pytest.mark.parametrize(("backend", "dtype"), CALLS, ids=str)
@SCHEDULES
def test_gradients_are_added(backend, schedule, dtype):
    """Twice the call: twice the oracle's gradient, unrounded; a loss times 3: three times; weight.grad stays None; the other
    gradients have the bits they have without a buffer."""
    problem = small(dtype, bias=True, lora=2, temperature="per-token")
    want = oracle(problem, CISPO())
    given, buffer = with_buffer(problem)
    for _ in range(2):
        loss_of(schedule, given, backend=backend).backward()
    assert relative_error(buffer, 2 * want["dW"]) <= WEIGHT_TOLERANCE[dtype]
    (3 * loss_of(schedule, given, backend=backend)).backward()
    assert relative_error(buffer, 5 * want["dW"]) <= WEIGHT_TOLERANCE[dtype]
    assert given.head.weight.grad is None

    once, _ = with_buffer(problem)
    plain = problem.leaves()
    loss_of(schedule, once, backend=backend).backward()
    loss_of(schedule, plain, backend=backend).backward()
    for mine, other in zip(inputs_of(once), inputs_of(plain), strict=True):
        assert torch.equal(mine.grad, other.grad)


def inputs_of(problem: Inputs) -> list[torch.Tensor]:
    return [problem.hidden, problem.head.bias, *problem.head.lora[:2]]


@SCHEDULES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_several_chunks(schedule, dtype):
    """Chunks of 256 rows, checked or not, on top of what the buffer had."""
    problem = random_problem(1100, 300, dtype, masked=True)
    want = oracle(problem, CISPO())
    for check in (True, False):
        given, buffer = with_buffer(problem)
        start = torch.randn(buffer.shape)
        buffer.copy_(start)
        loss_of(schedule, given, workspace=2_100_000, check=check).backward()
        assert relative_error(buffer - start, want["dW"]) <= WEIGHT_TOLERANCE[dtype]


@SCHEDULES
def test_no_rows(schedule):
    given, buffer = with_buffer(random_problem(0, 30, torch.bfloat16))
    buffer.fill_(1)
    loss_of(schedule, given).backward()
    assert (buffer == 1).all()
    assert given.head.weight.grad is None


@SCHEDULES
def test_many_micro_batches(schedule):
    """64 micro-batches whose gradients share a direction: the buffer's error is that of one, `.grad +=` in bf16 far larger."""
    weight = (0.1 * torch.randn(200, 32)).bfloat16().requires_grad_()
    plain = weight.detach().clone().requires_grad_()
    wide = weight.detach().double().requires_grad_()
    buffer = torch.zeros(200, 32)
    for _ in range(64):
        tokens = torch.randint(0, 20, (16,))
        problem = Inputs(torch.randn(16, 32).add(1).bfloat16(), LMHead(weight), tokens, torch.zeros(16), torch.ones(16))
        logprobs = reference.linear_logprobs(problem.hidden.double(), wide, tokens)[0]
        problem = replace(problem, old_logprobs=logprobs.detach().float())
        logprobs.sum().neg().backward()
        loss_of(schedule, replace(problem, head=LMHead(weight, weight_grad=buffer))).backward()
        loss_of(schedule, replace(problem, head=LMHead(plain))).backward()
    with_bf16, with_fp32 = relative_error(plain.grad, wide.grad), relative_error(buffer, wide.grad)
    assert with_fp32 < 2e-3
    assert with_fp32 < with_bf16 / 4


@SCHEDULES
def test_tied_embeddings(schedule):
    """weight.grad has the embedding's share alone, the buffer the head's."""
    weight = torch.randn(40, 16).requires_grad_()
    tokens, old, advantages = torch.randint(0, 40, (10,)), torch.full((10,), -4.0), torch.randn(10)
    buffer = torch.zeros(40, 16)

    def loss(weight_of_embedding: torch.Tensor, head: LMHead) -> torch.Tensor:
        hidden = weight_of_embedding[tokens].tanh()
        return loss_of(schedule, Inputs(hidden, head, tokens, old, advantages))

    loss(weight, LMHead(weight, weight_grad=buffer)).backward()
    of_embedding, of_head = (weight.detach().clone().requires_grad_() for _ in range(2))
    loss(of_embedding, LMHead(of_head)).backward()
    assert torch.allclose(weight.grad, of_embedding.grad, rtol=1e-5, atol=1e-7)
    assert torch.allclose(buffer, of_head.grad, rtol=1e-5, atol=1e-7)


@SCHEDULES
@pytest.mark.parametrize("autocast", [False, True])
def test_no_gradient_leaves_it_untouched(schedule, autocast):
    given, buffer = with_buffer(small(torch.float32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_of(schedule, given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_of(schedule, given)  # and no backward
    assert (buffer == 0).all()


@SCHEDULES
def test_autocast(schedule):
    """The buffer gets the gradient of the bf16 products, in fp32."""
    problem = small(torch.float32)
    rounded = replace(problem, hidden=problem.hidden.bfloat16(), head=LMHead(problem.head.weight.bfloat16()))
    given, buffer = with_buffer(problem)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(schedule, given)
    loss.backward()
    assert given.head.weight.grad is None
    assert relative_error(buffer, oracle(rounded, CISPO())["dW"]) < WEIGHT_TOLERANCE[torch.bfloat16]


@SCHEDULES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory(schedule, dtype):
    """Beyond the workspace and dX: one fp32 (V, H) in one pass, which has its dW before backward, and none in two."""
    vocab, size, rows, workspace = 20_000, 512, 256, 2**26
    weight = (torch.randn(vocab, size) * 0.1).to(dtype).requires_grad_()
    hidden = torch.randn(rows, size).to(dtype).requires_grad_()
    tokens, buffer = torch.randint(0, vocab, (rows,)), torch.zeros(vocab, size)
    problem = Inputs(hidden, LMHead(weight, weight_grad=buffer), tokens, torch.full((rows,), -10.0), torch.randn(rows))
    of_weight = buffer.nbytes if schedule == "one-pass" else 0

    def step() -> None:
        loss_of(schedule, problem, workspace=workspace).backward()

    step()
    assert transient_bytes(step) < workspace + of_weight + 3 * rows * size * 4 + buffer.nbytes // 8


@pytest.mark.parametrize(
    ("dtype", "buffer", "error", "said"),
    [
        (torch.bfloat16, torch.zeros(20, 8).bfloat16(), TypeError, "must be a torch.float32 tensor"),
        (torch.float32, torch.zeros(20, 8).double(), TypeError, "must be a torch.float32 tensor"),
        (torch.float64, torch.zeros(20, 8), TypeError, "must be a torch.float64 tensor"),
        (torch.float32, torch.zeros(20, 8, device="meta"), TypeError, "on meta"),
        (torch.float32, "buffer", TypeError, "got str"),
        (torch.float32, torch.zeros(20, 7), ValueError, "the weight's shape (20, 8)"),
        (torch.float32, torch.zeros(8, 20), ValueError, "the weight's shape (20, 8)"),
        (torch.float32, torch.zeros(20, 8, requires_grad=True), ValueError, "require no gradient"),
    ],
)
def test_what_does_not_fit_is_named(dtype, buffer, error, said):
    with pytest.raises(error) as raised:
        LMHead(torch.randn(20, 8, dtype=dtype, requires_grad=True), weight_grad=buffer)
    assert "head.weight_grad" in str(raised.value)
    assert said in str(raised.value)


def test_a_frozen_weight_has_nothing_to_add():
    with pytest.raises(ValueError, match="requires no gradient: nothing would be added"):
        LMHead(torch.randn(20, 8), weight_grad=torch.zeros(20, 8))
