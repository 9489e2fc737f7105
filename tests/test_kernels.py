"""The Triton kernels, launcher by launcher, against the same quantities written out in float64.

On a GPU where there is one, in Triton's interpreter elsewhere. Launchers are called as `fastpg.triton_tile_ops` calls them.
"""

import math
import mmap
import sys
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

INF, NAN = math.inf, math.nan
DEVICE = "cpu" if INTERPRETED else "cuda"
ULP = 2.0**-23
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what storing an entry may cost: relative, and absolute where numbers become subnormal
ROUNDING = {torch.float32: (0, 2.0**-126), torch.bfloat16: (2.0**-8, 2.0**-126), torch.float16: (2.0**-11, 2.0**-25)}
# rows around a tile of 64, vocabularies around one of 1024, hidden sizes that a depth of 64 does not divide
SHAPES = [(1, 1, 40), (64, 1, 1), (3, 2, 40), (65, 17, 96), (1, 1100, 40), (130, 1100, 96), (64, 2100, 40), (3, 1024, 64)]
OPTIONS = ["bias", "softcap", "temperature", "bias softcap temperature"]
CASES = pytest.mark.parametrize(
    ("shape", "options"),
    [(shape, "") for shape in SHAPES] + [((65, 1100, 40), options) for options in OPTIONS],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else x.replace(" ", "+") or "plain",
)
DTYPES = pytest.mark.parametrize("name", FLOATS)
E_DTYPES = pytest.mark.parametrize("name", ["fp32", "bf16"])  # fp16 has too little range for E


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
    sure = torch.linspace(0, 30, rows) * (torch.arange(rows) % 2 == 0)
    hidden = torch.randn(rows, hidden_size) + w_y * (sure / w_y.square().sum(1).clamp(min=1))[:, None]
    bias = torch.randn(vocab).to(dtype) if "bias" in options else None
    scale = torch.rand(rows) + 0.5 if "temperature" in options else torch.ones(rows)
    scale, inner = (9 * scale, 0.7 / 9) if "softcap" in options else (scale, None)
    return move(Inputs(hidden.to(dtype), weight.to(dtype), bias, tokens, scale, inner), DEVICE)


def move(p: Inputs, device: str) -> Inputs:
    return Inputs(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in p))


def some_rows(p: Inputs, rows) -> Inputs:
    return p._replace(hidden=p.hidden[rows], tokens=p.tokens[rows], scale=p.scale[rows])


