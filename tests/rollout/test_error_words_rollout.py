"""Every error of fastpg.rollout keeps its type and its words, and comes before any work; see `test_error_words`."""

import math

import pytest
import torch
from raising import said

from fastpg.rollout import icepop, masked_weights, mismatch_metrics, token_veto, truncated_weights, within_band

INF, NAN = math.inf, math.nan
ROWS, PACK, MASK = -torch.ones(2, 3), -torch.ones(6), torch.ones(2, 3, dtype=torch.bool)
IDS = torch.tensor([0, 0, 0, 1, 1, 1])
NO_SEQUENCES = "needs sequences: logprobs of shape (B, T), or packed (N,) with sequence_ids=; got shape (6,)"
WANTED = "must be a floating-point tensor, a log-probability for each sampled token; got"
HOLE = torch.tensor([[-1.0, -1.0, NAN], [-1.0, -INF, -1.0]])


def weights(logprobs=ROWS, rollout_logprobs=ROWS, mask=None, **changes):
    return truncated_weights(logprobs, rollout_logprobs, mask, **{"high": 2.0} | changes)


FUNCTIONS = {
    "truncated": weights,
    "masked": lambda *x, **more: masked_weights(*x, low=0.5, high=2.0, **more),
    "icepop": icepop,
    "band": lambda *x, **more: within_band(*x, low=0.5, **more),
    "veto": token_veto,
    "metrics": mismatch_metrics,
}

TENSORS = {
    "logprobs-none": (
        (None, ROWS),
        f"TypeError: logprobs {WANTED} NoneType",
    ),
    "rollout-missing": (
        (ROWS, None),
        f"TypeError: rollout_logprobs {WANTED} NoneType",
    ),
    "rollout-list": (
        (ROWS, [[-1.0] * 3] * 2),
        f"TypeError: rollout_logprobs {WANTED} list",
    ),
    "rollout-tokens": (
        (ROWS, IDS.view(2, 3)),
        f"TypeError: rollout_logprobs {WANTED} torch.int64",
    ),
    "rollout-few": (
        (ROWS, ROWS[:, :2]),
        "ValueError: rollout_logprobs must have the shape of logprobs, (2, 3): one for each token, padded where mask is False; "
        "got (2, 2)",
    ),
    "rollout-many": (
        (ROWS, -torch.ones(2, 4)),
        "ValueError: rollout_logprobs must have the shape of logprobs, (2, 3): one for each token, padded where mask is False; "
        "got (2, 4)",
    ),
    "rollout-per-sequence": (
        (ROWS, ROWS[:, :1]),
        "ValueError: rollout_logprobs must have the shape of logprobs, (2, 3): one for each token, padded where mask is False; "
        "got (2, 1)",
    ),
    "rollout-device": ((ROWS, ROWS.to("meta")), "ValueError: rollout_logprobs is on meta but logprobs is on cpu"),
    "mask-int": (
        (ROWS, ROWS, MASK.long()),
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.int64 (use mask.bool())",
    ),
    "mask-shape": ((ROWS, ROWS, MASK[0]), "ValueError: mask must have the shape of logprobs, (2, 3); got (3,)"),
}

