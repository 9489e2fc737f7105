"""The stand-in for the one matrix product: what it refuses, what it rounds, and that there is no other product."""

import ast
from pathlib import Path

import pytest
import torch
from worst_hardware import memory_around, worst_product

from fastpg import linear_cispo_loss
from fastpg.linear.rows import Rows
from fastpg.tiles import products
from fastpg.tiles.products import dense, has_gaps

PACKAGE = Path(__file__).resolve().parents[2] / "fastpg"
PRODUCTS = {"mm", "addmm", "addmm_", "matmul", "bmm", "baddbmm", "einsum", "mv", "addmv", "dot", "inner", "tensordot", "linear"}
# plain code of the oracle, of what is compared with it, and of the demo; and three rows that a layer is asked about
ON_FULL_LOGITS = {"cases", "compare", "train", "estimators", "casting_heads"}


def test_nothing_else_calls_a_matrix_product():
    for path in PACKAGE.rglob("*.py"):
        if path.stem in ON_FULL_LOGITS or path.parent.name == "reference":
            continue
        tree = ast.parse(path.read_text())
        allowed = {id(n) for f in tree.body if getattr(f, "name", "") == "_multiply" for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in PRODUCTS or id(node) in allowed, f"{path.name}:{node.lineno}"
            assert not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)), f"{path.name}:{node.lineno}"


def padded(rows: int, columns: int, padding: float) -> torch.Tensor:
    x = torch.full((rows, columns + 3), padding)
    x[:, :columns] = 1
    return x[:, :columns]


@pytest.mark.parametrize("transposed", [False, True])
def test_it_refuses_operands_in_memory_that_is_not_finite(transposed):
    multiply = worst_product(products._multiply)
    for padding in (torch.nan, torch.inf):
        x = padded(4, 5, padding)
        a, b = (x.T, torch.ones(4, 2)) if transposed else (x, torch.ones(5, 2))
        with pytest.raises(AssertionError, match="first operand"):
            multiply(a, b)
        with pytest.raises(AssertionError, match="second operand"):
            multiply(b.T, a.T)
    assert torch.equal(multiply(padded(4, 5, 0.0), torch.ones(5, 2)), torch.full((4, 2), 5.0))
    assert multiply(torch.full((2, 3), torch.nan), torch.ones(3, 2)).isnan().all()  # a NaN of its own is the caller's


def test_memory_around():
    x = torch.arange(20.0).view(4, 5)
    assert len(memory_around(x)) == len(memory_around(x.T)) == len(memory_around(x[:1].expand(4, 5))) == 0
    assert memory_around(x[:2, :3]).tolist() == [3, 4, 8, 9]
    assert memory_around(x[2:, 1:3]).tolist() == [13, 14, 15, 18, 19]  # to the end of the storage
    assert memory_around(x[:, ::2])[:4].tolist() == [1, 3, 6, 8]


def test_it_rounds_where_the_switch_allows_it():
    seen = []
    multiply = worst_product(lambda a, b, *_: seen.append(a))
    third = torch.full((1, 1), 1 / 3)
    multiply(third, third)
    switch = torch.backends.mkldnn.matmul
    before, switch.fp32_precision = switch.fp32_precision, "bf16"
    try:
        multiply(third, third)
    finally:
        switch.fp32_precision = before
    assert torch.equal(seen[0], third)
    assert torch.equal(seen[1], third.bfloat16().float())


def test_gaps():
    x = torch.zeros(6, 8)
    for whole in (x, x.T, x[2:4], x[2:3], x[:1].expand(6, 8), x[:0, :3]):
        assert not has_gaps(whole)
        assert dense(whole) is whole
    for part in (
        x[:, :5],
        x[:, ::2],
        x[::2],
        x[:, :5].T,
        x[:, ::2][:1].expand(6, 4),
        x[:, 3:4],
        x[:1, :5],
        x[:, :1].expand(6, 8),
    ):
        assert has_gaps(part)
        assert torch.equal(dense(part), part)
        assert not has_gaps(dense(part))


def test_chunks_have_their_rows_side_by_side():
    """The order of sums in a product may follow the layout of its operands, on some CPUs."""
    values, tokens = torch.randn(16, 512), torch.zeros(512, dtype=torch.int64)
    for hidden in (values.T, values.T.bfloat16(), torch.randn(512, 32)[:, ::2], torch.randn(1, 16).expand(512, 16)):
        for stop in (256, 100):
            chunk = Rows(hidden, None, None, None, tokens, None).chunk(0, stop, torch.float32, multiple=256)
            assert chunk.hidden.shape == (256, 16)
            assert chunk.hidden.stride(1) == 1
            assert torch.equal(chunk.hidden[:stop], hidden[:stop].float())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [17, 1000, 1024])
def test_rows_of_e_end_in_zeros(monkeypatch, backend, dtype, vocab):
    """What products 2 and 3 are given has finite memory behind every row, whatever was there before."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("on CPU tensors, in the interpreter")
    seen, original = [], products.gradient_products

    def spy(exps, *arguments):
        seen.append(memory_around(exps))
        return original(exps, *arguments)

    monkeypatch.setattr(products, "gradient_products", spy)
    hidden, weight = torch.randn(40, 16).to(dtype).requires_grad_(), (torch.randn(vocab, 16) / 5).to(dtype).requires_grad_()
    tokens, advantages = torch.randint(0, vocab, (40,)), torch.randn(40)
    linear_cispo_loss(hidden, weight, tokens, None, advantages, backend=backend).loss.backward()
    assert len(seen) == 1
    assert len(seen[0]) >= 32 * 40  # oneDNN's kernels read blocks of 32
    assert (seen[0] == 0).all()
    assert hidden.grad.isfinite().all()
