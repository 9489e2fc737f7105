"""Errors that come from values, and which of two comes first, word by word; see `test_error_words`."""

import math
import re

import pytest
import torch
from raising import LINEAR, ONE_PASS, H, V, call, cases, said

from fastpg import CISPO, GSPO, VESPO, ClipCov, KLPenalty, linear_cispo_loss, masked_mean, policy_loss, selective_logprobs

INF, NAN = math.inf, math.nan
IDS = torch.tensor([0, 0, 1, 1, 2, 2])
SOME = torch.tensor([[False, True, True], [True, True, False]])
WIDE = torch.ones(2, 3, H).bfloat16()  # of another dtype than the head


def spoilt(like, **places):
    """A copy with other values at places, "r1c2" in two dimensions and "n4" in one."""
    out = like.clone()
    for place, value in places.items():
        out[tuple(int(i) for i in re.findall(r"\d+", place))] = value
    return out


ROWS, PACK, ONES = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.arange(6), torch.ones(2, 3)

# ---- values: the first bad one that is kept is named, with its place in the caller's shape

VALUES = {
    "token-large": ({"tokens": spoilt(ROWS, r1c2=7)}, "ValueError: tokens must be in [0, 7) or -100; got 7 at position (1, 2)"),
    "token-negative": (
        {"tokens": spoilt(ROWS, r0c0=-1)},
        "ValueError: tokens must be in [0, 7) or -100; got -1 at position (0, 0)",
    ),
    "token-minus-99": (
        {"tokens": spoilt(ROWS, r1c0=-99)},
        "ValueError: tokens must be in [0, 7) or -100; got -99 at position (1, 0)",
    ),
    "token-int32": (
        {"tokens": spoilt(ROWS, r0c2=2**30).int()},
        "ValueError: tokens must be in [0, 7) or -100; got 1073741824 at position (0, 2)",
    ),
    "token-first-of-two": (
        {"tokens": spoilt(ROWS, r0c1=8, r1c1=9)},
        "ValueError: tokens must be in [0, 7) or -100; got 8 at position (0, 1)",
    ),
    "token-after-masked": (
        {"tokens": spoilt(ROWS, r0c0=50, r1c1=9, r1c2=60), "mask": SOME},
        "ValueError: tokens must be in [0, 7) or -100; got 9 at position (1, 1)",
    ),
    "token-after-no-token": (
        {"tokens": spoilt(ROWS, r0c0=-100, r0c1=-100, r0c2=-101)},
        "ValueError: tokens must be in [0, 7) or -100; got -101 at position (0, 2)",
    ),
    "token-packed": (
        {"shape": (6,), "tokens": spoilt(PACK, n4=70)},
        "ValueError: tokens must be in [0, 7) or -100; got 70 at position (4,)",
    ),
    "token-3d": (
        {"shape": (2, 3, 1), "tokens": spoilt(ROWS, r1c1=70)[..., None]},
        "ValueError: tokens must be in [0, 7) or -100; got 70 at position (1, 1, 0)",
    ),
    "temperature-zero": (
        {"temperature": spoilt(ONES, r1c2=0.0)},
        "ValueError: temperature must be positive and finite; got 0.0 at position (1, 2)",
    ),
    "temperature-negative": (
        {"temperature": spoilt(ONES, r0c1=-2.0)},
        "ValueError: temperature must be positive and finite; got -2.0 at position (0, 1)",
    ),
    "temperature-nan": (
        {"temperature": spoilt(ONES, r0c2=NAN)},
        "ValueError: temperature must be positive and finite; got nan at position (0, 2)",
    ),
    "temperature-inf": (
        {"temperature": spoilt(ONES, r1c0=INF)},
        "ValueError: temperature must be positive and finite; got inf at position (1, 0)",
    ),
    "temperature-0d": (
        {"temperature": torch.tensor(-0.5)},
        "ValueError: temperature must be positive and finite; got -0.5 at position (0, 0)",
    ),
    "temperature-0d-after-masked": (
        {"temperature": torch.tensor(0.0), "mask": SOME},
        "ValueError: temperature must be positive and finite; got 0.0 at position (0, 1)",
    ),
    "temperature-after-masked": (
        {"temperature": spoilt(ONES, r0c0=NAN, r1c1=-3.0), "mask": SOME},
        "ValueError: temperature must be positive and finite; got -3.0 at position (1, 1)",
    ),
    "temperature-packed": (
        {"shape": (6,), "temperature": spoilt(torch.ones(6), n5=0.0)},
        "ValueError: temperature must be positive and finite; got 0.0 at position (5,)",
    ),
}

