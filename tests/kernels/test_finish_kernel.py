"""What kernels make of a row once its sums are known: `fastpg.kernels.finish`, and `finished` of `fastpg.kernels.logsumexp`.

Against float64, in Triton's interpreter, or on a GPU where there is one. See test_device_objectives for the losses themselves.
"""

from functools import partial, partialmethod
from math import inf, nan

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from triton.runtime.interpreter import InterpreterBuilder

from fastpg import KLPenalty, PPOClip
from fastpg.kernels import objectives
from fastpg.kernels.anchored_exp import TileSums
from fastpg.kernels.finish import Terms, Tokens, finish_with_loss
from fastpg.kernels.logsumexp import Running, combine, finished
from fastpg.kernels.tile import INTERPRETED
from fastpg.loss.policy_loss import token_losses
from fastpg.tiles.row_statistics import finish_rows
from fastpg.tiles.structures import Partials, TokenTerms

DEVICE = "cpu" if INTERPRETED else "cuda"
ULP = 2.0**-23
SMALL, LARGE = 2.0**-90, 2.0**99  # an anchored sum is in range from SMALL to below LARGE

same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)  # asserts equal bits, of tuples too
of_lost_rows = pytest.mark.parametrize("show_lost", [False, True], ids=["left", "shown"])


@pytest.fixture(autouse=True)
def _minimum_and_maximum_drop_nan_unless_told_to_propagate_it(monkeypatch):
    """As on a GPU. In the interpreter they are numpy's, which always propagate it."""
    for name, function in {"create_minnumf": np.fmin, "create_maxnumf": np.fmax}.items():
        monkeypatch.setattr(InterpreterBuilder, name, partialmethod(InterpreterBuilder.binary_op, op=function))


def assert_close(got, want, tolerance):
    """|got - want| <= tolerance, infinities equal, NaN nowhere."""
    got = got.cpu().double()
    assert got.shape == want.shape
    good = (got == want) | ((got - want).abs() <= tolerance)
    assert good.all(), f"{(~good).sum()} of {good.numel()}, {got[~good][:4]} instead of {want[~good][:4]}"


def run_cispo(sums, old, advantage, weight, row_scale, mask=True, bounds=(None, None), tokens=0, show_lost=False):
    """finish_with_loss of CISPO, and of partial sums: (C, tiles), or TileSums. The others are numbers or (C,); to the kernel
    `weight` goes with its sign turned, so that losses and factors have that of `advantage` times it. On the CPU, S and residual
    first, then the fields of Results."""
    if not isinstance(sums, TileSums):
        sums = TileSums(sums.to(DEVICE), E=torch.empty(len(sums), 1, device=DEVICE), stride_e=1)

    def vector(x, dtype=torch.float32):
        return torch.as_tensor(x, dtype=dtype).expand(len(sums.S)).clone().to(DEVICE)

    terms = Terms(~vector(mask, torch.bool), *map(vector, (old, advantage)), -vector(weight), None, None)
    loss = objectives.Loss(objectives.cispo, objectives.RatioBounds(*bounds), None, None, False, None, show_lost)
    (total, weighted, residual), results = finish_with_loss(
        sums, Tokens(vector(tokens, torch.int64), None, vector(row_scale), None), terms, loss
    )
    assert weighted is None
    return [x if x is None else x.cpu() for x in (total, residual, *results)]


