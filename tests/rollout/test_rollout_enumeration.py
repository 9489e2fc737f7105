"""All outcomes of a small policy listed, so that expectations under the engine's probabilities are exact sums: which weights
give the gradient of samples from the trainer's policy, and what the diagnostics estimate.
"""

from functools import partial

import pytest
import torch

from fastpg import CISPO, SAPO, PPOClip, Reinforce, policy_loss
from fastpg.rollout import masked_weights, mismatch_metrics, token_veto, truncated_weights, within_band

F64 = torch.float64


class Outcomes:
    """Every sequence of 3 tokens that ends at its first 0 or after `steps`, and a return for each."""

    def __init__(self, steps: int) -> None:
        tokens = torch.cartesian_prod(*[torch.arange(3)] * steps).reshape(-1, steps)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 1:] = (tokens != 0).cumprod(1)[:, :-1].bool()
        once = (tokens * ~mask == 0).all(1)
        self.tokens, self.mask = tokens[once], mask[once]
        self.states = torch.zeros_like(self.tokens)  # the number of the prefix, of at most 1 + 3 + 9
        for t in range(1, steps):
            self.states[:, t] = 3 * self.states[:, t - 1] + 1 + self.tokens[:, t - 1]
        self.returns = torch.randn(len(self.tokens), dtype=F64)
        logits = torch.randn(13, 3, dtype=F64)
        self.policy = logits.requires_grad_()
        self.engine = logits.detach() + 0.8 * torch.randn(13, 3, dtype=F64)

    def logprobs(self, logits):
        """Of the tokens (M, T); NaN after the end."""
        return torch.where(self.mask, logits.log_softmax(1)[self.states, self.tokens], torch.nan)

    def probabilities(self, logits):
        return self.logprobs(logits).nansum(1).exp()

    @property
    def pair(self):
        """What a correction is given."""
        return self.logprobs(self.policy), self.logprobs(self.engine), self.mask

    def expected(self, weights, objective=None):
        """The expectation of minus the loss's gradient, over sequences that the engine samples."""
        logprobs = self.logprobs(self.policy)
        loss = policy_loss(
            logprobs, logprobs.detach(), self.returns, objective=objective or Reinforce(), mask=self.mask, denominator=1.0,
            rollout_weights=(weights * self.probabilities(self.engine)[:, None]).expand_as(logprobs),
            reduction="seq-mean-token-sum",
        ).loss  # fmt: skip
        return -torch.autograd.grad(loss, self.policy)[0]

    def band(self):
        """Bounds that leave out the sequences with the smallest and the largest ratio; and which sequences are left."""
        ratios = (self.probabilities(self.policy) / self.probabilities(self.engine)).detach()
        ordered = ratios.sort().values
        low, high = (ordered[:2].mean().item(), ordered[-2:].mean().item())
        return {"low": low, "high": high, "level": "sequence"}, (ratios >= low) & (ratios <= high)

    def exact(self, accepted=None):
        """The gradient of E[R] of samples from the policy; of E[R 1(accepted)] for a constant set of sequences."""
        returns = self.returns if accepted is None else self.returns * accepted
        return torch.autograd.grad(self.probabilities(self.policy) @ returns, self.policy)[0]


def equal(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-13)


def biased(actual, wanted):
    return (actual - wanted).norm() > 0.03 * wanted.norm()


steps = pytest.mark.parametrize("steps", [1, 2, 3])


@steps
def test_the_list_is_complete_and_samples_of_the_engine_need_a_correction(steps):
    x = Outcomes(steps)
    assert len(x.tokens) == (3, 7, 15)[steps - 1]
    for logits in (x.policy, x.engine):
        assert x.probabilities(logits).sum().item() == pytest.approx(1, rel=1e-14)
    assert biased(x.expected(torch.ones(len(x.tokens), steps)), x.exact())


@pytest.mark.parametrize("objective", [Reinforce(), PPOClip(0.2, 0.2)], ids=["reinforce", "ppo"])
@steps
def test_weights_of_sequences_without_bounds_are_unbiased(steps, objective):
    """The loss's own ratio is 1 here. So is the gradient of PPO's clip."""
    x = Outcomes(steps)
    equal(x.expected(truncated_weights(*x.pair, high=None, level="sequence"), objective), x.exact())


