"""The factor that reaches a loss's backward: a gradient scaler's, gradient accumulation's, or any other."""

import pytest
import torch
from problems import relative_error
from torch.utils.checkpoint import checkpoint

from fastpg import CISPO, KLPenalty, LMHead, Reinforce, linear_logprobs, linear_policy_loss, reference

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, SIZE, VOCAB = 96, 32, 200
COUNT = 65536  # tokens of the whole step: what a loss is divided by under gradient accumulation


def made(dtype, backend="torch", **changes):
    """hidden, weight, bias, A and B as leaves, tokens and advantages. In fp16 advantages of order 0.1, as trainers have."""
    device = KERNEL_DEVICE if backend == "triton" else "cpu"
    shapes = {"hidden": (ROWS, SIZE), "weight": (VOCAB, SIZE), "bias": (VOCAB,), "a": (3, SIZE), "b": (VOCAB, 3)}
    sizes = {"hidden": 1.0, "weight": 0.2, "bias": 0.3, "a": 0.2, "b": 0.2}
    leaves = {name: (torch.randn(shape) * sizes[name]).to(dtype).to(device) for name, shape in shapes.items()}
    tokens, advantages = torch.randint(0, VOCAB, (ROWS,)), torch.randn(ROWS) / 10
    return {name: x.requires_grad_() for name, x in leaves.items()} | {
        "tokens": tokens.to(device),
        "advantages": advantages.to(device),
    } | changes  # fmt: skip


def loss_of(x, schedule, backend, **options):
    lora = (x["a"], x["b"], 0.5) if "a" in x else None
    head = LMHead(x["weight"], x["bias"], lora=lora, weight_grad=x.get("weight_grad"))
    if schedule == "two passes":
        return -(linear_logprobs(x["hidden"], head, x["tokens"], backend=backend).logprobs * x["advantages"]).sum() / COUNT
    return linear_policy_loss(
        x["hidden"], head, x["tokens"], None, x["advantages"], objective=Reinforce(), denominator=COUNT, backend=backend,
        **options,
    ).loss  # fmt: skip


def exact_gradients(x, dtype):
    """In float64, of the inputs rounded to `dtype`."""
    names = ("hidden", "weight", "bias", "a", "b")
    wide = {name: x[name].detach().cpu().to(dtype if name not in ("a", "b") else x[name].dtype).double() for name in names}
    wide = {name: value.requires_grad_() for name, value in wide.items()}
    head = LMHead(wide["weight"], wide["bias"], lora=(wide["a"], wide["b"], 0.5))
    logprobs, _ = reference.linear_logprobs(wide["hidden"], head, x["tokens"].cpu())
    (-(logprobs * x["advantages"].double().cpu()).sum() / COUNT).backward()
    return {name: value.grad for name, value in wide.items()}


