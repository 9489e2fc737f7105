"""`fastpg.rollout` against loops in Python, numbers by hand, and what must not matter.

`test_rollout_enumeration` has the proofs of what is unbiased, `test_rollout_dialects` the formulas of other libraries.
"""

import math

import pytest
import torch

import fastpg
from fastpg import PPOClip, Reinforce, policy_loss
from fastpg.rollout import icepop, masked_weights, mismatch_metrics, token_veto, truncated_weights, within_band

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
INF, NAN = math.inf, math.nan

# Sequences: full, with holes, one token, none, full.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
levels = pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
measures = pytest.mark.parametrize("measure", ["ratio", "k2", "k3", "probability"])
bounds = pytest.mark.parametrize(("low", "high"), [(0.7, 1.4), (None, 1.2), (0.9, None)])


def inputs(dtype=F64, spread=0.4):
    """Log-probabilities of the trainer and of the engine: sequences above, below and at 1, with tokens on both sides."""
    logprobs = -3 * torch.rand(5, 6, dtype=F64) - 0.01
    noise = torch.where(MASK, spread * torch.randn(5, 6, dtype=F64), 0)
    noise = noise - noise.sum(1, keepdim=True) / MASK.sum(1, keepdim=True).clamp(min=1)
    d = torch.tensor([0.45, -0.45, 0.05, 0.0, 0.02], dtype=F64)[:, None] + noise
    return logprobs.to(dtype), (logprobs - d).to(dtype)


