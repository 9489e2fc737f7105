"""Sets of tokens as a sampler would leave them, and what the oracle says of a problem whose softmax is over them."""

from __future__ import annotations

from dataclasses import replace

import torch
from problems import Result, check_result

from fastpg import KLPenalty, Support, reference
from fastpg.crosscheck import cases
from fastpg.crosscheck.cases import Inputs, Settings

f16, f64 = torch.float16, torch.float64
MIXED = "mixed"


def random_sets(tokens: torch.Tensor, vocab: int, size: int | str) -> torch.Tensor:
    """(N, V) bool: each token and others at random, `size` in all. MIXED: from 1 to the whole vocabulary, row by row."""
    sizes = torch.tensor([1, 2, 8, vocab // 2, vocab - 1, vocab] if size == MIXED else [size])
    sizes = sizes.clamp(1, vocab)[torch.arange(len(tokens)) % len(sizes)]
    order = torch.rand(len(tokens), vocab).scatter_(1, tokens.clamp(0, vocab - 1)[:, None], -1.0).argsort(1).argsort(1)
    return order < sizes[:, None]


def largest_sets(x: Inputs, size: int) -> torch.Tensor:
    """(N, V) bool: the tokens with the largest logits, `size` of each row, and the row's own."""
    wide = x.leaves(f64)
    with torch.no_grad():
        z = reference.logits(wide.hidden, wide.head, wide.temperature)
    members = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.topk(size, 1).indices, True)
    return members.scatter_(1, x.tokens[:, None], True)


def logprobs_over(x: Inputs, members: torch.Tensor, **asked):
    """The oracle's results, float64."""
    wide = x.leaves(f64)
    with torch.no_grad():
        return reference.linear_logprobs(
            wide.hidden, wide.head, wide.tokens, mask=x.mask, support=members, temperature=wide.temperature, **asked
        )


def sampled_over(x: Inputs, members: torch.Tensor) -> Inputs:
    """The problem with old log-probabilities over the sets, as far from the policy's as they were.

    In float16: no ratio, and no confident row, whose gradient it could not hold.
    """
    wide = x.leaves(f64)
    before, _ = reference.linear_logprobs(wide.hidden, wide.head, wide.tokens, temperature=wide.temperature)
    x = replace(x, old_logprobs=(x.old_logprobs - before.detach() + logprobs_over(replace(x, mask=None), members)[0]).float())
    if x.hidden.dtype != f16:
        return x
    now, _ = logprobs_over(replace(x, mask=None), members)
    fine = (now < -0.1) | (members.sum(1) == 1)
    return replace(x, old_logprobs=now.float(), mask=fine if x.mask is None else x.mask & fine)


def oracle_over(
    x: Inputs, members: torch.Tensor, objective, reduction: str = "sum", kl: KLPenalty | None = None
) -> dict[str, torch.Tensor]:
    """As `cases.oracle`, over the sets."""
    wide = x.leaves(f64)
    logprobs, _ = reference.linear_logprobs(
        wide.hidden, wide.head, wide.tokens, mask=x.mask, support=members, temperature=wide.temperature
    )
    loss = cases.reference_loss(logprobs, wide, Settings(objective, reduction, kl))
    return {"logp": logprobs.detach(), "loss": loss.detach(), **wide.gradients(loss)}


def check_over(x: Inputs, members: torch.Tensor, schedule, objective, reduction: str = "sum", kl=None, **options) -> Result:
    """The schedule with the sets keeps the promise of accuracy. No gradient reaches a row of the head that is in no set."""
    got = schedule(x, objective, reduction, kl, support=Support.from_mask(members), **options)
    check_result(x, got, oracle_over(x, members, objective, reduction, kl))
    check_outside(x, members, got)
    return got


def check_outside(x: Inputs, members: torch.Tensor, gradients: dict[str, torch.Tensor]) -> None:
    unused = ~members[x.keep()].any(0)
    for name in ("dW", "db", "dB"):
        if name in gradients:
            assert not gradients[name][unused].any(), name
