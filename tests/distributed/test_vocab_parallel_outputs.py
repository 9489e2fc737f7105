"""Further statistics of rows whose columns are on several ranks: those of one process, with equal bits on every rank.

All cases run in one set of processes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from problems import Result, check_result, random_problem
from ranks import run_on_ranks

from fastpg import CISPO, LMHead, TokenStatistics, linear_logprobs, linear_policy_loss, reference
from fastpg.crosscheck.accuracy import logprob_tolerance
from fastpg.crosscheck.cases import Inputs, Settings
from fastpg.linear.outputs import OUTPUTS

pytestmark = pytest.mark.xdist_group("vocab-parallel ranks")

f32, bf16 = torch.float32, torch.bfloat16
TOP = 6
CASES = {  # edges: the first rank has [0, edge), or with "swapped" [edge, V)
    "torch": ("torch", f32, 300),
    "torch swapped": ("torch", f32, 300),
    "bf16": ("torch", bf16, 300),
    "three columns on one rank": ("torch", f32, 3),
    "triton": ("triton", f32, 100),
    "triton swapped": ("triton", bf16, 3),
    "no tokens": ("torch", f32, 300),
}
VOCAB = 701


def problem(name: str) -> Inputs:
    """The rows of the weight from 350 on are those before them once more, so that both ranks have equal logits."""
    backend, dtype, _ = CASES[name]
    torch.manual_seed(0)
    rows = 0 if name == "no tokens" else 30 if backend == "triton" else 60
    x = random_problem(
        rows, VOCAB, dtype, hidden_size=32, bias=True, softcap=20.0, temperature="per-token", masked=True, lora=3
    )
    for part in (x.head.weight, x.head.bias, x.head.lora.b):
        part[350:700] = part[:350]
    return x


def head_of(name: str, x: Inputs, rank: int) -> LMHead:
    _, _, edge = CASES[name]
    rows = slice(0, edge) if rank == ("swapped" in name) else slice(edge, VOCAB)
    head = x.head
    lora = (head.lora.a, head.lora.b[rows], head.lora.scale)
    return replace(
        head, weight=head.weight[rows], bias=head.bias[rows], lora=lora, group=dist.group.WORLD, vocab_start=rows.start
    )


def loss_of(found) -> torch.Tensor:
    places = torch.arange(len(found.logprobs)) + 1
    found = found.logprobs + 0.3 * found.entropy - 0.7 * found.logsumexp + 0.5 * found.mean_logits
    return (found / places).sum()


def run_cases(rank: int) -> dict:
    results = {}
    for name, (backend, *_) in CASES.items():
        x = problem(name)
        leaves = replace(x, head=head_of(name, x, rank)).leaves()
        options = {"mask": x.mask, "temperature": x.temperature, "top_k": TOP, "backend": backend}
        found = linear_logprobs(leaves.hidden, leaves.head, x.tokens, outputs=OUTPUTS, **options)
        loss_of(found).backward()
        with torch.no_grad():
            again = linear_logprobs(leaves.hidden, leaves.head, x.tokens, outputs=OUTPUTS, check=False, **options)
        different = [n for n, a, b in zip(found._fields, found, again, strict=True) if not torch.equal(a, b)]
        assert not different, (name, different)
        one = linear_policy_loss(
            leaves.hidden, leaves.head, x.tokens, found.logprobs.detach() + 0.1, torch.ones(len(x.tokens)), objective=CISPO(),
            outputs=OUTPUTS, **options,
        )  # fmt: skip
        results[f"{name} in one pass"] = list(one.statistics)
        gradients = {"dX": leaves.hidden.grad, "dW": leaves.head.weight.grad, "db": leaves.head.bias.grad}
        results[name] = [v.detach() for v in found], gradients
    results["errors"] = errors(rank)
    return results


def errors(rank: int) -> list[str]:
    head = LMHead(torch.ones(2, 4), group=dist.group.WORLD, vocab_start=2 * rank)
    said = []
    for options in ({"top_k": 5}, {"top_k": 1 + rank}, {"outputs": OUTPUTS[: 1 + rank]}, {"outputs": "rank" if rank else ()}):
        with pytest.raises((ValueError, TypeError)) as raised:
            linear_logprobs(torch.ones(1, 4), head, torch.tensor([0]), **options)
        said.append(str(raised.value))
    return said


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_on_ranks(run_cases, 2, timeout=100)


@pytest.mark.parametrize("name", CASES)
def test_like_one_process(ranks, name):
    x = problem(name)
    (found, gradients), (other, others) = (of_rank[name] for of_rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    got, wide = TokenStatistics(*found), x.leaves(torch.float64)
    want = reference.linear_logprobs(
        wide.hidden, wide.head, x.tokens, mask=x.mask, temperature=wide.temperature, outputs=OUTPUTS, top_k=TOP
    )
    z = reference.logits(wide.hidden, wide.head, wide.temperature).detach()
    tolerance = logprob_tolerance(z.abs().amax(1) if len(z) else z.new_zeros(0), x.hidden.dtype, 32, "cpu")
    for field in ("logprobs", "entropy", "logsumexp", "mean_logits", "log_sum_sq_probs", "top_logprobs"):
        value, exact = getattr(got, field).double(), getattr(want, field).detach()
        factor = 2 if field == "log_sum_sq_probs" else 1
        limit = factor * (tolerance if exact.dim() == 1 else tolerance[:, None])
        assert ((value - exact).abs() <= limit).all(), field
    # twins on the two ranks have equal logits, also where they are computed apart: the smaller id comes first
    keep = x.keep()
    assert (got.argmax[keep] % 350 == want.argmax[keep] % 350).all()
    assert (got.argmax[keep] < 350).float().mean() > 0.9 if len(keep) else True
    apart = (z.scatter(1, x.tokens[:, None], torch.inf) - z.gather(1, x.tokens[:, None])).abs().amin(1) > 2 * tolerance
    assert torch.equal(got.rank[apart], want.rank[apart])
    assert torch.equal(got.is_top1, (got.argmax == x.tokens) & keep)
    assert (got.top_ids[~keep] == -1).all()
    assert torch.equal(got.top_ids[:, 0], got.argmax)
    loss_of(want).backward()
    halves = [(gradients["dW"], gradients["db"]), (others["dW"], others["db"])]
    dw, db = (torch.cat(v) for v in zip(*(reversed(halves) if "swapped" in name else halves), strict=True))
    assert torch.equal(gradients["dX"], others["dX"])
    exact = {"logp": want.logprobs.detach(), "dX": wide.hidden.grad, "dW": wide.head.weight.grad, "db": wide.head.bias.grad}
    exact["scale"] = exact["dX"].norm(dim=1) + x.head.weight.double().norm(dim=1).mean() / (torch.arange(len(x.tokens)) + 1)
    check_result(x, Result({"logp": got.logprobs, "dX": gradients["dX"], "dW": dw, "db": db}, Settings()), exact)


@pytest.mark.parametrize("name", CASES)
def test_one_pass_has_those_of_two_passes(ranks, name):
    """Which `test_like_one_process` holds to float64."""
    found, other = (of_rank[f"{name} in one pass"] for of_rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    for field, a, b in zip(TokenStatistics._fields, found, ranks[0][name][0], strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=field)
        else:
            same = (a == b).float()
            assert same.numel() == 0 or same.mean() > 0.9, field  # twins are computed apart


def test_equal_logits_on_two_ranks():
    """Whole numbers, whose logits are exact: ids and ranks are those of one process to the last."""
    for found in run_on_ranks(equal_logits, 2):
        for name, value, exact in found:
            assert torch.equal(value, exact), name


def equal_logits(rank: int) -> list:
    torch.manual_seed(0)
    weight, hidden = torch.randint(-2, 3, (20, 8)).float().repeat(2, 1), torch.randint(-2, 3, (50, 8)).float()
    tokens = (hidden @ weight.T).argmax(1)
    tokens = torch.where(torch.arange(50) % 2 == 0, tokens, (tokens + 20 * (torch.arange(50) % 3)) % 40)
    whole = linear_logprobs(hidden, weight, tokens, outputs=OUTPUTS, top_k=8)
    rows = slice(20, 40) if rank == 0 else slice(0, 20)  # the first rank has the last ids
    head = LMHead(weight[rows], group=dist.group.WORLD, vocab_start=rows.start)
    found = linear_logprobs(hidden, head, tokens, outputs=OUTPUTS, top_k=8)
    ones = torch.ones(50)
    one = linear_policy_loss(hidden, head, tokens, None, ones, objective=CISPO(), outputs=OUTPUTS, top_k=8).statistics
    names = "is_top1", "argmax", "rank", "top_ids"
    return [(name, getattr(x, name), getattr(whole, name)) for name in names for x in (found, one)]


def test_ranks_must_ask_for_the_same(ranks):
    for rank, found in enumerate(ranks):
        top, different_top, different_names, failed = found["errors"]
        assert top == "top_k must be at most V = 4, the vocabulary of all ranks; got 5"
        assert different_top == "head.group: its ranks must agree on top_k; rank(s) [1] of the group differ from rank 0"
        assert different_names == "head.group: its ranks must agree on outputs; rank(s) [1] of the group differ from rank 0"
        words = (
            'outputs must be a sequence of names, such as ("rank",)' if rank else "head.group: the call failed on rank(s) [1]"
        )
        assert failed.startswith(words)
