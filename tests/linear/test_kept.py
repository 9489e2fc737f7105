"""`fastpg.kept`: rows that are chosen before the model runs, in the place of a mask."""

import pytest
import torch

import fastpg
from fastpg import (
    CISPO,
    ImportanceWeighted,
    Kept,
    KLPenalty,
    LMHead,
    kept,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
)
from fastpg.linear import call

N, H, V = 40, 8, 30
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
CHECKS = pytest.mark.parametrize("check", [True, False])


def batch(shape=(N,)):
    """hidden, weight, tokens, old log-probabilities, advantages (a third are 0) and mask."""
    hidden, weight = torch.randn(*shape, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    tokens, mask = torch.randint(0, V, shape), torch.rand(shape) < 0.7
    with torch.no_grad():
        old = linear_logprobs(hidden, weight, tokens).logprobs + torch.randn(shape) * 0.1
    advantages = torch.where(torch.rand(shape) < 0.3, 0.0, torch.randn(shape))
    return hidden, weight, tokens, old, advantages, mask


def results(arguments, mask, function=linear_cispo_loss, **options):
    hidden, weight, *others = arguments
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    out = function(*leaves, *others, mask=mask, **options)
    (out.loss if hasattr(out, "loss") else out.logprobs.sum()).backward()
    return out, *(x.grad for x in leaves)


def same(got, want):
    for a, b in zip(got[1:], want[1:], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(got[0].logprobs, want[0].logprobs, rtol=0, atol=0, equal_nan=True)


@BACKENDS
@CHECKS
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("shape", [(N,), (5, 8)], ids=str)
def test_a_call_with_it_is_the_call_with_the_mask(backend, check, skips, shape):
    *arguments, mask = batch(shape)
    rows = kept(mask, arguments[4] if skips else None)
    got = results(arguments, rows, backend=backend, check=check)
    # without checks, no row without a gradient is left out of the products
    want = results(arguments, mask, backend=backend, skip_zero_weight=skips, skip_silenced=None if check else False)
    same(got, want)
    assert torch.equal(got[0].loss, want[0].loss)
    assert got[0].metrics.to_dict() == want[0].metrics.to_dict()
    assert (got[0].metrics["skipped_tokens"] > 0) == skips


@BACKENDS
@CHECKS
def test_log_probabilities(backend, check):
    hidden, weight, tokens, _, _, mask = batch((5, 8))
    want = results((hidden, weight, tokens), mask, linear_logprobs, backend=backend)
    same(results((hidden, weight, tokens), kept(mask), linear_logprobs, backend=backend, check=check), want)


@BACKENDS
@CHECKS
def test_no_row_and_every_row(backend, check):
    *arguments, mask = batch()
    for m in (torch.zeros_like(mask), torch.ones_like(mask)):
        got = results(arguments, kept(m), backend=backend, check=check)
        want = results(arguments, m, backend=backend, skip_zero_weight=False, skip_silenced=None if check else False)
        same(got, want)
        assert torch.equal(got[0].loss, want[0].loss)
    everything_skipped = kept(torch.ones_like(mask), torch.zeros(N))
    out = linear_cispo_loss(*arguments[:4], torch.zeros(N), mask=everything_skipped, backend=backend, check=check)
    assert out.loss == 0
    assert out.metrics["skipped_tokens"] == N


def test_rows():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages = torch.tensor([[0.0, 1.0, 1.0], [-0.0, torch.nan, 1e-30]])
    assert kept(mask).indices.tolist() == [0, 1, 3, 4, 5]
    assert kept(mask, advantages).indices.tolist() == [1, 4, 5]
    assert kept(mask, torch.tensor([0.0, 2.0])).indices.tolist() == [3, 4, 5]
    assert kept(mask, advantages, torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])).indices.tolist() == [4, 5]
    narrow = torch.full((2, 3), 2.0**-14, dtype=torch.float16)
    assert kept(mask, narrow, narrow).indices.tolist() == [0, 1, 3, 4, 5]  # their product underflows in 16 bits
    assert kept(mask, torch.tensor([0, 2])).indices.tolist() == [3, 4, 5]


