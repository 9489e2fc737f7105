"""`LMHead(fp32_head=True)`: float32 products whatever the dtypes and autocast; without it autocast decides, as in torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import Result, check_result, logprobs_of, oracle, random_problem, relative_error

from fastpg import CISPO, LMHead, Reinforce, linear_cispo_loss, linear_logprobs, linear_policy_loss, policy_loss
from fastpg.crosscheck.cases import Inputs, Settings

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BACKENDS = ["torch"] if torch.cuda.is_available() else ["torch", "triton"]
SCHEDULES = pytest.mark.parametrize("schedule", ["one-pass", "two-pass"])
AUTOCAST = pytest.mark.parametrize("autocast", [None, bf16, f16], ids=["plain", "autocast bf16", "autocast fp16"])


def under(autocast: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", autocast or bf16, enabled=autocast is not None)


def problem_in(hidden: torch.dtype, weight: torch.dtype, beside: torch.dtype | None = None, fp32_head: bool = True) -> Inputs:
    """Every feature of a head; bias and LoRA's factors in the dtype `beside`, or the weight's."""
    problem = random_problem(24, 130, f32, hidden_size=32, bias=True, softcap=20.0, logit_scale=0.7, masked=True, lora=3)
    (a, b, scale), beside = problem.head.lora, beside or weight
    parts = {"bias": problem.head.bias.to(beside), "lora": (a.to(beside), b.to(beside), scale)}
    head = LMHead(problem.head.weight.to(weight), softcap=20.0, logit_scale=0.7, fp32_head=fp32_head, **parts)
    problem = replace(problem, hidden=problem.hidden.to(hidden), head=head)
    logprobs = logprobs_of(problem).float()  # ratios of order 1, for float16
    return replace(problem, old_logprobs=logprobs + torch.randn(24))


def result_of(
    schedule: str, problem: Inputs, autocast: torch.dtype | None = None, backward_too: bool = False, **options
) -> Result:
    leaves = problem.leaves()
    inputs = leaves.hidden, leaves.head, leaves.tokens
    old, advantages = leaves.old_logprobs, leaves.advantages
    with under(autocast):
        if schedule == "one-pass":
            out = linear_cispo_loss(*inputs, old, advantages, mask=leaves.mask, reduction="sum", **options)
            logprobs, loss = out.logprobs, out.loss
        else:
            logprobs = linear_logprobs(*inputs, mask=leaves.mask, **options).logprobs
            loss = policy_loss(logprobs, old, advantages, objective=CISPO(), mask=leaves.mask, reduction="sum").loss
    with under(autocast if backward_too else None):
        return Result.of(leaves, Settings(CISPO()), logprobs, loss)


def tensors(result: Result) -> list[torch.Tensor]:
    return list(result.values())


def widened(problem: Inputs, dtype: torch.dtype = f32) -> Inputs:
    head, lora = problem.head, problem.head.lora
    parts = {"bias": head.bias.to(dtype), "lora": (lora.a.to(dtype), lora.b.to(dtype), lora.scale)}
    head = replace(head, weight=head.weight.to(dtype), fp32_head=False, **parts)
    return replace(problem, hidden=problem.hidden.to(dtype), head=head)


DTYPES = [(bf16, bf16), (f16, f16), (bf16, f32), (f32, bf16), (f16, bf16), (f32, f32)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("hidden", "weight"), DTYPES, ids=str)
@AUTOCAST
@SCHEDULES
def test_values_and_all_gradients(schedule, autocast, hidden, weight, backend):
    """The bits of float32 inputs outside of autocast, which are the oracle's to float32's rounding; gradients come back in the
    inputs' dtypes, rounded once."""
    problem = problem_in(hidden, weight)
    got = result_of(schedule, problem, autocast, backend=backend)
    wide = result_of(schedule, widened(problem), backend=backend)
    for mine, other in zip(tensors(got), tensors(wide), strict=True):
        assert torch.equal(mine, other.to(mine.dtype))
    check_result(widened(problem), wide)
    assert (got["dX"].dtype, got["dW"].dtype, got["db"].dtype, got["dA"].dtype) == (hidden, weight, weight, weight)


