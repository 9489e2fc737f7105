"""The Triton kernels, launcher by launcher, against the same quantities written out in float64.

On a GPU where there is one, in Triton's interpreter elsewhere. Launchers are called as `fastpg.tiles.triton_tiles` calls them.
What becomes of a row's sums is in test_finish_kernel.
"""

import mmap
import sys
from functools import partial, partialmethod
from math import inf, nan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from fastpg import LMHead, linear_logprobs
from fastpg.kernels import objectives
from fastpg.kernels.anchored_exp import anchored_exp
from fastpg.kernels.blocks import blocks_for, target_of
from fastpg.kernels.dlogits import Incoming, Statistics, dlogits
from fastpg.kernels.finish import Terms, Tokens, finish, finish_with_loss
from fastpg.kernels.logsumexp import combine, finished, logsumexp
from fastpg.kernels.operands import Operands, tile_arguments
from fastpg.kernels.target import target_logits
from fastpg.kernels.tile import INTERPRETED, log_sigmoid, round_to, softcap_tanh

DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL_TILE = {"rows": 16, "columns": 128} if INTERPRETED else {}  # where only time depends on it
ULP = 2.0**-23
SMALL, LARGE = 2.0**-90, 2.0**99  # an anchored sum is in range from SMALL to below LARGE
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what storing an entry may cost: relative, and absolute where numbers become subnormal
ROUNDING = {torch.float32: (0, 2.0**-126), torch.bfloat16: (2.0**-8, 2.0**-126), torch.float16: (2.0**-11, 2.0**-25)}
TWO_DTYPES = pytest.mark.parametrize("name", ["fp32", "bf16"])
EVERYTHING = "bias softcap temperature lora"

same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)  # asserts equal bits, of tuples too


@pytest.fixture(autouse=True)
def _minimum_and_maximum_drop_nan_unless_told_to_propagate_it(monkeypatch):
    """As on a GPU. In the interpreter they are numpy's, which always propagate it."""
    for name, function in {"create_minnumf": np.fmin, "create_maxnumf": np.fmax}.items():
        monkeypatch.setattr(InterpreterBuilder, name, partialmethod(InterpreterBuilder.binary_op, op=function))


def blocks_of(p, **changes):
    plain = p.bias is not None, p.inner is not None
    blocks = blocks_for(target_of(p.weight.device), p.weight.dtype, *plain, "anchored_exp", p.hidden.shape[1])
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
    lora = None
    if "lora" in options:  # B in fp32, which 16-bit kernels split, and a rank that they take in two parts
        lora = torch.randn(rows, 40), torch.randn(vocab, 40) * 0.05
    p = Operands(hidden.to(FLOATS[name]), weight.to(FLOATS[name]), lora, bias, tokens, scale, inner)
    return moved_to(DEVICE, p)


def moved_to(device, p):
    lora = p.lora and tuple(x.to(device) for x in p.lora)
    return Operands(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in p))._replace(lora=lora)


def exact(p):
    """float64, on the CPU: z, slope and rest (C, V), where rest is z with -inf in the target's column; the others (C,)."""
    p, e = moved_to("cpu", p), SimpleNamespace(column=p.tokens.cpu()[:, None])
    u = p.hidden.double() @ p.weight.double().T + (0 if p.bias is None else p.bias.double())
    u = u if p.lora is None else u + p.lora[0].double() @ p.lora[1].double().T
    e.slope = torch.ones_like(u) if p.inner is None else (u * p.inner).cosh() ** -2
    e.z = (u if p.inner is None else (u * p.inner).tanh()) * p.scale.double()[:, None]
    e.rest, e.target, e.target_slope = e.z.scatter(1, e.column, -inf), *(x.gather(1, e.column)[:, 0] for x in (e.z, e.slope))
    e.t = e.rest.logsumexp(1) - e.target
    e.logp, q = F.logsigmoid(-e.t), e.rest.softmax(1)
    e.others = -torch.where(q > 0, q * q.log(), 0).sum(1)  # entropy of the others alone
    e.tolerance = 1e-6 * e.z.abs().masked_fill(e.z.isinf(), 0).amax(1).clamp(min=10)  # promised of a log-probability
    return e


