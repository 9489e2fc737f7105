"""The autograd contract of linear_logprobs: gradcheck, opcheck, frozen inputs, incoming gradients of every kind."""

import pytest
import torch
from problems import opcheck, random_problem
from torch.utils.checkpoint import checkpoint

from fastpg import LMHead, linear_logprobs
from fastpg.linear.online import Plan
from fastpg.linear.operators import two_pass_backward, two_pass_partials, two_pass_statistics
from fastpg.linear.rows import Rows
from fastpg.tiles.products import product
from fastpg.tiles.row_statistics import finish_rows
from fastpg.tiles.structures import Asked, Head, Incoming, Wanted


def small_inputs(dtype=torch.float64, rows=7, vocab=9, hidden_size=4):
    hidden = torch.randn(rows, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocab, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, vocab, (rows,))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, "per-token"])
def test_gradcheck(softcap, temperature):
    hidden, weight, bias, tokens = small_inputs()
    mask = torch.tensor([True, True, False, True, True, True, True])
    per_token = torch.rand(7, dtype=torch.float64) + 0.5 if temperature == "per-token" else 1.0

    def values(hidden, weight, bias):
        head = LMHead(weight, bias, softcap, logit_scale=0.8)
        return tuple(linear_logprobs(hidden, head, tokens, mask=mask, temperature=per_token, entropy=True))

    assert torch.autograd.gradcheck(values, (hidden, weight, bias))


def rows_and_head(dtype, gather, rank=None):
    hidden, weight, bias, tokens = small_inputs(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    lora_hidden, b = (None, None) if rank is None else (torch.randn(7, rank).to(wide), torch.randn(9, rank).to(dtype))
    indices = torch.tensor([0, 2, 3, 6]) if gather else None
    keep = None if gather else torch.tensor([True, False, True, True, True, True, True])
    rows = tokens[indices] if gather else tokens
    temperature = torch.rand(len(rows)) + 0.5
    masked = None if keep is None else ~keep
    rows = Rows(hidden.detach(), lora_hidden, indices, masked, rows, temperature.to(wide))
    return rows, Head(weight.detach(), b, bias.detach(), 3.0, 0.8)


@pytest.mark.parametrize(
    ("dtype", "gather", "entropy"),
    [
        (torch.float32, True, True), (torch.bfloat16, False, True), (torch.bfloat16, True, False),
    ],
    ids=str,
)  # fmt: skip
def test_opcheck_two_pass(dtype, gather, entropy):
    rows, head = rows_and_head(dtype, gather, 2 if entropy else None)
    statistics, _ = opcheck(two_pass_statistics, rows, head, Asked(entropy), 2**24, "torch")
    partials = opcheck(two_pass_partials, rows, head, Asked(entropy), 2**24, "torch", None)
    for x, y in zip(finish_rows(partials, entropy), statistics, strict=True):
        assert x is y is None or torch.equal(x, y)
    g = torch.randn_like(statistics.t)
    incoming = Incoming(g, torch.randn_like(g) if entropy else None)
    buffer = torch.zeros_like(head.weight, dtype=g.dtype)
    for n, (hidden, weight, bias) in enumerate(((True, True, True), (False, True, False), (True, False, False))):
        wanted = Wanted(hidden, hidden and entropy, weight, weight and entropy, bias)
        partial = n % 2 == entropy  # every dtype has both, and so has what is wanted
        plan, weight_grad = Plan(2**24, "torch", partial), buffer if partial and weight else None
        found = opcheck(two_pass_backward, rows, head, statistics, incoming, wanted, plan, weight_grad)
        given = wanted._replace(weight=weight and weight_grad is None)
        assert [x is not None for x in found] == list(given)


def test_the_precision_switch_is_restored():
    switch = torch.backends.mkldnn.matmul
    out, a, b = torch.randn(64, 48), torch.randn(64, 32), torch.randn(32, 48)
    for before in ("none", "ieee", "bf16"):
        switch.fp32_precision = before
        try:
            product(out, a, b, False, True)
            assert switch.fp32_precision == before
            with pytest.raises(RuntimeError):
                product(out, a, b[:5], False, True)
            assert switch.fp32_precision == before
        finally:
            switch.fp32_precision = "none"


def test_bf16_operands_are_multiplied_exactly():
    """Products under the switch equal the float64 product of the bf16 values up to fp32 rounding: nothing else is lost."""
    a, b = torch.randn(256, 512).bfloat16().float(), torch.randn(512, 300).bfloat16().float()
    out = torch.empty(256, 300)
    product(out, a, b, False, True)
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() <= 2e-6 * exact.abs().max()
    product(out, a, b, True, True)
    assert (out - 2 * exact).abs().max() <= 4e-6 * exact.abs().max()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(frozen):
    def gradients(frozen):
        torch.manual_seed(1)
        inputs = dict(zip(("hidden", "weight", "bias"), small_inputs(torch.float32)[:3], strict=True))
        if frozen:
            inputs[frozen].requires_grad_(False)
        head = LMHead(inputs["weight"], inputs["bias"])
        linear_logprobs(inputs["hidden"], head, torch.arange(7)).logprobs.square().sum().backward()
        return {name: x.grad for name, x in inputs.items()}

    everything, partial = gradients(None), gradients(frozen)
    assert partial.pop(frozen) is None
    for name, gradient in partial.items():
        assert torch.equal(gradient, everything[name]), name


def test_only_what_is_asked_for_is_computed():
    """torch.autograd.grad for one input, through backward's needs_input_grad."""
    hidden, weight, bias, tokens = small_inputs()
    logprobs = linear_logprobs(hidden, LMHead(weight, bias), tokens).logprobs
    (alone,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    together = torch.autograd.grad(logprobs.sum(), (hidden, weight, bias))
    assert torch.equal(alone, together[0])
    assert all(x.grad is None for x in (hidden, weight, bias))


def test_incoming_gradients_of_every_kind():
    """stride-0 (from .sum()), dense, non-contiguous, scaled, and a missing one for entropy or for logprobs."""
    hidden, weight, bias, tokens = small_inputs()

    def gradient(loss):
        hidden.grad = None
        loss(linear_logprobs(hidden, LMHead(weight, bias), tokens, entropy=True)).backward()
        return hidden.grad

    ones = torch.ones(7, dtype=torch.float64)
    by_sum = gradient(lambda out: out.logprobs.sum())
    assert torch.equal(by_sum, gradient(lambda out: (out.logprobs * ones).sum()))
    assert torch.equal(by_sum, gradient(lambda out: torch.stack([out.logprobs, out.logprobs], 1)[:, 1].sum()))
    assert torch.allclose(3 * by_sum, gradient(lambda out: 3 * out.logprobs.sum()), rtol=1e-14)
    only_entropy = gradient(lambda out: out.entropy.sum())
    both = gradient(lambda out: out.logprobs.sum() + out.entropy.sum())
    assert torch.allclose(both, by_sum + only_entropy, rtol=1e-12, atol=1e-14)
    assert only_entropy.abs().max() > 0


def test_retain_graph_twice_gives_the_same_and_double_backward_raises():
    hidden, weight, bias, tokens = small_inputs()
    total = linear_logprobs(hidden, LMHead(weight, bias), tokens).logprobs.sum()
    first = torch.autograd.grad(total, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, weight, retain_graph=True)[0])
    (twice,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        twice.sum().backward()


def test_an_input_changed_between_forward_and_backward_is_an_error():
    hidden, weight, bias, tokens = small_inputs()
    loss = linear_logprobs(hidden, LMHead(weight, bias), tokens).logprobs.sum()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_grad_keeps_nothing_for_backward():
    hidden, weight, bias, tokens = small_inputs()
    with torch.no_grad():
        out = linear_logprobs(hidden, LMHead(weight, bias), tokens, entropy=True)
    assert not out.logprobs.requires_grad
    with_grad = linear_logprobs(hidden, LMHead(weight, bias), tokens, entropy=True)
    assert torch.equal(out.logprobs, with_grad.logprobs)
    assert torch.equal(out.entropy, with_grad.entropy)


def test_checkpointing_around_the_call():
    hidden, weight, bias, tokens = small_inputs()

    def loss(hidden):
        return linear_logprobs(hidden, LMHead(weight, bias), tokens).logprobs.sum()

    plain = torch.autograd.grad(loss(hidden), (hidden, weight))
    through = torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, through, strict=True))


