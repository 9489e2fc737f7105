"""`metrics.named("verl")`: every name is the number that the library computes, by its formula written out (sources: TRL 1.16's
GRPOTrainer; verl's core_algos.py, dp_actor.py and rollout_corr_helper.py). The page's table has every name, and no other."""

import copy
import itertools
import math
import pickle
import re
from collections.abc import Mapping

import pytest
import torch
from operations import counted
from pages import PAGES

from fastpg import CISPO, GSPO, SAPO, ClipCov, KLCov, PPOClip, Reinforce, linear_policy_loss, policy_loss
from fastpg.loss.metric_names import Library
from fastpg.rollout import mismatch_metrics

F64 = torch.float64
PAGE = (PAGES / "objectives.md").read_text()
SECTION = re.search(r"^## Names in logs.*?\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)[1]
ROWS = re.findall(r"^\| (trl|verl) \| `(\S+)` \| `(\w+)` \|", SECTION, re.MULTILINE)
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])  # what verl calls rollout_is

LOW, HIGH = 0.2, 0.3
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()


def inputs(masked_value: float = 0.0):
    """Log-probabilities of the policy, of the old one and of the engine, entropies and advantages."""
    p, old, q = (-3 * torch.rand(3, 5, dtype=F64) - 0.01 for _ in range(3))
    return [torch.where(MASK, x, masked_value) for x in (p, old, q, torch.rand(3, 5, dtype=F64), torch.randn(3, 5, dtype=F64))]


def masked_mean(values):
    return float((values * MASK).sum() / MASK.sum())


def of_trl(p, old, q, entropies):
    """`_generate_and_score_completions` and `_compute_loss` of GRPOTrainer."""
    delta = (old - q).abs()[MASK]
    return {
        "entropy": masked_mean(entropies),
        "sampling/sampling_logp_difference/mean": float(delta.mean()),
        "sampling/sampling_logp_difference/max": float(delta.max()),
    }


def of_verl(p, old, q, entropies, objective, level):
    """`compute_policy_loss_*`, `agg_loss` of token means, `compute_offpolicy_metrics`, `compute_rollout_correction_weights`."""
    negative_approx_kl = (p - old).clamp(-20, 20)
    ratio = negative_approx_kl.exp()
    found = {"actor/entropy": masked_mean(entropies), "actor/ppo_kl": masked_mean(-negative_approx_kl)}
    if isinstance(objective, CISPO):
        found["actor/pg_clipfrac"] = masked_mean((ratio != ratio.clamp(1 - LOW, 1 + HIGH)).double())
    log_ratio = old - q
    rho = log_ratio.clamp(-20, 20).exp()
    sums = (log_ratio * MASK).sum(-1)
    found |= {
        "rollout_corr/kl": masked_mean(q - old),
        "rollout_corr/k3_kl": masked_mean(log_ratio.exp() - log_ratio - 1),
        "rollout_corr/chi2_token": masked_mean(rho.square()) - 1,
        "rollout_corr/chi2_seq": float((2 * sums.clamp(-20, 20)).exp().mean() - 1),
    }
    weights = rho if level == "token" else sums.clamp(-20, 20).exp()[:, None].expand_as(rho)
    found["rollout_corr/rollout_is_mean"] = masked_mean(weights)
    found["rollout_corr/rollout_is_max"] = float(weights[MASK].max())
    return found


def metrics_of(objective, level="token", masked_value=0.0):
    p, old, q, entropies, advantages = inputs(masked_value)
    out = policy_loss(p, old, advantages, objective=objective, mask=MASK, entropies=entropies, reduction="seq-mean-token-mean")
    return out.metrics | mismatch_metrics(old, q, MASK, level=level), (p, old, q, entropies)


@LEVELS
@pytest.mark.parametrize("objective", [CISPO(1 + HIGH, 1 - LOW), PPOClip(LOW, HIGH), GSPO(LOW, HIGH), SAPO()], ids=repr)
def test_every_name_is_the_librarys_number(objective, level):
    metrics, given = metrics_of(objective, level)
    assert metrics.named("trl").to_dict() == pytest.approx(of_trl(*given), rel=1e-12)
    assert metrics.named("verl").to_dict() == pytest.approx(of_verl(*given, objective, level), rel=1e-12)


def test_the_formulas_tell_what_they_are_of_apart():
    """Numbers that a wrong row could be taken from are others here."""
    metrics, _ = metrics_of(CISPO(1 + HIGH, 1 - LOW), "sequence")
    numbers = sorted(value for name, value in metrics.to_dict().items() if isinstance(value, float) and name != "work_saved")
    assert all(b - a > 1e-6 for a, b in itertools.pairwise(numbers))


