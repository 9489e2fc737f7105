"""Every error that a user can see keeps its type and its words, whatever the modules behind the public functions are called.

Shapes, dtypes, options and devices here; values that are read from tensors, order, groups and what is raised late in
`test_error_words_values`. The messages are written out and compared as a whole: a regular expression would let words change.
"""

import math

import pytest
import torch
from raising import ACCEPTED, LINEAR, ONE_PASS, H, V, call, cases, of_shape, said

from fastpg import CISPO, GSPO, ImportanceWeighted, KLPenalty, LMHead, masked_mean, policy_loss, selective_logprobs

INF, NAN = math.inf, math.nan
IDS = torch.tensor([0, 0, 1, 1, 2, 2])


def meta(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device="meta")


# ---- hidden states, the head and tokens

HIDDEN = {
    "hidden-list": ({"hidden": [[1.0]]}, "TypeError: hidden must be a tensor; got list"),
    "hidden-none": ({"hidden": None}, "TypeError: hidden must be a tensor; got NoneType"),
    "hidden-int": (
        {"hidden": torch.ones(2, 3, H).long()},
        "TypeError: hidden must be float16, bfloat16, float32 or float64; got torch.int64",
    ),
    "hidden-int-fp32-head": (
        {"hidden": torch.ones(2, 3, H).int(), "head": LMHead(torch.ones(V, H), fp32_head=True)},
        "TypeError: hidden must be float16, bfloat16, float32 or float64; got torch.int32",
    ),
    "hidden-bf16": (
        {"hidden": torch.ones(2, 3, H).bfloat16()},
        "TypeError: hidden is torch.bfloat16 but head.weight is torch.float32; cast one of them, or pass LMHead(weight, "
        "fp32_head=True) for float32 products of both (not of float64), or call under torch.autocast",
    ),
    "hidden-fp64-fp32-head": (
        {"hidden": torch.ones(2, 3, H).double(), "head": LMHead(torch.ones(V, H), fp32_head=True)},
        "TypeError: hidden is torch.float64 but head.weight is torch.float32; cast one of them, or pass LMHead(weight, "
        "fp32_head=True) for float32 products of both (not of float64), or call under torch.autocast",
    ),
    "weight-fp64": (
        {"head": torch.ones(V, H).double()},
        "TypeError: hidden is torch.float32 but head.weight is torch.float64; cast one of them, or pass LMHead(weight, "
        "fp32_head=True) for float32 products of both (not of float64), or call under torch.autocast",
    ),
    "hidden-width": (
        {"hidden": torch.ones(2, 3, 5)},
        "ValueError: hidden must be (..., H) with H = 4 as in head.weight (7, 4); got shape (2, 3, 5)",
    ),
    "hidden-0d": (
        {"hidden": torch.tensor(1.0)},
        "ValueError: hidden must be (..., H) with H = 4 as in head.weight (7, 4); got shape ()",
    ),
    "head-list": ({"head": [[1.0]]}, "TypeError: head.weight must be a floating-point tensor (V, H); got list"),
    "head-layer": (
        {"head": torch.nn.Bilinear(1, H, V)},
        "TypeError: head.weight must be a floating-point tensor (V, H); got Bilinear",
    ),
    "head-int": (
        {"head": torch.ones(V, H).int()},
        "TypeError: head.weight must be a floating-point tensor (V, H); got torch.int32",
    ),
    "head-1d": ({"head": torch.ones(V)}, "ValueError: head.weight must be (V, H) with V >= 1 and H >= 1; got shape (7,)"),
    "head-device": ({"head": meta(V, H)}, "ValueError: head.weight is on meta but hidden is on cpu"),
    "tokens-shifted": (
        {"tokens": torch.zeros(2, 2).long()},
        "ValueError: tokens must have the leading shape of hidden, (2, 3): hidden[..., t, :] predicts tokens[..., t], already "
        "shifted; got shape (2, 2)",
    ),
    "tokens-flat": (
        {"tokens": torch.zeros(6).long()},
        "ValueError: tokens must have the leading shape of hidden, (2, 3): hidden[..., t, :] predicts tokens[..., t], already "
        "shifted; got shape (6,)",
    ),
    "tokens-one-hot": (
        {"tokens": torch.zeros(2, 3, V).int()},
        "ValueError: tokens must have the leading shape of hidden, (2, 3): hidden[..., t, :] predicts tokens[..., t], already "
        "shifted; got shape (2, 3, 7)",
    ),
    "tokens-device": ({"tokens": meta(2, 3, dtype=torch.int64)}, "ValueError: tokens is on meta but hidden is on cpu"),
    "mask-device": ({"mask": meta(2, 3, dtype=torch.bool)}, "ValueError: mask is on meta but hidden is on cpu"),
    "temperature-device": ({"temperature": meta(2, 3)}, "ValueError: temperature is on meta but hidden is on cpu"),
    "workspace-zero": ({"workspace": 0}, "ValueError: workspace must be a positive number of bytes; got 0"),
    "workspace-negative": ({"workspace": -1}, "ValueError: workspace must be a positive number of bytes; got -1"),
    "workspace-float": ({"workspace": 1e9}, "ValueError: workspace must be a positive number of bytes; got 1000000000.0"),
    "workspace-str": ({"workspace": "1GB"}, "ValueError: workspace must be a positive number of bytes; got '1GB'"),
    "workspace-bool": ({"workspace": True}, "ValueError: workspace must be a positive number of bytes; got True"),
}

