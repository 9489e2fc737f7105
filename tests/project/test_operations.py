"""How many operations and launches a step asks of a device (see `operations`): they are what a call costs the host.

                                          at 12db879    at most
    one pass, check=False                        131         17
    one pass, check=True, no row flagged         141         24
    two passes and policy_loss                   160         25
    ... each further slice of the vocabulary      16          4
    scoring, check=True                           44         10
    scoring, check=False                          35          9

A figure that falls is written here; one that rises is a regression.
"""

import pytest
import torch
from operations import counted

from fastpg import CISPO, linear_cispo_loss, linear_logprobs, policy_loss
from fastpg.tiles import products, triton_tiles
from fastpg.tiles.structures import TileShape

ROWS, SIZE, VOCAB = 64, 64, 512


@pytest.fixture(autouse=True)
def _bf16_products(monkeypatch):
    """As a GPU has them, whichever CPU this is: one without them has further branches, by tiles."""
    monkeypatch.setattr(products, "has_bf16_products", lambda: True)


def inputs(dtype=torch.bfloat16):
    """hidden, weight, tokens, old log-probabilities near the truth, advantages, mask."""
    hidden = torch.randn(ROWS, SIZE, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, SIZE).mul_(0.2).to(dtype).requires_grad_()
    tokens, mask = torch.randint(0, VOCAB, (ROWS,)), torch.rand(ROWS) > 0.25
    with torch.no_grad():
        old = torch.log_softmax(hidden.float() @ weight.float().T, -1).gather(1, tokens[:, None])[:, 0]
    return hidden, weight, tokens, old + 0.01 * torch.randn(ROWS), torch.randn(ROWS), mask


def one_pass(check):
    *arguments, mask = inputs()
    out = linear_cispo_loss(*arguments, mask=mask, backend="triton", check=check)
    out.loss.backward()


def two_passes():
    hidden, weight, tokens, old, advantages, mask = inputs()
    logprobs = linear_logprobs(hidden, weight, tokens, mask=mask, backend="triton").logprobs
    policy_loss(logprobs, old, advantages, objective=CISPO(), mask=mask, backend="triton").loss.backward()


@torch.no_grad()
def scoring(check):
    hidden, weight, tokens, *_, mask = inputs()
    linear_logprobs(hidden, weight, tokens, mask=mask, backend="triton", check=check)


MOST = {
    "one pass": (lambda: one_pass(check=False), 17),
    "one pass, checked": (lambda: one_pass(check=True), 24),
    "two passes": (two_passes, 25),
    "scoring, checked": (lambda: scoring(check=True), 10),
    "scoring": (lambda: scoring(check=False), 9),
}


INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="on CPU tensors, in the interpreter")


@pytest.fixture(autouse=True)
def _plain_memory():
    torch.use_deterministic_algorithms(False)  # which fills what is allocated


@INTERPRETED
@pytest.mark.parametrize("name", MOST)
def test_operations_of_a_step(name):
    step, most = MOST[name]
    with counted() as of_inputs:
        inputs()
    step()  # what is done once and kept
    with counted() as operations:
        step()
    total = operations.total - of_inputs.total
    assert total <= most, dict(operations.counts - of_inputs.counts)
    assert total > 0.9 * most, f"{total}: write it down"


@INTERPRETED
def test_operations_of_a_further_slice(monkeypatch):
    """D, its two products, and the sums of its rounding errors. More than one slice takes two operations in all, once."""
    totals = []
    for slices in (1, 2, 5):
        shape = TileShape(256, VOCAB // slices + 1, 1, 1024)
        monkeypatch.setattr(triton_tiles, "tile_shape", lambda head, shape=shape: shape)
        two_passes()
        with counted() as step:
            two_passes()
        totals.append(step.total)
    assert totals[1] - totals[0] == 4 + 2
    assert totals[2] - totals[1] == 3 * 4


def test_the_counter_sees_operations_fills_and_copies_and_no_views():
    x = torch.ones(4, 4)
    with counted() as step:
        x[1:].t().reshape(-1)  # a copy
        x.view(-1)[2:].expand(3, -1).detach()
        torch.empty_like(x)
    assert step.counts == {"clone": 1} or step.counts == {"_reshape_copy": 1}
    with counted() as step:
        x.new_zeros(3).fill_(1.0).sum().item()
    assert step.counts == {"new_zeros": 1, "fill_": 1, "sum": 1, "_local_scalar_dense": 1}
    with counted() as step:
        torch.where(x > 0, x, 0)
    assert step.counts == {"gt": 1, "scalar_tensor": 1, "where": 1}  # the number becomes a tensor first


@INTERPRETED
def test_the_counter_sees_launches():
    hidden, weight, tokens, *_ = inputs()
    with counted() as step, torch.no_grad():
        linear_logprobs(hidden, weight, tokens, backend="triton")
    assert step.counts["launch of logsumexp_kernel"] == step.counts["launch of target_kernel"] == 1


def test_the_casts_of_a_cpu_product_are_not_counted():
    """Where a GPU's product of 16-bit operands returns fp32."""
    a, b = torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16()
    with counted() as step:
        (a @ b).float()
    assert +step.counts == {"mm": 1}
    with counted() as step:
        a.float() @ b.float()
    assert +step.counts == {"mm": 1}
    with counted() as step:
        (a + b).float()
    assert step.counts == {"add": 1, "_to_copy": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_batch_without_tokens_does_not_walk_the_vocabulary(dtype):
    """As many operations for 5 tiles of the weight as for one."""
    totals = set()
    for vocab in (100, 20_000):
        hidden, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (3, vocab))
        tokens, mask = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
        with counted() as step:
            linear_cispo_loss(hidden, weight, tokens, torch.zeros(3), torch.ones(3), mask=mask).loss.backward()
            linear_logprobs(hidden, weight, tokens, mask=mask, entropy=True).logprobs.sum().backward()
        totals.add(step.total)
    assert len(totals) == 1, totals