@BACKENDS
@pytest.mark.parametrize("schedule", ["one pass", "two passes"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp16", "autocast"])
@pytest.mark.parametrize("scale", [1024.0, 65536.0, 2.0**24])
def test_a_gradient_scaler_keeps_fp16_gradients(schedule, backend, autocast, scale):
    """Unscaled they would be below 6e-8, fp16's smallest number: rounded before the factor is known, half of them were 0."""
    x = made(torch.float32 if autocast else torch.float16, backend)
    with torch.autocast(x["hidden"].device.type, torch.float16, enabled=autocast):
        loss = loss_of(x, schedule, backend)
    (loss * scale).backward()
    for name, want in exact_gradients(x, torch.float16).items():
        floor = 2.0**-25 * want.numel() ** 0.5 / scale / want.norm()
        assert relative_error(x[name].grad.cpu().double() / scale, want) <= 2e-3 + floor, name


def test_under_torchs_own_scaler():
    x = made(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    names = ("hidden", "weight", "bias", "a", "b")
    optimizer = torch.optim.SGD([x[name] for name in names], lr=1.0)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(x, "one pass", "torch")
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, want in exact_gradients(x, torch.float16).items():
        assert relative_error(x[name].grad, want) <= 2e-3, name
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0  # no step was skipped


@BACKENDS
def test_a_buffer_for_dweight_gets_the_factor(backend):
    buffers = []
    for dtype, scale in ((torch.float16, 1.0), (torch.float16, 65536.0), (torch.bfloat16, 1.0), (torch.bfloat16, 1 / 3)):
        torch.manual_seed(0)
        x = made(dtype, backend)
        x["weight_grad"] = torch.zeros(VOCAB, SIZE, device=x["hidden"].device)
        (loss_of(x, "one pass", backend) * scale).backward()
        buffers.append(x["weight_grad"] / scale)
    half, scaled, bf16, third = buffers
    assert relative_error(scaled, half.double()) <= 1e-6
    assert relative_error(third, bf16.double()) <= 1e-6
    assert half.any()
    assert bf16.any()


@pytest.mark.parametrize("keep", [False, True], ids=["in place", "retain_graph"])
@pytest.mark.parametrize("factor", [1 / 3, 0.3, 1e-4, -7.0])
def test_bf16_gradients_are_scaled_in_fp32(factor, keep):
    """And rounded once more: with the factor in bf16 all of dX and dW would be off by one common factor of up to 0.3 %."""
    x = without_lora(made(torch.bfloat16, "triton" if KERNEL_DEVICE == "cuda" else "torch"))  # a GPU scales in another way
    inputs = [x[name] for name in ("hidden", "weight", "bias")]
    once = torch.autograd.grad(loss_of(x, "one pass", None), inputs)
    scaled = torch.autograd.grad(loss_of(x, "one pass", None) * factor, inputs, retain_graph=keep)
    of_factor = torch.tensor(factor, dtype=torch.float32, device=KERNEL_DEVICE)
    for a, b in zip(once, scaled, strict=True):
        assert torch.equal(b, (a.float() * of_factor).bfloat16())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_compiled_loss_are_scaled_in_fp32(dtype):
    x = without_lora(made(dtype))
    inputs = [x[name] for name in ("hidden", "weight", "bias")]

    def loss(hidden, weight, bias):
        return loss_of(x | {"hidden": hidden, "weight": weight, "bias": bias}, "one pass", "torch", check=False)

    plain, compiled = loss(*inputs), torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(plain, compiled)
    want, got = (torch.autograd.grad(value * 0.3 * COUNT, inputs) for value in (plain, compiled))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(want, got, strict=True))


def without_lora(x):
    return {name: value for name, value in x.items() if name not in ("a", "b")}


# ---- float16's gradients are computed in backward -------------------------------------------------------------------


def test_several_backwards_of_fp16():
    x = made(torch.float16)
    loss = loss_of(x, "one pass", "torch") * 1024
    inputs = [x[name] for name in ("hidden", "weight", "bias", "a", "b")]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(kept, second, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, inputs)


def test_a_second_derivative_of_fp16_is_refused():
    x = made(torch.float16)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss_of(x, "one pass", "torch"), x["weight"], create_graph=True)


def test_checkpointing_of_fp16():
    x = made(torch.float16)
    inputs = [x[name] for name in ("hidden", "weight", "bias", "a", "b")]
    want = torch.autograd.grad(loss_of(x, "one pass", "torch") * 1024, inputs)
    got = torch.autograd.grad(checkpoint(loss_of, x, "one pass", "torch", use_reentrant=False) * 1024, inputs)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_fp16_without_gradients_and_without_tokens():
    x = made(torch.float16)
    with torch.no_grad():
        assert not loss_of(x, "one pass", "torch").requires_grad
    loss = loss_of(x, "one pass", "torch", mask=torch.zeros(ROWS, dtype=torch.bool))
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, [x["hidden"], x["weight"]]))


