"""LoRA on the lm_head: both schedules and backends against the float64 oracle, the memory, and what does not fit."""

import re
from dataclasses import replace

import pytest
import torch
from problems import check_result, logprobs_of, oracle, random_problem
from schedules import ALL_DTYPES, SCHEDULES

from fastpg import CISPO, LMHead, Reinforce, linear_cispo_loss, linear_logprobs
from fastpg.tools.memory import transient_bytes


@SCHEDULES
@ALL_DTYPES
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("rows", [0, 1, 100])
def test_parity(schedule, dtype, rank, rows):
    problem = random_problem(rows, 1100, dtype, lora=rank)
    check_result(problem, schedule(problem, CISPO()))


@SCHEDULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_feature_at_once(schedule, dtype):
    """Factors in fp32 beside a 16-bit weight, as PEFT makes them; masked rows hold NaN."""
    problem = random_problem(
        90, 700, dtype, bias=True, softcap=20.0, logit_scale=0.7, temperature="per-token", masked=True, lora=5,
        lora_dtype=torch.float32,
    )  # fmt: skip
    if dtype == torch.float16:  # whose range ends at 6e-8: ratios and 1 - p of order 1
        logprobs = logprobs_of(problem).float()
        problem = replace(problem, old_logprobs=logprobs - torch.randn(90), mask=problem.mask & (logprobs < -0.01))
    reduction = "sum" if dtype == torch.float16 else "token-mean"
    garbage = torch.where(problem.mask[:, None], problem.hidden, torch.nan)
    got = schedule(replace(problem, hidden=garbage), CISPO(), reduction)
    assert (got["dX"][~problem.mask] == 0).all()
    assert got["dA"].dtype == got["dB"].dtype == torch.float32
    check_result(problem, got)


@SCHEDULES
def test_without_host_reads(schedule):
    problem = random_problem(100, 300, torch.float32, masked=True, lora=4)
    garbage = torch.where(problem.mask[:, None], problem.hidden, torch.nan)
    check_result(problem, schedule(replace(problem, hidden=garbage), CISPO(), check=False))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_several_chunks_and_recomputed_rows(backend):
    problem = random_problem(600, 1100, torch.bfloat16, lora=8)
    # anchors that are far too high and far too low: their sums leave the range
    wild = torch.where(torch.arange(600) % 5 == 0, -55.0 + problem.old_logprobs, problem.old_logprobs)
    problem = replace(problem, old_logprobs=wild)
    leaves = problem.leaves()

    def loss(workspace):
        return linear_cispo_loss(
            leaves.hidden, leaves.head, leaves.tokens, leaves.old_logprobs, leaves.advantages, reduction="sum", backend=backend,
            workspace=workspace,
        )  # fmt: skip

    workspace, out = 1, None
    while out is None:  # the smallest: chunks of 256 rows
        try:
            out = loss(workspace)
        except ValueError as error:
            workspace = int(re.search(r"needs? (\d+)", str(error))[1])
    assert out.metrics["recomputed_tokens"] > 10
    out.loss.backward()
    want = oracle(problem, CISPO())
    for got, wide in ((leaves.head.lora.a, want["dA"]), (leaves.head.lora.b, want["dB"]), (leaves.hidden, want["dX"])):
        assert (got.grad.double() - wide).norm() / wide.norm() < 8e-3


@pytest.mark.parametrize("schedule", ["one-pass", "two-pass"])
def test_gradients_are_those_of_the_merged_weight(schedule):
    """d/dA and d/dB from d/d(W + s B A), by the chain rule and not by the oracle's LoRA; entropy included in two passes."""
    problem = random_problem(60, 50, torch.float64, hidden_size=12, lora=3)
    leaves = problem.leaves()
    a, b, scale = leaves.head.lora

    def loss(hidden, head):
        if schedule == "one-pass":
            return linear_cispo_loss(hidden, head, leaves.tokens, leaves.old_logprobs, leaves.advantages).loss
        logprobs, entropy = linear_logprobs(hidden, head, leaves.tokens, entropy=True)
        return (logprobs * leaves.advantages + 0.1 * entropy).sum()

    loss(leaves.hidden, leaves.head).backward()
    merged = (leaves.head.weight + scale * b @ a).detach().requires_grad_()
    hidden = leaves.hidden.detach().clone().requires_grad_()
    loss(hidden, LMHead(merged)).backward()
    for got, want in (
        (a.grad, scale * b.detach().T @ merged.grad),
        (b.grad, scale * merged.grad @ a.detach().T),
        (leaves.hidden.grad, hidden.grad),
        (leaves.head.weight.grad, merged.grad),
    ):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    problem = random_problem(5, 9, torch.float64, hidden_size=4, lora=2).leaves()
    a, b, scale = problem.head.lora

    def values(hidden, weight, a, b):
        return tuple(linear_logprobs(hidden, LMHead(weight, softcap=3.0, lora=(a, b, scale)), problem.tokens, entropy=True))

    assert torch.autograd.gradcheck(values, (problem.hidden, problem.head.weight, a, b))