LOGITS = {
    "logits-list": ({"logits": [1.0]}, "TypeError: logits must be a tensor; got list"),
    "logits-int": (
        {"logits": torch.ones(2, 3, V).int()},
        "TypeError: logits must be float16, bfloat16, float32 or float64; got torch.int32",
    ),
    "logits-0d": ({"logits": torch.tensor(1.0)}, "ValueError: logits must be (..., V) with V >= 1; got shape ()"),
    "logits-empty": ({"logits": torch.ones(2, 3, 0)}, "ValueError: logits must be (..., V) with V >= 1; got shape (2, 3, 0)"),
    "tokens-shifted": (
        {"tokens": torch.zeros(2, 2).long()},
        "ValueError: tokens must have the leading shape of logits, (2, 3): logits[..., t, :] predicts tokens[..., t], already "
        "shifted; got shape (2, 2)",
    ),
    "tokens-device": ({"tokens": meta(2, 3, dtype=torch.int64)}, "ValueError: tokens is on meta but logits is on cpu"),
    "mask-device": ({"mask": meta(2, 3, dtype=torch.bool)}, "ValueError: mask is on meta but logits is on cpu"),
    "temperature-device": ({"temperature": meta(2, 3)}, "ValueError: temperature is on meta but logits is on cpu"),
}

TOKENS = {
    "tokens-list": ({"tokens": [[0, 1, 2]]}, "TypeError: tokens must be a tensor; got list"),
    "tokens-float": ({"tokens": torch.ones(2, 3)}, "TypeError: tokens must be int64 or int32; got torch.float32"),
    "tokens-uint8": ({"tokens": torch.ones(2, 3).byte()}, "TypeError: tokens must be int64 or int32; got torch.uint8"),
    "tokens-bool": ({"tokens": torch.ones(2, 3).bool()}, "TypeError: tokens must be int64 or int32; got torch.bool"),
    "mask-per-sequence": ({"mask": torch.ones(2).bool()}, "ValueError: mask must have the shape of tokens, (2, 3); got (2,)"),
    "mask-broadcast": ({"mask": torch.ones(2, 1).bool()}, "ValueError: mask must have the shape of tokens, (2, 3); got (2, 1)"),
    "temperature-zero": ({"temperature": 0.0}, "ValueError: temperature must be a positive number; got 0.0"),
    "temperature-negative": ({"temperature": -1}, "ValueError: temperature must be a positive number; got -1"),
    "temperature-nan": ({"temperature": NAN}, "ValueError: temperature must be a positive number; got nan"),
    "temperature-inf": ({"temperature": INF}, "ValueError: temperature must be a positive number; got inf"),
    "temperature-str": ({"temperature": "1"}, "ValueError: temperature must be a positive number; got '1'"),
    "temperature-none": ({"temperature": None}, "ValueError: temperature must be a positive number; got None"),
    "temperature-bool": ({"temperature": True}, "ValueError: temperature must be a positive number; got True"),
    "temperature-int-tensor": (
        {"temperature": torch.ones(2, 3).int()},
        "TypeError: temperature must be a number or a floating-point tensor; got torch.int32",
    ),
    "temperature-requires-grad": (
        {"temperature": torch.ones(2, 3, requires_grad=True)},
        "ValueError: temperature must not require a gradient: none is computed for it; pass temperature.detach()",
    ),
    "temperature-per-sequence": (
        {"temperature": torch.ones(2)},
        "ValueError: temperature must be a number or have the shape of tokens, (2, 3); got (2,)",
    ),
    "temperature-broadcast": (
        {"temperature": torch.ones(2, 1)},
        "ValueError: temperature must be a number or have the shape of tokens, (2, 3); got (2, 1)",
    ),
    "backend": ({"backend": "cuda"}, 'ValueError: backend must be "torch", "triton" or None; got \'cuda\''),
    "backend-capital": ({"backend": "Triton"}, 'ValueError: backend must be "torch", "triton" or None; got \'Triton\''),
}

