"""Sixteen ways in which public implementations of these losses go wrong or apart, one test each, named by what must not happen.

Where a trap concerns both, `policy_loss` on ready log-probabilities and `linear_policy_loss` on hidden states are asked the
same: `outcome` says which coefficient c_n = -dL/dlogp_n each token's log-probability gets.
"""

import math
from typing import NamedTuple

import pytest
import torch

from fastpg import (
    CISPO,
    DPPOKL,
    DPPOTV,
    GSPO,
    SAPO,
    IcePop,
    ImportanceWeighted,
    KLPenalty,
    PPOClip,
    Reinforce,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
)

F64 = torch.float64
INF, NAN = math.inf, math.nan
every_path = pytest.mark.parametrize("path", ["policy_loss", "linear_policy_loss"])
every_garbage = pytest.mark.parametrize("garbage", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])

TOKEN_OBJECTIVES = {
    "reinforce": Reinforce(),
    "importance-weighted": ImportanceWeighted(),
    "cispo": CISPO(),
    "cispo-two-sided": CISPO(1.2, 0.8),
    "ppo": PPOClip(dual_clip=3.0),
    "sapo": SAPO(),
    "dppo-tv": DPPOTV(0.9, 0.9),
    "dppo-kl": DPPOKL(3.0, 3.0, 50.0),
    "icepop": IcePop(50.0, 0.05),
}
SEQUENCE_OBJECTIVES = {
    "gspo": GSPO(),
    "sequence-weighted": ImportanceWeighted("sequence"),
    "trajectory-weighted": ImportanceWeighted("trajectory"),
}


class Outcome(NamedTuple):
    loss: float
    coefficients: torch.Tensor  # c_n = -dL/dlogp_n, (...)
    logprobs: torch.Tensor  # (...)
    metrics: dict


class Head(NamedTuple):
    hidden: torch.Tensor  # (..., H)
    weight: torch.Tensor  # (V, H)
    tokens: torch.Tensor  # (...)
    logprobs: torch.Tensor  # (...), exact
    slopes: torch.Tensor  # (..., H): dlogp_n / dhidden_n

    @classmethod
    def random(cls, *shape: int) -> "Head":
        hidden, weight = torch.randn(*shape, 6, dtype=F64, requires_grad=True), torch.randn(11, 6, dtype=F64)
        tokens = torch.randint(0, 11, shape)
        logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(-1, tokens[..., None])[..., 0]
        (slopes,) = torch.autograd.grad(logprobs.sum(), hidden)
        return cls(hidden.detach(), weight, tokens, logprobs.detach(), slopes)


def outcome(path: str, ratios, advantages, *, head: Head | None = None, reduction="sum", **options) -> Outcome:
    """Of tokens whose ratios are `ratios`; None: on-policy."""
    advantages = torch.as_tensor(advantages, dtype=F64)
    head = head or Head.random(*(torch.as_tensor(ratios).shape if ratios is not None else advantages.shape))
    old = None if ratios is None else head.logprobs - torch.as_tensor(ratios, dtype=F64).log()
    if path == "policy_loss":
        logprobs = head.logprobs.clone().requires_grad_()
        output = policy_loss(logprobs, old, advantages, reduction=reduction, **options)
        (gradient,) = torch.autograd.grad(output.loss, logprobs)
    else:
        hidden = head.hidden.clone().requires_grad_()
        output = linear_policy_loss(hidden, head.weight, head.tokens, old, advantages, reduction=reduction, **options)
        (rows,) = torch.autograd.grad(output.loss, hidden)
        gradient = (rows * head.slopes).sum(-1) / head.slopes.square().sum(-1)
        torch.testing.assert_close(rows, gradient[..., None] * head.slopes, rtol=1e-9, atol=1e-12)
    return Outcome(output.loss.item(), -gradient, output.logprobs, output.metrics)


def close(actual, wanted, **options) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=F64), **({"rtol": 1e-11, "atol": 0} | options))


@every_path
def test_1_the_upper_bound_is_on_the_ratio_itself_not_one_plus_epsilon(path):
    """TRL's reading, not verl's: 1.5 lets 1.4 through and holds 2.4 at 1.5; 0.2 multiplies every token by at most 0.2."""
    ratios = [0.1, 1.0, 1.4, 2.4]
    close(outcome(path, ratios, [1.0] * 4, objective=CISPO(ratio_max=1.5)).coefficients, [0.1, 1.0, 1.4, 1.5])
    close(outcome(path, ratios, [1.0] * 4, objective=CISPO(ratio_max=0.2)).coefficients, [0.1, 0.2, 0.2, 0.2])
    close(outcome(path, ratios, [1.0] * 4, objective=CISPO(1.5, ratio_min=0.9)).coefficients, [0.9, 1.0, 1.4, 1.5])


