"""Rows of dX after product 2, and the operand of product 3: the kernel against the PyTorch tile op in float64."""

import pytest
import torch

from fastpg.tiles import torch_tiles, triton_tiles
from fastpg.tiles.structures import Chunk, Head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}  # a multiply-add rounds once or twice in fp32
VOCAB = 50


def problem(dtype, rows, size, places=None, strided=False):
    """Tokens of other ranks on both sides of the vocabulary are among them."""
    weight = torch.randn(VOCAB, 2 * size if strided else size, device=DEVICE).to(dtype)[:, :: 2 if strided else 1]
    hidden = torch.randn(rows, size, device=DEVICE).to(dtype)
    tokens = torch.randint(-20, VOCAB + 20, (rows,), device=DEVICE)
    chunk = Chunk(hidden, None, tokens, None, places)
    return chunk, Head(weight, None, None, None, 1.0), torch.randn(rows, size, device=DEVICE)


def run(tiles, chunk, head, product, factor, residual, out, weighted):
    tiles.gradient_rows(product.clone(), chunk, head, factor, residual, out, weighted)
    return [x for x in (out, weighted) if x is not None]


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("wanted", ["hidden and weight", "hidden", "weight"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (70, 33), (5, 5000)])
def test_against_float64(rows, size, dtype, gathered, wanted):
    places = torch.randperm(rows + 9, device=DEVICE)[:rows] if gathered else None
    chunk, head, product = problem(dtype, rows, size, places)
    factor, residual = torch.randn(rows, device=DEVICE), torch.randn(rows, device=DEVICE) * 0.01
    count = rows + 9 if gathered else rows

    def results(tiles, of):
        out = torch.full((count, size), 7.0, dtype=of(chunk.hidden).dtype, device=DEVICE) if "hidden" in wanted else None
        weighted = torch.full((rows, size), torch.nan, device=DEVICE).to(of(chunk.hidden).dtype) if "weight" in wanted else None
        arguments = Chunk(*map(of, chunk)), Head(*map(of, head)), of(product), of(factor), of(residual)
        return run(tiles, *arguments, out, weighted)

    for got, exact in zip(results(triton_tiles, lambda x: x), results(torch_tiles, wide), strict=True):
        size_of_terms = product.abs().amax() + 1
        torch.testing.assert_close(got.double(), exact, rtol=ROUNDING[dtype], atol=float(2**-23 * size_of_terms))


@pytest.mark.parametrize("dtype", ROUNDING, ids=["fp32", "bf16"])
def test_a_strided_weight_and_no_residual(dtype):
    chunk, head, product = problem(dtype, 9, 20, strided=True)
    factor = torch.randn(9, device=DEVICE)
    for residual in (None, torch.ones(9, device=DEVICE)):
        found = [
            run(tiles, chunk, head, product, factor, residual, torch.empty(9, 20, device=DEVICE), None)[0]
            for tiles in (torch_tiles, triton_tiles)
        ]
        torch.testing.assert_close(*found, rtol=2**-22, atol=2**-21)


def test_no_rows():
    chunk, head, product = problem(torch.float32, 0, 8)
    run(triton_tiles, chunk, head, product, torch.empty(0, device=DEVICE), None, torch.empty(0, 8, device=DEVICE), None)