MASKS = {
    "mask-int": (
        {"mask": torch.ones(2, 3).long()},
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.int64 (use mask.bool())",
    ),
    "mask-float": (
        {"mask": torch.ones(2, 3)},
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.float32 (use mask.bool())",
    ),
    "mask-list": (
        {"mask": [[True] * 3] * 2},
        "TypeError: mask must be a bool tensor, True where a token counts; got list (use mask.bool())",
    ),
}

# ---- what stands beside log-probabilities

POLICY = {
    "old-list": ({"old_logprobs": [-1.0]}, "TypeError: old_logprobs must be a floating-point tensor or None; got list"),
    "old-int": (
        {"old_logprobs": torch.ones(2, 3).long()},
        "TypeError: old_logprobs must be a floating-point tensor or None; got torch.int64",
    ),
    "ref-int": (
        {"ref_logprobs": torch.ones(2, 3).int()},
        "TypeError: ref_logprobs must be a floating-point tensor or None; got torch.int32",
    ),
    "rollout-number": (
        {"rollout_weights": 2.0},
        "TypeError: rollout_weights must be a floating-point tensor or None; got float",
    ),
    "advantages-float": ({"advantages": 1.0}, "TypeError: advantages must be a real tensor; got float"),
    "advantages-none": ({"advantages": None}, "TypeError: advantages must be a real tensor; got NoneType"),
    "advantages-bool": ({"advantages": torch.ones(2).bool()}, "TypeError: advantages must be a real tensor; got torch.bool"),
    "advantages-complex": (
        {"advantages": torch.ones(2, dtype=torch.complex64)},
        "TypeError: advantages must be a real tensor; got torch.complex64",
    ),
    "advantages-column": (
        {"advantages": torch.ones(2, 1)},
        "ValueError: advantages must be per token (2, 3) or per sequence (2,); got shape (2, 1)",
    ),
    "advantages-scalar": (
        {"advantages": torch.tensor(1.0)},
        "ValueError: advantages must be per token (2, 3) or per sequence (2,); got shape ()",
    ),
    "advantages-packed-alone": (
        {"shape": (6,), "advantages": torch.ones(3)},
        "ValueError: advantages must be per token (6,) or one per sequence (S,), with sequence_ids=; got shape (3,)",
    ),
    "advantages-packed": (
        {"shape": (6,), "advantages": torch.ones(2, 3), "sequence_ids": IDS},
        "ValueError: advantages must be per token (6,) or one per sequence (S,); got shape (2, 3)",
    ),
    "advantages-3d": (
        {"shape": (2, 3, 1), "advantages": torch.ones(2)},
        "ValueError: advantages must be per token (2, 3, 1); got shape (2,)",
    ),
    "objective-none": (
        {"objective": None},
        "TypeError: objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got "
        "NoneType",
    ),
    "objective-name": (
        {"objective": "cispo"},
        "TypeError: objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got "
        "'cispo': what this name means differs between libraries; in TRL it is objective=fastpg.CISPO(ratio_max=epsilon_high), "
        'denominator=step_tokens / num_processes; "Dialects" in docs/pages/objectives.md has the names of other libraries',
    ),
    "objective-and-reduction-of-a-name": (
        {"objective": "LUSPO"},
        "TypeError: objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got "
        "'LUSPO': what this name means differs between libraries; in TRL it is objective=fastpg.GSPO(epsilon, epsilon_high), "
        'reduction="seq-mean-token-sum", denominator=B; "Dialects" in docs/pages/objectives.md has the names of other '
        "libraries",
    ),
    "objective-unknown-name": (
        {"objective": "vanilla"},
        "TypeError: objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got "
        "'vanilla': pass an instance, such as fastpg.CISPO(ratio_max=5.0) or fastpg.PPOClip(0.2, 0.2); \"Dialects\" in "
        "docs/pages/objectives.md has the names of other libraries",
    ),
    "objective-tensor": (
        {"objective": torch.ones(2)},
        "TypeError: objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got "
        "torch.float32",
    ),
    "objective-class": (
        {"objective": CISPO},
        "TypeError: objective must be an instance of an objective or a function of (logprobs, old_logprobs, advantages); got "
        "the class CISPO: pass an instance, CISPO(...)",
    ),
    "kl-number": (
        {"kl": 0.1, "ref_logprobs": -torch.ones(2, 3)},
        "TypeError: kl must be a KLPenalty, such as KLPenalty(0.01), or None; got float",
    ),
    "kl-function": (
        {"kl": len},
        "TypeError: kl must be a KLPenalty, such as KLPenalty(0.01), or None; got builtin_function_or_method",
    ),
    "kl-without-ref": (
        {"kl": KLPenalty(0.1)},
        "ValueError: kl was given without ref_logprobs; a KL penalty needs kl=KLPenalty(...) and ref_logprobs",
    ),
    "ref-without-kl": (
        {"ref_logprobs": -torch.ones(2, 3)},
        "ValueError: ref_logprobs was given without kl; a KL penalty needs kl=KLPenalty(...) and ref_logprobs",
    ),
    "ids-list": ({"shape": (6,), "sequence_ids": IDS.tolist()}, "TypeError: sequence_ids must be int64 or int32; got list"),
    "ids-float": (
        {"shape": (6,), "sequence_ids": IDS.float()},
        "TypeError: sequence_ids must be int64 or int32; got torch.float32",
    ),
    "reduction-mean": (
        {"reduction": "mean"},
        "ValueError: reduction must be one of token-mean, seq-mean-token-mean, seq-mean-token-sum, sum; got 'mean'",
    ),
    "reduction-none": (
        {"reduction": None},
        "ValueError: reduction must be one of token-mean, seq-mean-token-mean, seq-mean-token-sum, sum; got None",
    ),
    "seq-mean-packed": (
        {"shape": (6,), "reduction": "seq-mean-token-mean"},
        'ValueError: reduction="seq-mean-token-mean" needs sequences: packed tokens (N,) with sequence_ids=, or (B, T); got '
        "shape (6,)",
    ),
    "seq-sum-3d": (
        {"shape": (2, 3, 1), "reduction": "seq-mean-token-sum"},
        'ValueError: reduction="seq-mean-token-sum" needs sequences: packed tokens (N,) with sequence_ids=, or (B, T); got '
        "shape (2, 3, 1)",
    ),
}

