"""The adapter with the signature of verl's fused linear_cross_entropy."""

import pytest
import torch
from problems import random_problem

from fastpg import linear_logprobs
from fastpg.integrations.verl import linear_cross_entropy


@pytest.mark.parametrize("reduction", [None, "none", "sum", "MEAN"])
@pytest.mark.parametrize("shape", [(30,), (5, 6)])
def test_equals_autograd_on_full_logits(reduction, shape):
    """Positional, as verl calls it; verl's results are flat."""
    problem = random_problem(30, 200, torch.float64)
    leaves = problem.leaves()
    hidden, labels = leaves.hidden.view(*shape, -1), leaves.tokens.view(shape)
    logprobs, entropy = linear_cross_entropy(hidden, leaves.head.weight, labels, 0.7, reduction)
    full = problem.leaves()
    log_p = ((full.hidden @ full.head.weight.T) / 0.7).log_softmax(-1)
    want, want_entropy = log_p.gather(1, full.tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    if reduction in ("sum", "MEAN"):
        want = want.sum() if reduction == "sum" else want.mean()
    assert logprobs.shape == want.shape
    assert torch.allclose(logprobs, want, rtol=1e-9, atol=1e-12)
    assert torch.allclose(entropy, want_entropy, rtol=1e-9, atol=1e-12)
    (logprobs.sum() * 2 + entropy.sum()).backward()
    (want.sum() * 2 + want_entropy.sum()).backward()
    assert torch.allclose(leaves.hidden.grad, full.hidden.grad, rtol=1e-8, atol=1e-12)
    assert torch.allclose(leaves.head.weight.grad, full.head.weight.grad, rtol=1e-8, atol=1e-12)


def test_temperature_per_token():
    hidden, weight, labels = torch.randn(2, 3, 8), torch.randn(20, 8), torch.randint(0, 20, (2, 3))
    temperature = torch.rand(2, 3) + 0.5
    got, _ = linear_cross_entropy(hidden, weight, labels, temperature)
    assert torch.equal(got.view(2, 3), linear_logprobs(hidden, weight, labels, temperature=temperature).logprobs)


def test_another_reduction_is_an_error():
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(torch.randn(3, 8), torch.randn(20, 8), torch.zeros(3, dtype=torch.int64), 1.0, "avg")