@pytest.mark.this_cpu
@pytest.mark.parametrize("trained", ["a", "b", "both", "hidden"])
@pytest.mark.parametrize("schedule", ["one-pass", "two-pass"])
def test_a_frozen_weight_costs_no_gradient_of_its_size(trained, schedule):
    """What a call takes beyond its workspace stays below one (V, H) tensor; the gradients are the oracle's."""
    vocab, size, rows = 12_000, 256, 512
    hidden, weight = torch.randn(rows, size), torch.randn(vocab, size) * 0.1
    a, b = torch.randn(8, size) * 0.1, torch.randn(vocab, 8) * 0.1
    hidden.requires_grad_(trained == "hidden")
    a.requires_grad_(trained in ("a", "both"))
    b.requires_grad_(trained in ("b", "both"))
    tokens, advantages = torch.randint(0, vocab, (rows,)), torch.randn(rows)
    head = LMHead(weight, lora=(a, b, 2.0))
    old = linear_logprobs(hidden, head, tokens).logprobs.detach()
    workspace = 2**26

    def step():
        if schedule == "one-pass":
            linear_cispo_loss(hidden, head, tokens, old, advantages, workspace=workspace).loss.backward()
        else:
            linear_logprobs(hidden, head, tokens, workspace=workspace).logprobs.sum().backward()

    step()  # gradients exist
    assert transient_bytes(step) < workspace + 4 * (rows * size * 2 + 3 * vocab * 8) < workspace + weight.nbytes
    assert weight.grad is None
    assert [x.grad is not None for x in (a, b, hidden)] == [x.requires_grad for x in (a, b, hidden)]


@pytest.mark.this_cpu
def test_memory_at_the_size_of_a_real_head():
    """V = 152k, H = 1024 in bf16, N = 128: beyond the workspace come gradients of hidden, A and B and nothing with V H entries
    (297 MiB, or 594 in fp32)."""
    vocab, size, rows, rank = 151_936, 1024, 128, 16
    weight = torch.empty(vocab, size, dtype=torch.bfloat16).uniform_(-0.05, 0.05)
    hidden = torch.randn(rows, size).bfloat16().requires_grad_()
    a, b = (torch.randn(*shape, requires_grad=True) for shape in ((rank, size), (vocab, rank)))
    head, tokens = LMHead(weight, lora=(a, b, 0.01)), torch.randint(0, vocab, (rows,))
    old, workspace = torch.full((rows,), -12.0), 2**28

    def step():
        return linear_cispo_loss(hidden, head, tokens, old, torch.ones(rows), workspace=workspace).loss.backward()

    of_gradients = 3 * (b.nbytes + a.nbytes) + 6 * hidden.nbytes  # dB twice as it is scaled by the incoming gradient
    assert transient_bytes(step) < workspace + of_gradients < 2 * weight.nbytes
    assert b.grad.isfinite().all()


def test_a_user_of_autocast_keeps_fp32_factors():
    problem = random_problem(40, 60, torch.float32, lora=3)
    leaves = problem.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprobs(leaves.hidden, leaves.head, leaves.tokens).logprobs
    out.sum().backward()
    rounded = replace(
        problem, hidden=problem.hidden.bfloat16(), head=replace(problem.head, weight=problem.head.weight.bfloat16())
    )
    want = oracle(rounded, Reinforce())
    assert torch.allclose(out.detach().double(), want["logp"], atol=2e-5)
    assert leaves.head.lora.a.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (lambda a, b: (a, b), "(A, B, scale)"),
        (lambda a, b: (a[:, :5], b, 1.0), "A (r, H) = (r, 8)"),
        (lambda a, b: (a[:1], b, 1.0), "one rank r"),
        (lambda a, b: (a, b[:7], 1.0), "B (V, r) = (20, r)"),
        (lambda a, b: (b, a, 1.0), "head.lora must be A"),
        (lambda a, b: (a[:0], b[:, :0], 1.0), "r >= 1"),
        (lambda a, b: (a.double(), b, 1.0), "head.lora's A"),
        (lambda a, b: (a, b.int(), 1.0), "head.lora's B"),
        (lambda a, b: (a, b, "2"), "scale must be a finite number"),
        (lambda a, b: (a, b, float("nan")), "scale must be a finite number"),
    ],
)
def test_what_does_not_fit_is_named(lora, said):
    with pytest.raises((TypeError, ValueError)) as error:
        LMHead(torch.randn(20, 8), lora=lora(torch.randn(2, 8), torch.randn(20, 2)))
    assert said in str(error.value)
