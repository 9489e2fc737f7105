"""Finished gradients times the incoming factor: `kernels/scale.py`, and what calls it."""

import pytest
import torch
from operations import counted

from fastpg import CISPO, linear_policy_loss
from fastpg.kernels import scale as kernel
from fastpg.kernels.scale import scale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIGNALLING = 0x7F81  # a NaN that every arithmetic operation turns into a quiet one: shows whether a number was written


def gradients(dtype):
    """As a head with LoRA and a bias has them, the largest with more blocks than there are programs."""
    sizes = [(3, 5), (1,), (kernel._PROGRAMS * kernel._BLOCK + 7, 1), (0, 4), (kernel._BLOCK,)]
    wide = [torch.randn(size, device=DEVICE) for size in sizes]
    return [g if i in (1, 4) else g.to(dtype) for i, g in enumerate(wide)]


@pytest.mark.parametrize("factor", [0.3, -65536.0, 0.0, torch.inf, torch.nan, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_products_are_formed_in_fp32_and_rounded_once(dtype, factor):
    found = gradients(dtype)
    want = [(g.float() * factor).to(g.dtype) for g in found]
    scale(found, torch.tensor(factor, device=DEVICE))
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", range(6))
def test_any_number_of_gradients(count):
    found = [torch.full((i + 1, 3), float(i), device=DEVICE) for i in range(count)]
    scale(found, torch.tensor(2.0, device=DEVICE))
    assert all((g == 2 * i).all() for i, g in enumerate(found))


@pytest.mark.parametrize(("factor", "is_written"), [(1.0, False), (0.5, True)])
def test_a_factor_of_1_writes_nothing(factor, is_written):
    bits = torch.full((700,), SIGNALLING, dtype=torch.int16, device=DEVICE)
    scale([bits.view(torch.bfloat16)], torch.tensor(factor, device=DEVICE))
    assert (bits != SIGNALLING).all() == is_written


def test_a_gradient_with_gaps_is_refused():
    with pytest.raises(RuntimeError, match="view"):
        scale([torch.ones(4, 6, device=DEVICE)[:, :3]], torch.tensor(2.0, device=DEVICE))


def step(backend, dtype=torch.bfloat16):
    hidden, weight = (torch.randn(n, 16).to(dtype).requires_grad_() for n in (9, 40))
    out = linear_policy_loss(
        hidden, weight, torch.arange(9), -torch.ones(9), torch.randn(9), objective=CISPO(), check=False, backend=backend
    )
    return out.loss, hidden, weight


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CPU tensors, in the interpreter")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_of_a_loss_alone_makes_no_pass_over_its_gradients(backend):
    loss, *_ = step(backend)
    with counted() as operations:
        loss.backward()
    assert operations.counts["mul"] == operations.counts["mul_"] == 0
    assert operations.counts["launch of scale_kernel"] == (backend == "triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CPU tensors, in the interpreter")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_other_factors_reach_the_gradients(backend, keep):
    torch.manual_seed(1)
    loss, *plain = step(backend)
    loss.backward()
    torch.manual_seed(1)
    loss, *scaled = step(backend)
    (loss * 0.37).backward(retain_graph=keep)
    for x, y in zip(plain, scaled, strict=True):
        assert torch.equal(y.grad, (x.grad.float() * 0.37).bfloat16())
    if keep:
        (loss * 0.63).backward()
        for x, y in zip(plain, scaled, strict=True):
            torch.testing.assert_close(y.grad, x.grad, rtol=2**-6, atol=1e-6)