def assert_close(got, want, tolerance):
    """|got - want| <= tolerance, infinities equal, NaN nowhere."""
    got = got.cpu().double()
    assert got.shape == want.shape
    good = (got == want) | ((got - want).abs() <= tolerance)
    assert good.all(), f"{(~good).sum()} of {good.numel()}, {got[~good][:4]} instead of {want[~good][:4]}"


def assert_stored(got, want, tolerance, residual, sum_tolerance):
    """Entries (C, V) up to their rounding, and that `residual` is what rounding took from each row."""
    relative, absolute = ROUNDING[got.dtype]
    assert_close(got, want, tolerance + relative * want.abs() + absolute)
    assert (residual is not None) == (relative > 0)
    if relative:
        assert_close(residual.cpu() + got.cpu().double().sum(1), want.sum(1), sum_tolerance)


def score(p, log_anchor, blocks, out=None):
    """target_logits, anchored_exp and finish: E, S, Q, residual."""
    dtype = torch.bfloat16 if p.weight.dtype == torch.bfloat16 else torch.float32  # fp16 has too little range for E
    out = p.weight.new_empty(len(p.tokens), len(p.weight), dtype=dtype) if out is None else out
    target, slope = target_logits(p)
    return out, *finish(anchored_exp(p, target - log_anchor, True, out, blocks), Tokens(p.tokens, slope, None, None))