@every_path
def test_2_small_ratios_are_not_raised_to_a_lower_bound_nobody_asked_for(path):
    """The paper has none; others have 0.1, 0.8 or 0.9."""
    ratios = [1e-12, 1e-3, 0.05, 0.5]
    for objective in (CISPO(), CISPO(ratio_max=None), CISPO(ratio_max=2.0)):
        close(outcome(path, ratios, [1.0, -1.0, 2.0, -2.0], objective=objective).coefficients, [1e-12, -1e-3, 0.1, -1.0])


@every_path
def test_3_the_default_does_not_shrink_every_token(path):
    """A default upper bound of 0.2 multiplies whole batches by 0.2. Here it is 5, on-policy tokens and most others keep r."""
    assert CISPO() == CISPO(ratio_max=5.0, ratio_min=None)
    close(outcome(path, [1.0, 1.3, 4.99, 5.01], [1.0] * 4, objective=CISPO()).coefficients, [1.0, 1.3, 4.99, 5.0])
    close(
        outcome(path, None, [1.0, -2.0], objective=CISPO()).coefficients,
        [1.0, -2.0],
        rtol=0 if path == "policy_loss" else 1e-11,
    )


@every_path
@pytest.mark.parametrize("d", [-25.0, 25.0])
def test_4_the_log_ratio_is_not_clamped_at_20(path, d):
    """Such a clamp caps r, and kills the gradient of r A: it passes none outside."""
    r = math.exp(d)
    for objective in (ImportanceWeighted(), CISPO(ratio_max=None)):
        close(outcome(path, [r], [1.5], objective=objective).coefficients, [1.5 * r])
    # PPO's clip leaves r A where it is the smaller term
    advantage = -1.5 if d > 0 else 1.5
    result = outcome(path, [r], [advantage], objective=PPOClip())
    close(result.coefficients, [advantage * r])
    assert result.loss == pytest.approx(-advantage * r, rel=1e-11)
    # and SAPO's gate has a slope at r = 0 too (above e^20 there is nothing left of it)
    if d < 0:
        gate = 1 / (1 + math.exp(1.0))
        close(outcome(path, [r], [1.5], objective=SAPO()).coefficients, [6 * gate * (1 - gate) * r])


@every_path
def test_5_no_gradient_flows_through_the_clipped_weight(path):
    """A live r would add r A logp inside the bounds, and a live clamp take all gradient outside of them."""
    ratios, advantages = [0.1, 0.9, 1.1, 30.0], [1.0, -2.0, 3.0, -4.0]
    result = outcome(path, ratios, advantages, objective=CISPO(2.0, 0.5))
    close(result.coefficients, [0.5, -1.8, 3.3, -8.0])
    assert result.loss == pytest.approx(-(result.coefficients * result.logprobs).sum().item(), rel=1e-11)


@every_path
def test_6_micro_batches_never_get_a_token_mean_of_their_own(path, monkeypatch):
    """With the caller's denominator they add up to the batch, whatever they hold; no collective is run behind the caller."""

    def forbidden(*_, **__):
        raise AssertionError("a collective, or a question about ranks")

    for name in ("all_reduce", "all_gather", "get_world_size", "is_initialized"):
        monkeypatch.setattr(torch.distributed, name, forbidden)
    head = Head.random(4, 5)
    ratios, advantages = torch.rand(4, 5, dtype=F64) + 0.5, torch.randn(4, 5, dtype=F64)
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 0])[:, None]
    options = {"objective": CISPO(1.2), "reduction": "token-mean"}
    whole = outcome(path, ratios, advantages, head=head, mask=mask, **options)

    def parts(denominator):
        rows = [slice(0, 1), slice(1, 3), slice(3, 4)]
        heads = [Head(head.hidden[r], head.weight, head.tokens[r], head.logprobs[r], head.slopes[r]) for r in rows]
        return [
            outcome(path, ratios[r], advantages[r], head=h, mask=mask[r], denominator=denominator, **options)
            for r, h in zip(rows, heads, strict=True)
        ]

    summed = parts(int(mask.sum()))
    assert sum(part.loss for part in summed) == pytest.approx(whole.loss, rel=1e-11)
    close(torch.cat([part.coefficients for part in summed]), whole.coefficients, atol=1e-15)
    mean_of_means = torch.cat([part.coefficients for part in parts(None)]) / 3
    assert not torch.allclose(mean_of_means, whole.coefficients, rtol=1e-2)


