"""In these tests the interpreter's tl.dot has one order of sums for every row and column (`interpreted_products`)."""

import interpreted_products
import numpy as np
import pytest
import torch
from ranks import run_on_ranks

from fastpg import linear_logprobs
from fastpg.kernels.tile import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU nothing is interpreted")


def test_kernels_multiply_with_it(monkeypatch):
    """Whatever the version of Triton: its interpreter looks the product up at every call."""
    products = []
    monkeypatch.setattr(np, "matmul", lambda *a, **k: products.append(a) or interpreted_products.one_order(*a, **k))
    hidden, weight = torch.randn(3, 40), torch.randn(1100, 40)
    linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]), backend="triton")
    assert products
    assert all(a.ndim == 2 for a, _ in products)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_is_a_product_in_one_order(dtype):
    numbers = np.random.default_rng(0)
    a, b = numbers.standard_normal((64, 32)).astype(dtype), numbers.standard_normal((48, 32)).astype(dtype).T
    assert np.matmul is interpreted_products.one_order
    got = np.matmul(a, b, dtype=np.float32)
    np.testing.assert_allclose(got, a.astype(np.float64) @ b.astype(np.float64), rtol=0, atol=1e-5)
    assert got.dtype == np.float32
    for place in (1, 6, 17, 63):
        np.testing.assert_array_equal(np.matmul(np.roll(a, place, 0), b, dtype=np.float32), np.roll(got, place, 0))


def product_of_a_rank(rank):
    return np.matmul is interpreted_products.one_order


@pytest.mark.xdist_group("data-parallel ranks")
def test_ranks_multiply_with_it_too():
    assert run_on_ranks(product_of_a_rank, 2) == [True, True]


def test_other_products_are_numpys():
    numbers = np.random.default_rng(0)
    a, b = numbers.standard_normal((5, 3, 4)), numbers.standard_normal((5, 4, 2))
    np.testing.assert_array_equal(np.matmul(a, b), a @ b)
