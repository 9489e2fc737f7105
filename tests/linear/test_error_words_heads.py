"""Every error of LMHead and of the objectives keeps its type and its words; see `test_error_words`."""

import math

import pytest
import torch
from raising import H, V, call, said

from fastpg import CISPO, GSPO, SAPO, ImportanceWeighted, KLPenalty, LMHead, PPOClip, linear_cispo_loss, reference

INF, NAN = math.inf, math.nan


def meta(*shape):
    return torch.ones(shape, device="meta")


W, A, B = torch.ones(V, H), torch.ones(2, H), torch.ones(V, 2)
TRAINED = torch.ones(V, H, requires_grad=True)
FLAT, FREED = torch.nn.Parameter(torch.ones(5)), torch.ones(V, H)  # as FSDP1 leaves them
FLAT._fsdp_flattened = True
FREED.untyped_storage().resize_(0)
SHARDED = (
    "is sharded by FSDP1 (FullyShardedDataParallel) outside the forward of the module that it wraps; pass the wrapped model to "
    "token_logprobs or causal_lm_policy_loss, or compute the loss in that forward"
)
BUILT = {
    "weight-list": (lambda: LMHead([[1.0]]), "TypeError: head.weight must be a floating-point tensor (V, H); got list"),
    "weight-int": (lambda: LMHead(W.int()), "TypeError: head.weight must be a floating-point tensor (V, H); got torch.int32"),
    "weight-3d": (
        lambda: LMHead(W[None]),
        "ValueError: head.weight must be (V, H) with V >= 1 and H >= 1; got shape (1, 7, 4)",
    ),
    "weight-no-rows": (
        lambda: LMHead(W[:0]),
        "ValueError: head.weight must be (V, H) with V >= 1 and H >= 1; got shape (0, 4)",
    ),
    "weight-no-width": (
        lambda: LMHead(W[:, :0]),
        "ValueError: head.weight must be (V, H) with V >= 1 and H >= 1; got shape (7, 0)",
    ),
    "weight-flat": (lambda: LMHead(FLAT), f"ValueError: head.weight {SHARDED}"),
    "weight-freed": (lambda: LMHead(FREED), f"ValueError: head.weight {SHARDED}"),
    "lora-a-flat": (lambda: LMHead(W, lora=(FLAT, B, 1.0)), f"ValueError: head.lora's A {SHARDED}"),
    "lora-b-freed": (lambda: LMHead(W, lora=(A, FREED, 1.0)), f"ValueError: head.lora's B {SHARDED}"),
    "fp32-head-int": (lambda: LMHead(W, fp32_head=1), "TypeError: head.fp32_head must be True or False; got int"),
    "fp32-head-none": (lambda: LMHead(W, fp32_head=None), "TypeError: head.fp32_head must be True or False; got NoneType"),
    "bias-list": (
        lambda: LMHead(W, [0.0] * V),
        "TypeError: head.bias must be a tensor with the weight's dtype and device (torch.float32, cpu); got list",
    ),
    "bias-bf16": (
        lambda: LMHead(W, W[:, 0].bfloat16()),
        "TypeError: head.bias must be a tensor with the weight's dtype and device (torch.float32, cpu); got torch.bfloat16 on "
        "cpu",
    ),
    "bias-fp64-fp32-head": (
        lambda: LMHead(W.half(), W[:, 0].double(), fp32_head=True),
        "TypeError: head.bias must be a tensor with the weight's dtype and device (torch.float16, cpu); got torch.float64 on "
        "cpu",
    ),
    "bias-device": (
        lambda: LMHead(W, meta(V)),
        "TypeError: head.bias must be a tensor with the weight's dtype and device (torch.float32, cpu); got torch.float32 on "
        "meta",
    ),
    "bias-length": (lambda: LMHead(W, W[0]), "ValueError: head.bias must be (V,) = (7,); got shape (4,)"),
    "bias-2d": (lambda: LMHead(W, W[:, :1]), "ValueError: head.bias must be (V,) = (7,); got shape (7, 1)"),
    "softcap-zero": (lambda: LMHead(W, softcap=0.0), "ValueError: head.softcap must be a positive number or None; got 0.0"),
    "softcap-nan": (lambda: LMHead(W, softcap=NAN), "ValueError: head.softcap must be a positive number or None; got nan"),
    "softcap-inf": (lambda: LMHead(W, softcap=INF), "ValueError: head.softcap must be a positive number or None; got inf"),
    "softcap-str": (lambda: LMHead(W, softcap="30"), "ValueError: head.softcap must be a positive number or None; got '30'"),
    "scale-zero": (lambda: LMHead(W, logit_scale=0), "ValueError: head.logit_scale must be a positive number; got 0"),
    "scale-negative": (lambda: LMHead(W, logit_scale=-1.0), "ValueError: head.logit_scale must be a positive number; got -1.0"),
    "scale-none": (lambda: LMHead(W, logit_scale=None), "ValueError: head.logit_scale must be a positive number; got None"),
    "lora-list": (lambda: LMHead(W, lora=[A, B, 1.0]), "TypeError: head.lora must be (A, B, scale) or None; got list"),
    "lora-pair": (lambda: LMHead(W, lora=(A, B)), "TypeError: head.lora must be (A, B, scale) or None; got tuple"),
    "lora-tensor": (lambda: LMHead(W, lora=A), "TypeError: head.lora must be (A, B, scale) or None; got torch.float32"),
    "lora-a-list": (
        lambda: LMHead(W, lora=([[1.0]], B, 1.0)),
        "TypeError: head.lora's A must be a tensor in the weight's dtype or float32, on its device (torch.float32, cpu); got "
        "list",
    ),
    "lora-a-fp64": (
        lambda: LMHead(W, lora=(A.double(), B, 1.0)),
        "TypeError: head.lora's A must be a tensor in the weight's dtype or float32, on its device (torch.float32, cpu); got "
        "torch.float64 on cpu",
    ),
    "lora-b-int": (
        lambda: LMHead(W.bfloat16(), lora=(A, B.int(), 1.0)),
        "TypeError: head.lora's B must be a tensor in the weight's dtype or float32, on its device (torch.bfloat16, cpu); got "
        "torch.int32 on cpu",
    ),
    "lora-b-device": (
        lambda: LMHead(W, lora=(A, meta(V, 2), 1.0)),
        "TypeError: head.lora's B must be a tensor in the weight's dtype or float32, on its device (torch.float32, cpu); got "
        "torch.float32 on meta",
    ),
    "lora-width": (
        lambda: LMHead(W, lora=(A[:, :3], B, 1.0)),
        "ValueError: head.lora must be A (r, H) = (r, 4) and B (V, r) = (7, r) of one rank r >= 1; got A (2, 3) and B (7, 2)",
    ),
    "lora-ranks": (
        lambda: LMHead(W, lora=(A[:1], B, 1.0)),
        "ValueError: head.lora must be A (r, H) = (r, 4) and B (V, r) = (7, r) of one rank r >= 1; got A (1, 4) and B (7, 2)",
    ),
    "lora-no-rank": (
        lambda: LMHead(W, lora=(A[:0], B[:, :0], 1.0)),
        "ValueError: head.lora must be A (r, H) = (r, 4) and B (V, r) = (7, r) of one rank r >= 1; got A (0, 4) and B (7, 0)",
    ),
    "lora-scale-str": (lambda: LMHead(W, lora=(A, B, "2")), "ValueError: head.lora's scale must be a finite number; got '2'"),
    "lora-scale-nan": (lambda: LMHead(W, lora=(A, B, NAN)), "ValueError: head.lora's scale must be a finite number; got nan"),
    "lora-scale-bool": (
        lambda: LMHead(W, lora=(A, B, True)),
        "ValueError: head.lora's scale must be a finite number; got True",
    ),
    "buffer-str": (
        lambda: LMHead(TRAINED, weight_grad="buffer"),
        "TypeError: head.weight_grad must be a torch.float32 tensor on cpu; got str",
    ),
    "buffer-fp64": (
        lambda: LMHead(TRAINED, weight_grad=W.double()),
        "TypeError: head.weight_grad must be a torch.float32 tensor on cpu; got torch.float64 on cpu",
    ),
    "buffer-of-fp64": (
        lambda: LMHead(TRAINED.double(), weight_grad=W),
        "TypeError: head.weight_grad must be a torch.float64 tensor on cpu; got torch.float32 on cpu",
    ),
    "buffer-of-bf16": (
        lambda: LMHead(TRAINED.bfloat16(), weight_grad=W.bfloat16()),
        "TypeError: head.weight_grad must be a torch.float32 tensor on cpu; got torch.bfloat16 on cpu",
    ),
    "buffer-device": (
        lambda: LMHead(TRAINED, weight_grad=meta(V, H)),
        "TypeError: head.weight_grad must be a torch.float32 tensor on cpu; got torch.float32 on meta",
    ),
    "buffer-shape": (
        lambda: LMHead(TRAINED, weight_grad=W.T),
        "ValueError: head.weight_grad must have the weight's shape (7, 4) and require no gradient; got shape (4, 7)",
    ),
    "buffer-requires-grad": (
        lambda: LMHead(TRAINED, weight_grad=W.clone().requires_grad_()),
        "ValueError: head.weight_grad must have the weight's shape (7, 4) and require no gradient; got shape (7, 4), which "
        "requires one",
    ),
    "buffer-of-frozen": (
        lambda: LMHead(W, weight_grad=W.clone()),
        "ValueError: head.weight_grad was given, but head.weight requires no gradient: nothing would be added to it",
    ),
    "start-negative": (
        lambda: LMHead(W, group="WORLD", vocab_start=-1),
        "ValueError: head.vocab_start must be an int >= 0; got -1",
    ),
    "start-bool": (
        lambda: LMHead(W, group="WORLD", vocab_start=True),
        "ValueError: head.vocab_start must be an int >= 0; got True",
    ),
    "start-float": (
        lambda: LMHead(W, group="WORLD", vocab_start=1.0),
        "ValueError: head.vocab_start must be an int >= 0; got 1.0",
    ),
    "start-alone": (
        lambda: LMHead(W, vocab_start=3),
        "ValueError: head.vocab_start=3 needs head.group, the ranks that hold the other rows",
    ),
    "level": (
        lambda: ImportanceWeighted("word"),
        'ValueError: level must be "token", "sequence" or "trajectory"; got \'word\'',
    ),
    "ratio-max-zero": (
        lambda: CISPO(0.0),
        "ValueError: ratio_max must be positive and finite, a bound on the ratio itself, or None for no bound; got 0.0",
    ),
    "ratio-max-str": (
        lambda: CISPO("5"),
        "ValueError: ratio_max must be positive and finite, a bound on the ratio itself, or None for no bound; got '5'",
    ),
    "ratio-min-negative": (
        lambda: CISPO(ratio_min=-1.0),
        "ValueError: ratio_min must be >= 0 and finite, a bound on the ratio itself, or None for no bound; got -1.0",
    ),
    "ratio-min-nan": (
        lambda: CISPO(ratio_min=NAN),
        "ValueError: ratio_min must be >= 0 and finite, a bound on the ratio itself, or None for no bound; got nan",
    ),
    "ratios-crossed": (
        lambda: CISPO(0.5, 2.0),
        "ValueError: ratio_min must not exceed ratio_max; got ratio_min=2.0, ratio_max=0.5",
    ),
    "ppo-eps-low": (lambda: PPOClip(1.5), "ValueError: eps_low must be in [0, 1], so that 1 - eps_low bounds a ratio; got 1.5"),
    "ppo-eps-high": (
        lambda: PPOClip(eps_high=INF),
        "ValueError: eps_high must be >= 0 and finite, so that 1 + eps_high bounds a ratio; got inf",
    ),
    "gspo-eps-low": (lambda: GSPO(-0.1), "ValueError: eps_low must be in [0, 1], so that 1 - eps_low bounds a ratio; got -0.1"),
    "gspo-eps-high": (
        lambda: GSPO(eps_high="1"),
        "ValueError: eps_high must be >= 0 and finite, so that 1 + eps_high bounds a ratio; got '1'",
    ),
    "dual-clip": (
        lambda: PPOClip(dual_clip=1),
        "ValueError: dual_clip must be > 1, a bound on the ratio where A < 0, or None; got 1",
    ),
    "tau-pos": (lambda: SAPO(0.0), "ValueError: tau_pos must be positive and finite; got 0.0"),
    "tau-neg": (lambda: SAPO(tau_neg=None), "ValueError: tau_neg must be positive and finite; got None"),
    "coef-negative": (lambda: KLPenalty(-0.1), "ValueError: coef must be a number >= 0; got -0.1"),
    "coef-name": (lambda: KLPenalty("k3"), "ValueError: coef must be a number >= 0; got 'k3'"),
    "estimator": (lambda: KLPenalty(0.1, "k4"), 'ValueError: estimator must be "k1", "k2" or "k3"; got \'k4\''),
    "max-log-ratio-zero": (
        lambda: KLPenalty(0.1, max_log_ratio=0),
        "ValueError: max_log_ratio must be positive and finite, a bound on |ref - logp|, or None for no bound; got 0",
    ),
    "max-log-ratio-negative": (
        lambda: KLPenalty(0.1, max_log_ratio=-20.0),
        "ValueError: max_log_ratio must be positive and finite, a bound on |ref - logp|, or None for no bound; got -20.0",
    ),
    "max-log-ratio-nan": (
        lambda: KLPenalty(0.1, max_log_ratio=NAN),
        "ValueError: max_log_ratio must be positive and finite, a bound on |ref - logp|, or None for no bound; got nan",
    ),
    "max-log-ratio-inf": (
        lambda: KLPenalty(0.1, max_log_ratio=INF),
        "ValueError: max_log_ratio must be positive and finite, a bound on |ref - logp|, or None for no bound; got inf",
    ),
    "max-log-ratio-bool": (
        lambda: KLPenalty(0.1, max_log_ratio=True),
        "ValueError: max_log_ratio must be positive and finite, a bound on |ref - logp|, or None for no bound; got True",
    ),
    "max-log-ratio-str": (
        lambda: KLPenalty(0.1, max_log_ratio="20"),
        "ValueError: max_log_ratio must be positive and finite, a bound on |ref - logp|, or None for no bound; got '20'",
    ),
    "cispo-loss": (
        lambda: call(linear_cispo_loss, {"ratio_max": -0.2, "hidden": None}),
        "ValueError: ratio_max must be positive and finite, a bound on the ratio itself, or None for no bound; got -0.2",
    ),
    "oracle": (
        lambda: reference.logits(W, LMHead(W, group="WORLD")),
        "ValueError: head.group: the oracle computes on one process; give it the whole weight",
    ),
}


@pytest.mark.parametrize(("make", "words"), BUILT.values(), ids=BUILT)
def test_heads_and_objectives_that_do_not_fit(make, words):
    assert said(make) == words