# the names of what the others must fit: tokens in the losses of hidden states, logprobs in policy_loss
BESIDE_TOKENS = {
    "old-shape": (
        {"old_logprobs": torch.ones(2, 2)},
        "ValueError: old_logprobs must have the shape of tokens, (2, 3); got (2, 2)",
    ),
    "ref-shape": ({"ref_logprobs": torch.ones(3)}, "ValueError: ref_logprobs must have the shape of tokens, (2, 3); got (3,)"),
    "rollout-shape": (
        {"rollout_weights": torch.ones(2)},
        "ValueError: rollout_weights must have the shape of tokens, (2, 3); got (2,)",
    ),
    "old-device": ({"old_logprobs": meta(2, 3)}, "ValueError: old_logprobs is on meta but tokens is on cpu"),
    "ref-device": ({"ref_logprobs": meta(2, 3)}, "ValueError: ref_logprobs is on meta but tokens is on cpu"),
    "rollout-device": ({"rollout_weights": meta(2, 3)}, "ValueError: rollout_weights is on meta but tokens is on cpu"),
    "advantages-device": ({"advantages": meta(2)}, "ValueError: advantages is on meta but tokens is on cpu"),
    "ids-rows": (
        {"sequence_ids": torch.zeros(2, 3).long()},
        "ValueError: sequence_ids are for packed tokens of shape (N,); tokens has shape (2, 3), whose rows are the sequences: "
        "leave sequence_ids out",
    ),
    "ids-shape": (
        {"shape": (6,), "sequence_ids": IDS[:5]},
        "ValueError: sequence_ids must have the shape of tokens, (6,); got (5,)",
    ),
    "ids-device": ({"shape": (6,), "sequence_ids": IDS.to("meta")}, "ValueError: sequence_ids is on meta but tokens is on cpu"),
    "gspo": (
        {"objective": GSPO()},
        "ValueError: objective=GSPO(eps_low=0.0003, eps_high=0.0004) has one ratio for a sequence, which the one-pass loss "
        "does not know before its last token; use linear_logprobs and policy_loss",
    ),
    "sequence-level": (
        {"objective": ImportanceWeighted("sequence")},
        "ValueError: objective=ImportanceWeighted(level='sequence') has one ratio for a sequence, which the one-pass loss does "
        "not know before its last token; use linear_logprobs and policy_loss",
    ),
}

