"""Divisors that a batch can make 0: where nothing is kept a mean is 0 and its gradient exactly 0, never 0 / 0.

What is kept over a denominator of 0 stays loud. Ranks without tokens are in test_data_parallel.
"""

from __future__ import annotations

import math
import shutil
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpg
from fastpg import CISPO, GSPO, ImportanceWeighted, KLPenalty, LMHead, PPOClip, linear_logprobs, masked_mean, policy_loss
from fastpg.integrations.transformers import patched
from fastpg.integrations.verl import linear_cross_entropy
from fastpg.loss.policy_loss import token_losses
from fastpg.loss.reductions import token_weights
from fastpg.loss.sequences import sequences_of
from fastpg.tiles.structures import TokenTerms

REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"]
NOTHING, SOME = torch.zeros(2, 3, dtype=torch.bool), torch.tensor([[True, False, True], [False, False, True]])
ZEROS = {"int": 0, "float": 0.0, "int64": torch.tensor(0), "float32": torch.tensor(0.0), "float64": torch.tensor(0.0).double()}


# ---- masked_mean


@pytest.mark.parametrize("denominator", [None, 5, 2.5, torch.tensor(4), torch.tensor(2.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_mean_of_what_is_kept(dtype, denominator):
    values = torch.randn(2, 3).to(dtype).requires_grad_()
    out = masked_mean(values, SOME, denominator)
    count = 3.0 if denominator is None else float(denominator)
    assert out.shape == ()
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(out.double() - values.detach().double()[SOME].sum() / count) < 1e-6
    (2 * out).backward()
    assert values.grad.dtype == dtype
    torch.testing.assert_close(values.grad, torch.where(SOME, 2 / count, 0).to(dtype))


def test_sixteen_bits_are_summed_in_32():
    """1 + 4096 * 2^-8: in bf16 the sum would stay at 1 or, pairwise, be rounded to 8 bits; in fp16 it would overflow."""
    values = torch.cat([torch.ones(1), torch.full((4096,), 2.0**-8)])
    assert masked_mean(values.bfloat16(), torch.ones(4097).bool(), 1) == 17
    assert masked_mean(torch.full((4,), 60000.0).half(), torch.ones(4).bool()) == 60000


@pytest.mark.parametrize("denominator", [None, 3, torch.tensor(3.0)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3), (2, 0)], ids=str)
def test_of_nothing(shape, denominator):
    values = torch.full(shape, torch.nan, requires_grad=True)
    out = masked_mean(values, torch.zeros(shape, dtype=torch.bool), denominator)
    assert out == 0
    (out * torch.nan).backward()  # not even what comes in reaches a masked value
    assert torch.equal(values.grad, torch.zeros(shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_values_reach_neither_result_nor_gradient(bad):
    """And those that are kept are not hidden."""
    values = torch.where(SOME, 1.5, bad).requires_grad_()
    out = masked_mean(values, SOME)
    out.backward()
    assert out == 1.5
    torch.testing.assert_close(values.grad, SOME / 3)
    kept = torch.ones(2, 3)
    kept[0, 2] = bad
    assert not masked_mean(kept, SOME).isfinite()


def test_means_of_micro_batches_add_up():
    """With the count of all of them, one of them without anything; without it they would not."""
    values, mask = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6) > 0.5
    mask[2] = False
    whole, parts = masked_mean(values, mask), list(zip(values, mask, strict=True))
    assert torch.isclose(sum(masked_mean(v, m, mask.sum()) for v, m in parts), whole, rtol=1e-12)
    assert not torch.isclose(sum(masked_mean(v, m) for v, m in parts) / 4, whole, rtol=1e-3)


def test_gradcheck():
    values = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, SOME, 7.0), values)
    assert torch.autograd.gradgradcheck(lambda x: masked_mean(x**2, SOME), values)


def test_it_reads_nothing_and_compiles():
    with FakeTensorMode():
        masked_mean(torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool))

    def entropy_bonus(values, mask, count):
        return masked_mean(values, mask) + masked_mean(values * values, mask, count)

    compiled = torch.compile(entropy_bonus, fullgraph=True, backend="aot_eager")
    values = torch.randn(2, 3, requires_grad=True)
    for mask, count in ((SOME, torch.tensor(4.0)), (NOTHING, torch.tensor(4.0)), (NOTHING, torch.tensor(0.0))):
        got = compiled(values, mask, count)
        (gradient,) = torch.autograd.grad(got, values)
        want = entropy_bonus(values, mask, torch.tensor(4.0))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradient, torch.autograd.grad(want, values)[0])
    assert not compiled(values, SOME, torch.tensor(0.0)).isfinite()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"values": [1.0]}, TypeError, r"values must be a floating-point tensor; got list"),
        ({"values": torch.ones(2, 3).long()}, TypeError, r"values must be a floating-point tensor; got torch.int64"),
        ({"mask": None}, TypeError, r"mask must be a bool tensor.*got None"),
        ({"mask": torch.ones(2, 3)}, TypeError, r"mask must be a bool tensor.*got torch.float32"),
        ({"mask": SOME[:1]}, ValueError, r"mask must have the shape of values, \(2, 3\); got \(1, 3\)"),
        ({"mask": SOME.to("meta")}, ValueError, r"mask is on meta but values is on cpu"),
        ({"denominator": 0}, ValueError, r"denominator must be a positive number .*; got 0"),
        ({"denominator": -1.0}, ValueError, r"denominator must be a positive number .*; got -1.0"),
        ({"denominator": math.nan}, ValueError, r"denominator must be a positive number .*; got nan"),
        ({"denominator": torch.tensor(0)}, ValueError, r"denominator must be positive and finite; got 0 .*clamp\(min=1\)"),
        ({"denominator": torch.ones(1)}, ValueError, r"denominator must be .* 0-d tensor; got shape \(1,\)"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, said):
    with pytest.raises(error, match=said):
        masked_mean(**{"values": torch.ones(2, 3), "mask": SOME} | changes)


