"""What a caller holds stays the caller's: later changes of it alter nothing, and no call alters it."""

import pytest
import torch

from fastpg import (
    CISPO,
    DPPOKL,
    DPPOTV,
    SAPO,
    IcePop,
    PPOClip,
    Reinforce,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    selective_logprobs,
)

N, H, V = 12, 6, 20
MASKS = pytest.mark.parametrize("masked", [False, True], ids=["all kept", "masked"])
CHECK = pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])


def inputs(dtype=torch.float32):
    """hidden and weight, and by name the tensors that belong to tokens: every one in the dtype that needs no cast."""
    hidden, weight = (torch.randn(n, H).to(dtype).requires_grad_() for n in (N, V))
    per_token = {
        "tokens": torch.randint(0, V, (N,)), "old_logprobs": -3 - torch.rand(N), "advantages": torch.randn(N),
        "rollout_weights": torch.rand(N) + 0.5, "temperature": torch.rand(N) + 0.5,
    }  # fmt: skip
    return hidden, weight, per_token


def mask_of(masked):
    return torch.arange(N) % 3 > 0 if masked else torch.ones(N, dtype=torch.bool)


def changed(tensors):
    for x in tensors:
        x.zero_() if x.dtype == torch.int64 else x.fill_(0.25)


def gradients_with_and_without_a_change(call, leaves, tensors):
    """`call` makes a scalar; between it and backward `tensors` are changed in place, or not."""
    found = []
    for change in (False, True):
        loss = call()
        if change:
            changed(tensors)
        found.append(torch.autograd.grad(loss, leaves))
    return zip(*found, strict=True)


@MASKS
@CHECK
def test_linear_logprobs(masked, check):
    hidden, weight, given = inputs()
    mask, tokens, temperature = mask_of(masked), given["tokens"], given["temperature"]

    def call():
        out = linear_logprobs(hidden, weight, tokens, mask=mask, temperature=temperature, entropy=True, check=check)
        return out.logprobs.sum() + out.entropy.sum()

    for want, got in gradients_with_and_without_a_change(call, (hidden, weight), (tokens, temperature, mask)):
        assert torch.equal(want, got)


@MASKS
def test_selective_logprobs(masked):
    logits, mask = torch.randn(N, V, requires_grad=True), mask_of(masked)
    tokens, temperature = torch.randint(0, V, (N,)), torch.rand(N) + 0.5

    def call():
        return selective_logprobs(logits, tokens, mask=mask, temperature=temperature).logprobs.sum()

    for want, got in gradients_with_and_without_a_change(call, (logits,), (tokens, temperature, mask)):
        assert torch.equal(want, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@MASKS
@CHECK
def test_linear_policy_loss(masked, check, dtype):
    hidden, weight, given = inputs(dtype)
    mask = mask_of(masked)

    def call():
        return linear_policy_loss(hidden, weight, **given, mask=mask, objective=PPOClip(), check=check).loss

    for want, got in gradients_with_and_without_a_change(call, (hidden, weight), (*given.values(), mask)):
        assert torch.equal(want, got)


@pytest.mark.parametrize("objective", [Reinforce(), CISPO(), PPOClip(), SAPO(), DPPOTV(), DPPOKL(), IcePop()], ids=str)
@MASKS
def test_policy_loss(masked, objective):
    logprobs, mask = (-torch.rand(N)).requires_grad_(), mask_of(masked)
    given = {name: x for name, x in inputs()[2].items() if name not in ("tokens", "temperature")}

    def call():
        return policy_loss(logprobs, **given, mask=mask if masked else None, objective=objective).loss

    for want, got in gradients_with_and_without_a_change(call, (logprobs,), given.values()):
        assert torch.equal(want, got)


@MASKS
@CHECK
def test_an_objective_that_works_in_place_changes_no_tensor_of_the_caller(masked, check):
    hidden, weight, given = inputs()
    mask, before = mask_of(masked), {name: x.clone() for name, x in given.items()}

    def objective(logprobs, old_logprobs, advantages):
        return (logprobs - old_logprobs.clamp_(max=-5)).exp() * advantages.clamp_(-0.1, 0.1)

    linear_policy_loss(hidden, weight, **given, mask=mask, objective=objective, check=check).loss.backward()
    terms = {name: given[name] for name in ("old_logprobs", "advantages", "rollout_weights")}
    policy_loss((-torch.rand(N)).requires_grad_(), **terms, mask=mask if masked else None, objective=objective).loss.backward()
    assert all(torch.equal(x, before[name]) for name, x in given.items())


def test_what_a_metric_returns_is_not_what_the_next_look_is_computed_from():
    hidden, weight, given = inputs()
    metrics = linear_policy_loss(hidden, weight, **given, objective=CISPO()).metrics
    before = metrics.to_dict()
    for value in metrics.values():
        value.fill_(7)
    assert metrics.to_dict() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_are_skipped_by_their_product_in_the_dtype_of_the_loss(dtype):
    """1e-4 times 1e-4 is 0 in float16, and not in float32."""
    hidden, weight, given = inputs()
    small = torch.full((N,), 1e-4, dtype=dtype)
    given |= {"advantages": small, "rollout_weights": small.clone()}
    out = linear_policy_loss(hidden, weight, **given, objective=Reinforce())
    assert out.metrics["skipped_tokens"] == 0
    assert out.loss > 0
    given["rollout_weights"][::2] = 0
    out = linear_policy_loss(hidden, weight, **given, objective=Reinforce())
    assert out.metrics["skipped_tokens"] == N // 2


@pytest.mark.parametrize("denominator", [1e-300, torch.tensor(1e-300, dtype=torch.float64)], ids=["number", "tensor"])
def test_tokens_without_advantage_do_not_hide_a_weight_that_is_not_finite(denominator):
    hidden, weight, given = inputs()
    given["advantages"].zero_()
    assert linear_policy_loss(hidden, weight, **given, objective=Reinforce(), denominator=denominator).loss.isnan()
    given["old_logprobs"] = given["old_logprobs"].double()
    given["old_logprobs"][3] = -1e39  # infinite in float32
    assert linear_policy_loss(hidden, weight, **given, objective=Reinforce()).loss.isnan()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_loss_that_gets_no_gradient_gives_zeros(dtype):
    hidden, weight, given = inputs(dtype)
    NoGradient.apply(linear_policy_loss(hidden, weight, **given, objective=CISPO()).loss).backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()