@BACKENDS
def test_lora_and_float16(backend):
    *arguments, mask = batch()
    hidden, weight, *rest = arguments
    lora = torch.randn(2, H), torch.randn(V, 2), 0.5
    for head, dtype in ((LMHead(weight.detach(), lora=lora), torch.float32), (weight.detach().half(), torch.float16)):
        inputs = hidden.detach().to(dtype)
        got, want = (
            linear_cispo_loss(inputs, head, *rest, mask=m, backend=backend) for m in (kept(mask, rest[2]), mask)
        )  # fmt: skip
        assert torch.equal(got.loss, want.loss)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=0, equal_nan=True)


# ---- what does not fit

*ARGUMENTS, MASK = batch()
ROWS = kept(MASK)
FAULTS = {
    "another shape": (kept(torch.ones(N + 1, dtype=torch.bool)), ValueError, r"mask must have the shape of tokens, \(40,\)"),
    "another device": (Kept(MASK, ROWS.indices.to("meta"), False), ValueError, "mask.indices is on meta but tokens is on cpu"),
    "no indices": (Kept(MASK, None, False), TypeError, "mask.indices must be an int64 tensor .* got NoneType"),
    "int32": (Kept(MASK, ROWS.indices.int(), False), TypeError, "mask.indices must be an int64 tensor .* got torch.int32"),
    "too many": (Kept(MASK, torch.arange(N + 1), False), ValueError, "mask.indices has 41 rows, more than the 40 tokens"),
    "out of range": (Kept(MASK, ROWS.indices + N, False), ValueError, r"mask.indices must be in \[0, 40\), .* got 4\d"),
    "negative": (Kept(MASK, ROWS.indices - N, False), ValueError, r"mask.indices must be in \[0, 40\), .* got -\d"),
    "backwards": (Kept(MASK, ROWS.indices.flip(0), False), ValueError, "mask.indices must be ascending"),
    "masked rows": (Kept(MASK, torch.arange(N), False), ValueError, "mask.indices has rows where mask.mask is False"),
    "one missing": (Kept(MASK, ROWS.indices[1:], False), ValueError, "mask leaves out 1 rows that the loss needs"),
}