@pytest.mark.parametrize("fp32_head", [False, True])
@SCHEDULES
def test_backward_may_be_called_under_autocast(schedule, fp32_head):
    """It decides nothing there: the products are in the dtype of the forward's, and sums in float32."""
    problem = problem_in(f32, f32, fp32_head=fp32_head)
    inside, outside = (result_of(schedule, problem, bf16, backward_too=b) for b in (True, False))
    for mine, other in zip(tensors(inside), tensors(outside), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("weight", "beside"), [(bf16, f32), (f32, bf16), (f16, bf16)], ids=str)
@AUTOCAST
@SCHEDULES
def test_what_stands_beside_the_weight_may_have_another_dtype(schedule, autocast, weight, beside):
    problem = problem_in(bf16, weight, beside)
    got, wide = result_of(schedule, problem, autocast), result_of(schedule, widened(problem))
    for mine, other in zip(tensors(got), tensors(wide), strict=True):
        assert torch.equal(mine, other.to(mine.dtype))
    assert (got["dW"].dtype, got["db"].dtype, got["dB"].dtype) == (weight, beside, beside)


@AUTOCAST
def test_entropies(autocast):
    problem = problem_in(bf16, f32)
    leaves, wide = problem.leaves(), widened(problem).leaves()
    with under(autocast):
        got = linear_logprobs(leaves.hidden, leaves.head, leaves.tokens, entropy=True).entropy
        reported = linear_policy_loss(
            leaves.hidden,
            leaves.head,
            leaves.tokens,
            leaves.old_logprobs,
            leaves.advantages,
            objective=Reinforce(),
            entropy=True,
        ).metrics["entropy"]
    want = linear_logprobs(wide.hidden, wide.head, wide.tokens, entropy=True).entropy
    assert torch.equal(got, want)
    assert torch.isclose(reported, want.mean(), rtol=1e-5)
    got.sum().backward()
    want.sum().backward()
    assert torch.equal(leaves.hidden.grad, wide.hidden.grad.bfloat16())


@pytest.mark.parametrize("weight", [f32, bf16], ids=str)
@SCHEDULES
def test_autocast_wins_by_default(schedule, weight):
    """float32 master weights are no request: the bits of inputs cast to autocast's dtype; LoRA's float32 factors stay."""
    problem = problem_in(f32, weight, fp32_head=False)
    head, lora = problem.head, problem.head.lora
    rounded = replace(head, weight=head.weight.bfloat16(), bias=head.bias.bfloat16(), lora=lora)
    got = result_of(schedule, problem, bf16)
    for mine, other in zip(
        tensors(got),
        tensors(result_of(schedule, replace(problem, hidden=problem.hidden.bfloat16(), head=rounded))),
        strict=True,
    ):
        assert torch.equal(mine, other.to(mine.dtype))
    asked = result_of(schedule, replace(problem, head=replace(head, fp32_head=True)), bf16)
    assert not torch.equal(asked["logp"], got["logp"])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_error_of_a_float32_head(autocast):
    """Logits up to 80: float32's error with and without autocast, where bf16's is thousands of times as large."""
    hidden, weight = (torch.randn(64, 256) * 3).bfloat16(), torch.randn(2000, 256) / 3
    tokens = torch.randint(0, 2000, (64,))
    want = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, tokens[:, None])[:, 0]
    with torch.autocast("cpu", bf16, enabled=autocast):
        asked = linear_logprobs(hidden, LMHead(weight, fp32_head=True), tokens).logprobs
        plain = linear_logprobs(hidden.float(), LMHead(weight), tokens).logprobs
    assert (asked - want).abs().max() < 8e-5
    assert ((plain - want).abs().max() > 1e-2) == autocast


