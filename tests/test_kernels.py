"""The Triton kernels, launcher by launcher, against the same quantities written out in float64.

On a GPU where there is one, in Triton's interpreter elsewhere. Launchers are called as `fastpg.triton_tile_ops` calls them.
"""

import mmap
import sys
from math import inf, log10, nan
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastpg import CISPO, LMHead, linear_logprobs
from fastpg.kernels.anchored_exp import anchored_exp
from fastpg.kernels.blocks import Blocks, blocks_for, target_of
from fastpg.kernels.dlogits import dlogits
from fastpg.kernels.finalize import cispo_coefficient, finalize, finalize_cispo
from fastpg.kernels.logits import INTERPRETED, log_sigmoid, operands, round_to, softcap_tanh
from fastpg.kernels.logsumexp import logsumexp
from fastpg.kernels.target import target_logits

DEVICE = "cpu" if INTERPRETED else "cuda"
ULP = 2.0**-23
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what storing an entry may cost: relative, and absolute where numbers become subnormal
ROUNDING = {torch.float32: (0, 2.0**-126), torch.bfloat16: (2.0**-8, 2.0**-126), torch.float16: (2.0**-11, 2.0**-25)}
DTYPES = pytest.mark.parametrize("name", FLOATS)
TWO_DTYPES = pytest.mark.parametrize("name", ["fp32", "bf16"])
EVERYTHING = "bias softcap temperature"


class Inputs(NamedTuple):
    """What every launcher takes first, in its order."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    tokens: torch.Tensor
    scale: torch.Tensor
    inner: float | None


def inputs(rows: int, vocab: int, hidden_size: int = 40, name: str = "fp32", options: str = "") -> Inputs:
    """Every second row is sure of its token, up to 1 - p = 1e-10 or so where no softcap forbids it."""
    dtype = FLOATS[name]
    weight, tokens = torch.randn(vocab, hidden_size) * 0.3, torch.randint(0, vocab, (rows,))
    w_y = weight[tokens]
    sure = torch.linspace(30, 0, rows) * (torch.arange(rows) % 2 == 0)
    hidden = torch.randn(rows, hidden_size) + w_y * (sure / w_y.square().sum(1).clamp(min=1))[:, None]
    bias = torch.randn(vocab).to(dtype) if "bias" in options else None
    scale = torch.rand(rows) + 0.5 if "temperature" in options else torch.ones(rows)
    scale, inner = (9 * scale, 0.7 / 9) if "softcap" in options else (scale, None)
    return move(Inputs(hidden.to(dtype), weight.to(dtype), bias, tokens, scale, inner), DEVICE)


def move(p: Inputs, device: str) -> Inputs:
    return Inputs(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in p))


def blocks_of(p: Inputs, **changes) -> Blocks:
    blocks = blocks_for(target_of(p.weight.device), p.weight.dtype, p.bias is not None, p.inner is not None)
    return blocks._replace(**changes)


class Exact(NamedTuple):
    """float64, on the CPU."""

    z: torch.Tensor  # (C, V)
    slope: torch.Tensor  # (C, V)
    rest: torch.Tensor  # z with -inf in the target's column
    target: torch.Tensor  # (C,), as all that follow
    t: torch.Tensor
    others: torch.Tensor  # entropy of the others alone
    tolerance: torch.Tensor  # of a log-probability: what the library promises


def exact(p: Inputs) -> Exact:
    p = move(p, "cpu")
    u, column = p.hidden.double() @ p.weight.double().T, p.tokens[:, None]
    if p.bias is not None:
        u = u + p.bias.double()
    slope = torch.ones_like(u)
    if p.inner is not None:
        u, slope = (u * p.inner).tanh(), (u * p.inner).cosh() ** -2
    z = u * p.scale.double()[:, None]
    rest, target = z.scatter(1, column, -inf), z.gather(1, column)[:, 0]
    q = rest.softmax(1)
    others = -torch.where(q > 0, q * q.log(), 0).sum(1)
    tolerance = 1e-6 * z.abs().masked_fill(z.isinf(), 0).amax(1).clamp(min=10)
    return Exact(z, slope, rest, target, rest.logsumexp(1) - target, others, tolerance)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor | float) -> None:
    """|got - want| <= tolerance, infinities equal, NaN nowhere."""
    got = got.cpu().double()
    assert got.shape == want.shape
    good = (got == want) | ((got - want).abs() <= tolerance)
    assert good.all(), f"{(~good).sum()} of {good.numel()}, {got[~good][:4]} instead of {want[~good][:4]}"


def same(a, b) -> bool:
    """Equal bits, NaN where there is NaN. Also of results that are None or several tensors."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---- Each launcher --------------------------------------------------------------------------------------------------


