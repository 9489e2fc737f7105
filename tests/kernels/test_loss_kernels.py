"""The loss of ready log-probabilities by one kernel, and metrics from sums that kernels leave, against PyTorch in float64."""

import math
from functools import partial

import pytest
import torch

from fastpg import (
    CISPO,
    DPPOKL,
    DPPOTV,
    GSPO,
    SAPO,
    IcePop,
    ImportanceWeighted,
    KLPenalty,
    PPOClip,
    Reinforce,
    policy_loss,
)
from fastpg.kernels import summary as summary_kernel
from fastpg.kernels.limits import SUMMARY
from fastpg.kernels.summary import FIELDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OBJECTIVES = [Reinforce(), ImportanceWeighted(), CISPO(2.0, 0.5), PPOClip(0.2, 0.28, 3.0), SAPO(1.0, 1.1)]
OBJECTIVES += [DPPOTV(), DPPOTV(0.1, 0.1, 2.0, True), DPPOKL(0.02, 0.03), IcePop()]
NAMES = ("ratio_mean", "ratio_max", "clip_fraction", "ess", "kl_k1", "kl_k3", "tokens", "skipped_tokens", "recomputed_tokens")
named = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)


def batch(count=5000):
    """Vectors (count,) on the CPU, by the names of the arguments."""
    logprobs = -torch.rand(count) * 8
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + torch.randn(count),
        "advantages": torch.randn(count),
        "rollout_weights": torch.rand(count),
        "ref_logprobs": logprobs + torch.randn(count),
        "mask": torch.rand(count) < 0.7,
    }


def run(given, backend, dtype=torch.float32, **options):
    """(output, gradient) in `dtype`; the gradient of twice the loss is halved."""
    moved = {name: None if x is None else x.to(DEVICE) for name, x in given.items()}
    moved = {name: x if x is None or x.dtype == torch.bool else x.to(dtype) for name, x in moved.items()}
    leaf = moved.pop("logprobs").detach().requires_grad_()
    if "kl" not in options:
        moved.pop("ref_logprobs", None)
    out = policy_loss(leaf, **moved, backend=backend, **options)
    (2 * out.loss).backward()
    return out, leaf.grad / 2


def agree(given, objective, tolerance=1e-5, **options):
    """Asserts that the kernel's results are those of PyTorch in float64; returns the kernel's output."""

    def close(got, want, absolute, name):
        torch.testing.assert_close(
            got.double(),
            want.double(),
            rtol=tolerance,
            atol=float(absolute),
            equal_nan=True,
            msg=lambda said: f"{name}: {said}",
        )

    got, grad = run(given, "triton", objective=objective, **options)
    want, exact = run(given, "torch", torch.float64, objective=objective, **options)
    close(grad, exact, tolerance * exact.abs().amax() if exact.numel() else 0, "gradient")
    close(got.loss, want.loss, tolerance, "loss")
    close(got.logprobs, want.logprobs, 0, "logprobs")
    assert list(got.metrics) == list(want.metrics)
    for name, value in want.metrics.items():
        close(got.metrics[name], value, tolerance, name)
    return got


@named
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kl", [None, KLPenalty(0.1), KLPenalty(0.1, "k2", True)], ids=["plain", "k3", "k2-weighted"])
def test_the_loss_its_gradient_and_its_metrics(objective, masked, kl):
    given = batch()
    if not masked:
        given["mask"] = None
    agree(given, objective, **({} if kl is None else {"kl": kl}))


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"])
@pytest.mark.parametrize("denominator", [None, 7, "tensor"], ids=str)
def test_reductions(reduction, denominator):
    given = batch(60)
    given = {name: x.view(4, 15) for name, x in given.items()}
    given["mask"][1] = False
    for backend_of in ("cpu", DEVICE):
        D = torch.tensor(7, device=backend_of) if denominator == "tensor" else denominator
        agree(given, PPOClip(), reduction=reduction, denominator=D)


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(count):
    given = batch(count)
    out = agree(given | {"mask": None}, CISPO())
    assert out.metrics["tokens"] == count
    out = agree(given | {"mask": torch.zeros(count, dtype=torch.bool)}, CISPO())
    assert out.loss == 0
    assert out.metrics.to_dict() == dict.fromkeys(NAMES, 0) | {
        "ess": 1,
        "repeated_products": 0,
        "silenced_tokens": 0,
        "work_saved": 0,
    }


@named
def test_on_policy(objective):
    given = batch(300)
    agree(given | {"old_logprobs": None}, objective)


@named
def test_masked_tokens_may_be_anything_and_kept_ones_are_not_hidden(objective):
    given = batch(300)
    clean = agree(given, objective)
    spoilt = {name: x if name == "mask" else torch.where(given["mask"], x, math.nan) for name, x in given.items()}
    same = run(spoilt, "triton", objective=objective)[0]
    assert torch.equal(same.loss, clean.loss)
    assert same.metrics.to_dict() == clean.metrics.to_dict()
    place = given["mask"].nonzero()[0, 0]
    for name, value in [
        ("old_logprobs", math.inf),
        ("old_logprobs", -math.inf),
        ("advantages", math.nan),
        ("logprobs", math.nan),
    ]:
        bad = given[name].clone()
        bad[place] = value
        got, grad = run(given | {name: bad}, "triton", objective=objective)
        assert got.loss.isnan(), name
        # not where the gradient does not depend on it: that of A logp is A
        assert grad[place].isnan() or not run(given | {name: bad}, "torch", objective=objective)[1][place].isnan(), name