def blocks_of(p: Inputs) -> Blocks:
    return blocks_for(target_of(p.weight.device), p.weight.dtype, p.bias is not None, p.inner is not None)


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
    rest, target = z.scatter(1, column, -INF), z.gather(1, column)[:, 0]
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
    """Equal bits, NaN where there is NaN; None, and results of several tensors, too."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---- Each launcher --------------------------------------------------------------------------------------------------


@DTYPES
@CASES
def test_target_logits(shape, options, name):
    p = inputs(*shape, name, options)
    e = exact(p)
    z, slope = target_logits(*p)
    assert_close(z, e.target, e.tolerance)
    want = e.slope.gather(1, p.tokens.cpu()[:, None])[:, 0]
    assert_close(slope, want, 4 * e.tolerance * want)
    outside = p._replace(tokens=torch.where(torch.arange(len(z)) % 2 == 0, p.tokens.cpu(), shape[1]).to(DEVICE))
    assert same(target_logits(*outside)[0][::2], z[::2])
    assert target_logits(*outside)[0][1::2].isnan().all()


def check_logsumexp(p: Inputs, blocks: Blocks | None = None) -> None:
    blocks, e = blocks or blocks_of(p), exact(p)
    m, s, q, z = logsumexp(*p, True, blocks)
    assert same(logsumexp(*p, False, blocks), (m, s, None, z))  # asking for the entropy changes no bit
    assert_close(z, e.target, e.tolerance)
    assert_close(m, e.rest.amax(1), e.tolerance)
    m, s, q, z = (x.cpu().double() for x in (m, s, q, z))
    alone = e.t == -INF  # nothing else counts
    assert (s[alone] == 0).all()
    assert (q[alone] == 0).all()
    assert_close((m - z) + s.log(), e.t, e.tolerance)
    assert_close(torch.where(alone, 0, s.log() - q / s), e.others, e.tolerance)


@DTYPES
@CASES
def test_logsumexp(shape, options, name):
    check_logsumexp(inputs(*shape, name, options))


def near(e: Exact) -> torch.Tensor:
    """Log-probabilities to anchor with, some nats off: fp32, so that they are exact in float64 too."""
    return (F.logsigmoid(-e.t) + torch.rand(len(e.t)) * 6 - 3).clamp(-60, 0).float().to(DEVICE)


def score(p: Inputs, log_anchor: torch.Tensor, blocks: Blocks | None = None, out: torch.Tensor | None = None) -> tuple:
    """target_logits, anchored_exp and finalize: E, S, Q, residual."""
    out = p.weight.new_empty(len(p.hidden), len(p.weight)) if out is None else out
    target, slope = target_logits(*p)
    partials = anchored_exp(*p, target - log_anchor, True, out, blocks or blocks_of(p))
    return out, *finalize(partials, p.tokens, slope, out)


def check_score(
    p: Inputs, blocks: Blocks | None = None, e: Exact | None = None, log_anchor: torch.Tensor | None = None
) -> None:
    e = exact(p) if e is None else e
    log_anchor = near(e) if log_anchor is None else log_anchor
    log_e = e.rest - (e.target - log_anchor.cpu().double())[:, None]
    E, column, tolerance = log_e.exp(), p.tokens.cpu()[:, None], e.tolerance[:, None]
    stored, total, weighted, residual = score(p, log_anchor, blocks)
    S, Q = E.sum(1), torch.where(E > 0, E * log_e, 0).sum(1)
    assert_close(total, S, e.tolerance * S)
    assert_close(weighted, Q, e.tolerance * torch.where(E > 0, E * (log_e.abs() + 1), 0).sum(1))
    entries = (E * e.slope).scatter(1, column, -(S * e.slope.gather(1, column)[:, 0])[:, None])
    relative, absolute = ROUNDING[stored.dtype]
    assert_close(stored, entries, (relative + tolerance) * entries.abs() + absolute)
    # without the entropy, and without E: the same sums
    target, slope = target_logits(*p)
    partials = anchored_exp(*p, target - log_anchor, False, None, blocks or blocks_of(p))
    assert partials[1] is partials[2] is None
    assert same(finalize(partials, p.tokens, slope, None)[0], total)
    if stored.dtype == torch.float32:
        assert len(residual) == 0
    else:  # what is stored and what rounding took add up to a row that was not rounded
        assert_close(
            residual + stored.double().sum(1).to(residual), entries.sum(1), 1e-6 * S + e.tolerance * S * (p.inner or 0)
        )


@E_DTYPES
@CASES
def test_anchored_exp(shape, options, name):
    check_score(inputs(*shape, name, options))


def check_dlogits(p: Inputs, columns: slice, entropy: bool, blocks: Blocks | None = None) -> None:
    """Against automatic differentiation in the columns of the others. The target's is minus their sum, for every function of z
    that ignores shifts of z, as logp and the entropy do."""
    e, rows, column = exact(p), len(p.tokens), p.tokens.cpu()[:, None]
    g, h = torch.randn(rows).double(), torch.randn(rows).double() * entropy
    z = e.z.clone().requires_grad_()
    log_p = z.log_softmax(1)
    H = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1)
    d = torch.autograd.grad((g * log_p.gather(1, column)[:, 0] + h * H).sum(), z)[0].scatter(1, column, 0)
    d = d.scatter(1, column, -d.sum(1, keepdim=True))
    log_p, H = log_p.detach(), H.detach()
    # what the entries would be without cancellation
    size = log_p.exp() * (g.abs()[:, None] + h.abs()[:, None] * (H[:, None] - log_p.clamp(min=-1e4)))
    largest = torch.sigmoid(e.t) * (g.abs() + h.abs() * (torch.where(e.t.isinf(), 0, e.t.abs()) + e.others + 1))
    size = size.scatter(1, column, largest[:, None])
    factor = p.scale.cpu().double() * (p.inner or 1)
    unit = None
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
        *numbers, (h, H, others) if entropy else None, None if unit is None else unit.to(DEVICE), out, blocks or blocks_of(p),
    )  # fmt: skip
    relative, absolute = ROUNDING[out.dtype]
    assert_close(out, want, relative * want.abs() + 2 * e.tolerance[:, None] * size + absolute)
    assert (out.cpu()[want == 0] == 0).all()
    if out.dtype == torch.float32:
        assert len(residual) == 0
    else:
        assert_close(residual + out.double().sum(1).to(residual), want.sum(1), 2 * e.tolerance * size.sum(1))


@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "entropy"])
@DTYPES
@CASES
def test_dlogits(shape, options, name, entropy):
    p, middle = inputs(*shape, name, options), shape[1] // 2
    for columns in (slice(0, middle), slice(middle, shape[1])):
        if columns.start < columns.stop:
            check_dlogits(p, columns, entropy)


@pytest.mark.parametrize("rows", [16, 64])
def test_many_tiles_and_splits(rows):
    """9 row tiles of 16 are more than the 8 that share columns of W; 18 column tiles of 64 make 3 splits, the last ragged."""
    p = inputs(130, 1100, name="bf16", options="bias softcap temperature")
    blocks = blocks_of(p)._replace(rows=rows, columns=64, depth=16, parts=1)
    check_logsumexp(p, blocks)
    check_score(p, blocks)
    check_dlogits(p, slice(300, 1100), True, blocks)


def test_splits_whose_largest_logits_are_far_apart(monkeypatch):
    """A pivot that moves at every split by more than exp can undo, in more splits than are added up at a time."""
    monkeypatch.setattr("fastpg.kernels.logsumexp._BLOCK", 2)
    p = inputs(3, 1100, options="bias")
    for bias in (torch.linspace(-400, 400, 1100), torch.linspace(400, -400, 1100)):
        p.bias.copy_(bias)
        check_logsumexp(p, blocks_of(p)._replace(rows=16, columns=32, parts=1))


# ---- Columns that count for nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("how", ["bias", "weight"])
def test_the_edge_of_the_vocabulary_where_all_logits_are_about_minus_300(how, descriptors):
    """Lanes beyond the edge have logits of about 0: each would outweigh the whole vocabulary."""
    p = inputs(5, 1100, options="bias" if how == "bias" else "")
    if how == "bias":
        p.bias.sub_(300)
    else:
        p.weight[:, 0], p.hidden[:, 0] = 10, -30
    blocks = blocks_of(p)._replace(descriptors=descriptors)
    check_logsumexp(p, blocks)
    check_score(p, blocks)
    check_dlogits(p, slice(50, 1100), True, blocks)


@pytest.mark.parametrize("banned", [slice(0, 1024), slice(1024, None)], ids=["first", "last"])
def test_a_tile_whose_columns_are_all_banned(banned):
    p = inputs(5, 2100, options="bias")
    p.bias[banned] = -INF
    p.tokens.copy_(torch.arange(5) * 7 + (1024 if banned.start == 0 else 0))
    check_logsumexp(p)
    check_score(p)
    check_dlogits(p, slice(0, 2100), True)


@pytest.mark.parametrize("options", ["bias", "bias softcap"], ids=["plain", "softcap"])
def test_all_others_banned(options):
    """S = 0 and p = 1. Under a softcap a bias of -inf is a logit of -c, and bans nothing."""
    p = inputs(3, 1100, options=options)
    p.tokens.fill_(1090)
    p.bias.fill_(-INF)[1090] = 0
    check_logsumexp(p)
    check_score(p)
    check_dlogits(p, slice(0, 1100), True)


# ---- NaN and infinity -----------------------------------------------------------------------------------------------


def gradient_of(p: Inputs) -> torch.Tensor:
    """Some slice of dlogits whose numbers per row are all finite."""
    one, out = torch.ones(len(p.tokens), device=DEVICE), torch.empty(len(p.tokens), len(p.weight), device=DEVICE)
    dlogits(*p, -one, one, one, one, (one, one, one), None, out, blocks_of(p))
    return out


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@E_DTYPES
def test_a_bad_hidden_row_spoils_itself_and_no_other(name, value):
    clean = inputs(65, 1100, name=name, options="bias")
    log_anchor = near(exact(clean))
    p = clean._replace(hidden=clean.hidden.clone())
    p.hidden[7, 3] = value
    kept = torch.arange(65) != 7
    one, other = logsumexp(*p, True, blocks_of(p)), logsumexp(*clean, True, blocks_of(p))
    assert same(tuple(x[kept] for x in one), tuple(x[kept] for x in other))
    assert one[1][7].isnan()
    one, other = score(p, log_anchor), score(clean, log_anchor)
    assert same(tuple(x[kept] for x in one if len(x)), tuple(x[kept] for x in other if len(x)))
    assert not one[1][7] < 2.0**99
    assert (one[0][7] == 0).all()
    assert len(one[3]) == 0 or one[3][7] == 0
    if math.isnan(value):
        one = gradient_of(p)
        assert one[7].isnan().sum() >= 1099  # the target's entry is made of numbers per row
        assert same(one[kept], gradient_of(clean)[kept])


@pytest.mark.parametrize("column", [0, 1099])
def test_nan_in_a_row_of_the_weight(column):
    """Column 0 is also where lanes beyond the edge wrap around to."""
    p = inputs(20, 1100)
    p.tokens.copy_(torch.arange(20) * 3)
    clean = gradient_of(p)
    p.weight[column, 5] = NAN
    m, s, _, z = logsumexp(*p, True, blocks_of(p))
    assert ((m - z) + s.log()).isnan().all()
    assert score(p, torch.zeros(20, device=DEVICE))[1].isnan().all()
    got = gradient_of(p)
    others = torch.arange(1100) != column
    assert same(got[:, others], clean[:, others])
    assert got[p.tokens != column, column].isnan().all()


def test_a_logit_of_infinity():
    p = inputs(5, 1100, options="bias")
    p.tokens.fill_(3)
    p.bias[1050] = INF
    m, s, _, z = logsumexp(*p, True, blocks_of(p))
    assert not ((m - z) + s.log()).isfinite().any()
    stored, total, _, _ = score(p, torch.zeros(5, device=DEVICE))
    assert (total >= 2.0**99).all()
    assert (stored == 0).all()


# ---- Anchors that are wrong, and the range of S and u ---------------------------------------------------------------

SMALL, LARGE = 2.0**-90, 2.0**99  # a sum is in range from SMALL to below LARGE


@pytest.mark.parametrize("off", [-80, 80])
@E_DTYPES
def test_anchors_that_are_off_by_80(name, off):
    """Too high by e^80: entries end at 2^100 and every such row is lost. Too low: rows keep what they have."""
    p = inputs(65, 1100, name=name)
    e = exact(p)
    log_anchor = (F.logsigmoid(-e.t) + off).float().to(DEVICE)
    target, slope = target_logits(*p)
    stored = p.weight.new_empty(65, 1100)
    partials = anchored_exp(*p, target - log_anchor, True, stored, blocks_of(p))
    anchor = e.target - log_anchor.cpu().double()
    tolerance = e.tolerance.maximum(1e-6 * anchor.abs())  # the anchor is an fp32 number like the logits
    E = (e.rest - anchor[:, None]).exp().clamp(max=2.0**100)
    relative, absolute = ROUNDING[stored.dtype]
    assert_close(stored, E, (relative + tolerance[:, None]) * E + absolute)
    if off == 80:
        assert stored.max() == 2.0**100
    one, mask = torch.ones(65, device=DEVICE), torch.ones(65, dtype=torch.bool, device=DEVICE)
    result = finalize_cispo(partials, p.tokens, slope, stored, log_anchor, log_anchor, one, one, one, mask, None, 5.0)
    total, _, residual, _, _, _, state = (x.cpu() for x in result)
    S, at_target = E.sum(1), stored.cpu().gather(1, p.tokens.cpu()[:, None])[:, 0]
    lost = S > LARGE
    assert ((S / LARGE).log2().abs() > 0.1).all()
    assert lost.any() == (off == 80)
    assert_close(total, S, tolerance * S + absolute)
    assert torch.equal(state == 2, (S < SMALL) | lost)
    assert (state == 2).any()
    assert (stored.cpu()[lost] == 0).all()
    assert len(residual) == 0 or (residual[lost] == 0).all()
    assert_close(at_target[~lost], -S[~lost], (relative + tolerance[~lost]) * S[~lost] + absolute)


def run_cispo(S, log_anchor, old, advantages, weight, row_scale, mask, bounds=(None, None), out=None):
    """finalize_cispo of partial sums S (C, tiles) that no kernel computed; numbers or (C,) for the others. Results on the CPU."""
    count = len(S)

    def vector(x, dtype=torch.float32):
        return torch.as_tensor(x, dtype=dtype).expand(count).clone().to(DEVICE)

    vectors = [vector(x) for x in (log_anchor, old, advantages, weight, row_scale)]
    result = finalize_cispo(
        (S.float().to(DEVICE), None, None),
        vector(0, torch.int64),
        vector(1.0),
        out,
        *vectors,
        vector(mask, torch.bool),
        *bounds,
    )
    return [x.cpu() for x in result]


@pytest.mark.parametrize(
    ("total", "in_range", "lost"),
    [
        (0.0, False, False),
        (SMALL * (1 - 2.0**-24), False, False),
        (SMALL, True, False),
        (1.0, True, False),
        (LARGE * (1 - 2.0**-24), True, False),
        (LARGE, False, True),
        (INF, False, True),
        (NAN, False, True),
    ],
)
def test_the_range_of_the_sum(total, in_range, lost):
    """A lost row lies between two others, which are not."""
    E = torch.full((3, 1500), 3.0, device=DEVICE)[:, :1100]
    S = torch.tensor([[1.0, 0], [total, 0], [1.0, 0]])
    got, _, _, _, _, u, state = run_cispo(S, 0.0, 0.0, 1.0, 1.0, 1.0, True, (1.0, 1.0), E)
    assert same(got, S[:, 0])
    assert state.tolist() == [0, 0 if in_range else 2, 0]
    assert (E[::2, 1:] == 3).all()
    assert (E[::2, 0] == -1).all()
    if lost:
        assert (E[1] == 0).all()
        assert not u[1].isfinite() or abs(u[1]) <= 1 / LARGE
    else:
        assert E[1, 0] == -total
        assert (E[1, 1:] == 3).all()
    assert (E._base[:, 1100:] == 3).all()


def test_the_range_of_the_factor():
    """u = -weight, exactly: S = 1, a = -60, the ratio is clipped to 1."""
    weights = [0.0, 1e-45, 2.0**-110 * (1 - ULP), 2.0**-110, 1.0, -1.0, 2.0**110, 2.0**110 * (1 + ULP), -INF, NAN]
    weight = torch.tensor(weights, dtype=torch.float32)
    _, _, _, _, _, u, state = run_cispo(torch.ones(10, 1), -60.0, 0.0, 1.0, weight, 1.0, True, (1.0, 1.0))
    assert same(u, -weight)
    assert state.tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1, 1]


# ---- CISPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(None, None), (None, 5.0), (0.5, None), (0.5, 2), (1, 1)], ids=str)
def test_cispo_per_row_numbers(bounds):
    """Log-odds from e^-35, 1 - p = 1e-15, to e^60; ratios from e^-20 to e^20."""
    t = torch.linspace(-34.6, 60, 200).double()
    log_anchor = (F.logsigmoid(-t) + torch.randn(200)).clamp(-60, 0).float()
    S = ((t + log_anchor).exp()[:, None] * torch.rand(200, 5).softmax(1)).float()
    t = S.double().sum(1).log() - log_anchor.double()
    logp = -torch.where(t < 0, t.exp().log1p(), t + (-t).exp().log1p())
    old = (logp + torch.linspace(-20, 20, 200)[torch.randperm(200)]).float()
    advantages, weight, row_scale = torch.randn(200), torch.rand(200) + 0.1, torch.rand(200) + 0.5
    mask = torch.rand(200) > 0.2
    total, _, _, got, loss, u, state = run_cispo(S, log_anchor, old, advantages, weight, row_scale, mask, bounds)

    error = 1e-6 * t.abs().clamp(min=10)
    assert_close(total, S.double().sum(1), 4 * ULP * S.sum(1))
    assert_close(got, logp, error * logp.abs().clamp(max=1))
    ratio = (logp - old.double()).exp()
    c = ratio.clamp(*bounds) * advantages * weight * mask if bounds != (None, None) else ratio * advantages * weight * mask
    want = c * logp
    assert_close(loss, want, 2 * error * want.abs())
    want = -c * row_scale / (S.double().sum(1) + log_anchor.double().exp())
    assert_close(u, want, 2 * error * want.abs())
    assert (loss[~mask] == 0).all()
    assert (u[~mask] == 0).all()
    assert torch.equal(state == 2, (total < SMALL) | (total >= LARGE))


@pytest.mark.parametrize("garbage", ["anchor", "old", "advantage", "weight", "scale", "sum"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_masked_rows_are_exactly_zero(garbage, value):
    numbers = {"sum": 0.5, "anchor": -0.5, "old": -0.5, "advantage": 1.0, "weight": 1.0, "scale": 1.0}
    S, *vectors = (numbers | {garbage: value}).values()
    _, _, _, _, loss, u, _ = run_cispo(torch.full((2, 1), S), *vectors, False)
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
    logp[:3], old[3:6], advantages[6:9] = NAN, NAN, NAN
    old[9:12], old[12:15] = INF, -INF
    x = logp.clone().requires_grad_()
    want = torch.autograd.grad(CISPO(bounds[1], bounds[0])(x, old, advantages).sum(), x)[0]
    got = torch.empty(4096, device=DEVICE)
    coefficient_kernel[(1,)](*(v.to(DEVICE) for v in (logp, old, advantages)), got, *bounds, BLOCK=4096)
    got = got.cpu()
    assert torch.equal(got.isnan(), want.isnan())
    assert want[:9].isnan().all()
    ratio = (logp - old).exp()
    low, high = (x if x is not None else y for x, y in zip(bounds, (0.0, INF), strict=True))
    for clipped, bound in ((ratio < low * 0.999, low), (ratio > high * 1.001, high)):
        assert same(got[clipped], bound * advantages[clipped])
    number = ~want.isnan()
    ulps = (got.view(torch.int32) - want.view(torch.int32))[number].abs()
    # numpy's exp, the interpreter's, is up to 2 ulp from torch's; a GPU's multiplies by log2 e first
    assert ulps.max() <= (3 if INTERPRETED else 32)


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


def both_signs(low: float, high: float) -> torch.Tensor:
    """8192 numbers, the sizes spread evenly over the exponents."""
    sizes = torch.logspace(math.log10(low), math.log10(high), 4092)
    return torch.cat([sizes, -sizes, torch.tensor([0.0, -0.0, INF, -INF, NAN, 88.0, -88.0, 1.0])])


def test_log_sigmoid():
    x = both_signs(1e-8, 100)
    y = torch.empty(8192, device=DEVICE)
    log_sigmoid_kernel[(1,)](x.to(DEVICE), y, BLOCK=8192)
    w = x.double()
    want = torch.where(w < 0, w, 0) - (-w.abs()).exp().log1p()
    number = ~x.isnan()
    assert y.cpu()[~number].isnan().all()
    steps = 4 if INTERPRETED else 4 + w.abs()[number].clamp(max=100)  # a GPU's exp multiplies by log2 e first
    assert_close(y.cpu()[number], want[number], steps * ULP * want[number].abs() + 2.0**-148)


def test_softcap_tanh():
    x = both_signs(1e-8, 50)
    tanh, slope = (torch.empty(8192, device=DEVICE) for _ in range(2))
    softcap_kernel[(1,)](x.to(DEVICE), tanh, slope, BLOCK=8192)
    tanh, slope, w = tanh.cpu(), slope.cpu(), x.double()
    number = ~x.isnan()
    assert tanh[~number].isnan().all()
    assert slope[~number].isnan().all()
    want = w.tanh()[number]
    assert_close(tanh[number], want, 3 * ULP * want.abs())
    # 4 q / (1 + q)^2 with q = exp(-2 |x|), whose exponent is rounded; at 50 it is a subnormal number
    want = w.cosh()[number] ** -2
    assert_close(slope[number], want, (3 + 2 * w[number].abs().clamp(max=100)) * ULP * want + 2.0**-147)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("emulate", [True] if INTERPRETED else [True, False])
def test_round_to(name, emulate):
    """Every upper half of an fp32, with lower halves below, at and above the tie: NaN, infinities and subnormals included."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000], dtype=torch.int64)
    bits = (torch.arange(2**16)[:, None] * 2**16 + low).reshape(-1)
    x = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    y = torch.empty(len(x), dtype=FLOATS[name], device=DEVICE)
    round_kernel[(len(x) // 4096,)](x.to(DEVICE), y, emulate, BLOCK=4096)
    want, y = x.to(FLOATS[name]), y.cpu()
    number = ~x.isnan()
    assert torch.equal(y[number].view(torch.int16), want[number].view(torch.int16))
    assert y[~number].isnan().all()


# ---- Strides, alignment, offsets ------------------------------------------------------------------------------------


def launch_all(p: Inputs, blocks: Blocks | None = None, e_out: torch.Tensor | None = None, d_out: torch.Tensor | None = None):
    """Every launcher; one tuple of all their results."""
    blocks, numbers = blocks or blocks_of(p), -torch.rand(5, len(p.tokens), generator=torch.Generator().manual_seed(1))
    logp, t, lse, g, h = numbers.to(DEVICE)
    d_out = p.weight.new_empty(len(p.tokens), len(p.weight)) if d_out is None else d_out
    residual = dlogits(*p, logp, t, lse + 8, g, (h, -h, -h), None, d_out, blocks)
    return *target_logits(*p), *logsumexp(*p, True, blocks), *score(p, logp, blocks, e_out), d_out, residual


def in_wider(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """x with `before` and `after` columns of 99 around it, in one allocation."""
    return F.pad(x, (before, after), value=99.0)[:, before : before + x.shape[1]]


LAYOUTS = {
    "hidden-in-wider": lambda p: p._replace(hidden=in_wider(p.hidden, 3, 8)),
    "hidden-with-gaps": lambda p: p._replace(hidden=p.hidden.repeat_interleave(2, 0)[::2]),
    "weight-in-wider": lambda p: p._replace(weight=in_wider(p.weight, 1, 4)),
    "weight-transposed": lambda p: p._replace(weight=p.weight.T.contiguous().T),
    "weight-transposed-in-wider": lambda p: p._replace(weight=in_wider(p.weight.T.contiguous(), 2, 3).T),
}


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("layout", LAYOUTS)
@E_DTYPES
def test_layouts_change_no_bit(layout, name, descriptors):
    p = inputs(20, 1100, 96, name, "bias")
    blocks = blocks_of(p)._replace(descriptors=descriptors)
    q = LAYOUTS[layout](p)
    assert q.weight.stride() != p.weight.stride() or q.hidden.stride() != p.hidden.stride()
    assert same(launch_all(q, blocks), launch_all(p, blocks))


@pytest.mark.parametrize("padding", [32, 7])
@E_DTYPES
def test_padding_of_the_outputs_is_left_alone(name, padding):
    p = inputs(66, 1100, 40, name)
    buffers = [torch.full((68, 1100 + padding), 99.0, dtype=p.weight.dtype, device=DEVICE) for _ in range(2)]
    lost = some_rows(p, slice(0, 66))._replace(scale=p.scale.clone())
    lost.scale[5] = NAN  # a row that is filled with zeros
    assert same(launch_all(lost, None, *(b[1:67, :1100] for b in buffers)), launch_all(lost))
    for buffer in buffers:
        assert (buffer[:, 1100:] == 99).all()
        assert (buffer[[0, 67]] == 99).all()


@pytest.mark.parametrize("shape", [(65, 1100, 96), (3, 17, 40), (1, 2, 8)], ids=lambda s: "x".join(map(str, s)))
@E_DTYPES
def test_descriptors_change_no_bit(shape, name):
    p = inputs(*shape, name, "bias")
    blocks = blocks_of(p)
    assert operands(p.hidden, p.weight, blocks._replace(descriptors=True))["DESCRIPTORS"]
    results = [launch_all(p, blocks._replace(descriptors=d)) for d in (False, True)]
    assert same(*results)


@pytest.mark.parametrize("what", ["start", "stride", "transposed"])
@pytest.mark.parametrize("operand", ["hidden", "weight"])
def test_descriptors_where_alignment_forbids_them(operand, what):
    p = inputs(20, 1100, 40, "bf16", "bias")
    x = getattr(p, operand)
    if what == "transposed":
        if operand == "hidden":
            pytest.skip("rows of hidden are contiguous")
        x = x.T.contiguous().T
    else:
        x = in_wider(x, 1, 7) if what == "start" else in_wider(x, 0, 1)
    q = p._replace(**{operand: x})
    blocks = blocks_of(p)._replace(descriptors=True)
    assert not operands(q.hidden, q.weight, blocks)["DESCRIPTORS"]
    assert same(launch_all(q, blocks), launch_all(p, blocks))


def test_a_bias_with_a_stride():
    """Through the public function: who makes it contiguous is not the point."""
    p = inputs(5, 17, options="bias")
    head, strided = LMHead(p.weight, p.bias), LMHead(p.weight, p.bias.repeat_interleave(2)[::2])
    got, want = (linear_logprobs(p.hidden, h, p.tokens, backend="triton").logprobs for h in (strided, head))
    assert same(got, want)


FAR, STEP = 2**31, 2**30 + 8


@pytest.fixture(scope="module")
def far_memory():
    """bf16 numbers further apart than 32 bits count, in address space of which only touched pages exist. Where an offset wraps
    around, there is memory too: wrong numbers, and no crash."""
    if not INTERPRETED or sys.platform != "linux":
        pytest.skip("needs Linux, and memory on the CPU")
    no_reserve = 0x4000  # mmap has a name for it since Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        memory = mmap.mmap(-1, 2 * (2 * FAR + 2**29), flags=flags)
    except OSError:
        pytest.skip("this machine does not overcommit memory")
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


def far_apart(memory: torch.Tensor, shape, stride, values: torch.Tensor | None = None) -> torch.Tensor:
    x = memory.as_strided(shape, stride, FAR)
    return x.fill_(99) if values is None else x.copy_(values)


@pytest.mark.parametrize("what", ["hidden", "weight", "outputs", "weight-transposed"])
def test_offsets_beyond_32_bits(far_memory, what):
    p = inputs(3, 3, 40, "bf16", "bias")
    want = launch_all(p)
    if what == "outputs":
        e_out = far_apart(far_memory, (3, 3), (STEP, 1))
        d_out = far_apart(far_memory[64:], (3, 3), (STEP, 1))
        assert same(launch_all(p, None, e_out, d_out), want)
    elif what == "weight-transposed":  # 1100 hidden numbers, 2^21 apart: a vocabulary of 2 M
        p = inputs(2, 2, 1100, "bf16", "bias")
        far = far_apart(far_memory, (2, 1100), (1, 2**21), p.weight)
        assert same(launch_all(p._replace(weight=far)), launch_all(p))
    else:
        far = far_apart(far_memory, (3, 40), (STEP, 1), getattr(p, what))
        assert same(launch_all(p._replace(**{what: far})), want)


# ---- The same bits ---------------------------------------------------------------------------------------------------


@E_DTYPES
def test_bits_of_a_row_do_not_depend_on_the_batch(name):
    p = inputs(257, 1100, 96, name, "bias")
    log_anchor = near(exact(p))

    def run(rows):
        q = some_rows(p, rows)
        return tuple(x for x in (*logsumexp(*q, True, blocks_of(q)), *score(q, log_anchor[rows])) if len(x))

    whole = run(slice(None))
    for rows in ([200], [256, 1, 200], list(range(150, 214))):
        rows = torch.tensor(rows, device=DEVICE)
        assert same(run(rows), tuple(x[rows] for x in whole))


@pytest.mark.parametrize("options", ["", "bias softcap temperature"], ids=["plain", "everything"])
@E_DTYPES
def test_parts_and_groups_change_no_entry(name, options):
    """How an epilogue takes its tile changes the order of sums, and nothing else."""
    p = inputs(9, 1100, 40, name, options)
    blocks, column = blocks_of(p)._replace(rows=16), p.tokens[:, None]
    first = None
    for parts, groups in ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2)):
        got = launch_all(p, blocks._replace(parts=parts, groups=groups))
        z, slope, m, s, q, zy, E, S, Q, *residuals, D, R = got
        entries, sums = (z, slope, m, zy, D, E.scatter(1, column, 0)), (s, q, S, Q)  # the target's entry is -S
        first = first or (entries, sums)
        assert same(entries, first[0])
        for a, b in zip(sums, first[1], strict=True):
            assert_close(a, b.cpu().double(), 4e-6 * b.cpu().abs())