@every_path
def test_7_the_kl_term_is_neither_reweighted_nor_unmasked_nor_reduced_by_itself(path):
    """It is added after the correction by rollout weights, under the token mask, with the loss's own weights."""
    head = Head.random(2, 3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ref = head.logprobs - torch.tensor([[0.5, -0.4, 9.0], [0.7, NAN, -INF]], dtype=F64)
    e = ref - head.logprobs
    k3_slope = 1 - e.exp()  # of k3 = e^e - 1 - e in logp
    options = {"head": head, "mask": mask, "objective": CISPO(), "kl": KLPenalty(0.3), "ref_logprobs": ref}
    for reduction, weights in (
        ("token-mean", [[1 / 3, 1 / 3], [1 / 3, 0]]),
        ("seq-mean-token-mean", [[1 / 4, 1 / 4], [1 / 2, 0]]),
    ):
        weights = torch.tensor(weights, dtype=F64)
        wanted = torch.zeros(2, 3, dtype=F64)
        wanted[:, :2] = torch.where(mask, -0.3 * k3_slope, 0)[:, :2] * weights
        none = outcome(path, torch.ones(2, 3), torch.zeros(2, 3), reduction=reduction, **options)
        close(none.coefficients, wanted, atol=1e-15)
        weighted = outcome(
            path, torch.ones(2, 3), torch.ones(2, 3), reduction=reduction, rollout_weights=torch.full((2, 3), 0.25), **options
        )
        wanted[:, :2] += 0.25 * weights
        close(weighted.coefficients, wanted, atol=1e-15)


@every_path
def test_8_a_rollout_correction_does_not_move_the_anchor_of_the_ratio(path):
    """r is taken to old_logprobs; pi_old / pi_rollout is a factor outside the clip, and no part of the metrics of r."""
    ratios, advantages, w = [0.5, 1.0, 1.5, 3.0], [1.0, 1.0, -1.0, 2.0], torch.tensor([2.0, 0.1, 2.0, 0.0], dtype=F64)
    head = Head.random(4)
    plain = outcome(path, ratios, advantages, head=head, objective=CISPO(ratio_max=2.0))
    result = outcome(path, ratios, advantages, head=head, objective=CISPO(ratio_max=2.0), rollout_weights=w, **unskipped(path))
    close(plain.coefficients, [0.5, 1.0, -1.5, 4.0])
    close(result.coefficients, [1.0, 0.1, -3.0, 0.0], atol=1e-15)
    for name in ("ratio_mean", "ratio_max", "clip_fraction", "ess", "kl_k1", "kl_k3"):
        assert result.metrics[name].item() == pytest.approx(plain.metrics[name].item(), rel=1e-11)
    assert plain.metrics["ratio_max"].item() == pytest.approx(3.0)


def unskipped(path):
    """For `linear_policy_loss`: compute tokens of weight 0 as well."""
    return {"skip_zero_weight": False} if path == "linear_policy_loss" else {}


@pytest.mark.parametrize(
    ("path", "name"),
    [("policy_loss", name) for name in (*TOKEN_OBJECTIVES, *SEQUENCE_OBJECTIVES)]
    + [("linear_policy_loss", name) for name in TOKEN_OBJECTIVES],
)
def test_9_without_old_logprobs_the_ratio_is_exactly_one_and_keeps_its_gradient(path, name):
    """old = logp without a detach would give no gradient at all; a second forward would give ratios near 1."""
    objective = (TOKEN_OBJECTIVES | SEQUENCE_OBJECTIVES)[name]
    advantages = torch.tensor([[1.5], [-0.5]], dtype=F64).expand(2, 3)
    result = outcome(path, None, advantages, objective=objective)
    close(result.coefficients, advantages)
    for metric, value in {"ratio_mean": 1, "ratio_max": 1, "ess": 1, "kl_k1": 0, "kl_k3": 0, "clip_fraction": 0}.items():
        assert result.metrics[metric].item() == value


@every_path
@every_garbage
def test_10_masked_garbage_never_reaches_loss_or_gradient(path, garbage):
    """0 * inf is NaN, forward and backward, so that multiplying by a mask is too late."""
    mask = torch.tensor([[True, False, True], [False, True, False]])
    hidden, weight = torch.randn(2, 3, 6), torch.randn(11, 6)
    tokens = torch.randint(0, 11, (2, 3))
    clean = {name: -torch.rand(2, 3) for name in ("old_logprobs", "advantages", "ref_logprobs", "rollout_weights")}
    dirty = {name: value.masked_fill(~mask, garbage) for name, value in clean.items()}
    options = {"objective": PPOClip(), "kl": KLPenalty(0.1, importance_weighted=True), "mask": mask}

    def run(hidden, constants):
        hidden, weight_leaf = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if path == "policy_loss":
            logprobs = linear_logprobs(hidden, weight_leaf, tokens, mask=mask).logprobs
            loss = policy_loss(torch.where(mask, logprobs, hidden[..., 0]), **constants, **options).loss
        else:
            loss = linear_policy_loss(hidden, weight_leaf, tokens, **constants, **options).loss
        loss.backward()
        return loss.detach(), hidden.grad, weight_leaf.grad

    wanted = run(torch.where(mask[..., None], hidden, 0), clean)
    actual = run(torch.where(mask[..., None], hidden, garbage), dirty)
    for a, b in zip(actual, wanted, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    assert (actual[1][~mask] == 0).all()


@every_path
def test_11_the_clip_fraction_does_not_depend_on_the_sign_of_the_advantage_or_on_padding(path):
    """TRL counts r > hi only where A > 0, open-instruct r > hi alone. Here: outside either bound, of the kept tokens."""
    ratios = torch.tensor([0.3, 0.6, 1.0, 1.9, 2.5, 9.0, 9.0], dtype=F64)
    mask = torch.tensor([True] * 5 + [False] * 2)
    for advantages in (torch.ones(7), -torch.ones(7), torch.tensor([1.0, -1, 1, -1, 1, -1, 1])):
        for objective in (CISPO(2.0, 0.5), PPOClip(0.5, 1.0)):
            metrics = outcome(path, ratios, advantages, objective=objective, mask=mask).metrics
            assert metrics["clip_fraction"].item() == pytest.approx(2 / 5)
    assert outcome(path, ratios, -torch.ones(7), objective=CISPO(2.0), mask=mask).metrics["clip_fraction"].item() == 0.2


@every_path
def test_12_advantages_of_sequences_are_never_broadcast_along_the_wrong_axis(path):
    """(B,) with (B, T), where B = T both would fit; no silent (B, B, T); packed tokens say which sequence they are of."""
    head = Head.random(3, 3)
    close(
        outcome(path, torch.ones(3, 3), [1.0, -2.0, 4.0], head=head, objective=Reinforce()).coefficients,
        [[1.0] * 3, [-2.0] * 3, [4.0] * 3],
    )
    flat = Head(
        head.hidden.flatten(0, 1), head.weight, head.tokens.flatten(), head.logprobs.flatten(), head.slopes.flatten(0, 1)
    )
    ids = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0, 1])
    packed = outcome(path, torch.ones(9), [1.0, -2.0, 4.0], head=flat, objective=Reinforce(), sequence_ids=ids)
    close(packed.coefficients, [1.0, 1.0, -2.0, 4.0, 4.0, 4.0, -2.0, 1.0, -2.0])
    for shape in [(3, 1), (1, 3), (1,), (2,), (), (3, 3, 3)]:
        with pytest.raises(ValueError, match="advantages must be"):
            outcome(path, torch.ones(3, 3), torch.ones(shape), head=head, objective=Reinforce())
    with pytest.raises(ValueError, match="advantages must be"):
        outcome(path, torch.ones(9), [1.0, -2.0, 4.0], head=flat, objective=Reinforce())