def test_ratios_whose_squares_leave_the_range_of_fp32():
    given = batch(9000)
    given["old_logprobs"] = given["logprobs"] + torch.randn(9000) * 12
    given["advantages"] = given["advantages"] * 1e-10
    got = agree(given, CISPO(), tolerance=1e-4)
    assert got.metrics["ratio_max"] > 1e15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_log_probabilities(dtype):
    """Computed in fp32, like the formula on values that are widened first; the gradient has their dtype."""
    given = batch(500)
    given["logprobs"], given["old_logprobs"] = (given[name].to(dtype) for name in ("logprobs", "old_logprobs"))
    leaf = given["logprobs"].to(DEVICE).requires_grad_()
    rest = {name: given[name].to(DEVICE) for name in ("old_logprobs", "advantages", "mask")}
    found = [policy_loss(leaf, **rest, objective=CISPO(), backend=b) for b in ("torch", "triton")]
    grads = [torch.autograd.grad(out.loss, leaf)[0] for out in found]
    assert grads[1].dtype == dtype
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(found[1].loss, found[0].loss)
    assert found[1].logprobs.dtype == torch.float32


def test_strided_arguments_and_later_changes_by_the_caller():
    given = batch(100)
    wide = {name: torch.stack([x, x], 1).to(DEVICE) for name, x in given.items() if name != "ref_logprobs"}
    narrow = {name: x[:, 0] for name, x in wide.items()}
    out = policy_loss(narrow.pop("logprobs"), **narrow, objective=CISPO(), backend="triton")
    want = run(given, "torch", objective=CISPO())[0]
    before = out.metrics.to_dict()
    for x in wide.values():
        x.zero_()
    assert out.metrics.to_dict() == before == pytest.approx(want.metrics.to_dict(), rel=1e-5)
    torch.testing.assert_close(out.logprobs, want.logprobs)


def test_transforms_of_torch_func():
    given = batch(50)
    rest = {name: given[name].to(DEVICE) for name in ("old_logprobs", "advantages", "mask")}
    found = [
        torch.func.grad(lambda x, b=b: policy_loss(x, **rest, objective=CISPO(), backend=b).loss)(given["logprobs"].to(DEVICE))
        for b in ("torch", "triton")
    ]
    torch.testing.assert_close(found[1], found[0])


def test_second_derivatives_are_those_of_the_formula():
    given = batch(50)
    rest = {name: given[name].to(DEVICE) for name in ("old_logprobs", "advantages", "mask")}
    found = []
    for backend in ("torch", "triton"):
        leaf = given["logprobs"].to(DEVICE).requires_grad_()
        (g,) = torch.autograd.grad(
            policy_loss(leaf, **rest, objective=ImportanceWeighted(), backend=backend).loss, leaf, create_graph=True
        )
        found.append((g.detach(), *torch.autograd.grad(g.square().sum(), leaf)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    "objective", [GSPO(), lambda logp, old, a: logp * a, type("Mine", (CISPO,), {})()], ids=["gspo", "function", "subclass"]
)
def test_what_has_no_device_function_is_computed_in_pytorch(objective):
    given = batch(60)
    given = {name: x.view(4, 15) for name, x in given.items()}
    got, want = (run(given, backend, objective=objective) for backend in ("triton", "torch"))
    assert torch.equal(got[0].loss, want[0].loss)
    assert torch.equal(got[1], want[1])


def test_sums_of_many_programs():
    """More than are reduced at a time; some have no token, and their ratios are far apart."""
    programs = 2500
    values = torch.rand(FIELDS, programs)
    count, largest = torch.randint(0, 5, (programs,)).float(), torch.randn(programs) * 20
    largest[count == 0] = -math.inf
    values[1], values[2] = count, largest
    values[3:5, count == 0] = 0
    loss, metrics = (x.cpu().double() for x in summary_kernel.summary(values.to(DEVICE), True))
    wide = values.double()
    r, n = (wide[2] - wide[2].amax()).exp(), wide[1].sum()
    ratio, square = (r * wide[3]).sum(), (r * r * wide[4]).sum()
    want = {
        "ratio_mean": ratio * wide[2].amax().exp() / n, "ratio_max": wide[2].amax().exp(), "clip_fraction": wide[7].sum() / n,
        "ess": ratio.square() / (n * square), "kl_k1": -wide[5].sum() / n, "kl_k3": wide[6].sum() / n,
        "entropy": wide[8].sum() / n, "flagged": wide[9].sum(),
    }  # fmt: skip
    assert tuple(want) == SUMMARY
    torch.testing.assert_close(metrics, torch.stack([*want.values()]), rtol=2e-5, atol=0)
    torch.testing.assert_close(loss, wide[0].sum(), rtol=1e-5, atol=0)


same_bits = partial(torch.testing.assert_close, rtol=0, atol=0)


def test_the_same_bits_each_time():
    given = batch(20_000)
    first, second = (run(given, "triton", objective=CISPO()) for _ in range(2))
    same_bits(first[0].loss, second[0].loss)
    same_bits(first[1], second[1])