OF_IDS = {
    "id-large": (
        {"shape": (6,), "sequence_ids": spoilt(IDS, n3=6)},
        "ValueError: sequence_ids must be in [0, 6): number the sequences of a pack from 0; got 6 at position 3",
    ),
    "id-negative": (
        {"shape": (6,), "sequence_ids": spoilt(IDS, n0=-1)},
        "ValueError: sequence_ids must be in [0, 6): number the sequences of a pack from 0; got -1 at position 0",
    ),
    "id-without-advantage": (
        {"shape": (6,), "sequence_ids": IDS, "advantages": torch.ones(2)},
        "ValueError: sequence_ids must be in [0, 2): number the sequences of a pack from 0; got 2 at position 4",
    ),
    "id-int32": (
        {"shape": (6,), "sequence_ids": spoilt(IDS, n5=99).int(), "advantages": torch.ones(3)},
        "ValueError: sequence_ids must be in [0, 3): number the sequences of a pack from 0; got 99 at position 5",
    ),
    "id-more-advantages-than-tokens": (
        {"shape": (6,), "sequence_ids": spoilt(IDS, n1=7), "advantages": torch.ones(8)},
        "ValueError: sequence_ids must be in [0, 6): number the sequences of a pack from 0; got 7 at position 1",
    ),
    "id-after-masked": (
        {"shape": (6,), "sequence_ids": spoilt(IDS, n0=-7, n4=8, n5=9), "mask": PACK != 0},
        "ValueError: sequence_ids must be in [0, 6): number the sequences of a pack from 0; got 8 at position 4",
    ),
}

# ---- which of two comes first

