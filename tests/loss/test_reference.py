"""The oracle against computations that share no code with it: torch.distributions, arbitrary precision, finite differences,
and constants worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from mpmath import mp, mpf

from fastpg import LMHead, reference

F32, F64 = torch.float32, torch.float64
EPS = {F32: 2.0**-23, F64: 2.0**-52}
INF, NAN = math.inf, math.nan


def exact_row(logits: list[float], token: int) -> tuple[mpf, mpf, list[mpf], list[mpf]]:
    """(logp, H, dlogp/dz, dH/dz) by brute force; 800 digits, so that 1 - p keeps its own down to 1e-700."""
    with mp.workdps(800):
        powers = [mp.exp(mpf(z)) for z in logits]
        p = [e / sum(powers) for e in powers]
        log_p = [mp.log(q) if q else mpf(0) for q in p]
        entropy = -sum(q * lq for q, lq in zip(p, log_p, strict=True))
        dlogp = [(v == token) - q for v, q in enumerate(p)]
        dentropy = [-q * (lq + entropy) for q, lq in zip(p, log_p, strict=True)]
        return log_p[token], entropy, dlogp, dentropy


def assert_relative(actual: torch.Tensor, wanted: list[mpf], tolerance: float) -> None:
    """Each number relative to itself: an absolute tolerance would accept 0 for a gradient of 1e-30."""
    for a, w in zip(actual.flatten().tolist(), wanted, strict=True):
        assert abs(mpf(a) - w) <= tolerance * abs(w), f"{a} is not {mp.nstr(w, 17)} to {tolerance:.1e}"


def row(logits: list[float], token: int, dtype: torch.dtype = F64):
    """(logp, H, dlogp/dz, dH/dz) of the oracle."""
    z = torch.tensor([logits], dtype=dtype, requires_grad=True)
    logprobs, entropies = reference.token_distribution(z, torch.tensor([token]))
    (dlogp,) = torch.autograd.grad(logprobs.sum(), z, retain_graph=True)
    (dentropy,) = torch.autograd.grad(entropies.sum(), z)
    return logprobs.detach(), entropies.detach(), dlogp[0], dentropy[0]


# ---- the distribution of one row


def test_ordinary_rows_match_torch_distributions():
    z, tokens = 3 * torch.randn(64, 37, dtype=F64), torch.randint(37, (64,))
    results = []
    for function in (
        reference.token_distribution,
        lambda z, y: (
            torch.log_softmax(z, -1).gather(1, y[:, None])[:, 0],
            torch.distributions.Categorical(logits=z).entropy(),
        ),
    ):
        leaf = z.clone().requires_grad_()
        logprobs, entropies = function(leaf, tokens)
        # a different weight per row, so that a row's gradient cannot land in another row
        (logprobs * torch.arange(64) + entropies * torch.arange(64).flip(0)).sum().backward()
        results.append((logprobs, entropies, leaf.grad))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


# 1 - p_y: 0.8, 0.6, 2e-4, 4e-12, 2e-17, 1e-43, 1e-300; below zero the sampled token is the unlikely one
GAPS = [0.0, 1.0, 10.0, 27.6, 40.0, 100.0, 690.0, -1.0, -10.0, -27.6, -40.0, -100.0, -690.0]
OTHERS = [0.25, -1.25, 0.5, -0.0625]


@pytest.mark.parametrize("gap", GAPS)
def test_row_against_arbitrary_precision(gap):
    """Every number, and the target's own gradient 1 - p_y above all, is right relative to itself."""
    logits, token = [*OTHERS[:2], gap, *OTHERS[2:]], 2
    logp, entropy, dlogp, dentropy = row(logits, token)
    wanted = exact_row(logits, token)
    tolerance = 4 * EPS[F64] * (1 + abs(gap))  # exp of a sum of magnitude `gap` has that much
    assert_relative(logp, [wanted[0]], tolerance)
    assert_relative(entropy, [wanted[1]], tolerance)
    assert_relative(dlogp, wanted[2], tolerance)
    # dH/dz_y is proportional to t - Ho, and dH/dz_v to log p_v + H: differences, small by themselves for a gap near 0.
    assert_relative(dentropy, wanted[3], (4 if abs(gap) > 2 else 400) * tolerance)


