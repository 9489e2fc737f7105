"""Objectives that leave tokens out, DPPO and IcePop: by hand, at their bounds, far off, and where a probability is almost 1."""

import math
from itertools import product

import pytest
import torch
from batches import F64, loss_and_gradient
from objectives import LEAVE_OUT, OBJECTIVES

from fastpg import DPPOKL, DPPOTV, IcePop, policy_loss, reference

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def coefficients(objective, p, q, advantages, dtype=F64):
    """-dL/dlogp of tokens whose probability was q and is p."""
    logprobs, old = (torch.as_tensor(x, dtype=F64).log().to(dtype) for x in (p, q))
    given = {"old_logprobs": old, "advantages": torch.as_tensor(advantages, dtype=dtype)}
    return (-loss_and_gradient(logprobs, **given, objective=objective, reduction="sum")[1]).tolist()


def test_total_variation_by_hand():
    """A rare token may become eight times as likely; a likely one may not move by 0.21, which changes its ratio by a third."""
    p, q = [0.008, 0.84, 0.79, 0.4, 0.4, 0.61, 0.61], [0.001, 0.63, 0.6, 0.61, 0.61, 0.4, 0.4]
    advantages = [1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 0.0]
    ratios = [a / b for a, b in zip(p, q, strict=True)]
    kept = [True, False, True, False, True, True, False]
    wanted = [r * a * k for r, a, k in zip(ratios, advantages, kept, strict=True)]
    for objective in (DPPOTV(), reference.dppo_tv()):
        assert coefficients(objective, p, q, advantages) == pytest.approx(wanted, rel=1e-12, abs=0)
    both = [r * a * k for r, a, k in zip(ratios, advantages, [True, False, True, False, False, False, False], strict=True)]
    assert coefficients(DPPOTV(two_sided=True), p, q, advantages) == pytest.approx(both, rel=1e-12, abs=0)
    bounded = [min(r, 3) * a * k for r, a, k in zip(ratios, advantages, kept, strict=True)]
    assert coefficients(DPPOTV(ratio_max=3), p, q, advantages) == pytest.approx(bounded, rel=1e-12, abs=0)


def test_binary_kl_by_hand():
    """KL(0.5, 0.7) = 0.5 log(0.5 / 0.7) + 0.5 log(0.5 / 0.3) = 0.0872; KL(0.5, 0.65) = 0.0472; of 0.3 likewise."""
    p, q, advantages = [0.7, 0.65, 0.3, 0.35, 0.7, 0.3], [0.5] * 6, [1.0, 1.0, -1.0, -1.0, -1.0, 1.0]
    assert 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3) == pytest.approx(0.0872, abs=1e-4)
    wanted = [0.0, 1.3, 0.0, -0.7, -1.4, 0.6]
    for objective in (DPPOKL(), reference.dppo_kl()):
        assert coefficients(objective, p, q, advantages) == pytest.approx(wanted, rel=1e-12, abs=0)


def test_icepop_by_hand():
    """r = 1/4, 3/4, 2, 8: CISPO would clip the first to 1/2 and the last to 5."""
    p, q, advantages = [0.1, 0.3, 0.8, 0.8], [0.4, 0.4, 0.4, 0.1], [1.0, -2.0, 1.0, 1.0]
    for objective in (IcePop(), reference.icepop()):
        assert coefficients(objective, p, q, advantages) == pytest.approx([0.0, -1.5, 2.0, 0.0], rel=1e-12, abs=0)
    assert coefficients(IcePop(None, None), p, q, advantages) == pytest.approx([0.25, -1.5, 2.0, 8.0], rel=1e-12, abs=0)
    assert coefficients(IcePop(2.0, 0.75), [0.5, 0.375, 0.75], [0.25, 0.5, 0.5], [1.0] * 3) == [0, 0, 1.5]  # on a bound


def test_the_value_is_the_ratio_or_a_weight_on_the_log_probability():
    logprobs, old = torch.tensor([-1.0], dtype=F64), torch.tensor([-1.5], dtype=F64)
    r, one = math.exp(0.5), torch.ones(1, dtype=F64)
    for objective, value in ((DPPOTV(), r), (DPPOKL(0.5, 0.5), r), (DPPOTV(ratio_max=5), -r), (IcePop(), -r)):
        assert policy_loss(logprobs, old, one, objective=objective).loss.item() == pytest.approx(-value, rel=1e-14)


@BACKENDS
@pytest.mark.parametrize("name", [*LEAVE_OUT, "icepop", "icepop-narrow"])
def test_gradients_token_by_token(name, backend):
    """Of 500 tokens with any two probabilities, far enough from every bound for fp32: the fast path and the oracle."""
    objective, oracle, _, coefficient, left_out = OBJECTIVES[name]
    logprobs, old = (torch.rand(500, dtype=F64).log().float().double() for _ in range(2))
    advantages = torch.randn(500).double()
    tokens = list(zip(logprobs.tolist(), old.tolist(), advantages.tolist(), strict=True))
    outside = [left_out(*token) or coefficient(math.exp(token[0] - token[1]), 1.0) == 0 for token in tokens]
    wanted = [0.0 if out else coefficient(math.exp(x - y), a) for out, (x, y, a) in zip(outside, tokens, strict=True)]
    assert {(out, a > 0) for out, (*_, a) in zip(outside, tokens, strict=True)} == set(product((True, False), repeat=2))

    leaf = logprobs.clone().requires_grad_()
    (exact,) = torch.autograd.grad(oracle(leaf, old, advantages).sum(), leaf)
    assert exact.tolist() == pytest.approx(wanted, rel=1e-12, abs=0)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    given = [x.float().to(device) for x in (logprobs, old, advantages)]
    gradient = loss_and_gradient(*given, objective=objective, backend=backend, reduction="sum")[1]
    assert (-gradient).tolist() == pytest.approx(wanted, rel=2e-6, abs=0)