def test_what_is_masked_reaches_no_name():
    metrics, _ = metrics_of(CISPO(1 + HIGH, 1 - LOW), masked_value=math.nan)
    for library in Library.__args__:
        assert all(math.isfinite(value) for value in metrics.named(library).to_dict().values())


def test_names_that_the_objective_makes_another_number_are_left_out():
    names = {repr(o): set(metrics_of(o)[0].named("verl")) for o in (CISPO(), PPOClip(), ClipCov(), KLCov(), Reinforce())}
    assert [name for name in names if "actor/pg_clipfrac" in names[name]] == [repr(CISPO())]
    assert [name for name in names if "actor/ppo_kl" not in names[name]] == [repr(KLCov())]
    p, old, _, _, advantages = inputs()
    own = policy_loss(p, old, advantages, objective=lambda logp, old, a: a * logp).metrics
    assert list(own.named("verl")) == ["actor/ppo_kl"]
    assert list((type(own)(dict(own))).named("verl")) == []  # the values alone: of which objective?


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_names_of_one_pass(backend):
    """Where kernels leave sums of a step, they are of the same objective."""
    hidden, weight = torch.randn(12, 16), torch.randn(40, 16)
    given = torch.randint(0, 40, (12,)), -3 - torch.rand(12), torch.ones(12)
    for objective, clips in ((CISPO(1 + HIGH, 1 - LOW), True), (PPOClip(LOW, HIGH), False)):
        metrics = linear_policy_loss(hidden, weight, *given, objective=objective, backend=backend, entropy=True).metrics
        wanted = {"actor/entropy": metrics["entropy"], "actor/ppo_kl": metrics["kl_k1"]}
        wanted |= {"actor/pg_clipfrac": metrics["clip_fraction"]} if clips else {}
        assert metrics.named("verl").to_dict() == {name: value.item() for name, value in wanted.items()}
        of_ready = policy_loss(-torch.rand(6), -torch.rand(6), torch.ones(6), objective=objective, backend=backend).metrics
        assert ("actor/pg_clipfrac" in of_ready.named("verl")) == clips


def test_the_page_has_every_name_and_no_other():
    metrics, _ = metrics_of(CISPO())
    there = {library: metrics.named(library)._own_names for library in Library.__args__}
    assert [(library, *row) for library, names in there.items() for row in names.items()] == ROWS
    for library, name, own in ROWS:
        assert metrics.named(library)[name] == metrics[own]
    left_out = SECTION[SECTION.index("left out, because") :]
    assert not {name for _, name, _ in ROWS} & set(re.findall(r"`(\S+?)`(?! of PPO)", left_out))


def test_a_view_is_a_mapping_that_is_computed_when_it_is_looked_at():
    metrics, _ = metrics_of(CISPO())
    with counted() as step:
        view = metrics.named("verl")
        assert "actor/ppo_kl" in view
        assert "kl_k1" not in view
        assert len(view) == len(list(view)) == 9
        assert repr(view).startswith("NamedMetrics(actor/entropy, actor/ppo_kl")
    assert step.total == 0
    assert isinstance(view, Mapping)
    assert view["actor/ppo_kl"].dim() == 0
    with counted() as step:
        numbers = view.to_dict()
    assert step.counts["_local_scalar_dense"] == 0  # one read of all of them, by tolist
    assert numbers == {name: value.item() for name, value in dict(view).items()}
    for again in (copy.copy(view), copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert again.to_dict() == numbers


def test_names_are_of_metrics_that_are_there():
    out = policy_loss(-torch.rand(4), None, torch.randn(4), objective=Reinforce())
    assert out.metrics.named("trl").to_dict() == {}
    assert list(out.metrics.named("verl")) == ["actor/ppo_kl"]
    with pytest.raises(KeyError, match="'entropy' is not among the names of 'trl' that these metrics have: none"):
        out.metrics.named("trl")["entropy"]
    with pytest.raises(KeyError, match="'kl' is not among the names of 'verl' that these metrics have: actor/ppo_kl"):
        out.metrics.named("verl")["kl"]
    assert out.metrics.named("verl").get("kl") is None


@pytest.mark.parametrize("library", ["TRL", "openrlhf", "", None, ["trl"]])
def test_unknown_libraries_are_told_the_known_ones(library):
    metrics, _ = metrics_of(CISPO())
    with pytest.raises(ValueError, match=re.escape(f"library must be one of 'trl', 'verl'; got {library!r}")):
        metrics.named(library)