@pytest.mark.parametrize("gap", [0.0, 10.0, 16.0, 27.5, 80.0, -16.0, -80.0])
def test_row_in_fp32_against_arbitrary_precision(gap):
    """In fp32 `z_y - logsumexp(z)` is pure rounding from 1 - p_y = 1e-7, a gap of 16, on; the oracle is not."""
    logits, token = [*OTHERS[:2], gap, *OTHERS[2:]], 2
    logp, entropy, dlogp, _ = row(logits, token, F32)
    wanted = exact_row(logits, token)
    tolerance = 4 * EPS[F32] * (1 + abs(gap))
    assert_relative(logp, [wanted[0]], tolerance)
    assert_relative(entropy, [wanted[1]], tolerance)
    assert_relative(dlogp, wanted[2], tolerance)


def test_logits_of_any_size_do_not_overflow():
    logits = [1e5 - 3.0, 1e5, 1e5 - 40.0]
    logp, entropy, dlogp, _ = row(logits, 1)
    wanted = exact_row([-3.0, 0.0, -40.0], 1)  # exact: softmax does not see a shift
    assert_relative(logp, [wanted[0]], 1e-13)
    assert_relative(entropy, [wanted[1]], 1e-13)
    assert_relative(dlogp, wanted[2], 1e-13)


def test_one_word_vocabulary_is_certain():
    logp, entropy, dlogp, dentropy = row([-3.5], 0)
    assert logp == 0
    assert entropy == 0
    assert dlogp.tolist() == [0]
    assert dentropy.tolist() == [0]


@pytest.mark.parametrize("token", [0, 1])
def test_two_word_vocabulary_is_a_logistic(token):
    """p_y = 1 / (1 + e^-d) with d = z_y - z_other = +-1.5, written out."""
    logp, entropy, dlogp, dentropy = row([1.0, -0.5], token)
    d = 1.5 if token == 0 else -1.5
    p = 1 / (1 + math.exp(-d))
    sign = torch.tensor([1.0, -1.0] if token == 0 else [-1.0, 1.0], dtype=F64)
    assert logp.item() == pytest.approx(math.log(p), rel=1e-14, abs=0)
    assert entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-14, abs=0)
    torch.testing.assert_close(dlogp, sign * (1 - p), rtol=1e-14, atol=0)
    torch.testing.assert_close(dentropy, -sign * d * p * (1 - p), rtol=1e-13, atol=0)  # dH/dd = -d p (1 - p)


def test_all_other_tokens_banned_is_certain():
    logp, entropy, dlogp, dentropy = row([-INF, 2.0, -INF], 1)
    assert logp == 0
    assert entropy == 0
    assert dlogp.tolist() == [0, 0, 0]
    assert dentropy.tolist() == [0, 0, 0]