BESIDE_LOGPROBS = {
    "logprobs-list": ({"logprobs": [-1.0]}, "TypeError: logprobs must be a floating-point tensor; got list"),
    "logprobs-int": (
        {"logprobs": torch.ones(2, 3).long()},
        "TypeError: logprobs must be a floating-point tensor; got torch.int64",
    ),
    "logprobs-result": (
        {"logprobs": (torch.zeros(2, 3), None)},
        "TypeError: logprobs must be a floating-point tensor; got tuple",
    ),
    "mask-shape": ({"mask": torch.ones(3, 2).bool()}, "ValueError: mask must have the shape of logprobs, (2, 3); got (3, 2)"),
    "mask-device": ({"mask": meta(2, 3, dtype=torch.bool)}, "ValueError: mask is on meta but logprobs is on cpu"),
    "old-shape": (
        {"old_logprobs": torch.ones(2, 2)},
        "ValueError: old_logprobs must have the shape of logprobs, (2, 3); got (2, 2)",
    ),
    "ref-shape": (
        {"ref_logprobs": torch.ones(3)},
        "ValueError: ref_logprobs must have the shape of logprobs, (2, 3); got (3,)",
    ),
    "rollout-shape": (
        {"rollout_weights": torch.ones(2)},
        "ValueError: rollout_weights must have the shape of logprobs, (2, 3); got (2,)",
    ),
    "old-device": ({"old_logprobs": meta(2, 3)}, "ValueError: old_logprobs is on meta but logprobs is on cpu"),
    "ref-device": ({"ref_logprobs": meta(2, 3)}, "ValueError: ref_logprobs is on meta but logprobs is on cpu"),
    "advantages-device": ({"advantages": meta(2)}, "ValueError: advantages is on meta but logprobs is on cpu"),
    "ids-rows": (
        {"sequence_ids": torch.zeros(2, 3).long()},
        "ValueError: sequence_ids are for packed logprobs of shape (N,); logprobs has shape (2, 3), whose rows are the "
        "sequences: leave sequence_ids out",
    ),
    "ids-shape": (
        {"shape": (6,), "sequence_ids": IDS[:5]},
        "ValueError: sequence_ids must have the shape of logprobs, (6,); got (5,)",
    ),
    "ids-device": (
        {"shape": (6,), "sequence_ids": IDS.to("meta")},
        "ValueError: sequence_ids is on meta but logprobs is on cpu",
    ),
    "gspo-packed": (
        {"shape": (6,), "objective": GSPO(0.1, 0.2)},
        "ValueError: objective=GSPO(eps_low=0.1, eps_high=0.2) has one ratio for a sequence and needs sequences: logprobs of "
        "shape (B, T), or packed (N,) with sequence_ids=; got shape (6,)",
    ),
    "trajectory-3d": (
        {"shape": (2, 3, 1), "objective": ImportanceWeighted("trajectory")},
        "ValueError: objective=ImportanceWeighted(level='trajectory') has one ratio for a sequence and needs sequences: "
        "logprobs of shape (B, T), or packed (N,) with sequence_ids=; got shape (2, 3, 1)",
    ),
}

VALUES = {
    "values-list": ({"values": [1.0]}, "TypeError: values must be a floating-point tensor; got list"),
    "values-int": ({"values": torch.ones(2, 3).long()}, "TypeError: values must be a floating-point tensor; got torch.int64"),
    "mask-none": (
        {"mask": None},
        "TypeError: mask must be a bool tensor, True where a value counts; got None (the mean of all is values.mean())",
    ),
    "mask-shape": ({"mask": torch.ones(2).bool()}, "ValueError: mask must have the shape of values, (2, 3); got (2,)"),
    "mask-device": ({"mask": meta(2, 3, dtype=torch.bool)}, "ValueError: mask is on meta but values is on cpu"),
}