@pytest.mark.parametrize("objective", SEQUENCE_OBJECTIVES.values(), ids=SEQUENCE_OBJECTIVES)
def test_13_a_sequence_ratio_is_never_quietly_a_token_ratio(objective):
    """Refused where it cannot be had, with the remedy; and CISPO has none, whatever the sequences are."""
    head = Head.random(2, 3)
    with pytest.raises(ValueError, match="linear_logprobs"):
        outcome("linear_policy_loss", torch.ones(2, 3), torch.ones(2), head=head, objective=objective)
    with pytest.raises(ValueError, match="sequence_ids"):
        outcome("policy_loss", torch.ones(6), torch.ones(6), objective=objective)
    ratios = torch.tensor([[0.5, 2.0, 1.0], [1.0, 1.0, 8.0]], dtype=F64)
    same = outcome("policy_loss", ratios, torch.ones(2), head=head, objective=objective).coefficients
    assert (same == same[:, :1]).all()  # one number for a sequence, though its tokens' ratios differ
    close(outcome("policy_loss", ratios, torch.ones(2), head=head, objective=CISPO()).coefficients, ratios.clamp(max=5))


@every_path
@pytest.mark.parametrize("skip", [True, False], ids=["skipping", "computing"])
@pytest.mark.parametrize("name", TOKEN_OBJECTIVES)
def test_14_a_zero_advantage_never_has_a_gradient_whatever_the_tie_break(path, name, skip):
    """Neither 0 nor -0, on either side of a clip or of SAPO's temperatures; but it counts in the denominator."""
    options = {"skip_zero_weight": skip} if path == "linear_policy_loss" else {}
    ratios, advantages = [0.1, 0.9, 1.1, 40.0, 0.1, 40.0, 1.0], [0.0, 0.0, 0.0, 0.0, -0.0, -0.0, 3.0]
    result = outcome(path, ratios, advantages, objective=TOKEN_OBJECTIVES[name], reduction="token-mean", **options)
    assert (result.coefficients[:-1] == 0).all()
    close(result.coefficients[-1], 3.0 / 7)
    nothing = outcome(path, ratios, [0.0] * 7, objective=TOKEN_OBJECTIVES[name], reduction="token-mean", **options)
    assert nothing.loss == 0
    assert (nothing.coefficients == 0).all()