def check_target_logits(p: Inputs, blocks: Blocks) -> None:
    e, column = exact(p), p.tokens.cpu()[:, None]
    z, slope = target_logits(*p)
    assert_close(z, e.target, e.tolerance)
    want = e.slope.gather(1, column)[:, 0]
    assert_close(slope, want, 4 * e.tolerance * want)


def check_logsumexp(p: Inputs, blocks: Blocks) -> None:
    e = exact(p)
    m, s, q, z = logsumexp(*p, True, blocks)
    assert_close(z, e.target, e.tolerance)
    assert_close(m, e.rest.amax(1), e.tolerance)
    m, s, q, z = (x.cpu().double() for x in (m, s, q, z))
    alone = e.t == -inf  # nothing else counts
    assert (s[alone] == 0).all()
    assert (q[alone] == 0).all()
    assert_close((m - z) + s.log(), e.t, e.tolerance)
    assert_close(torch.where(alone, 0, s.log() - q / s), e.others, e.tolerance)


def near(e: Exact) -> torch.Tensor:
    """Log-probabilities to anchor with, some nats off. They are fp32 numbers, and so exact in float64 too."""
    return (F.logsigmoid(-e.t) + torch.rand(len(e.t)) * 6 - 3).clamp(-60, 0).float().to(DEVICE)


def room_for_e(p: Inputs) -> torch.Tensor:
    dtype = torch.bfloat16 if p.weight.dtype == torch.bfloat16 else torch.float32  # fp16 has too little range
    return torch.empty(len(p.hidden), len(p.weight), dtype=dtype, device=DEVICE)


def score(p: Inputs, log_anchor: torch.Tensor, blocks: Blocks, out: torch.Tensor | None = None) -> tuple:
    """target_logits, anchored_exp and finalize: E, S, Q, residual."""
    out = room_for_e(p) if out is None else out
    target, slope = target_logits(*p)
    partials = anchored_exp(*p, target - log_anchor, True, out, blocks)
    return out, *finalize(partials, p.tokens, slope, out)


def check_score(p: Inputs, blocks: Blocks) -> None:
    e, column = exact(p), p.tokens.cpu()[:, None]
    log_anchor, tolerance = near(e), e.tolerance
    log_e = e.rest - (e.target - log_anchor.cpu().double())[:, None]
    E = log_e.exp()
    S, Q = E.sum(1), torch.where(E > 0, E * log_e, 0).sum(1)
    stored, total, weighted, residual = score(p, log_anchor, blocks)
    assert_close(total, S, tolerance * S)
    assert_close(weighted, Q, tolerance * torch.where(E > 0, E * (log_e.abs() + 1), 0).sum(1))
    entries = (E * e.slope).scatter(1, column, -(S * e.slope.gather(1, column)[:, 0])[:, None])
    relative, absolute = ROUNDING[stored.dtype]
    assert_close(stored, entries, (relative + tolerance[:, None]) * entries.abs() + absolute)
    assert (len(residual) == 0) == (relative == 0)
    if relative:  # with what rounding took, rows sum to 0 but for what the slopes of a softcap leave
        left = tolerance if p.inner is not None else 2e-6
        assert_close(residual.cpu() + stored.cpu().double().sum(1), entries.sum(1), left * S)


