"""The one-pass loss in autograd and under torch.compile: what reaches its backward, its operators, no graph break."""

from dataclasses import replace

import pytest
import torch
from problems import check_result, logprobs_of, opcheck, random_problem
from schedules import one_pass
from torch.utils.checkpoint import checkpoint

from fastpg import (
    CISPO,
    KLPenalty,
    LinearPolicyLoss,
    LMHead,
    linear_cispo_loss,
    linear_policy_loss,
)
from fastpg.linear.operators import anchored_exp, gradient_products, target_logits
from fastpg.tiles.products import Sums
from fastpg.tiles.structures import Asked, Chunk, Head
from fastpg.tools.memory import transient_bytes

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
    check_result(problem, one_pass(problem, CISPO()))


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


@pytest.mark.parametrize(
    ("dtype", "entropy"),
    [(torch.float32, True), (torch.bfloat16, False), (torch.float64, False)],
    ids=str,
)
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
    opcheck(anchored_exp, chunk, head, anchor, target, None, Asked(entropy), "torch")
    sums = opcheck(anchored_exp, chunk, head, anchor, target, exps, Asked(entropy), "torch")
    assert (sums.weighted is not None, sums.residual is not None) == (entropy, dtype == torch.bfloat16)
    factor = torch.randn(256).to(wide)
    for of_weight in (dtype, wide):
        lora = (torch.zeros(256, 3, dtype=wide), torch.zeros(33, 3, dtype=wide)) if entropy else (None, None)
        into = Sums(
            torch.zeros(256, 8, dtype=dtype), lora[0], torch.zeros(33, 8, dtype=of_weight), lora[1], torch.zeros(33, dtype=wide)
        )
        opcheck(gradient_products, exps, factor, sums.residual, chunk, head, into, of_weight == wide, "torch")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
@pytest.mark.parametrize("name", ["user", "kl"])
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