# ---- weights of tokens


@pytest.mark.parametrize("zero", [*ZEROS.values(), torch.tensor(torch.nan)], ids=[*ZEROS, "nan"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_tokens_weigh_nothing_whatever_the_denominator(reduction, packed, zero):
    ids = torch.tensor([0, 0, 0, 1, 1, 1]) if packed else None
    for mask in (SOME.flatten(), NOTHING.flatten()) if packed else (SOME, NOTHING):
        weights = token_weights(mask.sum(), reduction, zero, torch.float32, sequences_of(mask, ids))
        assert not weights.expand(mask.shape)[mask].isfinite().any()
        terms = TokenTerms(~mask, None, torch.ones(mask.shape), weights, None, None)
        losses = token_losses(torch.zeros(mask.shape), terms, lambda logp, old, a: logp + a, None)
        assert (losses[~mask] == 0).all()
        assert not losses[mask].isfinite().any()


COMPILED = [CISPO(), PPOClip(), ImportanceWeighted("trajectory"), GSPO()]


@pytest.mark.parametrize(
    ("reduction", "objective"), list(zip(REDUCTIONS, COMPILED, strict=True)), ids=lambda x: getattr(x, "__name__", None)
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own
def test_compiled_losses_over_a_count_of_0(reduction, objective):
    """Where no check looks at the denominator: 0 and gradients of 0 for a batch without tokens, no finite one for others."""

    def loss(logprobs, mask, count):
        options = {"objective": objective, "mask": mask, "reduction": reduction, "denominator": count}
        old, ref = torch.full((2, 3), -1.0), torch.full((2, 3), -2.0)
        return policy_loss(logprobs, old, torch.ones(2, 3), kl=KLPenalty(0.1), ref_logprobs=ref, **options).loss

    torch._dynamo.reset()  # Dynamo compiles one function 8 times at most
    # what Dynamo traces is what differs from eager mode; AOT autograd sees losses in test_enumeration
    compiled, logprobs = torch.compile(loss, fullgraph=True, backend="eager"), (-torch.rand(2, 3)).requires_grad_()
    got = compiled(logprobs, NOTHING, torch.tensor(0.0))
    assert got == 0
    assert not torch.autograd.grad(got, logprobs)[0].any()
    assert not compiled(logprobs, SOME, torch.tensor(0.0)).isfinite()
    with pytest.raises(ValueError, match=r"denominator must be positive and finite; got 0.*clamp\(min=1\)"):
        loss(logprobs, NOTHING, torch.tensor(0.0))


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_linear_losses_over_a_count_of_0(one_pass):
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    tokens, old = torch.randint(0, 20, (2, 3)), torch.full((2, 3), -3.0)

    def loss(hidden, weight, mask, count):
        if one_pass:
            options = {"mask": mask, "denominator": count, "check": False}
            return fastpg.linear_cispo_loss(hidden, weight, tokens, old, torch.ones(2, 3), **options).loss
        out = linear_logprobs(hidden, weight, tokens, mask=mask, entropy=True, check=False)
        return -masked_mean(out.logprobs + out.entropy, mask, count)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = compiled(hidden, weight, NOTHING, torch.tensor(0.0))
    assert got == 0
    assert not any(g.any() for g in torch.autograd.grad(got, (hidden, weight)))
    assert not compiled(hidden, weight, SOME, torch.tensor(0.0)).isfinite()


@pytest.mark.parametrize(("reduction", "schedule"), list(product(REDUCTIONS, ["one-pass", "two-pass"])))
def test_losses_of_nothing_with_the_documented_entropy_bonus(reduction, schedule):
    hidden, weight = torch.full((2, 3, 8), torch.nan, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    tokens, old, advantages = torch.randint(0, 20, (2, 3)), torch.full((2, 3), torch.nan), torch.full((2, 3), torch.inf)
    options = {"objective": CISPO(), "mask": NOTHING, "reduction": reduction, "denominator": torch.tensor(0.0).clamp(min=1)}
    if schedule == "one-pass":
        out = fastpg.linear_policy_loss(hidden, weight, tokens, old, advantages, entropy=True, **options)
        loss = out.loss
    else:
        scored = linear_logprobs(hidden, weight, tokens, mask=NOTHING, entropy=True)
        out = policy_loss(scored.logprobs, old, advantages, **options)
        loss = out.loss - 0.01 * masked_mean(scored.entropy, NOTHING)
    assert loss == 0
    assert all(value.isfinite() for value in out.metrics.values())
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


# ---- integrations


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_patched_without_items(zero):
    model, ids = tiny_llama(), torch.randint(0, 61, (2, 8))
    with patched(model):
        loss = model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=zero).loss
        assert loss == 0
        loss.backward()
        assert not model(input_ids=ids, labels=ids, num_items_in_batch=zero).loss.isfinite()
    gradients = [p.grad for p in model.parameters()]
    assert not any(g is None or g.any() for g in gradients)


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_trls_answer_without_items(zero):
    pytest.importorskip("trl.trainer.utils")
    from trl.trainer.utils import FusedCausalLMOutput

    from fastpg.integrations.trl import _answer, _Scorer, _Settings

    model, ids = tiny_llama(), torch.randint(0, 61, (2, 8))
    scorer = _Scorer(_Settings(1.0, False, ("log_probs",)), None, None)
    for name in ("labels", "shift_labels"):
        inputs = {"input_ids": ids, "num_items_in_batch": zero}
        loss = _answer(model, scorer, FusedCausalLMOutput, (), inputs | {name: torch.full_like(ids, -100)}).loss
        assert loss == 0
        loss.backward()
        assert not any(p.grad is None or p.grad.any() for p in model.parameters())
        assert not _answer(model, scorer, FusedCausalLMOutput, (), inputs | {name: ids}).loss.isfinite()


def test_verls_mean_of_no_rows():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    mean, entropy = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), reduction="mean")
    assert mean == 0
    assert entropy.shape == (0,)
    mean.backward()
    assert not weight.grad.any()


def test_a_head_of_the_whole_batch_masked_by_tokens():
    """All tokens -100, as padding is."""
    out = linear_logprobs(torch.randn(4, 8), LMHead(torch.randn(20, 8)), torch.full((4,), -100), entropy=True)
    assert masked_mean(out.entropy, torch.zeros(4).bool()) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from its compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler for CPUs needs one of C++")
def test_compilers_do_not_hide_an_old_logprob_that_is_not_finite():
    """x * 0 is 0 for torch's compiler, whatever x is; the loss is NaN all the same."""
    logprobs, old, advantages = -torch.rand(8), -torch.rand(8), torch.zeros(8)

    def loss(logprobs, old):
        return policy_loss(logprobs, old, advantages, objective=CISPO()).loss

    compiled = torch.compile(loss)
    assert torch.equal(compiled(logprobs, old), loss(logprobs, old))
    for spoilt in (math.inf, -math.inf, math.nan):
        old[3] = spoilt
        assert compiled(logprobs, old).isnan()
        assert loss(logprobs, old).isnan()