@BACKENDS
@pytest.mark.parametrize(("rows", "error", "said"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(backend, rows, error, said):
    with pytest.raises(error, match=said):
        linear_cispo_loss(*ARGUMENTS, mask=rows, backend=backend)
    with pytest.raises(error, match=said):
        linear_logprobs(*ARGUMENTS[:3], mask=rows, backend=backend)


@BACKENDS
@pytest.mark.parametrize(("rows", "error", "said"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named_where_the_host_waits_at_the_end(backend, rows, error, said, monkeypatch):
    """As on a GPU: what is gathered by then reads no foreign memory, and no buffer of the caller has been written to."""
    monkeypatch.setattr(call, "_reading_is_free", lambda x: False)
    hidden, weight, *others = ARGUMENTS
    buffer = torch.full((V, H), 7.0)
    head = LMHead(weight, weight_grad=buffer)
    with pytest.raises(error, match=said):
        linear_cispo_loss(hidden, head, *others, mask=rows, backend=backend)
    with pytest.raises(error, match=said):
        linear_logprobs(hidden, head, others[0], mask=rows, backend=backend)
    assert (buffer == 7).all()


@BACKENDS
def test_the_host_waits_at_the_end_and_finds_nothing(backend, monkeypatch):
    monkeypatch.setattr(call, "_reading_is_free", lambda x: False)
    got, want = (results(ARGUMENTS, m, backend=backend) for m in (kept(MASK, ARGUMENTS[4]), MASK))
    same(got, want)
    assert got[0].metrics.to_dict() == want[0].metrics.to_dict()


@BACKENDS
def test_rows_that_do_not_fit_make_an_unchecked_loss_nan(backend):
    hidden, weight, tokens, old, _ = ARGUMENTS
    zero, place = torch.zeros(N), int(ROWS.indices[3])
    unknown = torch.where(torch.arange(N) == place, torch.nan, old)
    rows = kept(MASK, zero)
    assert linear_cispo_loss(hidden, weight, tokens, old, zero, mask=rows, backend=backend, check=False).loss == 0
    assert linear_cispo_loss(hidden, weight, tokens, unknown, zero, mask=rows, backend=backend, check=False).loss.isnan()
    rows = kept(MASK, torch.where(torch.arange(N) == int(ROWS.indices[0]), 1.0, 0.0))
    given = torch.where(torch.arange(N) == int(ROWS.indices[0]), 1.0, 0.0)
    assert linear_cispo_loss(hidden, weight, tokens, old, given, mask=rows, backend=backend, check=False).loss.isfinite()
    assert linear_cispo_loss(hidden, weight, tokens, unknown, given, mask=rows, backend=backend, check=False).loss.isnan()
    short = Kept(MASK, ROWS.indices[1:], False)
    assert linear_cispo_loss(*ARGUMENTS, mask=short, backend=backend, check=False).loss.isnan()


@BACKENDS
def test_tokens_that_are_none_and_values_of_another_batch(backend):
    hidden, weight, tokens, old, advantages = ARGUMENTS
    place = int(ROWS.indices[3])
    ignored = tokens.clone()
    ignored[place] = -100
    with pytest.raises(ValueError, match=rf"mask keeps the token at position {place}, whose id is -100"):
        linear_logprobs(hidden, weight, ignored, mask=ROWS, backend=backend)
    rows = kept(MASK, torch.zeros(N))
    with pytest.raises(ValueError, match=r"mask leaves out \d+ rows that the loss needs"):
        linear_cispo_loss(*ARGUMENTS, mask=rows, backend=backend)
    unknown = torch.where(torch.arange(N) == place, torch.nan, old)
    with pytest.raises(ValueError, match="mask leaves out 1 rows that the loss needs"):
        linear_cispo_loss(hidden, weight, tokens, unknown, torch.zeros(N), mask=rows, backend=backend)
    with pytest.raises(ValueError, match="tokens must be in"):
        linear_cispo_loss(hidden, weight, tokens + V, old, advantages, mask=ROWS, backend=backend)


def test_rows_without_zero_advantages_where_those_are_wanted():
    rows = kept(MASK, ARGUMENTS[4])
    with pytest.raises(ValueError, match=r"mask=kept\(mask, advantages\) leaves out tokens .*: pass kept\(mask\)"):
        linear_logprobs(*ARGUMENTS[:3], mask=rows)
    wanted = {
        "kl=KLPenalty": {"objective": CISPO(), "kl": KLPenalty(0.1), "ref_logprobs": ARGUMENTS[3]},
        "skip_zero_weight=False": {"objective": ImportanceWeighted(), "skip_zero_weight": False},
        "objective=<function": {"objective": lambda logp, old, a: logp * a},
    }
    for said, options in wanted.items():
        with pytest.raises(ValueError, match=f"which are wanted with {said}"):
            linear_policy_loss(*ARGUMENTS, mask=rows, **options)


def test_arguments_of_kept():
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, .* got torch.float32"):
        kept(torch.ones(3))
    with pytest.raises(TypeError, match="advantages must be a real tensor; got float"):
        kept(MASK, 1.0)
    with pytest.raises(ValueError, match=r"advantages must have the shape of mask, \(40,\); got \(3,\)"):
        kept(MASK, torch.ones(3))
    with pytest.raises(ValueError, match=r"advantages must have .* \(2, 3\) or per row \(2,\); got \(3,\)"):
        kept(torch.ones(2, 3, dtype=torch.bool), torch.ones(3))
    with pytest.raises(ValueError, match="rollout_weights must have the shape of mask"):
        kept(MASK, torch.ones(N), torch.ones(3))
    with pytest.raises(ValueError, match="rollout_weights were given without advantages"):
        kept(MASK, None, torch.ones(N))
    with pytest.raises(ValueError, match="advantages is on meta but mask is on cpu"):
        kept(MASK, torch.ones(N, device="meta"))
    assert fastpg.kept is kept