def spoilt(x, mask=MASK):
    """NaN and infinities wherever the mask says nobody looks."""
    return torch.where(mask, x, torch.tensor([NAN, INF, -INF], dtype=x.dtype).repeat(x.numel() // 3).reshape(x.shape))


def close(actual, wanted, rtol=1e-13, atol=1e-14):
    wanted = wanted if isinstance(wanted, torch.Tensor) else torch.tensor(wanted, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)


def bounded(x, low, high):
    return (low is None or x >= low) and (high is None or x <= high)


def by_loop(logprobs, rollout, formula, level="token", mask=MASK):
    """formula(log-ratio of the level, p, q) for every kept token, else 0."""
    result = [[0.0] * logprobs.shape[1] for _ in logprobs]
    for p, q, kept, out in zip(logprobs.tolist(), rollout.tolist(), mask.tolist(), result, strict=True):
        d = [a - b if k else 0.0 for a, b, k in zip(p, q, kept, strict=True)]
        of_sequence = {"sequence": math.fsum(d), "geometric": math.fsum(d) / max(sum(kept), 1)}
        for t, counts in enumerate(kept):
            if counts:
                out[t] = formula(of_sequence.get(level, d[t]), p[t], q[t])
    return result


# ---- weights


@bounds
@levels
def test_truncated_weights_equal_a_loop(level, low, high):
    p, q = inputs()
    actual = truncated_weights(spoilt(p), spoilt(q), MASK, low=low, high=high, level=level)
    close(actual, by_loop(p, q, lambda d, *_: min(max(math.exp(d), low or 0.0), high or INF), level))
    for bound in (low, high):
        assert bound is None or (actual == bound).any()
    plain = truncated_weights(p, q, MASK, high=None, level=level)
    close(plain, by_loop(p, q, lambda d, *_: math.exp(d), level))


@bounds
@levels
def test_masked_weights_equal_a_loop(level, low, high):
    p, q = inputs()
    actual = masked_weights(spoilt(p), spoilt(q), MASK, low=low, high=high, level=level)
    close(actual, by_loop(p, q, lambda d, *_: math.exp(d) if bounded(math.exp(d), low, high) else 0.0, level))
    assert 0 < ((actual == 0) & MASK).sum() < MASK.sum()


def test_icepop_equals_a_loop_and_its_bounds_are_those_of_its_documentation():
    p, q = inputs(spread=1.5)
    close(icepop(spoilt(p), spoilt(q), MASK), by_loop(p, q, lambda d, *_: math.exp(d) if 0.5 <= math.exp(d) <= 5 else 0.0))
    narrow = icepop(p, q, MASK, alpha=0.8, beta=1.3)
    close(narrow, by_loop(p, q, lambda d, *_: math.exp(d) if 0.8 <= math.exp(d) <= 1.3 else 0.0))
    assert torch.equal(narrow, masked_weights(p, q, MASK, low=0.8, high=1.3))


def test_weights_by_hand():
    """Ratios 2, 1/2, 4 and 1; a masked token between them. Bounds belong to the band."""
    q = torch.tensor([[0.25, 0.5, 0.3, 0.125, 0.5]], dtype=F64).log()
    p = torch.tensor([[0.5, 0.25, 0.9, 0.5, 0.5]], dtype=F64).log()
    mask = torch.tensor([[1, 1, 0, 1, 1]]).bool()
    close(truncated_weights(p, q, mask, high=2), [[2.0, 0.5, 0.0, 2.0, 1.0]])
    close(truncated_weights(p, q, mask, low=0.75, high=3), [[2.0, 0.75, 0.0, 3.0, 1.0]])
    close(masked_weights(p, q, mask, low=0.4, high=3), [[2.0, 0.5, 0.0, 0.0, 1.0]])
    close(truncated_weights(p, q, mask, high=None, level="sequence"), [[4.0, 4.0, 0.0, 4.0, 4.0]])
    close(truncated_weights(p, q, mask, high=None, level="geometric"), [[2**0.5, 2**0.5, 0.0, 2**0.5, 2**0.5]])
    exact = torch.zeros(1, 2), torch.zeros(1, 2)
    assert masked_weights(*exact, low=1, high=1).tolist() == [[1.0, 1.0]]
    assert within_band(*exact, low=1, high=1).all()
    assert token_veto(*exact, low=1, high=1).all()


# ---- masks

PER_TOKEN = {
    "ratio": lambda d, p, q: math.exp(d),
    "k2": lambda d, p, q: d * d / 2,
    "k3": lambda d, p, q: math.expm1(d) - d,
    "probability": lambda d, p, q: math.exp(p) - math.exp(q),
}
BANDS = {"ratio": (0.8, 1.3), "k2": (None, 0.05), "k3": (0.001, 0.05), "probability": (-0.05, 0.02)}


@measures
def test_a_band_of_tokens_equals_a_loop(measure):
    p, q = inputs()
    low, high = BANDS[measure]
    actual = within_band(spoilt(p), spoilt(q), MASK, low=low, high=high, measure=measure)
    assert actual.dtype == torch.bool
    wanted = by_loop(p, q, lambda *x: float(bounded(PER_TOKEN[measure](*x), low, high)))
    assert actual.double().tolist() == wanted
    assert 0 < actual.sum() < MASK.sum()


@pytest.mark.parametrize("level", ["sequence", "geometric"])
@pytest.mark.parametrize("measure", ["ratio", "k2", "k3"])
def test_a_band_of_sequences_equals_a_loop(measure, level):
    for _ in range(20):
        p, q = inputs()
        values = []
        for row in range(5):
            d = [(p - q)[row, t].item() for t in range(6) if MASK[row, t]]
            terms = d if measure == "ratio" else [PER_TOKEN[measure](x, 0, 0) for x in d]
            total = math.fsum(terms) / (max(len(d), 1) if level == "geometric" else 1)
            values.append(math.exp(total) if measure == "ratio" else total)
        middle = sorted(values[i] for i in (0, 1, 2, 4))
        low, high = (middle[0] + middle[1]) / 2, (middle[2] + middle[3]) / 2  # so one sequence is below, and one above
        keep = torch.tensor([bounded(v, low, high) for v in values])[:, None] & MASK
        assert keep.any(1).sum() == 2
        assert torch.equal(within_band(spoilt(p), spoilt(q), MASK, low=low, high=high, measure=measure, level=level), keep)


@measures
def test_a_veto_drops_the_sequences_with_a_token_outside(measure):
    p, q = inputs()
    low, high = {"ratio": (0.6, 1.9), "k2": (None, 0.3), "k3": (None, 0.2), "probability": (-0.1, 0.15)}[measure]
    p, q = torch.where(MASK, p, NAN), torch.where(MASK, q, NAN)
    p[4] = q[4] + 0.01  # a sequence that is kept
    p[0, 3], q[0, 3], p[1, 4], q[1, 4] = -2.5, -1.0, -0.001, -4.0  # and two that are not: a token below, and one above
    inside = within_band(p, q, MASK, low=low, high=high, measure=measure)
    wanted = MASK & (inside | ~MASK).all(1, keepdim=True)
    assert wanted[4].all()
    assert not wanted[:2].any()
    assert torch.equal(token_veto(p, q, MASK, low=low, high=high, measure=measure), wanted)


def test_a_veto_is_of_tokens_below_1e_4_by_default():
    q = torch.zeros(2, 3)
    p = torch.tensor([[0.0, math.log(1.1e-4), 9.0], [0.0, math.log(0.9e-4), 0.0]])
    assert token_veto(p, q).tolist() == [[True] * 3, [False] * 3]
    assert token_veto(p, q, low=None, high=2.0).tolist() == [[False] * 3, [True] * 3]


def test_k1_is_a_ratio_with_exchanged_bounds():
    p, q = inputs()
    a, b = -0.2, 0.3
    assert torch.equal(within_band(p, q, MASK, low=math.exp(-b), high=math.exp(-a)), (q - p >= a) & (q - p <= b) & MASK)


# ---- what must not matter

CALLS = {
    "truncated": lambda *x, level, **more: truncated_weights(*x, high=1.3, low=0.7, level=level, **more),
    "masked": lambda *x, level, **more: masked_weights(*x, low=0.7, high=1.3, level=level, **more),
    "band": lambda *x, level, **more: within_band(*x, low=0.8, high=1.2, level=level, **more),
    "band-k3": lambda *x, level, **more: within_band(*x, high=0.05, measure="k3", level=level, **more),
    "veto": lambda *x, level, **more: token_veto(*x, low=0.5, high=1.5, **more),
}
calls = pytest.mark.parametrize("call", CALLS)


@levels
@calls
def test_packed_tokens_in_any_order_are_rows(call, level):
    p, q = inputs()
    rows = CALLS[call](p, q, MASK, level=level)
    order = torch.randperm(30)
    ids = torch.arange(5).repeat_interleave(6)
    for mask, named in ((MASK, ids), (MASK, torch.where(MASK.flatten(), ids, 10**6))):  # ids of masked tokens may be anything
        packed = (x.flatten()[order] for x in (spoilt(p), spoilt(q), mask))
        actual = CALLS[call](*packed, level=level, sequence_ids=named[order])
        torch.testing.assert_close(actual, rows.flatten()[order], rtol=1e-13, atol=0)


@levels
@calls
def test_masking_equals_deleting(call, level):
    p, q = inputs()
    actual = CALLS[call](spoilt(p), spoilt(q), MASK, level=level)
    assert not actual[~MASK].any()
    for row in range(5):
        kept = MASK[row]
        alone = CALLS[call](p[row : row + 1, kept], q[row : row + 1, kept], level=level)
        torch.testing.assert_close(actual[row : row + 1, kept], alone, rtol=1e-13, atol=0)


@calls
def test_results_are_constants_of_the_promised_dtype_and_inputs_stay_as_they_are(call):
    for dtypes, wanted in (((F64, F32), F64), ((F32, F64), F64), ((BF16, F32), F32), ((BF16, BF16), F32)):
        p, q = (x.to(dtype).requires_grad_() for x, dtype in zip(inputs(), dtypes, strict=True))
        before = p.detach().clone(), q.detach().clone()
        actual = CALLS[call](p, q, MASK, level="sequence")
        assert actual.dtype in (wanted, torch.bool)
        assert not actual.requires_grad
        assert torch.equal(p, before[0])
        assert torch.equal(q, before[1])
        exact = CALLS[call](p.to(wanted), q.to(wanted), MASK, level="sequence")
        torch.testing.assert_close(actual, exact, rtol=0, atol=0)


@levels
def test_fp32_is_close_to_float64(level):
    p, q = inputs(F32)
    wanted = truncated_weights(p.double(), q.double(), MASK, high=None, level=level)
    torch.testing.assert_close(truncated_weights(p, q, MASK, high=None, level=level).double(), wanted, rtol=3e-6, atol=0)


@calls
def test_empty_in_empty_out(call):
    for shape in ((0, 3), (2, 0)):
        actual = CALLS[call](torch.zeros(shape), torch.zeros(shape), level="geometric")
        assert actual.shape == shape
    empty = torch.zeros(0)
    assert CALLS[call](empty, empty, level="sequence", sequence_ids=torch.zeros(0, dtype=torch.int64)).shape == (0,)
    nobody = CALLS[call](torch.full((2, 3), NAN), torch.full((2, 3), NAN), torch.zeros(2, 3).bool(), level="sequence")
    assert not nobody.any()


def test_single_tokens_have_any_shape():
    p, q = (x.reshape(5, 2, 3) for x in inputs())
    flat = truncated_weights(p.flatten(), q.flatten(), high=2)
    assert torch.equal(truncated_weights(p, q, high=2).flatten(), flat)
    assert truncated_weights(p[0, 0, 0], q[0, 0, 0], high=2).shape == ()


# ---- overflow, and what the engine did not score


@levels
def test_a_log_ratio_is_at_most_20_from_0(level):
    p = torch.tensor([[0.0, -300.0], [-600.0, -1.0]])
    q = torch.tensor([[-300.0, 0.0], [-1.0, -1.0]])
    weights = truncated_weights(p, q, high=None, level=level)
    wanted = {"token": [[20, -20], [-20, 0]], "sequence": [[0, 0], [-20, -20]], "geometric": [[0, 0], [-20, -20]]}[level]
    torch.testing.assert_close(weights, torch.tensor(wanted, dtype=F32).exp())
    assert within_band(p, q, high=1e9, level=level).all()
    for measure in ("k2", "k3"):
        assert within_band(p, q, high=math.exp(21), measure=measure).all()
    metrics = mismatch_metrics(p, q, level=level).to_dict()
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("value", [NAN, -INF, INF])
def test_a_token_that_was_not_scored_counts_nowhere(value):
    p, q = inputs()
    hole = q.clone()
    hole[0, 2], hole[2, 3] = value, value  # in a sequence, and the only token of one
    scored = MASK & hole.isfinite()
    for call in CALLS.values():
        for level in ("token", "sequence", "geometric"):
            actual = call(p, hole, MASK, level=level, unscored="zero")
            assert torch.equal(actual, call(p, q, scored, level=level))
            assert not actual[~scored].any()
    assert torch.equal(icepop(p, hole, MASK, unscored="zero"), icepop(p, q, scored))
    metrics = mismatch_metrics(p, hole, MASK, low=0.9, high=1.1)
    assert metrics["unscored_tokens"] == 2
    assert metrics["scored_tokens"] == MASK.sum() - 2
    without = mismatch_metrics(p, q, scored, low=0.9, high=1.1).to_dict() | {"unscored_tokens": 2}
    assert metrics.to_dict() == without


@calls
def test_unscored_zero_lets_the_host_wait_for_no_value(call, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("the host has read a tensor"))
    p, q = inputs()
    q[0, 0] = NAN
    CALLS[call](p, q, MASK, level="sequence", unscored="zero")
    mismatch_metrics(p, q, MASK, level="sequence", low=0.9)


def test_nan_of_the_trainer_is_never_hidden():
    p, q = inputs()
    p[0, 1] = NAN
    for level in ("token", "sequence", "geometric"):
        wanted = torch.zeros_like(MASK)
        wanted[0, 1 if level == "token" else slice(None)] = True
        assert torch.equal(truncated_weights(p, q, MASK, high=2, level=level).isnan(), wanted)
        assert torch.equal(masked_weights(p, q, MASK, low=0.5, high=2, level=level).isnan(), wanted)
        assert within_band(p, q, MASK, low=0.5, high=2, level=level)[0, 1]
    assert icepop(p, q, MASK)[0, 1].isnan()
    assert token_veto(p, q, MASK)[0, 1]
    assert mismatch_metrics(p, q, MASK)["mismatch_kl_k3"].isnan()


# ---- diagnostics


@levels
def test_metrics_equal_a_loop(level):
    p, q = inputs()
    found = mismatch_metrics(spoilt(p), spoilt(q), MASK, low=0.8, high=1.3, level=level).to_dict()
    d = [x for row, kept in zip((p - q).tolist(), MASK.tolist(), strict=True) for x, k in zip(row, kept, strict=True) if k]
    rho = [x for row in by_loop(p, q, lambda d, *_: math.exp(d), level) for x in row if x]
    sums = [math.fsum((p - q)[row][MASK[row]].tolist()) for row in (0, 1, 2, 4)]
    n = len(d)
    wanted = {
        "mismatch_kl_k1": -math.fsum(d) / n,
        "mismatch_kl_k3": math.fsum(math.expm1(x) - x for x in d) / n,
        "mismatch_abs_mean": math.fsum(map(abs, d)) / n,
        "mismatch_abs_max": max(map(abs, d)),
        "mismatch_ratio_mean": math.fsum(rho) / n,
        "mismatch_ratio_max": max(rho),
        "mismatch_ess": math.fsum(rho) ** 2 / (n * math.fsum(x * x for x in rho)),
        "mismatch_outside_band": sum(not 0.8 <= x <= 1.3 for x in rho) / n,
        "mismatch_chi2": math.fsum(math.exp(2 * x) for x in d) / n - 1,
        "mismatch_chi2_seq": math.fsum(math.exp(2 * x) for x in sums) / 4 - 1,
        "scored_tokens": n,
        "unscored_tokens": 0,
    }
    assert list(found) == list(wanted)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert len(rho) == n == 16
    assert type(found["scored_tokens"]) is int


def test_metrics_of_packed_tokens_and_of_fp32():
    p, q = inputs(F32)
    rows = mismatch_metrics(p, q, MASK, high=1.2).to_dict()
    order = torch.randperm(30)
    ids = torch.arange(5).repeat_interleave(6)[order]
    packed = [x.flatten()[order] for x in (p, q, MASK)]
    assert mismatch_metrics(*packed, high=1.2, sequence_ids=ids).to_dict() == pytest.approx(rows, rel=1e-5)
    alone = mismatch_metrics(*packed).to_dict()
    assert rows.keys() - alone.keys() == {"mismatch_chi2_seq", "mismatch_outside_band"}
    assert mismatch_metrics(p, q, MASK)["mismatch_kl_k1"].dtype == F32
    exact = mismatch_metrics(p.double(), q.double(), MASK, high=1.2).to_dict()
    assert rows == pytest.approx(exact, rel=1e-4)


def test_metrics_without_tokens():
    found = mismatch_metrics(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3).bool(), low=0.5)
    assert {name: value for name, value in found.to_dict().items() if value} == {"mismatch_ess": 1.0}


def test_metrics_of_equal_engines_are_exact():
    p = -torch.rand(4, 7)
    found = mismatch_metrics(p, p, low=1, high=1).to_dict()
    assert found == {
        "mismatch_kl_k1": 0, "mismatch_kl_k3": 0, "mismatch_abs_mean": 0, "mismatch_abs_max": 0,
        "mismatch_ratio_mean": 1, "mismatch_ratio_max": 1, "mismatch_ess": 1,
        "mismatch_outside_band": 0, "mismatch_chi2": 0, "mismatch_chi2_seq": 0, "scored_tokens": 28, "unscored_tokens": 0,
    }  # fmt: skip


def test_metrics_join_those_of_a_loss():
    p, q = inputs()
    out = policy_loss(p.requires_grad_(), p.detach(), torch.ones(5), objective=PPOClip(), mask=MASK)
    both = (out.metrics | mismatch_metrics(p, q, MASK)).to_dict()
    assert both.keys() == out.metrics.keys() | mismatch_metrics(p, q, MASK).keys()
    assert both["kl_k1"] == 0 != both["mismatch_kl_k1"]


# ---- in a loss


def test_weights_and_masks_in_a_loss():
    p, q = inputs()
    p.requires_grad_()
    A = torch.randn(5, dtype=F64)
    w, keep = truncated_weights(p, q, MASK, high=1.2), within_band(p, q, MASK, low=0.9, high=1.1, level="geometric")
    given = {"objective": Reinforce(), "mask": MASK, "rollout_weights": w * keep}
    (gradient,) = torch.autograd.grad(policy_loss(p, None, A, **given).loss, p)
    close(gradient, -A[:, None] * (p.detach() - q).exp().clamp(max=1.2) * keep / MASK.sum(), rtol=1e-12)
    (gradient,) = torch.autograd.grad(policy_loss(p, None, A, **given | {"mask": keep}).loss, p)
    close(gradient, -A[:, None] * (p.detach() - q).exp().clamp(max=1.2) * keep / keep.sum(), rtol=1e-12)


def test_one_pass_takes_them_too_and_computes_no_token_of_weight_0():
    hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)
    tokens = torch.randint(0, 11, (4, 6))
    old = fastpg.linear_logprobs(hidden, head, tokens).logprobs.detach()
    w = icepop(old, old + torch.randn(4, 6))
    one = fastpg.linear_cispo_loss(hidden, head, tokens, old, torch.ones(4), rollout_weights=w)
    assert one.metrics["skipped_tokens"] == (w == 0).sum() > 0
    logprobs = fastpg.linear_logprobs(hidden, head, tokens).logprobs
    two = policy_loss(logprobs, old, torch.ones(4), objective=fastpg.CISPO(5.0), rollout_weights=w).loss
    torch.testing.assert_close(one.loss, two)
