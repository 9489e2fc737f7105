"""The Triton kernels, launcher by launcher, against the same quantities written out in float64.

On a GPU where there is one, in Triton's interpreter elsewhere. Launchers are called as `fastpg.triton_tile_ops` calls them.
"""

import mmap
import sys
from collections import namedtuple
from functools import partial
from math import inf, nan

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastpg import CISPO, LMHead, linear_logprobs
from fastpg.kernels.anchored_exp import anchored_exp
from fastpg.kernels.blocks import blocks_for, target_of
from fastpg.kernels.dlogits import dlogits
from fastpg.kernels.finalize import cispo_coefficient, finalize, finalize_cispo
from fastpg.kernels.logits import INTERPRETED, log_sigmoid, operands, round_to, softcap_tanh
from fastpg.kernels.logsumexp import logsumexp
from fastpg.kernels.target import target_logits

DEVICE = "cpu" if INTERPRETED else "cuda"
FEW_ROWS = {"rows": 16} if INTERPRETED else {}  # a smaller tile where only time depends on it
ULP = 2.0**-23
SMALL, LARGE = 2.0**-90, 2.0**99  # an anchored sum is in range from SMALL to below LARGE
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what storing an entry may cost: relative, and absolute where numbers become subnormal
ROUNDING = {torch.float32: (0, 2.0**-126), torch.bfloat16: (2.0**-8, 2.0**-126), torch.float16: (2.0**-11, 2.0**-25)}
TWO_DTYPES = pytest.mark.parametrize("name", ["fp32", "bf16"])
EVERYTHING = "bias softcap temperature"

same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)  # asserts equal bits, of tuples too


# what every launcher takes first, in its order
Inputs = namedtuple("Inputs", "hidden weight bias tokens scale inner")


def to(p, device):
    return Inputs(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in p))


def blocks_of(p, **changes):
    blocks = blocks_for(target_of(p.weight.device), p.weight.dtype, p.bias is not None, p.inner is not None)
    return blocks._replace(**changes)


def inputs(rows, vocab, hidden_size=40, name="fp32", options=""):
    """Every second row is sure of its token, up to 1 - p = 1e-10 or so where no softcap forbids it."""
    weight, tokens = torch.randn(vocab, hidden_size) * 0.3, torch.randint(0, vocab, (rows,))
    w_y = weight[tokens]
    sure = torch.linspace(30, 0, rows) * (torch.arange(rows) % 2 == 0)
    hidden = torch.randn(rows, hidden_size) + w_y * (sure / w_y.square().sum(1).clamp(min=1))[:, None]
    bias = torch.randn(vocab).to(FLOATS[name]) if "bias" in options else None
    scale = torch.rand(rows) + 0.5 if "temperature" in options else torch.ones(rows)
    scale, inner = (9 * scale, 0.7 / 9) if "softcap" in options else (scale, None)
    return to(Inputs(hidden.to(FLOATS[name]), weight.to(FLOATS[name]), bias, tokens, scale, inner), DEVICE)


class Exact:
    """float64, on the CPU: z, slope and rest (C, V); rest is z with -inf in the target's column. The others (C,)."""

    def __init__(self, p):
        p = to(p, "cpu")
        u, self.column = p.hidden.double() @ p.weight.double().T, p.tokens[:, None]
        u = u if p.bias is None else u + p.bias.double()
        self.slope = torch.ones_like(u)
        if p.inner is not None:
            u, self.slope = (u * p.inner).tanh(), (u * p.inner).cosh() ** -2
        self.z = u * p.scale.double()[:, None]
        self.rest, self.target = self.z.scatter(1, self.column, -inf), self.at_target(self.z)
        self.t = self.rest.logsumexp(1) - self.target
        self.logp = F.logsigmoid(-self.t)
        q = self.rest.softmax(1)
        self.others = -torch.where(q > 0, q * q.log(), 0).sum(1)  # entropy of the others alone
        # what the library promises of a log-probability
        self.tolerance = 1e-6 * self.z.abs().masked_fill(self.z.isinf(), 0).amax(1).clamp(min=10)

    def at_target(self, x):
        return x.gather(1, self.column)[:, 0]

    def near(self):
        """Log-probabilities to anchor with, some nats off. They are fp32 numbers, and so exact in float64 too."""
        return (self.logp + torch.rand(len(self.t)) * 6 - 3).clamp(-60, 0).float().to(DEVICE)


