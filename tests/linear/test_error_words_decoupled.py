"""Errors of `rollout_logprobs` and `rollout_correction`, word by word and before any work; see `test_error_words`."""

import math
from functools import partial

import pytest
import torch
from raising import ONE_PASS, call, cases, said

from fastpg import CISPO, GSPO, policy_loss
from fastpg.rollout import truncated_weights

NAN, INF = math.nan, math.inf
ONES = -torch.ones(2, 3)
HOLE = torch.tensor([[-1.0, -1.0, NAN], [-1.0, -INF, -1.0]])
ZERO = 'functools.partial(fastpg.rollout.truncated_weights, high=None, unscored="zero")'
WANTED = (
    "TypeError: rollout_correction must be a function of (old_logprobs, rollout_logprobs, mask=, sequence_ids=), such as "
    "functools.partial(fastpg.rollout.truncated_weights, high=2.0), or None; got"
)
RETURNED = "rollout_correction must return weights, a floating-point or bool tensor of the shape (2, 3); got"


def returns(x):
    return lambda *_, **__: x


def never(*_, **__):
    raise AssertionError("the correction was called before the error")


OF_BOTH = {
    "with-weights": (
        {"rollout_logprobs": ONES, "rollout_weights": ONES},
        "ValueError: rollout_logprobs and rollout_weights were both given: weights are made of rollout_logprobs; pass one of "
        "them, and further factors inside rollout_correction",
    ),
    "correction-alone": (
        {"rollout_correction": never},
        "ValueError: rollout_correction was given without rollout_logprobs, which it corrects for",
    ),
    "correction-and-weights": (
        {"rollout_correction": never, "rollout_weights": ONES},
        "ValueError: rollout_correction was given without rollout_logprobs, which it corrects for",
    ),
    "list": ({"rollout_logprobs": [-1.0]}, "TypeError: rollout_logprobs must be a floating-point tensor or None; got list"),
    "tokens": (
        {"rollout_logprobs": torch.ones(2, 3).long()},
        "TypeError: rollout_logprobs must be a floating-point tensor or None; got torch.int64",
    ),
    "name": ({"rollout_logprobs": ONES, "rollout_correction": "tis"}, f"{WANTED} str"),
    "number": ({"rollout_logprobs": ONES, "rollout_correction": 2.0}, f"{WANTED} float"),
    "dictionary": ({"rollout_logprobs": ONES, "rollout_correction": {"high": 2.0}}, f"{WANTED} dict"),
    "returns-none": ({"rollout_logprobs": ONES, "rollout_correction": returns(None)}, f"TypeError: {RETURNED} NoneType"),
    "returns-int": (
        {"rollout_logprobs": ONES, "rollout_correction": returns(ONES.long())},
        f"TypeError: {RETURNED} torch.int64",
    ),
    "returns-per-sequence": (
        {"rollout_logprobs": ONES, "rollout_correction": returns(ONES[:, :1])},
        f"ValueError: {RETURNED} (2, 1)",
    ),
    "returns-elsewhere": (
        {"rollout_logprobs": ONES, "rollout_correction": returns(ONES.to("meta"))},
        "ValueError: rollout_correction must return weights on cpu, as old_logprobs; got meta",
    ),
    "not-scored": (
        {"rollout_logprobs": HOLE},
        "ValueError: rollout_logprobs must be finite where a token counts; got nan at (0, 2), a token that the engine did not "
        f"score: mask it, or give it the weight 0 by rollout_correction={ZERO}",
    ),
    "not-scored-inf": (
        {"rollout_logprobs": HOLE, "mask": ~HOLE.isnan()},
        "ValueError: rollout_logprobs must be finite where a token counts; got -inf at (1, 1), a token that the engine did not "
        f"score: mask it, or give it the weight 0 by rollout_correction={ZERO}",
    ),
    "not-scored-by-a-function": (
        {"rollout_logprobs": HOLE, "rollout_correction": partial(truncated_weights, high=2.0)},
        "ValueError: rollout_logprobs must be finite where a token counts; got nan at (0, 2), a token that the engine did not "
        'score: mask it, or take unscored="zero"',
    ),
    "level-of-packed": (
        {
            "shape": (6,), "rollout_logprobs": -torch.ones(6),
            "rollout_correction": partial(truncated_weights, high=2.0, level="sequence"),
        },
        "ValueError: level='sequence' needs sequences: logprobs of shape (B, T), or packed (N,) with sequence_ids=; got shape "
        "(6,)",
    ),
    "first-reduction-then-values": (
        {"rollout_logprobs": HOLE, "reduction": "mean"},
        "ValueError: reduction must be one of token-mean, seq-mean-token-mean, seq-mean-token-sum, sum; got 'mean'",
    ),
    "first-objective": (
        {"rollout_correction": never, "objective": CISPO},
        "TypeError: objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got "
        "the class CISPO: pass an instance, CISPO(...)",
    ),
}  # fmt: skip


def shapes(like):
    return {
        "few": (
            {"rollout_logprobs": ONES[:, :2]},
            f"ValueError: rollout_logprobs must have the shape of {like}, (2, 3); got (2, 2)",
        ),
        "many": (
            {"rollout_logprobs": -torch.ones(2, 4)},
            f"ValueError: rollout_logprobs must have the shape of {like}, (2, 3); got (2, 4)",
        ),
        "per-sequence": (
            {"rollout_logprobs": -torch.ones(2)},
            f"ValueError: rollout_logprobs must have the shape of {like}, (2, 3); got (2,)",
        ),
        "device": (
            {"rollout_logprobs": torch.ones(2, 3, device="meta")},
            f"ValueError: rollout_logprobs is on meta but {like} is on cpu",
        ),
    }


OF_ONE_PASS = {
    "no-old": (
        {"rollout_logprobs": ONES, "old_logprobs": None},
        "ValueError: old_logprobs must be given with rollout_logprobs in the one-pass loss: without them the weights are made "
        "of the current log-probabilities, which are not known before the sweep; pass old_logprobs, or use linear_logprobs and "
        "policy_loss",
    ),
    "gspo": (
        {"rollout_logprobs": ONES, "rollout_correction": never, "objective": GSPO(0.1, 0.2)},
        "ValueError: objective=GSPO(eps_low=0.1, eps_high=0.2) has one ratio for a sequence, which the one-pass loss does not "
        "know before its last token; use linear_logprobs and policy_loss",
    ),
}
TABLES = [
    ((*ONE_PASS, policy_loss), OF_BOTH),
    (ONE_PASS, shapes("tokens") | OF_ONE_PASS),
    ((policy_loss,), shapes("logprobs")),
]


@pytest.mark.parametrize(("function", "changes", "words"), cases(*TABLES))
def test_rollout_logprobs_and_corrections(function, changes, words):
    assert said(lambda: call(function, changes)) == words


@pytest.mark.parametrize("function", [*ONE_PASS, policy_loss])
def test_masked_tokens_need_not_be_scored(function):
    given = {"rollout_logprobs": HOLE, "mask": HOLE.isfinite(), "objective": CISPO()}
    assert said(lambda: call(function, given), before_work=False) == "nothing"
    assert said(lambda: call(function, given | {"mask": None, "check": False}), before_work=False) == "nothing"