@BACKENDS
@pytest.mark.parametrize("objective", [DPPOTV(), DPPOTV(ratio_max=2), DPPOKL(), IcePop()], ids=str)
def test_a_ratio_that_overflows_has_no_gradient_where_its_token_is_left_out(objective, backend):
    """r = e^120 is inf in fp32: for A > 0, and for A = 0 on any side, value and gradient are 0, and not 0 * inf."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    logprobs, old = torch.tensor([-0.1, -0.1, -120.0]), torch.tensor([-120.1, -120.1, -0.1])
    advantages = torch.tensor([1.0, 0.0, -1.0])
    given = [x.to(device) for x in (logprobs, old, advantages)]
    output, gradient = loss_and_gradient(*given, objective=objective, backend=backend)
    assert output.loss == 0
    assert (gradient == 0).all()


@BACKENDS
@pytest.mark.parametrize("objective", [DPPOTV(0, 0), DPPOTV(0, 0, 2.0, True), DPPOKL(0, 0), IcePop()], ids=str)
@pytest.mark.parametrize("of", range(3), ids=["logprobs", "old_logprobs", "advantages"])
def test_a_token_that_is_left_out_does_not_hide_nan(of, objective, backend):
    """Token 1 is; a NaN of it is in the loss all the same, as is that of a token that is kept."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    for token in (0, 1):
        given = [torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -7.0]), torch.tensor([1.0, 1.0])]
        given[of][token] = math.nan
        output, gradient = loss_and_gradient(*(x.to(device) for x in given), objective=objective, backend=backend)
        assert output.loss.isnan()
        assert gradient[token].isnan() or of == 1


def binary_kl(others_new, others_old):
    return (1 - others_old) * (torch.log1p(-others_old) - torch.log1p(-others_new)) + others_old * (
        others_old / others_new
    ).log()


@BACKENDS
def test_the_divergence_of_tokens_that_are_almost_certain(backend):
    """1 - p from e^-15 to e^-8, where fp32 knows 1 - exp(logp) only to 6e-8: decided 0.5 % from the bound as in float64."""
    delta = 1e-3 * torch.tensor([0.995, 1.005], dtype=F64).repeat(100)
    others_new = torch.linspace(-15, -8, 200, dtype=F64).exp()
    low, high = others_new.log(), torch.zeros(200, dtype=F64)
    for _ in range(60):  # by bisection, what the token's probability was
        middle = (low + high) / 2
        too_far = binary_kl(others_new, middle.exp()) > delta
        low, high = torch.where(too_far, low, middle), torch.where(too_far, middle, high)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    new, old = (torch.log1p(-x).float().to(device) for x in (others_new, low.exp()))
    gradient = loss_and_gradient(new, old, torch.ones(200, device=device), objective=DPPOKL(1e-3, 1e-3), backend=backend)[1]
    assert (gradient == 0).tolist() == [False, True] * 100


@BACKENDS
def test_a_token_that_has_become_certain_has_an_infinite_divergence(backend):
    """p = 1 and q < 1: left out for A > 0. q = 1 as well: nothing has changed. The gradient for A < 0 stays r A."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    logprobs, old = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([-0.5, 0.0, -0.5])
    advantages = torch.tensor([1.0, 1.0, -1.0])
    given = [x.to(device) for x in (logprobs, old, advantages)]
    gradient = loss_and_gradient(*given, objective=DPPOKL(3.0, 3.0), reduction="sum", backend=backend)[1]
    assert gradient.tolist() == pytest.approx([0.0, -1.0, math.exp(0.5)], rel=1e-6)


BAD = {
    "delta-low": (lambda: DPPOTV(-0.1), "delta_low must be >= 0 and finite, a bound on a divergence; got -0.1"),
    "delta-high": (lambda: DPPOTV(delta_high=math.nan), "delta_high must be >= 0 and finite, a bound on a divergence; got nan"),
    "delta-str": (lambda: DPPOKL("0.05"), "delta_low must be >= 0 and finite, a bound on a divergence; got '0.05'"),
    "delta-bool": (lambda: DPPOKL(0.1, True), "delta_high must be >= 0 and finite, a bound on a divergence; got True"),
    "ratio-max": (
        lambda: DPPOKL(ratio_max=0),
        "ratio_max must be positive and finite, a bound on the ratio itself, or None for no bound; got 0",
    ),
    "two-sided": (lambda: DPPOTV(two_sided=1), "two_sided must be True or False; got 1"),
    "icepop-max": (
        lambda: IcePop(-1.0),
        "ratio_max must be positive and finite, a bound on the ratio itself, or None for no bound; got -1.0",
    ),
    "icepop-min": (
        lambda: IcePop(ratio_min=math.inf),
        "ratio_min must be >= 0 and finite, a bound on the ratio itself, or None for no bound; got inf",
    ),
    "icepop-crossed": (lambda: IcePop(0.5, 2.0), "ratio_min must not exceed ratio_max; got ratio_min=2.0, ratio_max=0.5"),
}


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD)
def test_settings_that_do_not_fit(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert str(error.value) == words