FIRST = {
    "hidden, tokens": ({"hidden": None, "tokens": None}, "TypeError: hidden must be a tensor; got NoneType"),
    "head, hidden": (
        {"head": None, "hidden": None},
        "TypeError: head.weight must be a floating-point tensor (V, H); got NoneType",
    ),
    "hidden dtype, tokens shape": (
        {"hidden": torch.ones(2, 3, H).long(), "tokens": PACK},
        "TypeError: hidden must be float16, bfloat16, float32 or float64; got torch.int64",
    ),
    "tokens type, hidden dtype": ({"tokens": None, "hidden": WIDE}, "TypeError: tokens must be a tensor; got NoneType"),
    "hidden width, tokens dtype": (
        {"hidden": torch.ones(2, 3, 5), "tokens": ONES},
        "ValueError: hidden must be (..., H) with H = 4 as in head.weight (7, 4); got shape (2, 3, 5)",
    ),
    "tokens dtype, tokens shape": ({"tokens": torch.ones(6)}, "TypeError: tokens must be int64 or int32; got torch.float32"),
    "tokens shape, head device": (
        {"tokens": PACK, "head": torch.ones(V, H, device="meta")},
        "ValueError: tokens must have the leading shape of hidden, (2, 3): hidden[..., t, :] predicts tokens[..., t], already "
        "shifted; got shape (6,)",
    ),
    "temperature device, mask": (
        {"temperature": torch.ones(2, 3, device="meta"), "mask": ONES},
        "ValueError: temperature is on meta but hidden is on cpu",
    ),
    "workspace, token value": (
        {"workspace": 0, "tokens": ROWS + 7},
        "ValueError: tokens must be in [0, 7) or -100; got 7 at position (0, 0)",
    ),
    "backend, workspace": (
        {"backend": "cuda", "workspace": 0},
        'ValueError: backend must be "torch", "triton" or None; got \'cuda\'',
    ),
}
FIRST_OF_TOKENS = {
    "mask, temperature": (
        {"mask": ONES, "temperature": 0},
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.float32 (use mask.bool())",
    ),
    "temperature, backend": ({"temperature": 0, "backend": "cuda"}, "ValueError: temperature must be a positive number; got 0"),
    "backend, token value": (
        {"backend": "cuda", "tokens": ROWS + 7},
        'ValueError: backend must be "torch", "triton" or None; got \'cuda\'',
    ),
    "token value, temperature value": (
        {"tokens": ROWS - 2, "temperature": 0 * ONES},
        "ValueError: tokens must be in [0, 7) or -100; got -2 at position (0, 0)",
    ),
}
FIRST_OF_ONE_PASS = {
    "token value, ids value": (
        {"shape": (6,), "tokens": PACK + 4, "sequence_ids": IDS - 1},
        "ValueError: tokens must be in [0, 7) or -100; got 7 at position (3,)",
    ),
    "advantages, token value": (
        {"tokens": ROWS - 1, "advantages": None},
        "TypeError: advantages must be a real tensor; got NoneType",
    ),
    "ids, temperature value": (
        {"temperature": 0 * ONES, "sequence_ids": IDS},
        "ValueError: sequence_ids are for packed tokens of shape (N,); tokens has shape (2, 3), whose rows are the sequences: "
        "leave sequence_ids out",
    ),
    "backend, old": (
        {"backend": "cuda", "old_logprobs": 1},
        'ValueError: backend must be "torch", "triton" or None; got \'cuda\'',
    ),
    "objective, workspace": (
        {"objective": None, "workspace": 0},
        "TypeError: objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got "
        "NoneType",
    ),
    "kl, gspo": (
        {"kl": 1.0, "objective": GSPO()},
        "TypeError: kl must be a KLPenalty, such as KLPenalty(0.01), or None; got float",
    ),
    "gspo, reduction": (
        {"objective": GSPO(), "reduction": "mean"},
        "ValueError: objective=GSPO(eps_low=0.0003, eps_high=0.0004) has one ratio for a sequence, which the one-pass loss "
        "does not know before its last token; use linear_logprobs and policy_loss",
    ),
    "clip-cov, reduction": (
        {"objective": ClipCov(), "reduction": "mean"},
        "ValueError: objective=ClipCov(eps_low=0.2, eps_high=0.2, fraction=0.0002, cov_min=1.0, cov_max=5.0) compares the "
        "tokens of the batch, which the one-pass loss computes chunk by chunk; use linear_logprobs and policy_loss",
    ),
    "vespo, entropy coefficient": (
        {"objective": VESPO(), "entropy_coef": 0.1},
        "ValueError: objective=VESPO(k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0) has one ratio for a sequence, which "
        "the one-pass loss does not know before its last token; use linear_logprobs and policy_loss",
    ),
    "entropy coefficient, reduction": (
        {"entropy_coef": 0.1, "reduction": "mean"},
        "ValueError: entropy_coef must be 0 in the one-pass loss; got 0.1: the term -entropy_coef H has the gradient "
        "entropy_coef p_v (log p_v + H) in a row's logits, which is not the row's exponentials times one number, all that one "
        "pass has of it; use linear_logprobs(..., entropy=True) and policy_loss(..., entropies=, entropy_coef=)",
    ),
    "denominator, workspace": (
        {"denominator": 0, "workspace": 0},
        "ValueError: denominator must be a positive number or a 0-d tensor; got 0",
    ),
    "ids value, workspace": (
        {"shape": (6,), "sequence_ids": IDS - 1, "workspace": 0},
        "ValueError: sequence_ids must be in [0, 6): number the sequences of a pack from 0; got -1 at position 0",
    ),
}
FIRST_OF_POLICY = {
    "mask, advantages": (
        {"mask": ONES, "advantages": None},
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.float32 (use mask.bool())",
    ),
    "mask, ids": (
        {"shape": (6,), "mask": [True], "sequence_ids": [0]},
        "TypeError: mask must be a bool tensor, True where a token counts; got list (use mask.bool())",
    ),
    "ids, old": (
        {"shape": (6,), "sequence_ids": [0], "old_logprobs": 1},
        "TypeError: sequence_ids must be int64 or int32; got list",
    ),
    "old, ref": (
        {"old_logprobs": 1, "ref_logprobs": 2},
        "TypeError: old_logprobs must be a floating-point tensor or None; got int",
    ),
    "ref, rollout": (
        {"ref_logprobs": 2, "rollout_weights": 1.0},
        "TypeError: ref_logprobs must be a floating-point tensor or None; got int",
    ),
    "rollout, advantages": (
        {"rollout_weights": 1.0, "advantages": 1.0},
        "TypeError: rollout_weights must be a floating-point tensor or None; got float",
    ),
    "advantages, old device": (
        {"advantages": torch.ones(3), "old_logprobs": torch.ones(2, 3, device="meta")},
        "ValueError: advantages must be per token (2, 3) or per sequence (2,); got shape (3,)",
    ),
    "advantages, objective": ({"advantages": 1.0, "objective": None}, "TypeError: advantages must be a real tensor; got float"),
    "objective, kl": (
        {"objective": CISPO, "kl": 1.0},
        "TypeError: objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got "
        "the class CISPO: pass an instance, CISPO(...)",
    ),
    "kl without ref, reduction": (
        {"kl": KLPenalty(0.1), "reduction": "mean"},
        "ValueError: kl was given without ref_logprobs; a KL penalty needs kl=KLPenalty(...) and ref_logprobs",
    ),
    "reduction, denominator": (
        {"reduction": "mean", "denominator": 0},
        "ValueError: reduction must be one of token-mean, seq-mean-token-mean, seq-mean-token-sum, sum; got 'mean'",
    ),
    "needs sequences, denominator": (
        {"shape": (6,), "reduction": "seq-mean-token-sum", "denominator": 0},
        'ValueError: reduction="seq-mean-token-sum" needs sequences: packed tokens (N,) with sequence_ids=, or (B, T); got '
        "shape (6,)",
    ),
    "denominator, ids value": (
        {"shape": (6,), "denominator": -1, "sequence_ids": IDS - 1},
        "ValueError: denominator must be a positive number or a 0-d tensor; got -1",
    ),
}
FIRST_OF_READY = {
    "logprobs, mask": ({"logprobs": None, "mask": ONES}, "TypeError: logprobs must be a floating-point tensor; got NoneType"),
    "old shape, reduction": (
        {"old_logprobs": torch.ones(3), "reduction": "mean"},
        "ValueError: old_logprobs must have the shape of logprobs, (2, 3); got (3,)",
    ),
    "denominator, gspo": (
        {"shape": (6,), "denominator": 0, "objective": GSPO()},
        "ValueError: denominator must be a positive number or a 0-d tensor; got 0",
    ),
}
FIRST_OF_VALUES = {
    "values, mask": ({"values": None, "mask": None}, "TypeError: values must be a floating-point tensor; got NoneType"),
    "mask, denominator": (
        {"mask": None, "denominator": 0},
        "TypeError: mask must be a bool tensor, True where a value counts; got None (the mean of all is values.mean())",
    ),
}

TABLES = [
    ((*LINEAR, selective_logprobs), VALUES | FIRST_OF_TOKENS),
    ((*ONE_PASS, policy_loss), OF_IDS | FIRST_OF_POLICY),
    (LINEAR, FIRST),
    (ONE_PASS, FIRST_OF_ONE_PASS),
    ((policy_loss,), FIRST_OF_READY),
    ((masked_mean,), FIRST_OF_VALUES),
]


@pytest.mark.parametrize(("function", "changes", "words"), cases(*TABLES))
def test_values_and_order(function, changes, words):
    assert said(lambda: call(function, changes)) == words


def test_an_argument_of_the_objective_comes_before_all_others():
    words = "ValueError: ratio_min must not exceed ratio_max; got ratio_min=2.0, ratio_max=1.0"
    assert said(lambda: call(linear_cispo_loss, {"ratio_max": 1.0, "ratio_min": 2.0, "hidden": None, "head": None})) == words
