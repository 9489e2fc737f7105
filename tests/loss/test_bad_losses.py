"""What does not fit `policy_loss`, and settings of objectives, raise before any work an error that names the argument."""

import math
import re

import pytest
import torch

from fastpg import CISPO, ImportanceWeighted, KLPenalty, policy_loss

INF, NAN = math.inf, math.nan


def nothing_may_be_computed(*_):
    raise AssertionError("the objective was called")


def policy_inputs(**changes):
    inputs = {
        "logprobs": -torch.rand(2, 3),
        "old_logprobs": -torch.rand(2, 3),
        "advantages": torch.randn(2),
        "objective": nothing_may_be_computed,
    }
    return inputs | changes


BAD_POLICY = {
    "logprobs-list": ({"logprobs": [-1.0]}, TypeError, r"logprobs must be a floating-point tensor; got list"),
    "logprobs-int": ({"logprobs": torch.ones(2, 3).long()}, TypeError, r"logprobs must be a floating-point .*got torch.int64"),
    "logprobs-result": (
        {"logprobs": (torch.zeros(2, 3), None)},
        TypeError,
        r"logprobs must be a floating-point tensor; got tuple",
    ),
    "old-list": ({"old_logprobs": [-1.0]}, TypeError, r"old_logprobs must be a floating-point tensor or None; got list"),
    "old-int": ({"old_logprobs": torch.ones(2, 3).long()}, TypeError, r"old_logprobs must be .*got torch.int64"),
    "old-shape": ({"old_logprobs": torch.ones(2, 2)}, ValueError, r"old_logprobs must .*logprobs, \(2, 3\); got \(2, 2\)"),
    "old-flat": ({"old_logprobs": torch.ones(6)}, ValueError, r"old_logprobs must .*logprobs, \(2, 3\); got \(6,\)"),
    "old-per-sequence": ({"old_logprobs": torch.ones(2)}, ValueError, r"old_logprobs must .*logprobs, \(2, 3\); got \(2,\)"),
    "advantages-float": ({"advantages": 1.0}, TypeError, r"advantages must be a real tensor; got float"),
    "advantages-list": ({"advantages": [1.0, 2.0]}, TypeError, r"advantages must be a real tensor; got list"),
    "advantages-none": ({"advantages": None}, TypeError, r"advantages must be a real tensor; got NoneType"),
    "advantages-bool": ({"advantages": torch.ones(2).bool()}, TypeError, r"advantages must be a real tensor; got torch.bool"),
    "kl-number": ({"kl": 0.1, "ref_logprobs": -torch.rand(2, 3)}, TypeError, r"kl must be a KLPenalty.*; got (float|0.1)"),
    "kl-without-ref": ({"kl": KLPenalty(0.1)}, ValueError, r"kl was given without ref_logprobs"),
    "ref-without-kl": ({"ref_logprobs": torch.ones(2, 3)}, ValueError, r"ref_logprobs was given without kl"),
    "ref-int": ({"ref_logprobs": torch.ones(2, 3).int()}, TypeError, r"ref_logprobs must be a floating-.*got torch.int32"),
    "ref-shape": ({"ref_logprobs": torch.ones(3)}, ValueError, r"ref_logprobs must .*logprobs, \(2, 3\); got \(3,\)"),
    "rollout-number": ({"rollout_weights": 2.0}, TypeError, r"rollout_weights must be a floating-point tensor.*got float"),
    "rollout-per-sequence": ({"rollout_weights": torch.ones(2)}, ValueError, r"rollout_weights must .*\(2, 3\); got \(2,\)"),
    "mask-int": ({"mask": torch.ones(2, 3).long()}, TypeError, r"mask must be a bool tensor.*got torch.int64 .*mask.bool\(\)"),
    "mask-shape": (
        {"mask": torch.ones(3, 2).bool()},
        ValueError,
        r"mask must have the shape of logprobs, \(2, 3\); got \(3, 2\)",
    ),
    "mask-per-sequence": ({"mask": torch.ones(2).bool()}, ValueError, r"mask must have .*logprobs, \(2, 3\); got \(2,\)"),
    "reduction-mean": (
        {"reduction": "mean"},
        ValueError,
        r"reduction must be one of token-mean, seq-mean-token-mean, seq-mean-token-sum, sum; got 'mean'",
    ),
    "reduction-none": ({"reduction": None}, ValueError, r"reduction must be one of token-mean, .*; got None"),
    "denominator-zero": ({"denominator": 0}, ValueError, r"denominator must be a positive number .*; got 0"),
    "denominator-negative": ({"denominator": -2.0}, ValueError, r"denominator must be a positive number .*; got -2.0"),
    "denominator-nan": ({"denominator": NAN}, ValueError, r"denominator must be a positive number .*; got nan"),
    "denominator-inf": ({"denominator": INF}, ValueError, r"denominator must be a positive number .*; got inf"),
    "denominator-bool": ({"denominator": True}, (TypeError, ValueError), r"denominator must be a positive number .*; got True"),
    "denominator-str": ({"denominator": "3"}, (TypeError, ValueError), r"denominator must be a positive number .*; got '3'"),
    "denominator-1d": ({"denominator": torch.ones(1)}, ValueError, r"denominator must be .* 0-d tensor; got shape \(1,\)"),
    "denominator-per-sequence": ({"denominator": torch.ones(2)}, ValueError, r"denominator must be .* 0-d .*got shape \(2,\)"),
    "denominator-tensor-zero": ({"denominator": torch.tensor(0)}, ValueError, r"denominator must be .*positive.*; got .*0"),
    "denominator-tensor-negative": (
        {"denominator": torch.tensor(-1.0)},
        ValueError,
        r"denominator must be .*positive.*; got .*-1",
    ),
    "denominator-tensor-nan": ({"denominator": torch.tensor(NAN)}, ValueError, r"denominator must be .*positive.*; got .*nan"),
    "denominator-tensor-bool": (
        {"denominator": torch.tensor(True)},
        (TypeError, ValueError),
        r"denominator must be .*; got .*(bool|True)",
    ),
    "objective-none": ({"objective": None}, TypeError, r"objective must be .*; got None"),
    "objective-name": ({"objective": "cispo"}, TypeError, r"objective must be .*; got ('cispo'|str)"),
    "objective-class": ({"objective": CISPO}, TypeError, r"objective must be .*; got the class CISPO.*CISPO\("),
    "old-device": (
        {"old_logprobs": torch.ones(2, 3, device="meta")},
        ValueError,
        r"old_logprobs is on meta but logprobs is on cpu",
    ),
    "advantages-device": (
        {"advantages": torch.ones(2, device="meta")},
        ValueError,
        r"advantages is on meta but logprobs is on cpu",
    ),
    "mask-device": ({"mask": torch.ones(2, 3, device="meta").bool()}, ValueError, r"mask is on meta but logprobs is on cpu"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_POLICY.values(), ids=BAD_POLICY)
def test_policy_loss_names_what_does_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        policy_loss(**policy_inputs(**changes))


ADVANTAGES = {"B-1": (2, 1), "T": (3,), "1-T": (1, 3), "scalar": (), "flat": (6,), "B-T-1": (2, 3, 1), "T-B": (3, 2), "1": (1,)}


@pytest.mark.parametrize("shape", ADVANTAGES.values(), ids=ADVANTAGES)
def test_advantages_are_per_token_or_per_sequence_and_never_broadcast(shape):
    message = rf"advantages must be per token \(2, 3\) or per sequence \(2,\); got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        policy_loss(**policy_inputs(advantages=torch.ones(shape)))


@pytest.mark.parametrize("shape", [(), (1,), (2,), (6, 1)], ids=["scalar", "1", "per-sequence", "6-1"])
def test_packed_tokens_need_advantages_per_token(shape):
    """(N,) tokens do not say where a sequence ends."""
    flat = {"logprobs": -torch.rand(6), "old_logprobs": None, "advantages": torch.ones(shape)}
    wanted = re.escape(f"advantages must be per token (6,) or one per sequence (S,), with sequence_ids=; got shape {shape}")
    with pytest.raises(ValueError, match=wanted):
        policy_loss(**policy_inputs(**flat))


@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("shape", [(6,), (), (2, 3, 1)], ids=["packed", "scalar", "3-d"])
def test_sequence_reductions_need_sequences(reduction, shape):
    flat = {"logprobs": -torch.rand(shape), "old_logprobs": None, "advantages": torch.ones(shape)}
    with pytest.raises(ValueError, match=rf'reduction="{reduction}" needs .*\(B, T\); got shape {re.escape(str(shape))}'):
        policy_loss(**policy_inputs(**flat, reduction=reduction))


RETURNS = {
    "a-sum": (lambda logp, old, a: (logp * a).sum(), r"shape \(2, 3\); got \(\)"),
    "per-sequence": (lambda logp, old, a: (logp * a).sum(1), r"shape \(2, 3\); got \(2,\)"),
    "broadcastable": (lambda logp, old, a: (logp * a).sum(1, keepdim=True), r"shape \(2, 3\); got \(2, 1\)"),
    "nothing": (lambda logp, old, a: None, r"shape \(2, 3\); got NoneType"),
    "a-number": (lambda logp, old, a: 0.0, r"shape \(2, 3\); got float"),
    "a-tuple": (lambda logp, old, a: (logp * a, {}), r"shape \(2, 3\); got tuple"),
}


@pytest.mark.parametrize(("objective", "message"), RETURNS.values(), ids=RETURNS)
def test_objective_must_return_one_value_per_token(objective, message):
    with pytest.raises((TypeError, ValueError), match=rf"objective must return one value per token, {message}"):
        policy_loss(**policy_inputs(objective=objective))


# ---- objectives

BAD_OBJECTIVES = {
    "ratio-max-zero": (lambda: CISPO(0.0), r"ratio_max must be positive.*got 0.0"),
    "ratio-max-negative": (lambda: CISPO(ratio_max=-0.2), r"ratio_max must be positive.*got -0.2"),
    "ratio-max-nan": (lambda: CISPO(ratio_max=NAN), r"ratio_max must be positive.*got nan"),
    "ratio-max-str": (lambda: CISPO(ratio_max="5"), r"ratio_max must be .*got '?5"),
    "ratio-min-negative": (lambda: CISPO(ratio_min=-1.0), r"ratio_min must be >= 0.*got -1.0"),
    "ratio-min-nan": (lambda: CISPO(ratio_min=NAN), r"ratio_min must be >= 0.*got nan"),
    "ratio-min-list": (lambda: CISPO(ratio_min=[0.8]), r"ratio_min must be .*got (\[0.8\]|list)"),
    "crossed": (
        lambda: CISPO(ratio_max=0.5, ratio_min=2.0),
        r"ratio_min must not exceed ratio_max; .*ratio_min=2.0, ratio_max=0.5",
    ),
    "coef-negative": (lambda: KLPenalty(-0.1), r"coef must be a number >= 0; got -0.1"),
    "coef-nan": (lambda: KLPenalty(NAN), r"coef must be a number >= 0; got nan"),
    "coef-name": (lambda: KLPenalty("k3"), r"coef must be a number >= 0; got 'k3'"),
    "estimator": (lambda: KLPenalty(0.1, "k4"), r'estimator must be "k1", "k2" or "k3"; got \'k4\''),
    "level": (lambda: ImportanceWeighted("word"), r"level must be .*\"token\".*; got 'word'"),
    "level-none": (lambda: ImportanceWeighted(level=None), r"level must be .*\"token\".*; got None"),
}


@pytest.mark.parametrize(("make", "message"), BAD_OBJECTIVES.values(), ids=BAD_OBJECTIVES)
def test_objectives_name_what_does_not_fit(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_bounds_that_are_allowed():
    assert CISPO(None, None).ratio_bounds == (None, None)
    assert CISPO(1.0, 1.0).ratio_bounds == (1.0, 1.0)
    assert CISPO(5.0, 0.0).ratio_bounds == (0.0, 5.0)


def test_the_good_inputs_are_good():
    """Otherwise the tests above could pass for another reason."""
    assert policy_loss(**policy_inputs(objective=CISPO())).loss.isfinite()