def test_sampled_token_banned():
    """Probability 0: logp = -inf, with the finite gradient [v = y] - p_v of every logp; the entropy is that of the others."""
    logp, entropy, dlogp, dentropy = row([0.5, -INF, -1.0], 1)
    p = 1 / (1 + math.exp(-1.5))
    assert logp == -INF
    assert entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-14, abs=0)
    torch.testing.assert_close(dlogp, torch.tensor([-p, 1, p - 1], dtype=F64), rtol=1e-14, atol=0)
    slope = 1.5 * p * (1 - p)
    torch.testing.assert_close(dentropy, torch.tensor([-slope, 0, slope], dtype=F64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("token", [0, 2, 3])
def test_banning_a_token_equals_deleting_it(token):
    with_ban = row([0.5, -INF, -1.0, 4.0], token)
    without = row([0.5, -1.0, 4.0], token - (token > 1))
    for actual, wanted in zip(with_ban, without, strict=True):
        if len(actual) == 4:  # a gradient
            assert actual[1] == 0
            actual = actual[[0, 2, 3]]
        assert torch.equal(actual, wanted)


# ---- the head


def plain_head(hidden, weight, bias, softcap, scale, temperature):
    """Gemma's and Cohere's logits as their models write them: scale after the bias, before the cap; temperature last."""
    z = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


HEADS = {"plain": (None, 1.0), "softcap": (3.0, 1.0), "scale": (None, 0.25), "softcap-scale": (3.0, 2.5)}


@pytest.mark.parametrize(("softcap", "scale"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("temperature", ["one", "number", "scalar-tensor", "per-token"])
def test_logits_are_those_of_the_models(softcap, scale, temperature):
    x, w, b = torch.randn(6, 5, dtype=F64), torch.randn(9, 5, dtype=F64), torch.randn(9, dtype=F64)
    per_token = torch.linspace(0.5, 1.5, 6, dtype=F64)
    given = {"one": 1.0, "number": 0.7, "scalar-tensor": torch.tensor(0.7, dtype=F64), "per-token": per_token}[temperature]
    column = per_token[:, None] if temperature == "per-token" else given
    actual = reference.logits(x, LMHead(w, b, softcap, scale), given)
    torch.testing.assert_close(actual, plain_head(x, w, b, softcap, scale, column), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("softcap", "scale"), HEADS.values(), ids=HEADS)
def test_gradients_by_finite_differences(softcap, scale):
    """Through hidden, weight and bias, of logp and entropy, with a mask and a temperature per token."""
    tokens = torch.tensor([[3, 0, -100], [6, 2, 1]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    temperature = torch.tensor([[0.5, 1.0, 1.0], [2.0, 1.0, 0.8]], dtype=F64)

    def function(hidden, weight, bias):
        return reference.linear_logprobs(
            hidden, LMHead(weight, bias, softcap, scale), tokens, mask=mask, temperature=temperature
        )

    inputs = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in ((2, 3, 4), (7, 4), (7,))]
    # values of up to 10 have rounding errors of 1e-15, and divided by a step of 1e-6 of 1e-9
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("multiple", [2.0**-20, 0.25, 1.0, 4.0, 10.0, 15.0, 20.0, 30.0])
def test_softcap_and_its_slope_far_beyond_saturation(multiple, sign, dtype):
    """1 - tanh^2 = 1 / cosh^2 is 8e-9 at u = 10 c and 3e-26 at 30 c; a saturated logit still learns at that rate."""
    cap = 32.0  # a power of two: u / c is exact
    u = torch.tensor(sign * multiple * cap, dtype=dtype, requires_grad=True)
    value = reference.softcap(u, cap)
    value.backward()
    tolerance = 8 * EPS[dtype] * (1 + multiple)
    assert_relative(value.detach(), [sign * cap * mp.tanh(mpf(multiple))], tolerance)
    assert_relative(u.grad, [mp.sech(mpf(multiple)) ** 2], tolerance)


def test_softcap_is_smooth_at_zero():
    u = torch.zeros(1, dtype=F64, requires_grad=True)
    reference.softcap(u, 30.0).backward()
    assert u.grad.item() == 1


@pytest.mark.parametrize("multiple", [10.0, 15.0, 20.0, 30.0])
def test_gradient_through_a_saturated_softcap(multiple):
    """dlogp/du_v = ([v = y] - p_v) / cosh^2(u_v / c), read from the bias' gradient, each relative to itself."""
    cap = 4.0
    u = [0.5, multiple * cap, -multiple * cap]
    bias = torch.tensor(u, dtype=F64, requires_grad=True)
    head = LMHead(torch.ones(3, 2, dtype=F64), bias, softcap=cap)
    logprobs, _ = reference.linear_logprobs(torch.zeros(1, 2, dtype=F64), head, torch.tensor([1]))
    logprobs.sum().backward()
    with mp.workdps(50):
        powers = [mp.exp(cap * mp.tanh(mpf(x) / cap)) for x in u]
        wanted = [((v == 1) - powers[v] / sum(powers)) * mp.sech(mpf(u[v]) / cap) ** 2 for v in range(3)]
    assert_relative(bias.grad, wanted, 8 * EPS[F64] * (1 + multiple))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_inputs_are_widened_before_anything_else(dtype):
    x, w, b = torch.randn(5, 8).to(dtype), torch.randn(11, 8).to(dtype), torch.randn(11).to(dtype)
    tokens = torch.randint(11, (5,))
    actual = reference.linear_logprobs(x, LMHead(w, b, 30.0), tokens)
    wanted = reference.linear_logprobs(x.float(), LMHead(w.float(), b.float(), 30.0), tokens)
    assert actual[0].dtype == F32
    assert torch.equal(actual[0], wanted[0])
    assert torch.equal(actual[1], wanted[1])


@pytest.mark.parametrize("garbage", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("how", ["mask", "token -100"])
def test_masked_rows_do_not_matter(garbage, how):
    """Hidden states, temperatures and (under a mask) token ids of masked rows; results and gradients have the same bits."""
    keep = torch.tensor([[True, False, True], [False, True, True]])
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    x, w, b = torch.randn(2, 3, 4, dtype=F64), torch.randn(7, 4, dtype=F64), torch.randn(7, dtype=F64)
    temperature = torch.full((2, 3), 0.9, dtype=F64)

    def run(dirty: bool):
        hidden, weight, bias = (t.clone().requires_grad_() for t in (x, w, b))
        bad_token = tokens if not dirty or how != "mask" else torch.where(keep, tokens, 10**6)
        options = {"temperature": temperature, "mask": keep if how == "mask" else None}
        used = bad_token if how == "mask" else torch.where(keep, tokens, -100)
        if dirty:
            hidden = x.masked_fill(~keep[..., None], garbage).requires_grad_()
            options["temperature"] = temperature.masked_fill(~keep, garbage)
        logprobs, entropies = reference.linear_logprobs(hidden, LMHead(weight, bias, 5.0), used, **options)
        (logprobs + 0.3 * entropies).sum().backward()
        return logprobs.detach(), entropies.detach(), hidden.grad, weight.grad, bias.grad

    clean = run(dirty=False)
    for actual, wanted in zip(run(dirty=True), clean, strict=True):
        assert torch.equal(actual, wanted)
    assert (clean[0][~keep] == 0).all()
    assert (clean[1][~keep] == 0).all()
    assert (clean[2][~keep] == 0).all()
    assert (clean[0][keep] < 0).all()


# ---- losses and reductions, by hand
#
#   three sequences, the last without a token; one x per masked position
#   logp  -1  -3   x | -3   x   x | x x x
#   r      2  1/2  x |  8   x   x | x x x        old = logp - log r
#   A      1  -2   x |  3   x   x | x x x
#
#   l of Reinforce             A logp           -1   6 | -9     sums  5 | -9    means 5/2 | -9
#   l of ImportanceWeighted    r A               2  -1 | 24           1 | 24          1/2 | 24
#   l of CISPO, clip at 5      clip(r) A logp   -2   3 | -45          1 | -45         1/2 | -45
#   l of CISPO, no clip        r A logp         -2   3 | -72          1 | -72         1/2 | -72
#   l of CISPO, clip to [1,5]  clip(r) A logp   -2   6 | -45          4 | -45           2 | -45
#
#   token-mean -(sum)/3, seq-mean-token-sum -(sum of sums)/2, seq-mean-token-mean -(sum of means)/2, sum -(sum)

X = NAN
LOGP = [[-1.0, -3.0, X], [-3.0, X, X], [X, X, X]]
RATIO = [[2.0, 0.5, X], [8.0, X, X], [X, X, X]]
ADVANTAGE = [[1.0, -2.0, X], [3.0, X, X], [X, X, X]]
MASK = [[True, True, False], [True, False, False], [False, False, False]]
REDUCTIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "sum"]

# objective, dl/dlogp at the three tokens, the loss under each reduction
HAND = {
    "reinforce": (reference.reinforce, [1, -2, 3], [4 / 3, 4 / 2, 6.5 / 2, 4]),
    "importance_weighted": (reference.importance_weighted, [2, -1, 24], [-25 / 3, -25 / 2, -24.5 / 2, -25]),
    "cispo": (reference.cispo(), [2, -1, 15], [44 / 3, 44 / 2, 44.5 / 2, 44]),
    "cispo-unclipped": (reference.cispo(None), [2, -1, 24], [71 / 3, 71 / 2, 71.5 / 2, 71]),
    "cispo-1-5": (reference.cispo(5.0, 1.0), [2, -2, 15], [41 / 3, 41 / 2, 43 / 2, 41]),
}
# weight / D of the three tokens, and D
WEIGHTS = {
    "token-mean": ([1 / 3, 1 / 3, 1 / 3], 3),
    "seq-mean-token-sum": ([1 / 2, 1 / 2, 1 / 2], 2),
    "seq-mean-token-mean": ([1 / 4, 1 / 4, 1 / 2], 2),
    "sum": ([1, 1, 1], 1),
}


@pytest.mark.parametrize("denominator", [None, 10.0], ids=["own-count", "denominator-10"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", HAND)
def test_loss_and_gradient_by_hand(name, reduction, denominator):
    objective, coefficients, losses = HAND[name]
    logp = torch.tensor(LOGP, dtype=F64, requires_grad=True)
    old = torch.tensor(LOGP, dtype=F64) - torch.tensor(RATIO, dtype=F64).log()
    loss = reference.policy_loss(
        logp,
        old,
        torch.tensor(ADVANTAGE, dtype=F64),
        objective=objective,
        mask=torch.tensor(MASK),
        reduction=reduction,
        denominator=denominator,
    )
    weights, count = WEIGHTS[reduction]
    rescale = 1 if denominator is None else count / denominator
    assert loss.item() == pytest.approx(losses[REDUCTIONS.index(reduction)] * rescale, rel=1e-14, abs=0)

    loss.backward()
    wanted = torch.zeros(3, 3, dtype=F64)
    wanted[0, 0], wanted[0, 1], wanted[1, 0] = (-c * w * rescale for c, w in zip(coefficients, weights, strict=True))
    torch.testing.assert_close(logp.grad, wanted, rtol=1e-14, atol=0)


# one token with logp = -1, ref = logp + log 2, r = 3:   k, dk/dlogp of e = log 2
KL = {
    "k1": (-math.log(2), 1.0),  # -e, 1
    "k2": (math.log(2) ** 2 / 2, -math.log(2)),  # e^2 / 2, -e
    "k3": (1 - math.log(2), -1.0),  # exp(e) - 1 - e, 1 - exp(e)
}


@pytest.mark.parametrize("importance_weighted", [False, True], ids=["", "importance-weighted"])
@pytest.mark.parametrize("estimator", KL)
def test_kl_penalty_and_rollout_weight_by_hand(estimator, importance_weighted):
    """loss = -(w A logp - coef k), k times r = 3 where weighted, with the slope r (k + dk/dlogp) of the product."""
    logp = torch.tensor([-1.0], dtype=F64, requires_grad=True)
    loss = reference.policy_loss(
        logp,
        logp.detach() - math.log(3),
        torch.tensor([2.0], dtype=F64),
        objective=reference.reinforce,
        kl=(0.25, estimator, importance_weighted),
        ref_logprobs=logp.detach() + math.log(2),
        rollout_weights=torch.tensor([0.5], dtype=F64),
    )
    loss.backward()
    k, slope = KL[estimator]
    if importance_weighted:
        k, slope = 3 * k, 3 * (k + slope)
    assert loss.item() == pytest.approx(-(0.5 * 2 * -1 - 0.25 * k), rel=1e-14)
    assert logp.grad.item() == pytest.approx(-(0.5 * 2 - 0.25 * slope), rel=1e-14)


@pytest.mark.parametrize("name", HAND)
def test_on_policy_ratio_is_one(name):
    """old_logprobs=None: r = 1, so every coefficient is A, or A times the bound that 1 is clipped to."""
    logp = torch.tensor([-0.3, -7.0, -1e-13], dtype=F64, requires_grad=True)
    advantages = torch.tensor([1.5, -2.0, 0.25], dtype=F64)
    reference.policy_loss(logp, None, advantages, objective=HAND[name][0], reduction="sum").backward()
    assert torch.equal(logp.grad, -advantages)


def test_advantages_per_sequence():
    """B = T, where an advantage per sequence could be taken for one per token: loss = -(2 (-1 - 2) - 1 (-4 - 8)) = -6."""
    logp = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]], dtype=F64)
    loss = reference.policy_loss(
        logp, None, torch.tensor([2.0, -1.0], dtype=F64), objective=reference.reinforce, reduction="sum"
    )
    assert loss.item() == -6.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3)], ids=["no-sequence", "no-position", "all-masked"])
def test_no_tokens_is_a_differentiable_zero(shape, reduction):
    logp = torch.zeros(shape, dtype=F64, requires_grad=True)
    loss = reference.policy_loss(
        logp,
        None,
        torch.ones(shape, dtype=F64),
        objective=reference.cispo(),
        mask=torch.zeros(shape, dtype=torch.bool),
        reduction=reduction,
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logp.grad, torch.zeros(shape, dtype=F64))
