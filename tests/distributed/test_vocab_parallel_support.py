"""Sets of tokens where columns are on two ranks: the results of one process, with equal bits on every rank; and errors on both.

Every rank passes the same sets, in ids of the whole vocabulary. All cases run in one set of processes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from problems import Result, check_result, random_problem
from ranks import run_on_ranks
from sampled_sets import MIXED, check_outside, logprobs_over, oracle_over, random_sets, sampled_over

from fastpg import CISPO, LMHead, Reinforce, Support, TokenStatistics, linear_cispo_loss, linear_logprobs, linear_policy_loss
from fastpg.crosscheck.accuracy import logprob_tolerance
from fastpg.crosscheck.cases import Inputs, Settings
from fastpg.linear.outputs import OUTPUTS

pytestmark = pytest.mark.xdist_group("vocab-parallel ranks")

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
TOP = 6
CASES = {  # edges: the first rank has [0, edge), or with "swapped" [edge, V)
    "torch": ("torch", f32, 300, MIXED),
    "torch, swapped": ("torch", f32, 300, MIXED),
    "bf16": ("torch", bf16, 301, MIXED),
    "fp16": ("torch", f16, 304, MIXED),
    "two tokens": ("torch", f32, 300, 2),
    "the token alone": ("torch", f32, 300, 1),
    "three columns on one rank": ("torch", f32, 3, MIXED),
    "triton": ("triton", f32, 100, MIXED),
    "triton, swapped": ("triton", bf16, 3, 8),
    "no tokens": ("torch", f32, 300, MIXED),
}
VOCAB = 701


def problem(name: str) -> tuple[Inputs, torch.Tensor]:
    backend, dtype, _, size = CASES[name]
    torch.manual_seed(0)
    rows = 0 if name == "no tokens" else 30 if backend == "triton" else 60
    x = random_problem(
        rows, VOCAB, dtype, hidden_size=32, bias=True, softcap=20.0, temperature="per-token", masked=True, lora=3,
        lora_dtype=f32,
    )  # fmt: skip
    members = random_sets(x.tokens, VOCAB, size)
    return sampled_over(x, members), members


def head_of(name: str, x: Inputs, rank: int) -> LMHead:
    edge, head = CASES[name][2], x.head
    rows = slice(0, edge) if rank == ("swapped" in name) else slice(edge, VOCAB)
    lora = (head.lora.a, head.lora.b[rows], head.lora.scale)
    return replace(
        head, weight=head.weight[rows], bias=head.bias[rows], lora=lora, group=dist.group.WORLD, vocab_start=rows.start
    )


def support_of(x: Inputs, members: torch.Tensor, rank: int) -> Support:
    """The sets; at masked positions what differs from rank to rank, and is no set."""
    garbage = [[], [rank, rank], [-5 - rank], [VOCAB + rank], None]
    sets = [row.nonzero()[:, 0] for row in members]
    return Support.from_lists([ids if k else garbage[n % 5] for n, (ids, k) in enumerate(zip(sets, x.keep(), strict=True))])


def run_cases(rank: int) -> dict:
    results = {}
    for name, (backend, *_) in CASES.items():
        x, members = problem(name)
        support, own = support_of(x, members, rank), replace(x, head=head_of(name, x, rank))
        options = {"mask": x.mask, "temperature": x.temperature, "support": support, "backend": backend}
        leaves = own.leaves()
        out = linear_policy_loss(
            leaves.hidden, leaves.head, x.tokens, x.old_logprobs, x.advantages, objective=CISPO(), reduction="sum", **options
        )
        one = {"logp": out.logprobs, "loss": out.loss.detach(), **leaves.gradients(out.loss)}
        leaves = own.leaves()
        two = linear_logprobs(leaves.hidden, leaves.head, x.tokens, **options).logprobs
        two = {"logp": two.detach(), **leaves.gradients((two * x.advantages.to(two)).sum())}
        leaves = own.leaves()
        found = linear_logprobs(leaves.hidden, leaves.head, x.tokens, outputs=OUTPUTS, top_k=TOP, **options)
        further = leaves.gradients(further_loss(found))
        with torch.no_grad():  # a set may be wrong at masked positions only
            again = linear_logprobs(own.hidden, own.head, x.tokens, outputs=OUTPUTS, top_k=TOP, check=False, **options)
        close = [torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, again, strict=True)]
        results[f"{name}, unchecked"] = dict(zip(found._fields, close, strict=True))
        results[name] = one, two, [v.detach() for v in found], further
    results["errors"] = errors(rank)
    return results


def further_loss(found) -> torch.Tensor:
    places = torch.arange(len(found.logprobs)) + 1
    return ((found.logprobs + 0.3 * found.entropy - 0.7 * found.logsumexp + 0.5 * found.mean_logits) / places).sum()


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_on_ranks(run_cases, 2, timeout=100)


def joined(name: str, first: dict, second: dict) -> dict:
    """The results of one process, of which each rank has some rows of the head's gradients."""
    whole = dict(first)
    for part in ("dW", "db", "dB"):
        halves = (second[part], first[part]) if "swapped" in name else (first[part], second[part])
        whole[part] = torch.cat(halves)
    return whole