@pytest.mark.parametrize("objective", [Reinforce(), CISPO(), PPOClip(0.2, 0.2), SAPO()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("on_policy", [False, True])
@steps
def test_a_decoupled_loss_of_sequences_has_the_on_policy_gradient_where_the_policy_is_the_proximal_one(
    steps, on_policy, objective
):
    """SAPO's slope at a ratio of 1 is 1 as well. Away from it, the gradient is another one."""
    x = Outcomes(steps)
    frequencies = x.probabilities(x.engine)[:, None].expand(x.mask.shape)  # of each sequence among the engine's samples

    def expected(proximal, level="sequence"):
        logprobs = x.logprobs(x.policy)
        sampled = lambda logp, old, a: frequencies[x.mask] * objective(logp, old, a)  # noqa: E731
        loss = policy_loss(
            logprobs[x.mask], proximal and proximal(logprobs)[x.mask], (x.returns[:, None].expand_as(logprobs))[x.mask],
            objective=sampled, reduction="sum", rollout_logprobs=x.logprobs(x.engine)[x.mask],
            sequence_ids=torch.arange(len(x.mask))[:, None].expand(x.mask.shape)[x.mask],
            rollout_correction=partial(truncated_weights, high=None, level=level),
        ).loss  # fmt: skip
        return -torch.autograd.grad(loss, x.policy)[0]

    here = None if on_policy else lambda logprobs: logprobs.detach()
    equal(expected(here), x.exact())
    if steps > 1:
        assert biased(expected(here, "token"), x.exact())
    shift = torch.linspace(-0.5, 0.5, x.mask.numel(), dtype=F64).view(x.mask.shape)
    away = expected(lambda logprobs: logprobs.detach() + shift)
    if steps == 1 and isinstance(objective, CISPO):
        equal(away, x.exact())  # of one token, and within the bound: the proximal policy cancels
    elif not isinstance(objective, Reinforce):
        assert biased(away, x.exact())


@pytest.mark.parametrize("level", ["token", "geometric"])
@steps
def test_weights_of_tokens_and_geometric_means_are_so_for_single_tokens_alone(steps, level):
    x = Outcomes(steps)
    actual = x.expected(truncated_weights(*x.pair, high=None, level=level))
    if steps == 1:
        equal(actual, x.exact())
    else:
        assert biased(actual, x.exact())


@steps
def test_truncation_loses_what_is_above_the_bound(steps):
    x = Outcomes(steps)
    actual = x.expected(truncated_weights(*x.pair, high=1.1, level="sequence"))
    assert biased(actual, x.exact())
    p, q = x.probabilities(x.policy).detach(), x.probabilities(x.engine)
    above = (p - 1.1 * q).clamp(min=0)
    assert 0 < (above > 0).sum() < len(above)
    equal(actual + x.expected((above / q)[:, None]), x.exact())
    raised = x.expected(truncated_weights(*x.pair, low=0.9, high=1.1, level="sequence"))
    below = (0.9 * q - p).clamp(min=0)
    equal(raised + x.expected(((above - below) / q)[:, None]), x.exact())


@steps
def test_masked_weights_have_the_gradient_of_the_policys_samples_within_the_band(steps):
    """As if sequences outside had the return 0: a bias, but one without the engine."""
    x = Outcomes(steps)
    band, accepted = x.band()
    assert accepted.sum() == len(accepted) - 2
    actual = x.expected(masked_weights(*x.pair, **band))
    equal(actual, x.exact(accepted))
    assert biased(actual, x.exact())


@steps
def test_so_have_weights_of_sequences_times_any_mask_of_sequences(steps):
    x = Outcomes(steps)
    w = truncated_weights(*x.pair, high=None, level="sequence")
    d = torch.where(x.mask, x.logprobs(x.policy).detach() - x.logprobs(x.engine), 0)
    mean = (d.sum(1) / x.mask.sum(1)).exp()
    equal(x.expected(w * within_band(*x.pair, low=0.9, high=1.2, level="geometric")), x.exact((mean >= 0.9) & (mean <= 1.2)))
    equal(x.expected(w * token_veto(*x.pair, low=0.85)), x.exact((d.exp() >= 0.85).all(1)))


@steps
def test_a_mask_alone_leaves_the_engines_probabilities(steps):
    x = Outcomes(steps)
    band, accepted = x.band()
    keep = within_band(*x.pair, **band)
    assert biased(x.expected(keep), x.exact(accepted))
    terms = torch.where(x.mask, x.logprobs(x.policy), 0).sum(1) * x.returns * accepted
    wanted = torch.autograd.grad(x.probabilities(x.engine) @ terms, x.policy)[0]
    equal(x.expected(keep), wanted)


# ---- diagnostics: on samples whose frequencies are the engine's probabilities, means are expectations


def test_metrics_estimate_what_their_names_say():
    q = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [1.0, 2.0, 1.0], [2.0, 1.0, 1.0]], dtype=F64) / 4
    p = (q.log() + 0.5 * torch.randn(4, 3, dtype=F64)).softmax(1)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    states = torch.stack([torch.zeros(9, dtype=torch.long), 1 + pairs[:, 0]], 1)
    of_p, of_q = p[states, pairs], q[states, pairs]
    copies = (16 * of_q.prod(1)).long()
    rows = torch.arange(9).repeat_interleave(copies)
    assert len(rows) == 16
    whole_p, whole_q = of_p.prod(1), of_q.prod(1)
    kl = (whole_q * (whole_q / whole_p).log()).sum()  # of sequences: twice the mean of their two tokens
    found = mismatch_metrics(of_p.log()[rows], of_q.log()[rows])
    equal(2 * found["mismatch_kl_k1"], kl)
    equal(2 * found["mismatch_kl_k3"], kl)
    equal(found["mismatch_ratio_mean"], torch.ones((), dtype=F64))
    equal(found["mismatch_chi2_seq"], (whole_p.square() / whole_q).sum() - 1)
    second = (whole_q[:, None] * (of_p / of_q).square()).sum() / 2
    equal(found["mismatch_chi2"], second - 1)
    equal(found["mismatch_ess"], 1 / second)  # ESS = 1 / (1 + chi^2), as the mean ratio is 1
    of_sequences = mismatch_metrics(of_p.log()[rows], of_q.log()[rows], level="sequence")
    equal(of_sequences["mismatch_ratio_mean"], torch.ones((), dtype=F64))
    equal(of_sequences["mismatch_ess"], 1 / (1 + found["mismatch_chi2_seq"]))
