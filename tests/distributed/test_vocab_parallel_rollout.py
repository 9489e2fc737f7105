"""A decoupled loss where the vocabulary is on two ranks: the result of one process, and an error on both where they differ.

The weights decide which rows are computed, so ranks with other rollout_logprobs would not run the same sweep.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from fastpg import CISPO, LMHead, kept, linear_policy_loss, rollout

pytestmark = pytest.mark.xdist_group("vocab-parallel ranks")

V, H, ROWS, EDGE = 50, 8, 24, 20
MASKED = partial(rollout.masked_weights, low=0.8, high=1.25, unscored="zero")
CORRECTIONS = {"plain": None, "masked": MASKED}


def batch():
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, H), torch.randn(V, H)
    tokens, mask = torch.randint(0, V, (ROWS,)), torch.rand(ROWS) > 0.2
    old = -4 + torch.rand(ROWS)
    return (hidden, weight, tokens, old, torch.randn(ROWS)), {"mask": mask, "rollout_logprobs": old - 0.4 * torch.randn(ROWS)}


def results(arguments, head_of, **options):
    hidden, weight, *others = arguments
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_policy_loss(hidden, head_of(weight), *others, objective=CISPO(), **options)
    out.loss.backward()
    return out.loss.detach(), out.metrics.to_dict(), hidden.grad, weight.grad


def run(rank: int) -> dict:
    arguments, options = batch()
    rows = slice(0, EDGE) if rank == 0 else slice(EDGE, V)
    own = arguments[0], arguments[1][rows], *arguments[2:]

    def head_of(weight):
        return LMHead(weight, group=dist.group.WORLD, vocab_start=rows.start)

    found = {
        (name, backend): results(own, head_of, rollout_correction=correction, backend=backend, **options)
        for name, correction in CORRECTIONS.items()
        for backend in ("torch", "triton")
    }

    def said(check=True, mask=None, correction=MASKED, **changes) -> str:
        given = options | changes | {"mask": options["mask"] if mask is None else mask, "check": check}
        try:
            linear_policy_loss(own[0], head_of(own[1]), *own[2:], objective=CISPO(), rollout_correction=correction, **given)
        except ValueError as error:
            return str(error)
        return "nothing"

    place = options["mask"].nonzero()[0]
    other, hole = options["rollout_logprobs"].clone(), options["rollout_logprobs"].clone()
    other[place] = arguments[3][place] - rank  # within the band on rank 0, outside of it on rank 1
    hole[place] = torch.nan if rank else -1.0
    weights = MASKED(arguments[3], other, options["mask"])
    found["other rows"] = said(rollout_logprobs=other)
    rows_of_rank = kept(options["mask"], arguments[4], weights)
    found["other rows, chosen before"] = said(rollout_logprobs=other, mask=rows_of_rank, check=False)
    found["not scored on one"] = said(rollout_logprobs=hole, correction=None)
    found["none on one"] = said(rollout_logprobs=None if rank else other, correction=None if rank else MASKED)
    found["nothing wrong"] = said()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_on_ranks(run, 2, timeout=100)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_like_one_process(ranks, name, backend):
    arguments, options = batch()
    loss, metrics, of_hidden, of_weight = results(arguments, LMHead, rollout_correction=CORRECTIONS[name], **options)
    first, second = (of_rank[name, backend] for of_rank in ranks)
    for rank in (first, second):
        torch.testing.assert_close(rank[0], loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank[2], of_hidden, rtol=1e-4, atol=1e-6)
        assert rank[1] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    assert torch.equal(first[2], second[2])
    torch.testing.assert_close(torch.cat([first[3], second[3]]), of_weight, rtol=1e-4, atol=1e-6)
    assert (metrics["skipped_tokens"] > 0) == (name == "masked")


def test_ranks_that_would_compute_other_rows_raise(ranks):
    first, second = ranks
    words = "head.group: its ranks must agree on tokens and mask; rank(s) [1] of the group differ from rank 0"
    for name in ("other rows", "other rows, chosen before", "none on one"):
        assert first[name] == second[name], name
        assert first[name].startswith(words), name
    assert first["not scored on one"] == "head.group: the call failed on rank(s) [1] of the group; the error is raised there"
    assert second["not scored on one"].startswith("rollout_logprobs must be finite where a token counts; got nan at")
    assert first["nothing wrong"] == second["nothing wrong"] == "nothing"