@BACKENDS
def test_masked_rows_of_fp16_whose_token_is_banned(backend):
    """With check=False masked rows enter as token 0. Its logit of -inf is nobody's."""
    x = without_lora(made(torch.float16, backend))
    with torch.no_grad():
        x["bias"][0] = -torch.inf
        x["tokens"].clamp_(min=1)
    mask, seen = torch.arange(ROWS, device=x["hidden"].device) % 3 > 0, []

    def objective(logprobs, old_logprobs, advantages):
        seen.append(logprobs.detach())
        return logprobs * advantages

    loss = linear_policy_loss(
        x["hidden"], LMHead(x["weight"], x["bias"]), x["tokens"], None, x["advantages"], objective=objective, mask=mask,
        backend=backend, check=False,
    ).loss  # fmt: skip
    assert seen
    assert all((logprobs[~mask] == 0).all() for logprobs in seen)
    assert loss.isfinite()
    dhidden, dweight = torch.autograd.grad(loss, [x["hidden"], x["weight"]])
    assert dhidden.isfinite().all()
    assert dweight.isfinite().all()
    assert (dhidden[~mask] == 0).all()


def test_a_workspace_of_fp16_is_that_of_two_passes():
    """There is no E to make room for: N V numbers of two bytes would not fit here."""
    hidden, weight = torch.randn(300, 8).half(), torch.randn(60000, 8).half()
    tokens, advantages = torch.randint(0, 60000, (300,)), torch.ones(300)
    options = {"objective": Reinforce(), "workspace": 2**24}
    assert linear_policy_loss(hidden.requires_grad_(), weight, tokens, None, advantages, **options).loss.isfinite()
    with pytest.raises(ValueError, match="workspace=16777216"):
        linear_policy_loss(hidden.detach().bfloat16().requires_grad_(), weight.bfloat16(), tokens, None, advantages, **options)
    with pytest.raises(ValueError, match="workspace=1000"):
        linear_policy_loss(hidden, weight, tokens, None, advantages, **options | {"workspace": 1000})


def test_what_fp16_keeps_for_backward():
    """The inputs, and a few numbers per row: no gradient."""
    x = made(torch.float16)
    kept = []

    def pack(saved):
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss_of(x, "one pass", "torch")
    inputs = {x[name].data_ptr() for name in x}
    others = {t.data_ptr(): t for t in kept if t.data_ptr() not in inputs and t.numel()}
    assert sum(t.numel() for t in others.values()) <= (10 + 3) * ROWS  # and LoRA's r numbers


def test_an_objectives_own_tensors_get_no_gradient():
    x = made(torch.float16)
    learned = torch.ones((), requires_grad=True)
    head = LMHead(x["weight"])

    def objective(logprobs, old_logprobs, advantages):
        return logprobs * advantages * learned

    arguments = x["hidden"], head, x["tokens"], None, x["advantages"]
    linear_policy_loss(*arguments, objective=objective).loss.backward()
    assert learned.grad is None
    assert x["weight"].grad.any()


@BACKENDS
def test_entropies_and_metrics_of_fp16(backend):
    x = made(torch.float16, backend)
    head = LMHead(x["weight"], x["bias"])
    mask = torch.arange(ROWS, device=x["hidden"].device) % 3 > 0
    old = torch.full((ROWS,), -5.0, device=mask.device)
    out = linear_policy_loss(
        x["hidden"], head, x["tokens"], old, x["advantages"], objective=CISPO(), kl=KLPenalty(0.1), ref_logprobs=old, mask=mask,
        entropy=True, backend=backend,
    )  # fmt: skip
    two = linear_logprobs(x["hidden"], head, x["tokens"], mask=mask, entropy=True, backend=backend)
    assert torch.equal(out.logprobs, two.logprobs)
    assert torch.allclose(out.metrics["entropy"], two.entropy[mask].mean(), rtol=1e-6)
    assert not out.metrics["entropy"].requires_grad
    assert not out.logprobs.requires_grad
    assert out.metrics["recomputed_tokens"] == 0