def check_dlogits(p: Inputs, blocks: Blocks) -> None:
    """In two slices, the first with an incoming gradient of the entropy."""
    vocab = len(p.weight)
    check_slice(p, slice(0, vocab - vocab // 3), True, blocks)
    check_slice(p, slice(vocab // 3, vocab), False, blocks)


def check_slice(p: Inputs, columns: slice, entropy: bool, blocks: Blocks) -> None:
    """Against automatic differentiation in the columns of the others. The target's is minus their sum, as for every function of
    z that ignores shifts of z."""
    e, rows, column = exact(p), len(p.tokens), p.tokens.cpu()[:, None]
    g, h = torch.randn(rows).double(), torch.randn(rows).double() * entropy
    z = e.z.clone().requires_grad_()
    log_p = z.log_softmax(1)
    H = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1)
    d = torch.autograd.grad((g * log_p.gather(1, column)[:, 0] + h * H).sum(), z)[0].scatter(1, column, 0)
    d = d.scatter(1, column, -d.sum(1, keepdim=True))
    log_p, H = log_p.detach(), H.detach()
    # the entries' size before anything cancels
    size = log_p.exp() * (g.abs()[:, None] + h.abs()[:, None] * (H[:, None] - log_p.clamp(min=-1e4)))
    largest = torch.sigmoid(e.t) * (g.abs() + h.abs() * (torch.where(e.t.isinf(), 0, e.t.abs()) + e.others + 1))
    size = size.scatter(1, column, largest[:, None])
    factor, unit = p.scale.cpu().double() * (p.inner or 1), None
    if p.weight.dtype == torch.float16:
        unit = torch.ldexp(torch.ones(rows), 14 - torch.frexp(largest * factor).exponent)
        factor = factor * unit
    factor = factor[:, None] * e.slope
    want, size = (d * factor)[:, columns], (size * factor)[:, columns]

    numbers = F.logsigmoid(-e.t), e.t, e.z.logsumexp(1), g, h, H, e.others
    *numbers, h, H, others = (x.float().to(DEVICE) for x in numbers)
    out = p.weight.new_empty(want.shape)
    residual = dlogits(
        p.hidden, p.weight[columns], None if p.bias is None else p.bias[columns], p.tokens - columns.start, p.scale, p.inner,
        *numbers, (h, H, others) if entropy else None, None if unit is None else unit.to(DEVICE), out, blocks,
    )  # fmt: skip
    relative, absolute = ROUNDING[out.dtype]
    assert_close(out, want, relative * want.abs() + 2 * e.tolerance[:, None] * size + absolute)
    assert (out.cpu()[want == 0] == 0).all()
    assert (len(residual) == 0) == (relative == 0)
    if relative:
        assert_close(residual.cpu() + out.cpu().double().sum(1), want.sum(1), 2 * e.tolerance * size.sum(1))


CHECKS = pytest.mark.parametrize(
    "check", [check_target_logits, check_logsumexp, check_score, check_dlogits], ids=lambda f: f.__name__.removeprefix("check_")
)
# rows around a tile of 64, vocabularies around one of 1024, hidden sizes that a depth of 64 does not divide
SHAPES = [(3, 1, 40), (64, 2, 40), (65, 17, 96), (1, 2100, 40), (130, 1100, 96)]
CASES = [(shape, "") for shape in SHAPES] + [((3, 1100, 40), o) for o in (*EVERYTHING.split(), EVERYTHING)]


@CHECKS
@DTYPES
@pytest.mark.parametrize(
    ("shape", "options"), CASES, ids=lambda x: x.replace(" ", "+") if x is str(x) else "x".join(map(str, x))
)
def test_against_float64(shape, options, name, check):
    p = inputs(*shape, name, options)
    check(p, blocks_of(p))


@CHECKS
def test_more_row_tiles_than_share_columns(check):
    p = inputs(130, 40, name="bf16", options=EVERYTHING)
    check(p, blocks_of(p, rows=16, columns=16, depth=16, parts=1))


def test_pivots_far_apart_in_more_splits_than_are_added_up_at_a_time(monkeypatch):
    monkeypatch.setattr("fastpg.kernels.logsumexp._BLOCK", 2)
    p = inputs(3, 600, options="bias")
    for bias in (torch.linspace(-400, 400, 600), torch.linspace(400, -400, 600)):
        p.bias.copy_(bias)
        check_logsumexp(p, blocks_of(p, rows=16, columns=16, parts=1))


def test_tokens_outside_the_vocabulary_have_no_logit():
    p = inputs(4, 17)
    inside = target_logits(*p)[0]
    p.tokens[:2] = torch.tensor([-1, 17])
    outside = target_logits(*p)[0]
    assert outside[:2].isnan().all()
    assert same(outside[2:], inside[2:])


def test_entropy_and_e_change_no_bit_of_the_sums():
    p = inputs(3, 1100, options=EVERYTHING)
    m, s, _, z = logsumexp(*p, True, blocks_of(p))
    assert same(logsumexp(*p, False, blocks_of(p)), (m, s, None, z))
    a = torch.zeros(3, device=DEVICE)
    with_both, alone = (anchored_exp(*p, a, b, room_for_e(p) if b else None, blocks_of(p)) for b in (True, False))
    assert same(alone, (with_both[0], None, None))


# ---- Columns that count for nothing ---------------------------------------------------------------------------------


@CHECKS
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("how", ["bias", "weight"])
def test_the_edge_of_a_vocabulary_whose_logits_are_about_minus_300(how, descriptors, check):
    """Lanes beyond the edge may have logits of about 0: each would outweigh the whole vocabulary."""
    p = inputs(5, 1100, options="bias" if how == "bias" else "")
    if how == "bias":
        p.bias.sub_(300)
    else:
        p.weight[:, 0], p.hidden[:, 0] = 10, -30
    check(p, blocks_of(p, rows=16, descriptors=descriptors))


@CHECKS
@pytest.mark.parametrize("banned", [slice(0, 1024), slice(1024, None)], ids=["first", "last"])
def test_a_tile_whose_columns_are_all_banned(banned, check):
    p = inputs(5, 2100, options="bias")
    p.bias[banned] = -inf
    p.tokens.copy_(torch.arange(5) * 7 + (1024 if banned.start == 0 else 0))
    check(p, blocks_of(p, rows=16))


@CHECKS
@pytest.mark.parametrize("options", ["bias", "bias softcap"], ids=["plain", "softcap"])
def test_all_others_banned(options, check):
    """S = 0 and p = 1. Under a softcap a bias of -inf is a logit of -c, and bans nothing."""
    p = inputs(3, 1100, options=options)
    p.tokens.fill_(1090)
    p.bias.fill_(-inf)[1090] = 0
    check(p, blocks_of(p, rows=16))


# ---- NaN and infinity -----------------------------------------------------------------------------------------------


def launch(p: Inputs, e_out: torch.Tensor | None = None, d_out: torch.Tensor | None = None, **changes) -> tuple:
    """Every launcher, dlogits with numbers per row that are finite whatever the logits: z_y, slope, m, s, q, z_y, E, S, Q,
    dlogits, and the residuals of E and dlogits where there are any."""
    blocks = blocks_of(p, **({"rows": 16} if INTERPRETED else {}) | changes)
    logp, t, lse, g, h = (-torch.rand(5, 1, generator=torch.Generator().manual_seed(1))).expand(5, len(p.tokens)).to(DEVICE)
    d_out = p.weight.new_empty(len(p.tokens), len(p.weight)) if d_out is None else d_out
    *scored, taken = score(p, logp, blocks, e_out)
    residual = dlogits(*p, logp.clone(), t.clone(), lse + 8, g.clone(), (h.clone(), -h, -h), None, d_out, blocks)
    return *target_logits(*p), *logsumexp(*p, True, blocks), *scored, d_out, *(x for x in (taken, residual) if len(x))


@pytest.mark.parametrize("value", [nan, inf], ids=str)
@TWO_DTYPES
def test_a_bad_hidden_row_spoils_itself_and_no_other(name, value):
    p = inputs(20, 1100, name=name, options="bias")
    clean = launch(p)
    p.hidden[7, 3] = value
    bad, kept = launch(p), torch.arange(20) != 7
    assert same(tuple(x[kept] for x in bad), tuple(x[kept] for x in clean))
    z, _, _, s, _, _, E, S, _, d, *residuals = (x[7] for x in bad)
    assert s.isnan()
    assert not z.isfinite()
    assert not S < LARGE
    assert (E == 0).all()
    assert not residuals or residuals[0] == 0
    assert value == inf or d.isnan().sum() >= 1099  # the target's entry is made of the numbers per row


@pytest.mark.parametrize("column", [0, 1099])
def test_nan_in_a_row_of_the_weight(column):
    """Column 0 is also where lanes beyond the edge wrap around to."""
    p = inputs(9, 1100)
    p.tokens.copy_(torch.arange(9) * 3)
    clean = launch(p)
    p.weight[column, 5] = nan
    _, _, m, s, _, z, _, S, _, d = launch(p)
    assert ((m - z) + s.log()).isnan().all()
    assert S.isnan().all()
    others = torch.arange(1100) != column
    assert same(d[:, others], clean[9][:, others])
    assert d[p.tokens != column, column].isnan().all()


def test_a_logit_of_infinity():
    p = inputs(5, 1100, options="bias")
    p.tokens.fill_(3)
    p.bias[1050] = inf
    _, _, m, s, _, z, E, S, _, _ = launch(p)
    assert not ((m - z) + s.log()).isfinite().any()
    assert (S >= LARGE).all()
    assert (E == 0).all()


# ---- Anchors that are wrong, and the range of S and u ---------------------------------------------------------------

SMALL, LARGE = 2.0**-90, 2.0**99  # a sum is in range from SMALL to below LARGE


def run_cispo(
    S, log_anchor, old, advantages, weight, row_scale, mask, bounds=(None, None), out=None, others=(None, None), p=None
):
    """finalize_cispo of partial sums S (C, tiles); the others are numbers or (C,). Results on the CPU."""

    def vector(x, dtype=torch.float32):
        return torch.as_tensor(x, dtype=dtype).expand(len(S)).clone().to(DEVICE)

    vectors = [vector(x) for x in (log_anchor, old, advantages, weight, row_scale)]
    tokens = vector(0, torch.int64) if p is None else p.tokens
    partials = (S.float().to(DEVICE), *others)
    result = finalize_cispo(partials, tokens, vector(1.0), out, *vectors, vector(mask, torch.bool), *bounds)
    return [x.cpu() for x in result]


@pytest.mark.parametrize("off", [-80, 80])
@TWO_DTYPES
def test_anchors_that_are_off_by_80(name, off):
    """Too high by e^80: entries end at 2^100 and such rows are lost. Too low: rows keep what they have."""
    p = inputs(33, 1100, name=name)
    e, E = exact(p), room_for_e(p)
    a = (F.logsigmoid(-e.t) + off).float()
    S, *others = anchored_exp(*p, target_logits(*p)[0] - a.to(DEVICE), True, E, blocks_of(p))
    anchor = e.target - a.double()
    tolerance = e.tolerance.maximum(1e-6 * anchor.abs())  # the anchor is an fp32 number like the logits
    entries = (e.rest - anchor[:, None]).exp().clamp(max=2.0**100)
    relative, absolute = ROUNDING[E.dtype]
    assert_close(E, entries, (relative + tolerance[:, None]) * entries + absolute)
    assert (E.max() == 2.0**100) == (off == 80)
    total, _, residual, _, _, _, state = run_cispo(S, a, a, 1.0, 1.0, 1.0, True, (None, 5.0), E, others, p)
    want, E = entries.sum(1), E.cpu()
    lost = want > LARGE
    assert ((want / LARGE).log2().abs() > 0.1).all()
    assert_close(total, want, tolerance * want + absolute)
    assert torch.equal(state == 2, (want < SMALL) | lost)
    assert (state == 2).any()
    assert lost.any() == (off == 80)
    assert (E[lost] == 0).all()
    assert len(residual) == 0 or (residual[lost] == 0).all()
    at_target = E.gather(1, p.tokens.cpu()[:, None])[:, 0]
    assert_close(at_target[~lost], -want[~lost], ((relative + tolerance) * want + absolute)[~lost])


def test_the_range_of_the_sum():
    """Rows that are lost lie between others. Also: many partial sums, and E in a wider buffer."""
    sums = [0, SMALL * (1 - 2.0**-24), SMALL, LARGE, 1, nan, LARGE * (1 - 2.0**-24), inf, 1]
    state = [2, 2, 0, 2, 0, 2, 0, 2, 0]
    S = torch.zeros(9, 1500)
    S[range(9), range(1491, 1500)] = torch.tensor(sums)
    buffer = torch.full((9, 1500), 3.0, device=DEVICE)
    total, *_, got = run_cispo(S, 0.0, 0.0, 1.0, 1.0, 1.0, True, (1.0, 1.0), buffer[:, :1100])
    assert same(total, torch.tensor(sums))
    assert got.tolist() == state
    kept, buffer = total < LARGE, buffer.cpu()
    assert torch.equal(buffer[kept, 0], -total[kept])
    assert (buffer[kept, 1:] == 3).all()
    assert (buffer[~kept, :1100] == 0).all()
    assert (buffer[:, 1100:] == 3).all()


def test_the_range_of_the_factor():
    """u = -weight, exactly: S = 1, a = -60, and the ratio is clipped to 1."""
    weights = [0.0, 1e-45, 2.0**-110 * (1 - ULP), 2.0**-110, 1.0, -1.0, 2.0**110, 2.0**110 * (1 + ULP), -inf, nan]
    weight = torch.tensor(weights, dtype=torch.float32)
    *_, u, state = run_cispo(torch.ones(10, 1), -60.0, 0.0, 1.0, weight, 1.0, True, (1.0, 1.0))
    assert same(u, -weight)
    assert state.tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1, 1]


# ---- CISPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(None, None), (None, 5.0), (0.5, None), (0.5, 2), (1, 1)], ids=str)
def test_cispo_per_row(bounds):
    """Log-odds from e^-35, which is 1 - p = 1e-15, to e^60; ratios from e^-20 to e^20."""
    t = torch.linspace(-34.6, 60, 200).double()
    a = (F.logsigmoid(-t) + torch.randn(200)).clamp(-60, 0).float()
    S = ((t + a).exp()[:, None] * torch.rand(200, 5).softmax(1)).float()
    t = S.double().sum(1).log() - a.double()
    logp = -torch.where(t < 0, t.exp().log1p(), t + (-t).exp().log1p())
    old = (logp + torch.linspace(-20, 20, 200)[torch.randperm(200)]).float()
    advantages, weight, row_scale = torch.randn(200), torch.rand(200) + 0.1, torch.rand(200) + 0.5
    mask = torch.rand(200) > 0.2
    total, _, _, got, loss, u, _ = run_cispo(S, a, old, advantages, weight, row_scale, mask, bounds)

    tolerance = 1e-6 * t.abs().clamp(min=10)
    assert_close(total, S.double().sum(1), 4 * ULP * S.sum(1))
    assert_close(got, logp, tolerance * logp.abs().clamp(max=1))
    low, high = (x if x is not None else y for x, y in zip(bounds, (0, inf), strict=True))
    c = (logp - old.double()).exp().clamp(low, high) * advantages * weight * mask
    assert_close(loss, c * logp, 2 * tolerance * (c * logp).abs())
    want = -c * row_scale / (S.double().sum(1) + a.double().exp())
    assert_close(u, want, 2 * tolerance * want.abs())


@pytest.mark.parametrize("value", [nan, inf, -inf], ids=str)
@pytest.mark.parametrize("garbage", ["sum", "anchor", "old", "advantage", "weight", "scale"])
def test_masked_rows_are_exactly_zero(garbage, value):
    S, *vectors = ({"sum": 0.5, "anchor": -0.5, "old": 0, "advantage": 1, "weight": 1, "scale": 1} | {garbage: value}).values()
    *_, loss, u, _ = run_cispo(torch.full((2, 1), S), *vectors, False)
    assert (loss == 0).all()
    assert (u == 0).all()


@triton.jit
def coefficient_kernel(LOGP, OLD, ADVANTAGE, OUT, ratio_min, ratio_max, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c = cispo_coefficient(tl.load(LOGP + i), tl.load(OLD + i), tl.load(ADVANTAGE + i), ratio_min, ratio_max)
    tl.store(OUT + i, c)


@pytest.mark.parametrize("bounds", [(None, None), (None, 5.0), (0.2, None), (0.2, 5.0), (0.0, 1.0)], ids=str)
def test_cispo_coefficient_is_the_objectives(bounds):
    logp, old, advantages = -torch.rand(4096) * 10, -torch.rand(4096) * 10, torch.randn(4096)
    logp[:3], old[3:6], advantages[6:9], old[9:12], old[12:15] = nan, nan, nan, inf, -inf
    x = logp.clone().requires_grad_()
    want = torch.autograd.grad(CISPO(bounds[1], bounds[0])(x, old, advantages).sum(), x)[0]
    got = torch.empty(4096, device=DEVICE)
    coefficient_kernel[(1,)](*(v.to(DEVICE) for v in (logp, old, advantages)), got, *bounds, BLOCK=4096)
    got, number, ratio = got.cpu(), ~want.isnan(), (logp - old).exp()
    assert torch.equal(~got.isnan(), number)
    assert want[:9].isnan().all()
    # numpy's exp, the interpreter's, is up to 2 ulp from torch's; a GPU's multiplies by log2 e first
    ulps = (got.view(torch.int32) - want.view(torch.int32)).abs()
    assert ulps[number].max() <= (3 if INTERPRETED else 32)
    low, high = (x if x is not None else y for x, y in zip(bounds, (0, inf), strict=True))
    assert (ulps[number & ((ratio < low * 0.999) | (ratio > high * 1.001))] == 0).all()


# ---- Device functions -----------------------------------------------------------------------------------------------


@triton.jit
def log_sigmoid_kernel(X, Y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, log_sigmoid(tl.load(X + i)))


@triton.jit
def softcap_kernel(X, TANH, SLOPE, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tanh, slope = softcap_tanh(tl.load(X + i))
    tl.store(TANH + i, tanh)
    tl.store(SLOPE + i, slope)


@triton.jit
def round_kernel(X, Y, EMULATE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, round_to(tl.load(X + i), Y.dtype.element_ty, EMULATE))


def run(kernel, largest: float, results: int) -> list[torch.Tensor]:
    """x, and results of the kernel, float64: of sizes from 1e-8 to `largest`, 0 and infinity, with both signs. NaN stays NaN."""
    sizes = torch.cat([torch.logspace(-8, log10(largest), 4093), torch.tensor([0.0, inf, nan])])
    x = torch.cat([sizes, -sizes])
    out = [torch.empty(8192, device=DEVICE) for _ in range(results)]
    kernel[(1,)](x.to(DEVICE), *out, BLOCK=8192)
    assert all(y.cpu()[x.isnan()].isnan().all() for y in out)
    return [y.cpu()[~x.isnan()].double() for y in (x, *out)]


def test_log_sigmoid():
    x, y = run(log_sigmoid_kernel, 100, 1)
    want = x.clamp(max=0) - (-x.abs()).exp().log1p()
    steps = 4 if INTERPRETED else 4 + x.abs().clamp(max=100)  # a GPU's exp multiplies by log2 e first
    assert_close(y, want, steps * ULP * want.abs() + 2.0**-148)


def test_softcap_tanh():
    """The slope is 4 q / (1 + q)^2 with q = exp(-2 |x|), whose exponent is rounded, and which is a subnormal number at 50."""
    x, tanh, slope = run(softcap_kernel, 50, 2)
    assert_close(tanh, x.tanh(), 3 * ULP * x.tanh().abs())
    want = x.cosh() ** -2
    assert_close(slope, want, (3 + 2 * x.abs().clamp(max=100)) * ULP * want + 2.0**-147)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("emulate", [True] if INTERPRETED else [True, False])
def test_round_to(name, emulate):
    """Every upper half of an fp32, with lower halves below, at and above ties: NaN, infinities and subnormals included."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000])
    bits = (torch.arange(-(2**15), 2**15)[:, None] * 2**16 + low).reshape(-1)
    x = bits.to(torch.int32).view(torch.float32)
    y = torch.empty(len(x), dtype=FLOATS[name], device=DEVICE)
    round_kernel[(len(x) // 2**15,)](x.to(DEVICE), y, emulate, BLOCK=2**15)
    want, y, number = x.to(FLOATS[name]), y.cpu(), ~x.isnan()
    assert torch.equal(y[number].view(torch.int16), want[number].view(torch.int16))
    assert y[~number].isnan().all()


# ---- Strides, alignment, offsets ------------------------------------------------------------------------------------


def in_wider(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """x with columns of 99 before and after it, in one allocation."""
    return F.pad(x, (before, after), value=99.0)[:, before : before + x.shape[1]]


# of H = 96; and whether alignment allows descriptors
LAYOUTS = {
    "contiguous": (lambda p: p, True),
    "hidden-in-wider": (lambda p: p._replace(hidden=in_wider(p.hidden, 8, 24)), True),
    "hidden-misaligned": (lambda p: p._replace(hidden=in_wider(p.hidden, 1, 7)), False),
    "hidden-odd-stride": (lambda p: p._replace(hidden=in_wider(p.hidden, 0, 1)), False),
    "weight-in-wider": (lambda p: p._replace(weight=in_wider(p.weight, 16, 8)), True),
    "weight-misaligned": (lambda p: p._replace(weight=in_wider(p.weight, 1, 7)), False),
    "weight-odd-stride": (lambda p: p._replace(weight=in_wider(p.weight, 0, 1)), False),
    "weight-transposed": (lambda p: p._replace(weight=in_wider(p.weight.T, 0, 4).T), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@TWO_DTYPES
def test_layouts_and_descriptors_change_no_bit(name, layout):
    p = inputs(20, 1100, 96, name, "bias")
    lay, aligned = LAYOUTS[layout]
    q = lay(p)
    assert operands(q.hidden, q.weight, blocks_of(p, descriptors=True))["DESCRIPTORS"] == aligned
    want = launch(p, descriptors=False)
    for descriptors in (False, True):
        assert same(launch(q, descriptors=descriptors), want)


@pytest.mark.parametrize("padding", [32, 7])
@TWO_DTYPES
def test_padding_of_the_outputs_is_left_alone(name, padding):
    p = inputs(18, 1100, 40, name)
    p.scale[5] = nan  # a row that is filled with zeros
    buffers = [torch.full((20, 1100 + padding), 99.0, dtype=p.weight.dtype, device=DEVICE) for _ in range(2)]
    assert same(launch(p, *(b[1:19, :1100] for b in buffers)), launch(p))
    for buffer in buffers:
        assert (buffer[:, 1100:] == 99).all()
        assert (buffer[[0, 19]] == 99).all()


def test_a_bias_with_a_stride():
    """Through the public function, since it does not matter where such a bias is made contiguous."""
    p = inputs(5, 17, options="bias")
    biases = p.bias, p.bias.repeat_interleave(2)[::2]
    want, got = (linear_logprobs(p.hidden, LMHead(p.weight, b), p.tokens, backend="triton").logprobs for b in biases)
    assert same(got, want)


FAR = 2**31


@pytest.fixture(scope="module")
def far_memory():
    """bf16 numbers at offsets that 32 bits cannot hold, in address space of which only touched pages exist. Where an offset
    wraps around there is memory too: wrong numbers, and no crash."""
    if not INTERPRETED or sys.platform != "linux":
        pytest.skip("needs Linux, and memory on the CPU")
    no_reserve = 0x4000  # mmap has a name for it since Python 3.13
    try:
        memory = mmap.mmap(-1, 2 * (2 * FAR + 2**29), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError:
        pytest.skip("this machine does not overcommit memory")
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@pytest.mark.parametrize("what", ["hidden", "weight", "weight-transposed", "outputs"])
def test_offsets_beyond_32_bits(far_memory, what):
    """Rows 2^30 numbers apart; or 1100 hidden numbers 2^21 apart, as in a transposed weight of 2 M tokens."""
    transposed = what == "weight-transposed"
    p = inputs(3, 3, 1100 if transposed else 40, "bf16", "bias")
    stride = (1, 2**21) if transposed else (2**30 + 8, 1)
    if what == "outputs":
        outputs = [far_memory.as_strided((3, 3), stride, FAR + offset) for offset in (0, 64)]
        assert same(launch(p, *outputs), launch(p))
    else:
        x = getattr(p, what.removesuffix("-transposed"))
        far = far_memory.as_strided(x.shape, stride, FAR).copy_(x)
        assert same(launch(p._replace(**{what.removesuffix("-transposed"): far})), launch(p))


# ---- The same bits --------------------------------------------------------------------------------------------------


@TWO_DTYPES
def test_bits_of_a_row_do_not_depend_on_the_batch(name):
    p = inputs(257, 1100, 96, name, "bias")
    log_anchor, blocks = near(exact(p)), blocks_of(p)

    def results(rows):
        q = p._replace(hidden=p.hidden[rows], tokens=p.tokens[rows], scale=p.scale[rows])
        return tuple(x for x in (*logsumexp(*q, True, blocks), *score(q, log_anchor[rows], blocks)) if len(x))

    whole = results(slice(None))
    for rows in ([200], [256, 1, 200], list(range(150, 214))):
        rows = torch.tensor(rows, device=DEVICE)
        assert same(results(rows), tuple(x[rows] for x in whole))


@pytest.mark.parametrize("options", ["", EVERYTHING], ids=["plain", "everything"])
@TWO_DTYPES
def test_parts_and_groups_change_no_entry(name, options):
    """How an epilogue takes its tile changes the order of sums, and nothing else."""
    p = inputs(9, 1100, 40, name, options)
    first = None
    for parts, groups in ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2)):
        z, slope, m, s, q, z_y, E, S, Q, d, *_ = launch(p, parts=parts, groups=groups)
        entries, sums = (z, slope, m, z_y, d, E.scatter(1, p.tokens[:, None], 0)), (s, q, S, Q)  # the target's entry is -S
        first = first or (entries, sums)
        assert same(entries, first[0])
        for a, b in zip(sums, first[1], strict=True):
            assert_close(a, b.cpu().double(), 4e-6 * b.cpu().abs())
