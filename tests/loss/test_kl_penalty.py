"""The KL penalty and rollout weights of `policy_loss`: against the oracle, against torch.clamp, and within a bound of fp32."""

import math
from dataclasses import astuple

import pytest
import torch
from batches import F32, F64, batch, every_reduction, loss_and_gradient, oracle_of, penalties

from fastpg import CISPO, KLPenalty, reference

every_kl = pytest.mark.parametrize(
    "kl",
    [
        KLPenalty(0.25, k, weighted, largest)
        for k in ("k1", "k2", "k3")
        for weighted in (False, True)
        for largest in (None, 1.2)
    ],
    ids=lambda kl: kl.estimator + "-importance-weighted" * kl.importance_weighted + "-within" * (kl.max_log_ratio is not None),
)


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@every_reduction
@every_kl
def test_kl_and_rollout_weights_equal_the_oracle(kl, reduction, on_policy):
    inputs = batch(spread=3.0) | penalties()
    if on_policy:
        inputs["old_logprobs"] = None
    output, gradient = loss_and_gradient(**inputs, objective=CISPO(), kl=kl, reduction=reduction)
    options = {"kl": astuple(kl), "reduction": reduction}
    wanted, wanted_gradient, _ = oracle_of(inputs, reference.cispo(), **options)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=0)


def clamped_terms(estimator, weighted, logprobs, old, ref):
    """The KL term by torch.clamp at 1.2, on log-probabilities that are detached where it holds."""
    logprobs = torch.where((ref - logprobs).abs() > 1.2, logprobs.detach(), logprobs)
    e = (ref - logprobs).clamp(-1.2, 1.2)
    k = {"k1": -e, "k2": e.square() / 2, "k3": e.exp() - 1 - e}[estimator]
    return (logprobs - old).exp() * k if weighted else k


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "importance-weighted"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_term_within_a_bound_is_the_clamped_one(estimator, weighted, backend):
    """Against autograd of torch.clamp in float64: beyond the bound, on both sides, a value and no gradient."""
    logprobs, old, *_ = batch(F32).values()
    ref = -3 * torch.rand(6, 5)
    exact = logprobs.double().requires_grad_()
    wanted = clamped_terms(estimator, weighted, exact, old.double(), ref.double()).mean()
    (wanted_gradient,) = torch.autograd.grad(wanted, exact)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    given = [x.to(device) for x in (logprobs, old, torch.zeros(6, 5), ref)]
    kl = KLPenalty(1.0, estimator, weighted, max_log_ratio=1.2)
    output, gradient = loss_and_gradient(*given[:3], objective=CISPO(), kl=kl, ref_logprobs=given[3], backend=backend)
    torch.testing.assert_close(output.loss.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu().double(), wanted_gradient, rtol=1e-5, atol=1e-7)
    for beyond in (ref - logprobs > 1.2, ref - logprobs < -1.2):
        assert beyond.any()
        assert (gradient.cpu()[beyond] == 0).all()


@every_kl
def test_rollout_weights_leave_the_kl_term_alone(kl):
    logprobs, old, advantages, _ = batch().values()
    options = {"objective": CISPO(), "kl": kl, "ref_logprobs": -torch.rand(6, 5, dtype=F64)}
    zeros = torch.zeros(6, 5, dtype=F64)
    actual, gradient = loss_and_gradient(logprobs, old, advantages, rollout_weights=zeros, **options)
    wanted, wanted_gradient = loss_and_gradient(logprobs, old, zeros, **options)
    assert actual.loss.item() != 0
    torch.testing.assert_close(actual.loss, wanted.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-14, atol=0)


def test_rollout_weights_scale_the_objective():
    logprobs, old, advantages, _ = batch().values()
    factors = torch.rand(6, 5, dtype=F64)
    actual = loss_and_gradient(logprobs, old, advantages, objective=CISPO(), rollout_weights=factors)
    wanted = loss_and_gradient(logprobs, old, advantages * factors, objective=CISPO())
    torch.testing.assert_close(actual[0].loss, wanted[0].loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "importance-weighted"])
def test_a_bound_of_the_log_ratio_keeps_one_unlikely_token_from_an_infinite_kl(weighted, backend):
    """e = 93 is beyond an fp32 exp: loss and gradient are infinite. With a bound the token has exp(20), and no slope."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    logprobs, ref = torch.tensor([-1.0, -95.0], device=device), torch.tensor([-1.0, -2.0], device=device)
    given = {"old_logprobs": logprobs, "advantages": torch.ones(2, device=device), "ref_logprobs": ref, "backend": backend}
    given |= {"objective": CISPO(), "reduction": "sum"}
    without, slope = loss_and_gradient(logprobs, **given, kl=KLPenalty(0.01, "k3", weighted))
    assert without.loss == math.inf
    assert weighted or slope[1] == -math.inf  # weighted, the exponentials in the slope cancel, and a kernel knows it
    within, gradient = loss_and_gradient(logprobs, **given, kl=KLPenalty(0.01, "k3", weighted, max_log_ratio=20))
    assert within.loss.item() == pytest.approx(96 + 0.01 * (math.exp(20) - 21), rel=1e-6)
    assert gradient.tolist() == pytest.approx([-1.0, -1.0], rel=1e-6)


def test_a_bound_of_the_log_ratio_does_not_hide_nan():
    logprobs, ref = torch.tensor([-1.0, -2.0]), torch.tensor([math.nan, -1.0])
    given = {"old_logprobs": None, "advantages": torch.zeros(2), "ref_logprobs": ref, "objective": CISPO()}
    for backend in ("torch", "triton"):
        device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
        there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        kl = KLPenalty(1.0, max_log_ratio=3.0)
        output, gradient = loss_and_gradient(logprobs.to(device), **there, kl=kl, backend=backend)
        assert output.loss.isnan()
        assert gradient.isnan().tolist() == [True, False]