@pytest.mark.parametrize("schedule", ["one pass", "two passes"])
@pytest.mark.parametrize("name", CASES)
def test_like_one_process(ranks, name, schedule):
    x, members = problem(name)
    first, second = (of_rank[name][schedule == "two passes"] for of_rank in ranks)
    for part in first.keys() - {"dW", "db", "dB"}:  # complete on each
        assert torch.equal(first[part], second[part]), part
    got, objective = joined(name, first, second), CISPO() if schedule == "one pass" else Reinforce()
    want = oracle_over(x, members, objective)
    if schedule == "two passes":  # the gradient of a sum, of which the loss is the negative
        want = {n: -v if n.startswith("d") else v for n, v in want.items() if n != "loss"}
        objective = None
    check_result(x, Result(got, Settings(objective)), want)
    check_outside(x, members, got)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1] != f16])
def test_statistics(ranks, name):
    x, members = problem(name)
    (*_, found, further), (*_, others, _) = (of_rank[name] for of_rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(found, others, strict=True))
    got, want = TokenStatistics(*found), logprobs_over(x, members, outputs=OUTPUTS, top_k=TOP)
    tolerance = logprob_tolerance(x.leaves(torch.float64).hidden.new_full((len(x.tokens),), 40.0), f32, 32, "cpu").detach()
    for field in ("logprobs", "entropy", "logsumexp", "mean_logits", "log_sum_sq_probs", "top_logprobs"):
        value, exact = getattr(got, field).double(), getattr(want, field)
        error = torch.where(value == exact, 0, (value - exact).abs())
        assert (error <= 2 * (tolerance if exact.dim() == 1 else tolerance[:, None])).all(), field
    near = (want.top_logprobs.diff(dim=1).abs() < 1e-4).any(1) if len(x.tokens) else torch.zeros(0, dtype=torch.bool)
    for field in ("argmax", "is_top1", "top_ids"):
        assert torch.equal(getattr(got, field)[~near], getattr(want, field)[~near]), field
    assert (got.rank == want.rank).float().mean() > 0.9 if len(x.tokens) else True
    few = x.keep() & (members.sum(1) < TOP)
    assert (got.top_ids[few, -1] == -1).all()
    assert all(value.isfinite().all() for value in further.values())


@pytest.mark.parametrize("name", CASES)
def test_statistics_without_checks(ranks, name):
    """Small sets are not gathered then; all else is as with checks."""
    for of_rank in ranks:
        assert all(of_rank[f"{name}, unchecked"].values()), of_rank[f"{name}, unchecked"]


# ---- errors


SETS = [[0, 1], [2, 1], [3]]  # of tokens 0, 1, 3; a rank has two of the four columns
TOKENS = torch.tensor([0, 1, 3])


def errors(rank: int) -> dict[str, str]:
    """Rank 1 has something else, or both have the same that is wrong."""
    head = LMHead(torch.ones(2, 4), group=dist.group.WORLD, vocab_start=2 * rank)
    first, whole = Support.from_lists(SETS), Support.from_lists([None, *SETS[1:]])
    cases = {
        "another set": first if rank == 0 else Support.from_lists([[0, 2], *SETS[1:]]),
        "ids at other positions": Support.from_lists([[0, 1], [1, 2, 3], [3]] if rank == 0 else [[0, 1, 3], [1, 2], [3]]),
        "none on one rank": first if rank == 0 else None,
        "whole on one rank": first if rank == 0 else whole,
        "whole on one rank, ids on both": first if rank == 0 else first._replace(whole=whole.whole),
        "outside of every shard": Support.from_lists([[0, 4], *SETS[1:]]),
        "outside, on one rank": first if rank == 0 else Support.from_lists([[0, -1], *SETS[1:]]),
        "without the token, on one rank": first if rank == 0 else Support.from_lists([[1, 2], *SETS[1:]]),
        "another N, on one rank": first if rank == 0 else Support.from_lists(SETS[:2]),
    }
    said = {}
    for name, support in cases.items():
        for check in (True, False):
            words = []
            for call in (linear_logprobs, lambda *given, **named: linear_cispo_loss(*given, None, torch.ones(3), **named)):
                try:
                    call(torch.ones(3, 4), head, TOKENS, support=support, check=check)
                    words.append("nothing")
                except (ValueError, TypeError) as error:
                    words.append(str(error))
            assert words[0] == words[1]
            said[name, check] = words[0]
    return said


AGREE = "head.group: its ranks must agree on support; rank(s) [1] of the group differ from rank 0"
FAILED = "head.group: the call failed on rank(s) [1] of the group; the error is raised there"


def test_ranks_agree_on_the_sets_or_all_raise(ranks):
    """Before any work: a rank that went on alone would wait for the other one."""
    first, second = (of_rank["errors"] for of_rank in ranks)
    for name in ("another set", "ids at other positions", "none on one rank", *(n for n, _ in first if n.startswith("whole"))):
        for check in (True, False):
            assert first[name, check] == second[name, check] == AGREE, name
    outside = "support.ids must be in [0, 4), the vocabulary of all ranks; got 4"
    for check in (True, False):
        assert first["outside of every shard", check] == second["outside of every shard", check] == outside
    for name, words in (
        ("outside, on one rank", "support.ids must be in [0, 2147483647); got -1 in the set of position 0"),
        ("without the token, on one rank", "support leaves out the sampled token 0 at position 0"),
        ("another N, on one rank", "support must have a set for each of the 3 tokens, offsets (4,); got offsets (3,)"),
    ):
        assert first[name, True] == FAILED
        assert second[name, True].startswith(words)
    assert first["another N, on one rank", False] == FAILED  # shapes are looked at without checks too
    assert first["without the token, on one rank", False] == AGREE