@of_lost_rows
def test_the_range_of_the_sum_and_of_the_factor(show_lost):
    """Lost rows lie between others. There are more partial sums than are added up at a time, and E is in a wider buffer. Where
    S = 1, old = -60 and the ratio is clipped to 1, u = -weight exactly. Rows that are flagged have none where they are left to
    be computed again; where they are not, no number that is lost is shown."""
    sums = [0, SMALL * (1 - 2.0**-24), SMALL, LARGE, 1, nan, LARGE * (1 - 2.0**-24), inf, 1]
    weight = [0.0, 1e-45, 2.0**-110 * (1 - ULP), 2.0**-110, 1.0, -1.0, 2.0**110, 2.0**110 * (1 + ULP), -inf, nan]
    sums, weight = torch.tensor(sums + [1] * 10), torch.tensor([1.0] * 9 + weight)
    S, buffer = torch.zeros(19, 1500), torch.full((19, 1500), 3.0, device=DEVICE)
    S[range(19), range(1481, 1500)] = sums
    S = TileSums(S.to(DEVICE), torch.zeros_like(S, device=DEVICE), None, buffer[:, :1100], buffer.stride(0))
    total, _, logp, loss, entropy, u, state = run_cispo(S, -60, 1, weight, 1, True, (1.0, 1.0), show_lost=show_lost)
    same(total, sums)
    assert state.tolist() == [2, 2, 0, 2, 0, 2, 0, 2, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    kept, want = sums < LARGE, torch.full((19, 1500), 3.0)
    want[kept, 0], want[~kept, :1100] = -sums[kept], 0
    same(buffer.cpu(), want)
    if show_lost:
        lost = ~(kept & weight.isfinite())
        same(u[9:], torch.where(lost, nan, -weight)[9:])
        assert all(torch.equal(x.isnan(), lost) for x in (logp, loss, entropy, u))
    else:
        same(u[9:], torch.where(state == 0, -weight, 0)[9:])
        assert torch.equal(u == 0, (state > 0) | (weight == 0))
    same(logp[9:17], torch.full((8,), -60.0))


@pytest.mark.parametrize("bounds", [(None, None), (None, 5.0), (0.5, None), (0.5, 2), (1, 1)], ids=str)
def test_cispo_per_row(bounds):
    """Log-odds from e^-35, which is 1 - p = 1e-15, to e^60; ratios from e^-20 to e^20, so that old is outside [-60, 0] too."""
    t = torch.linspace(-34.6, 60, 200).double()
    old = (F.logsigmoid(-t) + torch.linspace(-20, 20, 200)[torch.randperm(200)]).float()
    assert (old < -60).any()
    assert (old > 0).any()
    a = old.clamp(-60, 0)
    S = ((t + a).exp()[:, None] * torch.rand(200, 5).softmax(1)).float()
    t = S.double().sum(1).log() - a.double()
    logp = -torch.where(t < 0, t.exp().log1p(), t + (-t).exp().log1p())
    advantage, weight, row_scale, mask = torch.randn(200), torch.rand(200) + 0.1, torch.rand(200) + 0.5, torch.rand(200) > 0.2
    _, _, got, loss, _, u, state = run_cispo(S, old, advantage, weight, row_scale, mask, bounds)
    assert (state == 0).all()
    tolerance = 1e-6 * t.abs().clamp(min=10)
    assert_close(got, logp * mask, tolerance * logp.abs().clamp(max=1))
    c = (logp - old.double()).exp().clamp(bounds[0] or 0, bounds[1] or inf) * advantage * weight * mask
    assert_close(loss, c * logp, 2 * tolerance * (c * logp).abs())
    c = c * row_scale / (S.double().sum(1) + a.double().exp())
    assert_close(u, -c, 2 * tolerance * c.abs())


def test_the_entropy_of_a_row_with_its_loss():
    """Each partial sum is one entry of E, so that all probabilities are known; 1 - p from 1e-15 to 1, and S = 0."""
    t, a = torch.linspace(-34.6, 60, 200).double(), -25 * torch.rand(200)
    E = ((t + a).exp()[:, None] * (torch.randn(200, 600) * 3).double().softmax(1)).float()
    E[-1] = 0
    Q = torch.where(E > 0, E.double() * E.double().log(), 0).float()
    sums = TileSums(E.to(DEVICE), Q.to(DEVICE))
    _, _, logp, _, entropy, u, _ = run_cispo(sums, a, 1, 1, 1, torch.arange(200) != 100)
    assert u is None  # without E there is no gradient
    e = torch.cat([a.double().exp()[:, None], E.double()], 1)
    p, log_p = e / e.sum(1, keepdim=True), e.log() - e.sum(1, keepdim=True).log()
    log_p[:, 0] = -(E.double().sum(1) / e[:, 0]).log1p()  # log p of the token, which cancels where p is nearly 1
    want = -torch.where(p > 0, p * log_p, 0).sum(1)
    want[100] = log_p[100, 0] = 0
    tolerance = 1e-6 * t.abs().clamp(min=10)
    assert_close(logp, log_p[:, 0], tolerance * log_p[:, 0].abs().clamp(max=1))
    assert_close(entropy, want, 2 * tolerance * want.clamp(max=1))


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_every_term_reaches_the_loss(on_policy):
    """As in `token_losses`; of rows with one logit_scale / T each, and of all with the same, as a number with the same bits."""
    t, scale = (torch.randn(200) * 3).double(), torch.rand(200) + 0.5
    old = (F.logsigmoid(-t) + torch.randn(200) * 0.5).float().clamp(max=0)
    advantage, weight, rollout, masked = torch.randn(200), torch.rand(200), torch.rand(200), torch.rand(200) < 0.2
    ref = (F.logsigmoid(-t) + torch.randn(200)).float()
    terms = TokenTerms(masked, None if on_policy else old, advantage, weight, rollout, ref)
    a = torch.zeros(200) if on_policy else old
    S = (t + a).exp().float()
    logp = F.logsigmoid(a.double() - S.double().log()).requires_grad_()
    exact = TokenTerms(masked, *(x if x is None else x.double() for x in terms[1:]))
    want = token_losses(logp, exact, PPOClip(0.2, 0.28, 3.0), KLPenalty(0.3, "k3", True)).masked_fill(masked, 0)
    g = torch.autograd.grad(want.sum(), logp)[0]

    bounds = objectives.ClipBounds(0.8, 1.28, 3.0)
    loss = objectives.Loss(objectives.ppo_clip, bounds, objectives.kl_k3, 0.3, True, None, False)
    terms = Terms(*(x if x is None else x.to(DEVICE) for x in terms))
    sums = TileSums(S[:, None].to(DEVICE), E=torch.empty(200, 1, device=DEVICE), stride_e=1)
    tokens = Tokens(torch.zeros(200, dtype=torch.int64, device=DEVICE), None, scale.to(DEVICE), None)
    _, results = finish_with_loss(sums, tokens, terms, loss)
    assert_close(results.LOGP, logp.detach().masked_fill(masked, 0), 1e-5)
    assert_close(results.LOSS, want.detach(), 2e-5 * (1 + want.detach().abs()))
    factor = scale.double() / (S.double() + a.double().exp())
    assert_close(results.FACTOR, -g * factor, 2e-5 * (1 + g.abs()) * factor)

    scale = torch.full((200,), 0.7, device=DEVICE)
    vector, number = (tokens._replace(SCALE=x, scale=y) for x, y in ((scale, None), (None, 0.7)))
    same(*(finish_with_loss(sums, x, terms, loss) for x in (number, vector)))


@of_lost_rows
@pytest.mark.parametrize("value", [nan, inf, -inf], ids=str)
@pytest.mark.parametrize("garbage", ["sum", "old", "advantage", "weight", "scale"])
def test_masked_rows_are_exactly_zero(garbage, value, show_lost):
    numbers = {"sum": 0.5, "old": -0.5, "advantage": 1, "weight": 1, "scale": 1} | {garbage: value}
    S, E = torch.full((2, 1), numbers.pop("sum"), device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    *_, logp, loss, entropy, u, _ = run_cispo(TileSums(S, S, None, E, 1), *numbers.values(), False, show_lost=show_lost)
    same((logp, loss, entropy, u), (torch.zeros(2),) * 4)


def test_finished_rows_are_those_of_finish_rows():
    """In float64, from the same m, s, q and z_y; in three splits, of which the first has no column in some rows."""
    m = torch.randn(300, 3) * 5
    m[:40, 0] = -inf
    s = torch.where(m == -inf, 0, 1 + torch.rand(300, 3) * 50)
    q = -s.clamp(min=1).log() * (s - 1).clamp(min=0) * torch.rand(300, 3)
    z = m.amax(1) + torch.linspace(-60, 40, 300)
    alone, spoilt = (-inf, 0.0, 0.0), (nan, nan)  # without any other column; with others that are infinite, or NaN
    special = [(1.0, 2.0, -0.5, z_y) for z_y in (inf, nan, -inf)] + [(*alone, z_y) for z_y in (1.0, inf, nan, -inf)]
    special += [(m_y, *spoilt, 0.0) for m_y in (0.0, inf, nan)]
    rows = range(0, 300, 30)
    for row, (m_y, s_y, q_y, z_y) in zip(rows, special, strict=True):
        m[row], s[row], q[row], z[row] = m_y, s_y, q_y, z_y
    running, z = Running(*(x.to(DEVICE) for x in (m, s, q))), z.to(DEVICE)
    got = finished(running, z)
    same(finished(running._replace(Q=None), z), (got.LOGP, None, got.T, got.LOGSUMEXP, None))
    m, s, q = combine(running)
    want = finish_rows(Partials(*(x.cpu().double() for x in (m, s, q, z))), True)
    number = ~want.t.isnan()
    assert number[list(rows)].tolist() == [False, False, True, True, False, False, False, False, False, False]
    size = torch.stack([m.cpu(), z.cpu(), want.t.float()]).abs().nan_to_num(0, 0, 0).amax(0).double()
    tolerance = 1e-6 * size.clamp(min=10)
    sizes = want.logprobs.abs().clamp(max=1), want.entropy.clamp(max=1), *[torch.ones(300).double()] * 3
    for x, exact, by in zip(got, want, sizes, strict=True):
        at = ~exact.isnan()
        assert torch.equal(~x.cpu().isnan(), at)
        assert_close(x.cpu()[at], exact[at], (2 * tolerance * by)[at])
