"""The step of the loss under pytest-benchmark: `pytest bench --benchmark-only`. Not part of the suite: it asserts nothing."""

from dataclasses import replace

import pytest
from cases import HEADS, Cell, batch
from peers import METHODS, bare_products

CELL = Cell("step", "pytest", HEADS["smollm2-135m"], 1024, "float32", ())


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def batch_of_dtype(request):
    return batch(replace(CELL, dtype=request.param))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full logits, compiled"])
def test_step(benchmark, batch_of_dtype, name):
    method = METHODS[name]
    why_not = method.why_not(batch_of_dtype)
    if why_not is not None:
        pytest.skip(why_not)
    benchmark.pedantic(lambda: method.step(batch_of_dtype.leaves()), rounds=3, warmup_rounds=1)


def test_bare_products(benchmark, batch_of_dtype):
    benchmark.pedantic(lambda: bare_products(batch_of_dtype), rounds=3, warmup_rounds=1)