CALLS = {
    "level": (lambda: weights(level="row"), "ValueError: level must be one of 'token', 'sequence', 'geometric'; got 'row'"),
    "level-none": (
        lambda: mismatch_metrics(ROWS, ROWS, level=None),
        "ValueError: level must be one of 'token', 'sequence', 'geometric'; got None",
    ),
    "unscored": (
        lambda: icepop(ROWS, ROWS, unscored="one"),
        "ValueError: unscored must be one of 'raise', 'zero'; got 'one'",
    ),
    "measure": (
        lambda: within_band(ROWS, ROWS, high=1, measure="k1"),
        "ValueError: measure must be one of 'ratio', 'k2', 'k3', 'probability'; got 'k1'",
    ),
    "measure-level": (
        lambda: within_band(ROWS, ROWS, high=0.1, measure="probability", level="sequence"),
        "ValueError: level must be 'token' with measure='probability', which is of single tokens; got 'sequence'",
    ),
    "level-of-packed": (
        lambda: weights(PACK, PACK, level="sequence"),
        f"ValueError: level='sequence' {NO_SEQUENCES}",
    ),
    "level-of-3d": (
        lambda: masked_weights(ROWS[None], ROWS[None], low=0.5, high=2, level="geometric"),
        "ValueError: level='geometric' needs sequences: logprobs of shape (B, T), or packed (N,) with sequence_ids=; got shape "
        "(1, 2, 3)",
    ),
    "level-of-packed-metrics": (
        lambda: mismatch_metrics(PACK, PACK, level="sequence"),
        f"ValueError: level='sequence' {NO_SEQUENCES}",
    ),
    "veto-of-packed": (
        lambda: token_veto(PACK, PACK),
        f"ValueError: token_veto {NO_SEQUENCES}",
    ),
    "ids-of-rows": (
        lambda: weights(sequence_ids=IDS),
        "ValueError: sequence_ids are for packed logprobs of shape (N,); logprobs has shape (2, 3), whose rows are the "
        "sequences: leave sequence_ids out",
    ),
    "ids-float": (
        lambda: weights(PACK, PACK, sequence_ids=PACK),
        "TypeError: sequence_ids must be int64 or int32; got torch.float32",
    ),
    "ids-large": (
        lambda: weights(PACK, PACK, sequence_ids=IDS + 5, level="sequence"),
        "ValueError: sequence_ids must be in [0, 6): number the sequences of a pack from 0; got 6 at position 3",
    ),
    "high-zero-or-below": (
        lambda: weights(high=-1),
        "ValueError: high must be a finite number >= 0, or None for no bound; got -1",
    ),
    "high-inf": (lambda: weights(high=INF), "ValueError: high must be a finite number >= 0, or None for no bound; got inf"),
    "high-nan": (lambda: weights(high=NAN), "ValueError: high must be a finite number >= 0, or None for no bound; got nan"),
    "high-tensor": (
        lambda: weights(high=torch.tensor(2.0)),
        "ValueError: high must be a finite number >= 0, or None for no bound; got tensor(2.)",
    ),
    "low-bool": (
        lambda: mismatch_metrics(ROWS, ROWS, low=True),
        "ValueError: low must be a finite number >= 0, or None for no bound; got True",
    ),
    "low-probability": (
        lambda: within_band(ROWS, ROWS, low=-1.5, measure="probability"),
        "ValueError: low must be a finite number >= -1, or None for no bound; got -1.5",
    ),
    "low-above": (lambda: weights(low=3, high=2.0), "ValueError: low must not be above high, 2.0; got 3"),
    "low-above-masked": (
        lambda: masked_weights(ROWS, ROWS, low=2.0, high=0.5),
        "ValueError: low must not be above high, 0.5; got 2.0",
    ),
    "low-above-band": (
        lambda: within_band(ROWS, ROWS, low=2.0, high=0.5),
        "ValueError: low must not be above high, 0.5; got 2.0",
    ),
    "low-above-veto": (lambda: token_veto(ROWS, ROWS, high=1e-5), "ValueError: low must not be above high, 1e-05; got 0.0001"),
    "low-above-metrics": (
        lambda: mismatch_metrics(ROWS, ROWS, low=2.0, high=0.5),
        "ValueError: low must not be above high, 0.5; got 2.0",
    ),
    "alpha-above": (lambda: icepop(ROWS, ROWS, alpha=6.0), "ValueError: alpha must not be above beta, 5.0; got 6.0"),
    "alpha-negative": (
        lambda: icepop(ROWS, ROWS, alpha=-0.5),
        "ValueError: alpha must be a finite number >= 0, or None for no bound; got -0.5",
    ),
    "no-band": (
        lambda: within_band(ROWS, ROWS),
        "ValueError: low and high must not both be None: the band would hold every token",
    ),
    "no-band-masked": (
        lambda: masked_weights(ROWS, ROWS, low=None, high=None),
        "ValueError: low and high must not both be None: the band would hold every token",
    ),
    "no-band-icepop": (
        lambda: icepop(ROWS, ROWS, alpha=None, beta=None),
        "ValueError: alpha and beta must not both be None: the band would hold every token",
    ),
    "no-band-veto": (
        lambda: token_veto(ROWS, ROWS, low=None),
        "ValueError: low and high must not both be None: the band would hold every token",
    ),
    "not-scored-inf": (
        lambda: token_veto(ROWS, HOLE, ~HOLE.isnan()),
        "ValueError: rollout_logprobs must be finite where a token counts; got -inf at (1, 1), a token that the engine did not "
        'score: mask it, or take unscored="zero"',
    ),
    "not-scored-packed": (
        lambda: weights(PACK, HOLE.flatten(), sequence_ids=IDS),
        "ValueError: rollout_logprobs must be finite where a token counts; got nan at (2,), a token that the engine did not "
        'score: mask it, or take unscored="zero"',
    ),
    "first-level-then-band": (
        lambda: weights(None, level="row", high=-1),
        "ValueError: level must be one of 'token', 'sequence', 'geometric'; got 'row'",
    ),
    "first-band-then-tensors": (
        lambda: weights(None, low=3),
        "ValueError: low must not be above high, 2.0; got 3",
    ),
    "first-tensors-then-values": (
        lambda: weights(PACK, PACK * NAN, level="sequence"),
        f"ValueError: level='sequence' {NO_SEQUENCES}",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_tensors_that_do_not_fit(function, name):
    given, words = TENSORS[name]
    assert said(lambda: FUNCTIONS[function](*given)) == words


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_do_not_fit(name):
    call, words = CALLS[name]
    assert said(call) == words


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_token_that_the_engine_did_not_score(function):
    """By default an error, except for the metrics, which count it."""
    words = (
        "ValueError: rollout_logprobs must be finite where a token counts; got nan at (0, 2), a token that the engine did not "
        'score: mask it, or take unscored="zero"'
    )
    call = FUNCTIONS[function]
    assert said(lambda: call(ROWS, HOLE), before_work=function != "metrics") == ("nothing" if function == "metrics" else words)
    assert said(lambda: call(ROWS, HOLE, HOLE.isfinite()), before_work=False) == "nothing"
    if function != "metrics":
        assert said(lambda: call(ROWS, HOLE, unscored="zero"), before_work=False) == "nothing"


def test_the_inputs_without_changes_fit():
    for call in FUNCTIONS.values():
        assert said(lambda call=call: call(ROWS, ROWS, MASK), before_work=False) == "nothing"
    assert said(lambda: token_veto(PACK, PACK, sequence_ids=IDS), before_work=False) == "nothing"
    assert said(lambda: within_band(ROWS, ROWS, low=-1, high=0.0, measure="probability"), before_work=False) == "nothing"
