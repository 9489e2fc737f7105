"""The metrics of `policy_loss` against their definitions."""

import math

import pytest
import torch
from batches import F32, F64, MASK, batch, every_layout, every_objective, lay_out
from objectives import INF, OBJECTIVES, TOKEN, soft_clipped

from fastpg import CISPO, ImportanceWeighted, Reinforce, policy_loss


def test_metrics_equal_their_definitions():
    logprobs, old, advantages, _ = batch(spread=3.0).values()
    old[0, :2] = logprobs[0, :2] - torch.tensor([0.1, 2.0])  # one ratio inside the bounds, one outside
    metrics = policy_loss(logprobs, old, advantages, objective=CISPO(2.0, 0.5), mask=MASK).metrics
    d = [logprobs[b, t].item() - old[b, t].item() for b in range(6) for t in range(5) if MASK[b, t]]
    r, n = [math.exp(x) for x in d], len(d)
    wanted = {
        "ratio_mean": sum(r) / n,
        "ratio_max": max(r),
        "clip_fraction": sum(x < 0.5 or x > 2.0 for x in r) / n,
        "ess": sum(r) ** 2 / (n * sum(x * x for x in r)),
        "kl_k1": -sum(d) / n,
        "kl_k3": sum(math.expm1(x) - x for x in d) / n,
        "tokens": n,
        "skipped_tokens": 0,
        "recomputed_tokens": 0,
        "repeated_products": 0,
        "silenced_tokens": 0,
        "work_saved": 0,
    }
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(wanted, rel=1e-13, abs=1e-14)
    assert 0 < wanted["clip_fraction"] < 1


@every_layout
@every_objective
def test_metrics_and_clip_fraction_on_the_objectives_own_ratio(name, layout):
    inputs = batch(per_sequence=True)
    metrics = policy_loss(**lay_out(inputs, layout), objective=OBJECTIVES[name][0]).metrics
    d = torch.where(MASK, inputs["logprobs"] - inputs["old_logprobs"], 0)
    lengths = MASK.sum(1, keepdim=True)
    own = d if OBJECTIVES[name][2] == TOKEN else (d.sum(1, keepdim=True) / lengths.clamp(min=1)).expand(6, 5)
    low, high = {
        "cispo": (0, 5.0),
        "cispo-both-bounds": (0.8, 1.3),
        "cispo-from-below": (0.5, INF),
        "ppo": (0.8, 1.2),
        "ppo-clip-higher": (0.7, 1.45),
        "ppo-dual": (0.8, 1.28),
        "dppo-tv-weight": (0, 1.3),
        "dppo-kl-weight": (0, 1.6),
        "icepop": (0.5, 5),
        "icepop-narrow": (0.8, 1.3),
        "gspo": (0.7, 1.45),
        "gspo-default": (1 - 3e-4, 1 + 4e-4),
    }.get(name, (0, INF))
    outside = ((own.exp() < low) | (own.exp() > high))[MASK].double().mean()
    assert metrics["clip_fraction"].item() == pytest.approx(outside.item(), rel=1e-13)
    if (low, high) not in ((0, INF), (0, 5.0)):
        assert outside > 0
    if name == "gspo":  # the shares of sequences 0 (5 tokens) and 1 (3 tokens); on the ratios of tokens it would be another
        assert metrics["clip_fraction"].item() == pytest.approx(8 / 15)
    assert metrics["ratio_mean"].item() == pytest.approx(d[MASK].exp().mean().item(), rel=1e-13)
    assert metrics["tokens"].item() == 15


CLIPPED = {
    "cispo-default": (CISPO(), 0.0),
    "cispo-3": (CISPO(3.0), 0.2),
    "cispo-3-below": (CISPO(3.0, 0.75), 0.6),
    "a-bound-is-inside": (CISPO(2.0, 0.5), 0.4),
    "unclipped": (CISPO(None), 0.0),
    "reinforce": (Reinforce(), 0.0),
    "importance-weighted": (ImportanceWeighted(), 0.0),
    "users-function": (soft_clipped, 0.0),
}


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize(("objective", "share"), CLIPPED.values(), ids=CLIPPED)
def test_clip_fraction_counts_ratios_outside_the_bounds_whatever_the_advantage(objective, share, sign):
    ratios = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=F64)
    old = -ratios.log()
    old[1], old[3] = math.log(2), -math.log(2)
    output = policy_loss(torch.zeros(5, dtype=F64), old, torch.full((5,), sign), objective=objective)
    assert output.metrics["clip_fraction"].item() == pytest.approx(share)


@pytest.mark.parametrize("top", [60.0, 88.0, 300.0, -300.0])
def test_ess_of_huge_and_tiny_ratios(top):
    """Ratios e^top and e^(top - 1) of fp32: squares of either leave its range; (1 + 1/e)^2 / (2 (1 + 1/e^2)) does not."""
    old = torch.tensor([-top, 1.0 - top])
    metrics = policy_loss(torch.zeros(2), old, torch.ones(2), objective=Reinforce()).metrics
    wanted = (1 + math.exp(-1)) ** 2 / (2 * (1 + math.exp(-2)))
    assert metrics["ess"].item() == pytest.approx(wanted, rel=1e-6)


def test_ess_is_the_share_of_effective_samples():
    """One ratio that dwarfs the other three: 1 of 4."""
    old = torch.tensor([-50.0, 0.0, 0.0, 0.0])
    assert policy_loss(torch.zeros(4), old, torch.ones(4), objective=Reinforce()).metrics["ess"].item() == 0.25


@every_objective
def test_outputs_other_than_the_loss_are_detached(name):
    inputs = batch(F32)
    logprobs = inputs["logprobs"].requires_grad_()
    output = policy_loss(**inputs, objective=OBJECTIVES[name][0])
    assert output.loss.requires_grad
    assert output.loss.shape == ()
    assert torch.equal(output.logprobs, torch.where(MASK, logprobs.detach(), 0))
    for key, value in output.metrics.items():
        assert isinstance(value, torch.Tensor), key
        assert value.shape == (), key
        assert not value.requires_grad, key
    assert not output.logprobs.requires_grad


def test_metrics_do_not_share_storage():
    """Accumulating one metric in place must not change another."""
    values = list(policy_loss(**batch(), objective=CISPO()).metrics.values())
    assert len({v.data_ptr() for v in values}) == len(values)