@AUTOCAST
@SCHEDULES
def test_float64_stays_and_is_not_mixed(schedule, autocast):
    problem = problem_in(f64, f64)
    got = result_of(schedule, problem, autocast)
    for mine, other in zip(tensors(got), tensors(result_of(schedule, widened(problem, f64))), strict=True):
        assert torch.equal(mine, other)
    assert got["logp"].dtype == f64
    for hidden, weight in ((f64, f32), (bf16, f64)):
        with under(autocast), pytest.raises(TypeError, match=f"hidden is {hidden} but head.weight is {weight}"):
            linear_logprobs(
                torch.randn(2, 4).to(hidden), LMHead(torch.randn(5, 4).to(weight), fp32_head=True), torch.ones(2).long()
            )


@pytest.mark.parametrize("weight", [bf16, f16, f32], ids=str)
@AUTOCAST
@SCHEDULES
def test_weight_grad(schedule, autocast, weight):
    """The buffer gets float32's gradient, unrounded, and weight.grad stays None; without gradients it stays as it is."""
    problem = problem_in(bf16, weight)
    want = oracle(problem, CISPO())
    buffer, parameter = torch.ones(problem.head.weight.shape), problem.head.weight.clone().requires_grad_()
    head = replace(problem.head, weight=parameter, weight_grad=buffer)
    old, advantages = problem.old_logprobs, problem.advantages

    def loss() -> torch.Tensor:
        with under(autocast):
            if schedule == "one-pass":
                return linear_cispo_loss(
                    problem.hidden, head, problem.tokens, old, advantages, mask=problem.mask, reduction="sum"
                ).loss
            logprobs = linear_logprobs(problem.hidden, head, problem.tokens, mask=problem.mask).logprobs
            return policy_loss(logprobs, old, advantages, objective=CISPO(), mask=problem.mask, reduction="sum").loss

    with torch.no_grad():
        loss()
    assert (buffer == 1).all()
    for _ in range(2):
        loss().backward()
    assert relative_error(buffer - 1, 2 * want["dW"]) < 1e-5
    assert parameter.grad is None


@pytest.mark.parametrize(
    ("schedule", "weight", "autocast"),
    [("one-pass", bf16, True), ("two-pass", f32, False)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
def test_compiles_without_graph_breaks(schedule, weight, autocast):
    torch._dynamo.reset()
    hidden, parameter, bias = torch.randn(7, 16).bfloat16(), torch.randn(30, 16).to(weight), torch.randn(30).to(weight)
    tokens, old, inputs = (
        torch.randint(0, 30, (7,)),
        torch.full((7,), -3.0),
        [x.requires_grad_() for x in (hidden, parameter, bias)],
    )

    def loss(hidden, weight, bias):
        head = LMHead(weight, bias, fp32_head=True)
        with torch.autocast("cpu", bf16, enabled=autocast):
            if schedule == "one-pass":
                return linear_cispo_loss(hidden, head, tokens, old, torch.ones(7), check=False).loss
            out = linear_logprobs(hidden, head, tokens, entropy=True, check=False)
            return (out.logprobs.exp() + out.entropy).sum()

    want = loss(*inputs)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [1, "yes", None, torch.tensor(True)])
def test_it_is_true_or_false(value):
    with pytest.raises(TypeError, match=r"head\.fp32_head must be True or False; got"):
        LMHead(torch.randn(5, 4), fp32_head=value)


def test_dtypes_that_differ_without_it_say_what_to_pass():
    with pytest.raises(TypeError, match=r"hidden is torch.bfloat16 but head.weight is torch.float32; .*fp32_head=True"):
        linear_logprobs(torch.randn(2, 4).bfloat16(), torch.randn(5, 4), torch.ones(2).long())
    with pytest.raises(TypeError, match=r"head\.bias must be a tensor with the weight's dtype"):
        LMHead(torch.randn(5, 4), torch.randn(5).bfloat16())
    with pytest.raises(TypeError, match=r"head\.bias must be a tensor with"):
        LMHead(torch.randn(5, 4), torch.randn(5).double(), fp32_head=True)
