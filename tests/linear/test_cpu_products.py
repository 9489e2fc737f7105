"""Products of 16-bit heads on CPUs with bf16 products (AVX-512, AMX) and without them (AVX2), whichever this one is."""

import pytest
import torch
from problems import check_result, random_problem
from schedules import KERNEL_DEVICE, TORCH, TRITON

from fastpg import CISPO, LMHead, linear_logprobs
from fastpg.tiles import products
from fastpg.tools.memory import transient_bytes

ON_A_CPU = TORCH + (TRITON if KERNEL_DEVICE == "cpu" else [])


@pytest.fixture(params=[True, False], ids=["bf16 products", "none"])
def has_bf16_products(request, monkeypatch):
    monkeypatch.setattr(products, "has_bf16_products", lambda: request.param)
    return request.param


@pytest.fixture
def operands(monkeypatch):
    """The dtypes of all products' operands and results."""
    dtypes, multiply = set(), products._multiply

    def counted(a, b, out=None, accumulate=False, dtype=None):
        result = multiply(a, b, out, accumulate, dtype)
        dtypes.update((a.dtype, b.dtype, result.dtype))
        return result

    monkeypatch.setattr(products, "_multiply", counted)
    return dtypes


@pytest.mark.parametrize("schedule", ON_A_CPU, ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 9.0}, {"lora": 3}], ids=["plain", "bias", "lora"])
@pytest.mark.parametrize("workspace", [None, 3 * 2**20], ids=["one chunk", "chunks"])
def test_a_bf16_head(schedule, options, workspace, has_bf16_products, operands):
    problem = random_problem(700, 300, torch.bfloat16, **options)
    check_result(problem, schedule(problem, CISPO(), workspace=workspace))
    if not has_bf16_products:
        assert operands == {torch.float32}
    elif workspace is None:
        assert torch.bfloat16 in operands


def test_dweight_is_rounded_once():
    """Over three blocks of rows and two tiles of columns the sums are fp32; only their result is bf16."""
    exps, x = torch.randn(1100, 4500).bfloat16(), torch.randn(1100, 8)
    wide, rounded = torch.empty(4500, 8), torch.empty(4500, 8, dtype=torch.bfloat16)
    for out in (wide, rounded):
        products._widened_products(out, exps, x, accumulate=False, holds_bf16=False)
    assert torch.equal(rounded, wide.bfloat16())


def test_no_more_than_tiles_is_widened():
    """dW of 49152 rows has 24 MiB in fp32; a tile of E and the sums of one tile of dW have 8 MiB and 2 MiB."""
    exps, x, out = torch.zeros(600, 49152).bfloat16(), torch.zeros(600, 128), torch.zeros(49152, 128).bfloat16()
    used = transient_bytes(lambda: products._widened_products(out, exps, x, False, False), device="cpu")
    assert 10 * 2**20 <= used < 12 * 2**20


def test_float16_keeps_the_tails_of_the_softmax_in_dweight():
    """A probability of 1e-8 is 0 in fp16, and 2000 of them, times hidden states of 16, are not."""
    weight = torch.zeros(2, 8, dtype=torch.float16)
    weight[0, 0] = 1.15
    weight.requires_grad_()
    hidden = torch.zeros(2000, 8, dtype=torch.float16)
    hidden[:, 0] = 16
    linear_logprobs(hidden, LMHead(weight), torch.zeros(2000, dtype=torch.long)).logprobs.sum().backward()
    logit = 16 * weight[0, 0].double()
    want = 2000 * 16 * torch.sigmoid(-logit)
    assert want > 2e-4
    torch.testing.assert_close(weight.grad[:, 0].double(), torch.stack([want, -want]), rtol=2e-3, atol=0)