def test_autocast_uses_its_dtype_and_gradients_come_back_in_the_inputs():
    hidden, weight, bias, tokens = small_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(hidden.bfloat16(), LMHead(weight, bias), tokens)  # dtypes may differ here
        again = linear_logprobs(hidden, LMHead(weight, bias), tokens)
    head = LMHead(weight.bfloat16(), bias.bfloat16())
    assert torch.equal(out.logprobs, linear_logprobs(hidden.bfloat16(), head, tokens).logprobs)
    assert torch.equal(out.logprobs, again.logprobs)
    again.logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


def test_strided_inputs():
    """states[:, :-1], a transposed weight and a strided token row give what contiguous copies give."""
    states = torch.randn(3, 6, 8, requires_grad=True)
    weight = torch.randn(8, 20).T.requires_grad_()
    tokens = torch.randint(0, 20, (3, 12))[:, 1:-1:2]
    strided = linear_logprobs(states[:, :-1], weight, tokens).logprobs
    copied = linear_logprobs(states[:, :-1].contiguous(), weight.contiguous(), tokens.contiguous()).logprobs
    assert torch.allclose(strided, copied, atol=1e-6)
    one, other = (torch.autograd.grad(x.sum(), (states, weight)) for x in (strided, copied))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    assert not one[0][:, -1].any()


def test_leading_shapes_and_int32_tokens():
    problem = random_problem(12, 17, torch.float32)
    flat = linear_logprobs(problem.hidden, problem.head, problem.tokens).logprobs
    shaped = linear_logprobs(problem.hidden.view(2, 3, 2, 64), problem.head, problem.tokens.view(2, 3, 2).int()).logprobs
    assert torch.equal(shaped.reshape(-1), flat)
    scalar = linear_logprobs(problem.hidden[0], problem.head, problem.tokens[0]).logprobs
    assert scalar.shape == ()
    assert torch.equal(scalar, flat[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
@pytest.mark.parametrize("entropy", [True, False])
def test_compiles_without_graph_breaks_when_nothing_reads_the_host(entropy):
    hidden, weight, bias, tokens = small_inputs(torch.float32)
    mask = torch.tensor([True, True, False, True, True, True, True])

    def loss(hidden, weight, bias):
        out = linear_logprobs(hidden, LMHead(weight, bias), tokens, mask=mask, entropy=entropy, check=False)
        return (out.logprobs.exp() + (out.entropy if entropy else 0)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(hidden, weight, bias), (hidden, weight, bias))
    got = torch.autograd.grad(compiled(hidden, weight, bias), (hidden, weight, bias))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