def assert_close(got, want, tolerance):
    """|got - want| <= tolerance, infinities equal, NaN nowhere."""
    got = got.cpu().double()
    assert got.shape == want.shape
    good = (got == want) | ((got - want).abs() <= tolerance)
    assert good.all(), f"{(~good).sum()} of {good.numel()}, {got[~good][:4]} instead of {want[~good][:4]}"


def room_for_e(p):
    dtype = torch.bfloat16 if p.weight.dtype == torch.bfloat16 else torch.float32  # fp16 has too little range
    return torch.empty(len(p.hidden), len(p.weight), dtype=dtype, device=DEVICE)


def score(p, log_anchor, blocks, out=None):
    """target_logits, anchored_exp and finalize: E, S, Q, residual."""
    out = room_for_e(p) if out is None else out
    target, slope = target_logits(*p)
    return out, *finalize(anchored_exp(*p, target - log_anchor, True, out, blocks), p.tokens, slope, out)


def check(p, blocks):
    e = Exact(p)
    check_statistics(p, e, blocks)
    check_score(p, e, blocks)
    vocab = len(p.weight)
    check_dlogits(p, e, slice(0, vocab - vocab // 3), True, blocks)
    check_dlogits(p, e, slice(vocab // 3, vocab), False, blocks)


def check_statistics(p, e, blocks):
    z, slope = target_logits(*p)
    assert_close(z, e.target, e.tolerance)
    assert_close(slope, e.at_target(e.slope), 4 * e.tolerance * e.at_target(e.slope))
    m, s, q, z = logsumexp(*p, True, blocks)
    same(logsumexp(*p, False, blocks), (m, s, None, z))  # without an entropy, the same bits
    m, s, q, z = (x.cpu().double() for x in (m, s, q, z))
    assert_close(z, e.target, e.tolerance)
    assert_close(m, e.rest.amax(1), e.tolerance)
    assert_close((m - z) + s.log(), e.t, e.tolerance)
    assert_close(torch.where(s == 0, q, s.log() - q / s), e.others, e.tolerance)


def check_score(p, e, blocks):
    log_anchor = e.near()
    log_e = e.rest - (e.target - log_anchor.cpu().double())[:, None]
    E, (stored, total, weighted, residual) = log_e.exp(), score(p, log_anchor, blocks)
    target, slope = target_logits(*p)
    same(finalize(anchored_exp(*p, target - log_anchor, False, None, blocks), p.tokens, slope, None)[0], total)
    S, Q, Q_size = (torch.where(E > 0, E * x, 0).sum(1) for x in (torch.ones_like(E), log_e, log_e.abs() + 1))
    assert_close(total, S, e.tolerance * S)
    assert_close(weighted, Q, e.tolerance * Q_size)
    entries = (E * e.slope).scatter(1, e.column, -(S * e.at_target(e.slope))[:, None])
    relative, absolute = ROUNDING[stored.dtype]
    assert_close(stored, entries, (relative + e.tolerance[:, None]) * entries.abs() + absolute)
    assert (len(residual) > 0) == (relative > 0)
    if relative:  # with what rounding took, rows sum to 0 but for what the slopes of a softcap leave
        left = 2e-6 if p.inner is None else e.tolerance
        assert_close(residual.cpu() + stored.cpu().double().sum(1), entries.sum(1), left * S)


def check_dlogits(p, e, columns, entropy, blocks):
    """Against automatic differentiation in the columns of the others. The target's is minus their sum, as for every function of
    z that ignores shifts of z."""
    g, h = torch.randn(len(e.z)).double(), torch.randn(len(e.z)).double() * entropy
    z = e.z.clone().requires_grad_()
    log_p = z.log_softmax(1)
    H = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1)
    d = torch.autograd.grad((g * e.at_target(log_p) + h * H).sum(), z)[0]
    log_p, H = log_p.detach(), H.detach()
    # the size of the entries before anything cancels
    size = log_p.exp() * (g.abs()[:, None] + h.abs()[:, None] * (H[:, None] - log_p.clamp(min=-1e4)))
    d, size = (x.scatter(1, e.column, 0) for x in (d, size))
    d, size = d.scatter(1, e.column, -d.sum(1, keepdim=True)), size.scatter(1, e.column, size.sum(1, keepdim=True))
    factor, unit = p.scale.cpu().double() * (p.inner or 1), None
    if p.weight.dtype == torch.float16:
        unit = torch.ldexp(torch.ones(len(z)), 14 - torch.frexp(factor * size.amax(1)).exponent)
        factor, unit = factor * unit, unit.to(DEVICE)
    want, size = (x[:, columns] * factor[:, None] * e.slope[:, columns] for x in (d, size))
    logp, t, lse, g, *for_entropy = (x.float().to(DEVICE) for x in (e.logp, e.t, e.z.logsumexp(1), g, h, H, e.others))
    out, bias = p.weight.new_empty(want.shape), None if p.bias is None else p.bias[columns]
    residual = dlogits(
        p.hidden, p.weight[columns], bias, p.tokens - columns.start, p.scale, p.inner, logp, t, lse, g,
        tuple(for_entropy) if entropy else None, unit, out, blocks,
    )  # fmt: skip
    relative, absolute = ROUNDING[out.dtype]
    assert_close(out, want, relative * want.abs() + 2 * e.tolerance[:, None] * size + absolute)
    assert (out.cpu()[want == 0] == 0).all()
    assert (len(residual) > 0) == (relative > 0)
    if relative:
        assert_close(residual.cpu() + out.cpu().double().sum(1), want.sum(1), 2 * e.tolerance * size.sum(1))


# rows around a tile of 64, vocabularies around one of 1024, hidden sizes that a depth of 64 does not divide
CASES = [(3, 1, 40, ""), (64, 2, 40, ""), (65, 17, 96, ""), (1, 2100, 40, ""), (130, 1100, 96, "")]
CASES += [(3, 1100, 40, options) for options in (*EVERYTHING.split(), EVERYTHING)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", "+"))
def test_against_float64(case, name):
    p = inputs(*case[:3], name, case[3])
    check(p, blocks_of(p))


def test_more_row_tiles_than_share_columns():
    p = inputs(130, 40, name="bf16", options=EVERYTHING)
    check(p, blocks_of(p, rows=16, columns=16, depth=16, parts=1))


@pytest.mark.parametrize("sign", [-1, 1], ids=["falling", "rising"])
def test_pivots_far_apart_in_more_splits_than_are_added_up_at_a_time(monkeypatch, sign):
    monkeypatch.setattr("fastpg.kernels.logsumexp._BLOCK", 2)
    p = inputs(3, 600, options="bias")
    p.bias.copy_(torch.linspace(-400 * sign, 400 * sign, 600))
    check_statistics(p, Exact(p), blocks_of(p, **FEW_ROWS, columns=16, parts=1))


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("what", ["edge", "edge-bias", "first-tile", "last-tile", "others", "others-softcap"])
def test_columns_that_count_for_nothing(what, descriptors):
    """Lanes beyond the edge, where the vocabulary's logits are about -300 and a lane of 0 would outweigh it; a tile of banned
    columns; all others banned, S = 0 and p = 1. Under a softcap a bias of -inf is a logit of -c, and bans nothing."""
    p = inputs(5, 2100 if "tile" in what else 1100, options="bias softcap" if "softcap" in what else "bias")
    if what == "edge":
        p.weight[:, 0], p.hidden[:, 0] = 10, -30
        p = p._replace(bias=None)
    elif what == "edge-bias":
        p.bias.sub_(300)
    elif what.startswith("others"):
        p.tokens.fill_(1090)
        p.bias.fill_(-inf)[1090] = 0
    else:
        p.bias[slice(0, 1024) if what == "first-tile" else slice(1024, None)] = -inf
        p.tokens.copy_(torch.arange(5) * 7 + (1024 if what == "first-tile" else 0))
    check(p, blocks_of(p, **FEW_ROWS, descriptors=descriptors))


def test_tokens_outside_the_vocabulary_have_no_logit():
    p = inputs(4, 17)
    inside = target_logits(*p)[0]
    p.tokens[:2] = torch.tensor([-1, 17])
    assert target_logits(*p)[0][:2].isnan().all()
    same(target_logits(*p)[0][2:], inside[2:])


def launch(p, e_out=None, d_out=None, **changes):
    """Every launcher, dlogits with numbers per row that are finite whatever the logits: z_y, slope, m, s, q, z_y, E, S, Q,
    dlogits, and the residuals of E and of dlogits where there are any."""
    blocks, numbers = blocks_of(p, **FEW_ROWS | changes), -torch.rand(6, 1, generator=torch.Generator().manual_seed(1))
    logp, t, lse, g, h, minus_H = numbers.repeat(1, len(p.tokens)).to(DEVICE)
    d_out = p.weight.new_empty(len(p.tokens), len(p.weight)) if d_out is None else d_out
    *scored, taken = score(p, logp, blocks, e_out)
    residual = dlogits(*p, logp, t, lse + 8, g, (h, -minus_H, -minus_H), None, d_out, blocks)
    return *target_logits(*p), *logsumexp(*p, True, blocks), *scored, d_out, *(x for x in (taken, residual) if len(x))


@pytest.mark.parametrize("value", [nan, inf], ids=str)
@TWO_DTYPES
def test_a_bad_hidden_row_spoils_itself_and_no_other(name, value):
    p = inputs(20, 1100, name=name, options="bias")
    clean, kept = launch(p), torch.arange(20) != 7
    p.hidden[7, 3] = value
    bad = launch(p)
    same(tuple(x[kept] for x in bad), tuple(x[kept] for x in clean))
    z, _, _, s, _, _, E, S, _, d, *residuals = (x[7] for x in bad)
    assert s.isnan()
    assert not z.isfinite()
    assert not S < LARGE
    assert (E == 0).all()
    assert not residuals or residuals[0] == 0
    assert value == inf or d.isnan().sum() >= 1099  # the target's entry is made of the numbers per row


@pytest.mark.parametrize("value", [nan, inf], ids=str)
@pytest.mark.parametrize("column", [0, 1099])
def test_a_bad_row_of_the_weight(column, value):
    """It spoils every row's sums, and the gradient of its own logits. Column 0 is where lanes beyond the edge wrap around to."""
    p = inputs(9, 1100)
    p.tokens.copy_(1 + torch.arange(9) * 3)
    p.hidden[:, 5] = 1
    clean, others = launch(p), torch.arange(1100) != column
    p.weight[column, 5] = value
    _, _, m, s, _, z, E, S, _, d = launch(p)
    assert not ((m - z) + s.log()).isfinite().any()
    assert not (S < LARGE).any()
    assert (E == 0).all()
    same(d[:, others], clean[9][:, others])
    assert not d[:, column].isfinite().any()


def run_cispo(partials, a, old, advantage, weight, row_scale, mask=True, bounds=(None, None), out=None, tokens=0):
    """finalize_cispo with partial sums (C, tiles); the others are numbers or (C,). Results on the CPU."""
    partials = partials if isinstance(partials, tuple) else (partials.float().to(DEVICE), None, None)

    def vector(x, dtype=torch.float32):
        return torch.as_tensor(x, dtype=dtype).expand(len(partials[0])).clone().to(DEVICE)

    numbers, tokens = map(vector, (a, old, advantage, weight, row_scale)), vector(tokens, torch.int64)
    result = finalize_cispo(partials, tokens, vector(1.0), out, *numbers, vector(mask, torch.bool), *bounds)
    return [x.cpu() for x in result]


@pytest.mark.parametrize("off", [-80, 80])
@TWO_DTYPES
def test_anchors_that_are_off_by_80(name, off):
    """Too high by e^80: entries end at 2^100, and such rows are lost. Too low: rows keep what they have."""
    p = inputs(33, 1100, name=name)
    e, E = Exact(p), room_for_e(p)
    a = (e.logp + off).float()
    partials = anchored_exp(*p, target_logits(*p)[0] - a.to(DEVICE), True, E, blocks_of(p))
    anchor = e.target - a.double()
    tolerance = e.tolerance.maximum(1e-6 * anchor.abs())  # the anchor is an fp32 number as the logits are
    entries = (e.rest - anchor[:, None]).exp().clamp(max=2.0**100)
    relative, absolute = ROUNDING[E.dtype]
    assert_close(E, entries, (relative + tolerance[:, None]) * entries + absolute)
    assert (E.max() == 2.0**100) == (off == 80)
    total, _, residual, *_, state = run_cispo(partials, a, a, 1.0, 1.0, 1.0, True, (None, 5.0), E, p.tokens)
    want, E = entries.sum(1), E.cpu()
    lost, low = want >= LARGE, want < SMALL
    assert_close(total, want, tolerance * want + absolute)
    assert torch.equal(state == 2, low | lost)
    assert (low.any(), lost.any()) == (off == -80, off == 80)
    assert (E[lost] == 0).all()
    assert len(residual) == 0 or (residual[lost] == 0).all()
    assert_close(e.at_target(E)[~lost], -want[~lost], ((relative + tolerance) * want + absolute)[~lost])


def test_the_range_of_the_sum():
    """Lost rows lie between others. Also more partial sums than are added up at a time, and E in a wider buffer."""
    sums = torch.tensor([0, SMALL * (1 - 2.0**-24), SMALL, LARGE, 1, nan, LARGE * (1 - 2.0**-24), inf, 1])
    S, buffer = torch.zeros(9, 1500), torch.full((9, 1500), 3.0, device=DEVICE)
    S[range(9), range(1491, 1500)] = sums
    total, *_, state = run_cispo(S, 0, 0, 1, 1, 1, True, (1.0, 1.0), buffer[:, :1100])
    same(total, sums)
    assert state.tolist() == [2, 2, 0, 2, 0, 2, 0, 2, 0]
    kept, want = sums < LARGE, torch.full((9, 1500), 3.0)
    want[kept, 0], want[~kept, :1100] = -sums[kept], 0
    same(buffer.cpu(), want)


def test_the_range_of_the_factor():
    """u = -weight, exactly: S = 1, a = -60, and the ratio is clipped to 1."""
    weight = [0.0, 1e-45, 2.0**-110 * (1 - ULP), 2.0**-110, 1.0, -1.0, 2.0**110, 2.0**110 * (1 + ULP), -inf, nan]
    *_, u, state = run_cispo(torch.ones(10, 1), -60, 0, 1, torch.tensor(weight), 1, True, (1.0, 1.0))
    same(u, -torch.tensor(weight))
    assert state.tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("bounds", [(None, None), (None, 5.0), (0.5, None), (0.5, 2), (1, 1)], ids=str)
def test_cispo_per_row(bounds):
    """Log-odds from e^-35, which is 1 - p = 1e-15, to e^60; ratios from e^-20 to e^20."""
    t = torch.linspace(-34.6, 60, 200).double()
    a = (F.logsigmoid(-t) + torch.randn(200)).clamp(-60, 0).float()
    S = ((t + a).exp()[:, None] * torch.rand(200, 5).softmax(1)).float()
    t = S.double().sum(1).log() - a.double()
    logp = -torch.where(t < 0, t.exp().log1p(), t + (-t).exp().log1p())
    old = (logp + torch.linspace(-20, 20, 200)[torch.randperm(200)]).float()
    advantage, weight, row_scale, mask = torch.randn(200), torch.rand(200) + 0.1, torch.rand(200) + 0.5, torch.rand(200) > 0.2
    total, _, _, got, loss, u, _ = run_cispo(S, a, old, advantage, weight, row_scale, mask, bounds)
    tolerance = 1e-6 * t.abs().clamp(min=10)
    assert_close(total, S.double().sum(1), 4 * ULP * S.sum(1))
    assert_close(got, logp, tolerance * logp.abs().clamp(max=1))
    c = (logp - old.double()).exp().clamp(bounds[0] or 0, bounds[1] or inf) * advantage * weight * mask
    assert_close(loss, c * logp, 2 * tolerance * (c * logp).abs())
    want = -c * row_scale / (S.double().sum(1) + a.double().exp())
    assert_close(u, want, 2 * tolerance * want.abs())


@pytest.mark.parametrize("value", [nan, inf, -inf], ids=str)
@pytest.mark.parametrize("garbage", ["sum", "anchor", "old", "advantage", "weight", "scale"])
def test_masked_rows_are_exactly_zero(garbage, value):
    numbers = {"sum": 0.5, "anchor": -0.5, "old": 0, "advantage": 1, "weight": 1, "scale": 1} | {garbage: value}
    *_, loss, u, _ = run_cispo(torch.full((2, 1), numbers.pop("sum")), *numbers.values(), False)
    assert (loss == 0).all()
    assert (u == 0).all()


@triton.jit
def coefficient_kernel(LOGP, OLD, ADVANTAGE, OUT, ratio_min, ratio_max, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c = cispo_coefficient(tl.load(LOGP + i), tl.load(OLD + i), tl.load(ADVANTAGE + i), ratio_min, ratio_max)
    tl.store(OUT + i, c)


@pytest.mark.parametrize("bounds", [(None, None), (None, 5.0), (0.2, None), (0.2, 5.0), (0.0, 1.0)], ids=str)
def test_cispo_coefficient_is_the_objectives(bounds):
    logp, old, advantage = -torch.rand(4096) * 10, -torch.rand(4096) * 10, torch.randn(4096)
    logp[:3], old[3:6], advantage[6:9], old[9:12], old[12:15] = nan, nan, nan, inf, -inf
    x = logp.clone().requires_grad_()
    want = torch.autograd.grad(CISPO(bounds[1], bounds[0])(x, old, advantage).sum(), x)[0]
    got = torch.empty(4096, device=DEVICE)
    coefficient_kernel[(1,)](*(v.to(DEVICE) for v in (logp, old, advantage)), got, *bounds, BLOCK=4096)
    got, number, ratio = got.cpu(), ~want.isnan(), (logp - old).exp()
    assert torch.equal(~got.isnan(), number)
    assert not number[:9].any()
    # numpy's exp, the interpreter's, is up to 2 ulp from torch's; a GPU's multiplies by log2 e first
    ulps = (got.view(torch.int32) - want.view(torch.int32)).abs()
    assert ulps[number].max() <= (3 if INTERPRETED else 32)
    clipped = (ratio < (bounds[0] or 0) * 0.999) | (ratio > (bounds[1] or inf) * 1.001)
    assert (ulps[number & clipped] == 0).all()


@triton.jit
def functions_kernel(X, LOG_SIGMOID, TANH, SLOPE, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tanh, slope = softcap_tanh(x)
    tl.store(LOG_SIGMOID + i, log_sigmoid(x))
    tl.store(TANH + i, tanh)
    tl.store(SLOPE + i, slope)


def test_log_sigmoid_and_softcap_tanh():
    """Of sizes from 1e-8 to 50, 0 and infinity, with both signs; NaN stays NaN."""
    x = torch.cat([torch.logspace(-8, 1.7, 4093), torch.tensor([0.0, inf, nan])])
    x = torch.cat([x, -x])
    out = [torch.empty(8192, device=DEVICE) for _ in range(3)]
    functions_kernel[(1,)](x.to(DEVICE), *out, BLOCK=8192)
    assert all(y[x.isnan()].isnan().all() for y in out)
    x, log_sigmoids, tanh, slope = (v.cpu()[~x.isnan()].double() for v in (x, *out))
    want, size = x.clamp(max=0) - (-x.abs()).exp().log1p(), x.abs().clamp(max=100)
    # a GPU's exp multiplies by log2 e first
    assert_close(log_sigmoids, want, (4 if INTERPRETED else 4 + size) * ULP * want.abs())
    assert_close(tanh, x.tanh(), 3 * ULP * x.tanh().abs())
    # 4 q / (1 + q)^2 with q = exp(-2 |x|), whose exponent is rounded, and which is subnormal at 50
    assert_close(slope, x.cosh() ** -2, (3 + 2 * size) * ULP * x.cosh() ** -2 + 2.0**-147)


@triton.jit
def round_kernel(X, Y, EMULATE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, round_to(tl.load(X + i), Y.dtype.element_ty, EMULATE))


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("emulate", [True] if INTERPRETED else [True, False])
def test_round_to(name, emulate):
    """Every upper half of an fp32, with lower halves below, at and above ties: NaN, infinities and subnormals included."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000])
    x = (torch.arange(-(2**15), 2**15)[:, None] * 2**16 + low).reshape(-1).to(torch.int32).view(torch.float32)
    y = torch.empty(len(x), dtype=FLOATS[name], device=DEVICE)
    round_kernel[(len(x) // 2**15,)](x.to(DEVICE), y, emulate, BLOCK=2**15)
    same(y.cpu(), x.to(FLOATS[name]))


def in_wider(x, before, after):
    """x with columns of 99 before and after it, in one allocation."""
    return F.pad(x, (before, after), value=99.0)[:, before : before + x.shape[1]]


@pytest.mark.parametrize("operand", ["hidden", "weight"])
@pytest.mark.parametrize("layout", ["contiguous", "in-wider", "misaligned", "odd-stride", "transposed"])
@TWO_DTYPES
def test_layouts_and_descriptors_change_no_bit(name, operand, layout):
    p = inputs(5, 1100, 96, name, "bias")
    if layout == "transposed":
        changed = p._replace(weight=in_wider(p.weight.T, 0, 4).T)
    else:
        margins = {"contiguous": (0, 0), "in-wider": (16, 8), "misaligned": (1, 7), "odd-stride": (0, 1)}[layout]
        changed = p._replace(**{operand: in_wider(getattr(p, operand), *margins)})
    with_descriptors = operands(changed.hidden, changed.weight, blocks_of(p, descriptors=True))["DESCRIPTORS"]
    assert with_descriptors == (layout in ("contiguous", "in-wider"))
    want = launch(p, descriptors=False)
    for descriptors in (False, True):
        same(launch(changed, descriptors=descriptors), want)


@TWO_DTYPES
def test_padding_of_the_outputs_is_left_alone(name):
    p = inputs(18, 1100, 40, name)
    p.scale[5] = nan  # a row of E that is filled with zeros
    E, D = (torch.full((20, 1107), 99.0, dtype=p.weight.dtype, device=DEVICE) for _ in range(2))
    same(launch(p, E[1:19, :1100], D[1:19, :1100]), launch(p))
    for buffer in (E, D):
        assert (buffer[:, 1100:] == 99).all()
        assert (buffer[[0, 19]] == 99).all()


def test_a_bias_with_a_stride():
    """Through the public function, since it does not matter where such a bias is made contiguous."""
    p = inputs(5, 17, options="bias")
    biases = p.bias, p.bias.repeat_interleave(2)[::2]
    same(*(linear_logprobs(p.hidden, LMHead(p.weight, b), p.tokens, backend="triton").logprobs for b in biases))


@pytest.mark.skipif(not INTERPRETED or sys.platform != "linux", reason="needs Linux, and memory on the CPU")
@pytest.mark.parametrize("what", ["hidden", "weight", "transposed-weight", "outputs"])
def test_offsets_beyond_32_bits(what):
    """Rows 2^30 numbers apart, or 1100 hidden numbers 2^21 apart, in address space of which only touched pages exist. Where an
    offset wraps around there is memory too: wrong numbers, and no crash."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, a name since Python 3.13
    memory = mmap.mmap(-1, 2 * (2 * 2**31 + 2**29), flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    far, transposed = torch.frombuffer(memory, dtype=torch.bfloat16), what == "transposed-weight"
    p, stride = inputs(3, 3, 1100 if transposed else 40, "bf16", "bias"), (1, 2**21) if transposed else (2**30 + 8, 1)
    if what == "outputs":
        same(launch(p, *(far.as_strided((3, 3), stride, 2**31 + start) for start in (0, 64))), launch(p))
    else:
        x = getattr(p, what.removeprefix("transposed-"))
        changed = {what.removeprefix("transposed-"): far.as_strided(x.shape, stride, 2**31).copy_(x)}
        same(launch(p._replace(**changed)), launch(p))


@TWO_DTYPES
def test_bits_of_a_row_do_not_depend_on_the_batch(name):
    p = inputs(257, 1100, 96, name, "bias")
    log_anchor, blocks = Exact(p).near(), blocks_of(p)

    def results(rows):
        q = p._replace(hidden=p.hidden[rows], tokens=p.tokens[rows], scale=p.scale[rows])
        return tuple(x for x in (*logsumexp(*q, True, blocks), *score(q, log_anchor[rows], blocks)) if len(x))

    whole = results(slice(None))
    for rows in ([200], [256, 1, 200], list(range(150, 214))):
        same(results(rows), tuple(x[rows] for x in whole))


@pytest.mark.parametrize("options", ["", EVERYTHING], ids=["plain", "everything"])
@TWO_DTYPES
def test_parts_and_groups_change_no_entry(name, options):
    """How an epilogue takes its tile changes the order of sums, and nothing else."""
    p, first = inputs(9, 1100, 40, name, options), None
    for parts, groups in ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2)):
        z, slope, m, s, q, z_y, E, S, Q, d, *_ = launch(p, parts=parts, groups=groups)
        entries, sums = (z, slope, m, z_y, d, E.scatter(1, p.tokens[:, None], 0)), (s, q, S, Q)  # the target's entry is -S
        first = first or (entries, sums)
        same(entries, first[0])
        for a, b in zip(sums, first[1], strict=True):
            assert_close(a, b.cpu().double(), 4e-6 * b.cpu().abs())