def check(p, blocks):
    e = exact(p)
    check_statistics(p, e, blocks)
    check_score(p, e, blocks)
    check_dlogits(p, e, slice(0, (2 * len(p.weight) + 2) // 3), True, blocks)
    check_dlogits(p, e, slice(len(p.weight) // 3, len(p.weight)), False, blocks)


def check_statistics(p, e, blocks):
    z, slope = target_logits(p)
    assert_close(z, e.target, e.tolerance)
    assert (slope is None) == (p.inner is None)  # a slope of 1
    if slope is not None:
        assert_close(slope, e.target_slope, 4 * e.tolerance * e.target_slope)
    for tokens in (p.tokens - len(p.weight), p.tokens + len(p.weight)):  # outside
        assert target_logits(p._replace(tokens=tokens))[0].isnan().all()
    m, s, q = combine(logsumexp(p, True, blocks))
    same(combine(logsumexp(p, False, blocks)), (m, s, None))  # without an entropy, the same bits
    m, s, q, z = (x.cpu().double() for x in (m, s, q, z))
    assert_close(m, e.rest.amax(1), e.tolerance)
    assert_close((m - z) + s.log(), e.t, e.tolerance)
    assert_close(torch.where(s == 0, q, s.log() - q / s), e.others, e.tolerance)


def check_score(p, e, blocks):
    # some nats off; fp32 numbers, and so exact in float64 too
    log_anchor = (e.logp + torch.rand(len(e.t)) * 6 - 3).clamp(-60, 0).float().to(DEVICE)
    log_e = e.rest - (e.target - log_anchor.cpu().double())[:, None]
    E, (stored, total, weighted, residual), (target, slope) = log_e.exp(), score(p, log_anchor, blocks), target_logits(p)
    sums = anchored_exp(p, target - log_anchor, False, None, blocks)
    same(finish(sums, Tokens(p.tokens, slope, None, None)), (total, None, None))
    S, Q, Q_size = (torch.where(E > 0, E * x, 0).sum(1) for x in (torch.ones_like(E), log_e, log_e.abs() + 1))
    assert_close(total, S, e.tolerance * S)
    assert_close(weighted, Q, e.tolerance * Q_size)
    entries = (E * e.slope).scatter(1, e.column, -(S * e.target_slope)[:, None])
    left = 2e-6 if p.inner is None else e.tolerance  # rows sum to 0 but for what the slopes of a softcap leave
    assert_stored(stored, entries, e.tolerance[:, None] * entries.abs(), residual, left * S)


def check_dlogits(p, e, columns, entropy, blocks):
    """Against automatic differentiation, but for the target's column: minus the others, since logp and H ignore shifts of z."""
    g, h = torch.randn(len(e.z)).double(), torch.randn(len(e.z)).double() * entropy
    z = e.z.clone().requires_grad_()
    log_p = z.log_softmax(1)
    H = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1)
    d = torch.autograd.grad((g * log_p.gather(1, e.column)[:, 0] + h * H).sum(), z)[0]
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
    logp, t, lse, g, h, H, others = (x.float().to(DEVICE) for x in (e.logp, e.t, e.z.logsumexp(1), g, h, H, e.others))
    h, H, others = (h, H, others) if entropy else (None,) * 3
    out, bias = p.weight.new_empty(want.shape), None if p.bias is None else p.bias[columns]
    lora = p.lora and (p.lora[0], p.lora[1][columns])
    part = p._replace(weight=p.weight[columns], lora=lora, bias=bias, tokens=p.tokens - columns.start)
    residual = dlogits(part, Statistics(logp, H, t, lse, others), Incoming(g, h, unit), out, blocks)
    assert_stored(out, want, 2 * e.tolerance[:, None] * size, residual, 2 * e.tolerance * size.sum(1))


# rows around a tile of 64, vocabularies around one of 1024 and one that tiles divide, hidden sizes that a depth of 64 does not
CASES = [(3, 1, 40, ""), (64, 2, 40, ""), (65, 17, 96, ""), (1, 2100, 40, ""), (130, 1100, 40, ""), (5, 2048, 40, "")]
CASES += [(3, 1100, 40, options) for options in (*EVERYTHING.split(), EVERYTHING)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", "+"))
def test_against_float64(case, name):
    p = inputs(*case[:3], name, case[3])
    check(p, blocks_of(p))


@pytest.mark.parametrize("sign", [-1, 1], ids=["falling", "rising"])
def test_pivots_far_apart_in_more_splits_than_are_added_up_at_a_time(monkeypatch, sign):
    monkeypatch.setattr("fastpg.kernels.logsumexp._BLOCK", 2)
    p = inputs(3, 600, options="bias")
    p.bias.copy_(torch.linspace(-400 * sign, 400 * sign, 600))
    check_statistics(p, exact(p), blocks_of(p, rows=16, columns=16, parts=1))


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("what", ["edge", "first-tile", "last-tile", "others", "others-softcap"])
def test_columns_that_count_for_nothing(what, descriptors):
    """Lanes beyond the edge, where all logits are about -300 and a lane of 0 would outweigh them; a tile of banned columns; all
    others banned, S = 0 and p = 1. Under a softcap a bias of -inf is a logit of -c, and bans nothing."""
    p = inputs(5, 600, options="bias softcap" if "softcap" in what else "bias")
    if what == "edge":
        p.weight[:, 0], p.hidden[:, 0] = 10, -30
    elif what.startswith("others"):
        p.tokens.fill_(590)
        p.bias.fill_(-inf)[590] = 0
    else:
        p.bias[slice(0, 256) if what == "first-tile" else slice(512, None)] = -inf
        p.tokens.copy_(torch.arange(5) * 60 + 256)
    check(p, blocks_of(p, **SMALL_TILE, descriptors=descriptors))


def launch(p, e_out=None, d_out=None, **changes):
    """Every launcher, dlogits with numbers per row that are finite whatever the logits: z_y, slope, m, s, q, E, S, Q, dlogits,
    and the residuals of E and of dlogits where there are any."""
    blocks, numbers = blocks_of(p, **SMALL_TILE | changes), -torch.rand(6, 1, generator=torch.Generator().manual_seed(1))
    logp, t, lse, g, h, minus_H = numbers.repeat(1, len(p.tokens)).to(DEVICE)
    d_out = p.weight.new_empty(len(p.tokens), len(p.weight)) if d_out is None else d_out
    *scored, taken = score(p, logp, blocks, e_out)
    residual = dlogits(p, Statistics(logp, -minus_H, t, lse + 8, -minus_H), Incoming(g, h), d_out, blocks)
    z, slope = target_logits(p)
    slope, residuals = torch.ones_like(z) if slope is None else slope, [x for x in (taken, residual) if x is not None]
    return z, slope, *combine(logsumexp(p, True, blocks)), *scored, d_out, *residuals


@pytest.mark.parametrize("value", [nan, inf], ids=str)
@pytest.mark.parametrize(("operand", "row"), [("hidden", 7), ("weight", 0), ("weight", 299)])
def test_a_bad_row_spoils_what_it_enters_and_nothing_else(operand, row, value):
    """Row 0 of the weight is also where lanes beyond the edge wrap around to."""
    p = inputs(20, 300, name="bf16")
    p.tokens.copy_(1 + torch.arange(20) * 3)
    p.hidden[:, 5], p.weight[:, 5] = 1, 1
    *clean, d_clean = launch(p)[:9]
    getattr(p, operand)[row, 5] = value
    *bad, d = launch(p)[:9]
    enters = torch.zeros(20, 300, dtype=torch.bool)
    enters[(row, slice(None)) if operand == "hidden" else (slice(None), row)] = True
    hit = enters.any(1)
    same([x[~hit] for x in bad], [x[~hit] for x in clean])
    same(d[~enters], d_clean[~enters])
    assert not d[enters.scatter(1, p.tokens.cpu()[:, None], False)].isfinite().any()  # the target's is made of numbers per row
    z, _, m, s, _, E, S, _ = (x[hit] for x in bad)
    assert not ((m - z) + s.log()).isfinite().any()
    assert (S.isnan() | ((value == inf) & (S >= LARGE))).all()
    assert (E == 0).all()


@pytest.mark.parametrize("off", [-80, -60, 65, 80, 100])
@TWO_DTYPES
def test_anchors_that_are_far_off(name, off):
    """Too high by e^80: such rows are lost, and with e^100 their entries are infinite. Too low: sums go down to 2^-115, with
    entries that are subnormal, which a GPU flushes. Accuracy is promised of sums in range; other rows are flagged, and hide
    nothing that is not finite.
    """
    p = inputs(33, 1100, name=name)
    e, E = exact(p), p.weight.new_empty(33, 1100)
    a = (e.logp + off).float()
    sums = anchored_exp(p, target_logits(p)[0] - a.to(DEVICE), True, E, blocks_of(p))
    assert E.isinf().any() == (off == 100)
    loss = objectives.Loss(objectives.cispo, objectives.RatioBounds(None, 5.0), None, None, False, None, False)
    one = torch.ones(33, device=DEVICE)
    terms, tokens = Terms(None, a.to(DEVICE), one, -one, None, None), Tokens(p.tokens, None, one, None)
    found, results = finish_with_loss(sums, tokens, terms, loss)
    total, residual = (x if x is None else x.cpu() for x in (found.TOTAL, found.RESIDUAL))
    u, state = results.FACTOR.cpu(), results.STATE.cpu()
    anchor = e.target - a.double()
    entries = (e.rest - anchor[:, None]).exp()
    S, (relative, absolute) = entries.sum(1), ROUNDING[E.dtype]
    low, lost = S < SMALL, S >= LARGE
    kept = ~(low | lost)
    assert (kept.any(), low.any(), lost.any()) == {
        -80: (False, True, False), -60: (True, True, False), 65: (True, False, False), 80: (True, False, True),
        100: (False, False, True),
    }[off]  # fmt: skip
    assert torch.equal(state == 2, ~kept)
    tolerance = e.tolerance.maximum(1e-6 * anchor.abs())  # the anchor is an fp32 number as the logits are
    assert_close(total[kept], S[kept], tolerance[kept] * S[kept])
    entries = entries.scatter(1, e.column, -S[:, None])
    assert_close(E[kept], entries[kept], (relative + tolerance[kept, None]) * entries[kept].abs() + absolute)
    # a factor of zero is what flagged rows enter the products with: times infinity or NaN it would be NaN
    E = E.cpu()
    assert (u[state > 0] == 0).all()
    assert (E[low].abs() < SMALL).all()
    assert (total[low] >= 0).all()
    assert (E[lost] == 0).all()
    assert residual is None or ((residual[lost] == 0).all() and (residual[low].abs() < SMALL).all())


@triton.jit
def functions_kernel(X, ROUNDED, LOG_SIGMOID, TANH, SLOPE, EMULATE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tanh, slope = softcap_tanh(x)
    tl.store(ROUNDED + i, round_to(x, ROUNDED.dtype.element_ty, EMULATE))
    tl.store(LOG_SIGMOID + i, log_sigmoid(x))
    tl.store(TANH + i, tanh)
    tl.store(SLOPE + i, slope)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("emulate", [True] if INTERPRETED else [True, False])
def test_device_functions(name, emulate):
    """Of every upper half of an fp32, with lower halves below, at and above ties: NaN, infinities and subnormals included."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000])
    x = (torch.arange(-(2**15), 2**15)[:, None] * 2**16 + low).reshape(-1).to(torch.int32).view(torch.float32)
    rounded, *out = (torch.empty(len(x), dtype=dtype, device=DEVICE) for dtype in (FLOATS[name], *[torch.float32] * 3))
    functions_kernel[(len(x) // 2**15,)](x.to(DEVICE), rounded, *out, emulate, BLOCK=2**15)
    same(rounded.cpu(), x.to(FLOATS[name]))
    assert all(y[x.isnan()].isnan().all() for y in out)
    x, log_sigmoids, tanh, slope = (v.cpu()[~x.isnan()].double() for v in (x, *out))
    want, size = x.clamp(max=0) - (-x.abs()).exp().log1p(), x.abs().clamp(max=100)
    # a GPU's exp multiplies by log2 e first; and 2^-147 is a few subnormal numbers
    assert_close(log_sigmoids, want, (4 if INTERPRETED else 4 + size) * ULP * want.abs() + 2.0**-147)
    assert_close(tanh, x.tanh(), 3 * ULP * x.tanh().abs())
    # 4 q / (1 + q)^2 with q = exp(-2 |x|), whose exponent is rounded
    assert_close(slope, x.cosh() ** -2, (3 + 2 * size) * ULP * x.cosh() ** -2 + 2.0**-147)


def in_wider(x, before, after):
    """x with columns of 99 before and after it, in one allocation."""
    return F.pad(x, (before, after), value=99.0)[:, before : before + x.shape[1]]


@pytest.mark.parametrize(
    ("name", "options", "entropy"), [("bf16", "", False), ("bf16", "everything", True), ("fp32", "", True)]
)
def test_persistent_programs_and_descriptor_stores_change_no_bit(name, options, entropy):
    """Several tiles of rows and of columns, both with an edge; what lies behind the rows and columns of E stays as it was."""
    p = inputs(40, 200, name=name, options=options)
    anchor, found = target_logits(p)[0], []
    for changes in ({}, {"persistent": True}, {"stores": True}, {"persistent": True, "stores": True}):
        buffer = torch.full((48, 224), 7.0, device=DEVICE, dtype=p.weight.dtype)
        sums = anchored_exp(p, anchor, entropy, buffer[:40, :200], blocks_of(p, **SMALL_TILE, **changes))
        assert (buffer[40:] == 7).all()
        assert (buffer[:, 200:] == 7).all()
        found.append([x for x in (buffer, *sums[:3]) if x is not None])
    for other in found[1:]:
        same(other, found[0])


@pytest.mark.parametrize("operand", ["hidden", "weight"])
@pytest.mark.parametrize("layout", ["contiguous", "in-wider", "misaligned", "odd-stride", "transposed"])
def test_layouts_and_descriptors_change_no_bit(operand, layout):
    p = inputs(5, 140, 96, "bf16", "bias")
    if layout == "transposed":
        changed = p._replace(weight=in_wider(p.weight.T, 0, 4).T)
    else:
        margins = {"contiguous": (0, 0), "in-wider": (16, 8), "misaligned": (1, 7), "odd-stride": (0, 1)}[layout]
        changed = p._replace(**{operand: in_wider(getattr(p, operand), *margins)})
    chosen = tile_arguments(changed, blocks_of(p, descriptors=True))[-1].DESCRIPTORS
    assert chosen == (layout in ("contiguous", "in-wider"))
    want = launch(p, descriptors=False)
    same((launch(changed, descriptors=True), launch(changed, descriptors=False)), (want, want))


@TWO_DTYPES
def test_padding_of_the_outputs_is_left_alone(name):
    p = inputs(18, 300, 40, name)
    p.scale[5] = nan  # a row of E that is filled with zeros
    E, D = (torch.full((20, 307), 99.0, dtype=p.weight.dtype, device=DEVICE) for _ in range(2))
    same(launch(p, E[1:19, :300], D[1:19, :300]), launch(p))
    E[1:19, :300], D[1:19, :300] = 99, 99
    assert all((buffer == 99).all() for buffer in (E, D))


@pytest.mark.parametrize("number", [1.0, 1.37])
@pytest.mark.parametrize("options", ["", EVERYTHING], ids=["plain", "everything"])
@TWO_DTYPES
def test_a_scale_that_is_one_number_has_the_bits_of_a_vector(name, options, number):
    """Of all launchers that see logits: `launch` calls each."""
    p = inputs(18, 300, 40, name, options)
    want = launch(p._replace(scale=torch.full((18,), number, device=DEVICE)))
    same(launch(p._replace(scale=number)), want)
    same(launch(p._replace(scale=nan))[0].cpu(), torch.full((18,), nan))


def test_a_bias_with_a_stride():
    """Through the public function, since it does not matter where such a bias is made contiguous."""
    p = inputs(5, 17, options="bias")
    biases = p.bias, p.bias.repeat_interleave(2)[::2]
    same(*(linear_logprobs(p.hidden, LMHead(p.weight, b), p.tokens, backend="triton").logprobs for b in biases))


@pytest.mark.skipif(not INTERPRETED or sys.platform != "linux", reason="needs Linux, and memory on the CPU")
@pytest.mark.parametrize("what", ["hidden", "weight", "transposed-weight", "outputs"])
def test_offsets_beyond_32_bits(what):
    """In address space of which only touched pages exist. Where an offset wraps around there is memory too, so no crash."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, a name since Python 3.13
    memory = mmap.mmap(-1, 2 * (2 * 2**31 + 2**29), flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    far, operand = torch.frombuffer(memory, dtype=torch.bfloat16), what.removeprefix("transposed-")
    p, stride = inputs(3, 3, 1100, "bf16", "bias"), (1, 2**21) if "transposed" in what else (2**30 + 8, 1)
    if what == "outputs":
        same(launch(p, *(far.as_strided((3, 3), stride, 2**31 + start) for start in (0, 64))), launch(p))
    else:
        x = getattr(p, operand)
        same(launch(p._replace(**{operand: far.as_strided(x.shape, stride, 2**31).copy_(x)})), launch(p))


@TWO_DTYPES
def test_bits_of_a_row_do_not_depend_on_the_batch(name):
    p, log_anchor = inputs(257, 140, 40, name, "bias"), -torch.rand(257, device=DEVICE)
    blocks = blocks_of(p, **SMALL_TILE)  # 17 row tiles, more than the 8 that share columns

    def results(rows):
        lora = p.lora and (p.lora[0][rows], p.lora[1])
        q = p._replace(hidden=p.hidden[rows], lora=lora, tokens=p.tokens[rows], scale=p.scale[rows])
        running, scored = logsumexp(q, True, blocks), score(q, log_anchor[rows], blocks)
        return tuple(x for x in (*combine(running), *finished(running, target_logits(q)[0]), *scored) if x is not None)

    whole = results(slice(None))
    for rows in ([200], [256, 1, 200], list(range(150, 214))):
        same(results(rows), tuple(x[rows] for x in whole))


@pytest.mark.parametrize("options", ["", EVERYTHING], ids=["plain", "everything"])
@TWO_DTYPES
def test_parts_and_groups_change_no_entry(name, options):
    """How an epilogue takes its tile changes the order of sums, and nothing else."""
    p, first = inputs(9, 140, 40, name, options), None
    for parts, warp_groups in ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2)):
        z, slope, m, s, q, E, S, Q, d, *_ = launch(p, parts=parts, warp_groups=warp_groups)
        entries = z, slope, m, d, E.scatter(1, p.tokens[:, None], 0)  # the target's entry is -S
        sums = torch.stack([s, q, S, Q]).cpu().double()
        first = first or (entries, sums)
        same(entries, first[0])
        assert_close(sums, first[1], 4e-6 * first[1].abs())