def test_15_the_temperature_never_scales_log_probabilities_instead_of_logits():
    """It is inside the softmax, as in the sampler, 1 unless given; a ratio to the sampler's log-probabilities is then 1."""
    hidden, weight = torch.randn(5, 6, dtype=F64), torch.randn(11, 6, dtype=F64)
    tokens = torch.randint(0, 11, (5,))
    z = hidden @ weight.T

    def sampler(temperature):
        return torch.log_softmax(z / temperature, -1).gather(1, tokens[:, None])[:, 0]

    close(linear_logprobs(hidden, weight, tokens).logprobs, sampler(1.0), atol=1e-14)
    for temperature in (0.6, torch.tensor([0.3, 0.6, 1.0, 1.7, 4.0], dtype=F64)):
        exact = sampler(temperature if isinstance(temperature, float) else temperature[:, None])
        close(linear_logprobs(hidden, weight, tokens, temperature=temperature).logprobs, exact, atol=1e-14)
        assert not torch.allclose(exact, sampler(1.0) / temperature, rtol=1e-2)
        output = linear_policy_loss(
            hidden, weight, tokens, exact, torch.ones(5), objective=CISPO(1.0 + 1e-9, 1.0 - 1e-9), temperature=temperature
        )
        close(output.logprobs, exact, atol=1e-14)
        assert output.metrics["ratio_max"].item() == pytest.approx(1, rel=1e-12)
        assert output.metrics["clip_fraction"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_logits_are_not_rounded_before_the_softmax(dtype):
    """Rounding logits of 30 to bf16 moves log-probabilities by 0.1: a bound of 1.01 would clip that noise."""
    hidden, weight = (3 * torch.randn(64, 32)).to(dtype), torch.randn(200, 32).to(dtype)
    tokens = (hidden.float() @ weight.float().T).topk(3).indices[:, 2]

    def logprobs_of(z):
        return torch.log_softmax(z.double(), -1).gather(1, tokens[:, None])[:, 0]

    exact = logprobs_of(hidden.double() @ weight.double().T)
    rounded = logprobs_of((hidden.double() @ weight.double().T).to(dtype))
    coarse = (rounded - exact).abs().max().item()
    assert coarse > (0.05 if dtype == torch.bfloat16 else 0.005)

    ours = linear_logprobs(hidden, weight, tokens).logprobs
    assert ours.dtype == torch.float32
    objective = CISPO(1 + coarse / 5, 1 - coarse / 5)
    outputs = [
        policy_loss(ours, exact.float(), torch.ones(64), objective=objective),
        linear_policy_loss(hidden, weight, tokens, exact.float(), torch.ones(64), objective=objective),
    ]
    for output in outputs:
        assert (output.logprobs.double() - exact).abs().max() < coarse / 500
        assert output.metrics["clip_fraction"] == 0
    assert policy_loss(rounded, exact, torch.ones(64), objective=objective).metrics["clip_fraction"] > 0.1