DENOMINATORS = {
    "denominator-zero": ({"denominator": 0}, "ValueError: denominator must be a positive number or a 0-d tensor; got 0"),
    "denominator-negative": (
        {"denominator": -2.0},
        "ValueError: denominator must be a positive number or a 0-d tensor; got -2.0",
    ),
    "denominator-nan": ({"denominator": NAN}, "ValueError: denominator must be a positive number or a 0-d tensor; got nan"),
    "denominator-inf": ({"denominator": INF}, "ValueError: denominator must be a positive number or a 0-d tensor; got inf"),
    "denominator-bool": ({"denominator": True}, "ValueError: denominator must be a positive number or a 0-d tensor; got True"),
    "denominator-str": ({"denominator": "3"}, "ValueError: denominator must be a positive number or a 0-d tensor; got '3'"),
    "denominator-1d": (
        {"denominator": torch.ones(1)},
        "ValueError: denominator must be a positive number or a real 0-d tensor; got shape (1,), torch.float32",
    ),
    "denominator-per-sequence": (
        {"denominator": torch.ones(2).long()},
        "ValueError: denominator must be a positive number or a real 0-d tensor; got shape (2,), torch.int64",
    ),
    "denominator-bool-tensor": (
        {"denominator": torch.tensor(True)},
        "ValueError: denominator must be a positive number or a real 0-d tensor; got shape (), torch.bool",
    ),
    "denominator-complex": (
        {"denominator": torch.tensor(1j)},
        "ValueError: denominator must be a positive number or a real 0-d tensor; got shape (), torch.complex64",
    ),
    "denominator-0d-zero": (
        {"denominator": torch.tensor(0)},
        "ValueError: denominator must be positive and finite; got 0 (where no rank may have a token, pass count.clamp(min=1): "
        "the loss is then 0)",
    ),
    "denominator-0d-negative": (
        {"denominator": torch.tensor(-1.5)},
        "ValueError: denominator must be positive and finite; got -1.5 (where no rank may have a token, pass "
        "count.clamp(min=1): the loss is then 0)",
    ),
    "denominator-0d-nan": (
        {"denominator": torch.tensor(NAN)},
        "ValueError: denominator must be positive and finite; got nan (where no rank may have a token, pass "
        "count.clamp(min=1): the loss is then 0)",
    ),
    "denominator-0d-inf": (
        {"denominator": torch.tensor(INF)},
        "ValueError: denominator must be positive and finite; got inf (where no rank may have a token, pass "
        "count.clamp(min=1): the loss is then 0)",
    ),
}

TABLES = [
    (LINEAR, HIDDEN),
    ((selective_logprobs,), LOGITS),
    ((*LINEAR, selective_logprobs), TOKENS),
    ((*LINEAR, selective_logprobs, policy_loss, masked_mean), MASKS),
    ((*ONE_PASS, policy_loss), POLICY),
    (ONE_PASS, BESIDE_TOKENS),
    ((policy_loss,), BESIDE_LOGPROBS),
    ((masked_mean,), VALUES),
    ((*ONE_PASS, policy_loss, masked_mean), DENOMINATORS),
]


@pytest.mark.parametrize(("function", "changes", "words"), cases(*TABLES))
def test_arguments_that_do_not_fit(function, changes, words):
    """With check=False too, which leaves out what costs a host read and nothing else, and on either backend."""
    assert said(lambda: call(function, changes)) == words
    if "check" in ACCEPTED[function]:
        assert said(lambda: call(function, changes, check=False)) == words
    # beside a GPU the kernels are not interpreted, and CPU tensors are an error of their own
    if "backend" in ACCEPTED[function] and "backend" not in changes and not torch.cuda.is_available():
        assert said(lambda: call(function, changes, backend="triton")) == words


@pytest.mark.parametrize("function", [*LINEAR, selective_logprobs])
def test_float64_has_no_kernels(function):
    wide = {name: of_shape()[name].double() for name in ("hidden", "head", "logits")} | {"backend": "triton"}
    words = 'TypeError: backend="triton" has no float64 kernels; use backend="torch", or float32 inputs'
    assert said(lambda: call(function, {}, **wide)) == words
    assert said(lambda: call(function, {}, **wide, check=False)) == words


@pytest.mark.parametrize("function", [*LINEAR, selective_logprobs, policy_loss])
@pytest.mark.parametrize("shape", [(2, 3), (6,), (2, 3, 1)], ids=str)
def test_inputs_without_changes_are_worked_on(function, shape):
    """Otherwise the tests above could pass for another reason: because nothing fits, or because no work is seen."""
    words = said(lambda: call(function, {"shape": shape}))
    assert words.startswith("AssertionError: ")
    assert words.endswith(" before the error")
