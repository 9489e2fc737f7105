"""All trajectories of a policy that is sampled through top-k or top-p listed, so that expectations are exact sums.

With the sets that the sampler kept, the policy has ratio 1 to itself and its gradient is that of the expected return. Over the
whole vocabulary it has neither.
"""

import pytest
import torch

from fastpg import ImportanceWeighted, Reinforce, Support, linear_logprobs, linear_policy_loss, policy_loss

V, STEPS = 5, 3
STATES = 1 + V + V**2  # prefixes
TOKENS = torch.cartesian_prod(*[torch.arange(V)] * STEPS)
PREFIXES = torch.stack([torch.zeros(V**3, dtype=torch.int64), 1 + TOKENS[:, 0], 1 + V + V * TOKENS[:, 0] + TOKENS[:, 1]], 1)
SAMPLERS = pytest.mark.parametrize("sampler", ["top-k", "top-p"])
BACKENDS = pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)], ids=str)
SCHEDULES = pytest.mark.parametrize("schedule", ["one pass", "two passes"])


def kept_by(sampler: str, policy: torch.Tensor) -> torch.Tensor:
    """(STATES, V) bool: which tokens may be sampled after each prefix."""
    if sampler == "top-k":
        return policy >= policy.topk(2, 1).values[:, -1:]
    p, order = policy.softmax(1).sort(1, descending=True)
    return torch.zeros_like(policy, dtype=torch.bool).scatter_(1, order, p.cumsum(1) - p < 0.7)


class Policy:
    """Logits after each prefix, a head on one-hot states; and the trajectories that its sampler may draw."""

    def __init__(self, sampler: str, dtype: torch.dtype) -> None:
        self.logits = (1.5 * torch.randn(STATES, V, dtype=torch.float64)).to(dtype).requires_grad_()
        self.kept = kept_by(sampler, self.logits.detach())
        assert set(self.kept.sum(1).tolist()) >= ({2} if sampler == "top-k" else {1, 2, 3})
        possible = self.kept[PREFIXES, TOKENS].all(1)
        self.tokens, self.prefixes = TOKENS[possible], PREFIXES[possible]
        self.support = Support.from_mask(self.kept[self.prefixes])
        self.states = torch.nn.functional.one_hot(self.prefixes, STATES).to(dtype)
        self.returns = torch.randn(len(self.tokens), dtype=torch.float64)

    def drawn(self, logits: torch.Tensor) -> torch.Tensor:
        """The log-probability of each token as it is drawn, (M, STEPS), by plain torch."""
        return torch.where(self.kept, logits, -torch.inf).log_softmax(1)[self.prefixes, self.tokens]

    def expected(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (M, ...) of the trajectories."""
        return (self.drawn(self.logits.detach().double()).sum(1).exp() @ values.double().flatten(1)).squeeze()

    def exact(self, logits: torch.Tensor) -> torch.Tensor:
        """The gradient of the expected return at these logits, (STATES, V)."""
        leaf = logits.detach().double().requires_grad_()
        return torch.autograd.grad(self.drawn(leaf).sum(1).exp() @ self.returns, leaf)[0]

    def estimate(self, logits, objective, support, schedule: str, backend: str) -> torch.Tensor:
        """Minus the expected gradient of the library's loss, where this policy has drawn the tokens."""
        weights = self.drawn(self.logits.detach().double()).sum(1).exp()
        leaf = logits.detach().to(self.states.dtype).requires_grad_()
        options = {"objective": objective, "rollout_weights": weights[:, None].expand(self.tokens.shape).to(leaf)}
        options |= {"reduction": "sum"}
        old, head = self.drawn(self.logits.detach()).to(leaf), leaf.T.contiguous()
        if schedule == "one pass":
            options |= {"support": support, "backend": backend}
            loss = linear_policy_loss(self.states, head, self.tokens, old, self.returns.to(leaf), **options).loss
        else:
            ready = linear_logprobs(self.states, head, self.tokens, support=support, backend=backend).logprobs
            loss = policy_loss(ready, old, self.returns.to(leaf), **options).loss
        return -torch.autograd.grad(loss, leaf)[0].double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@SAMPLERS
@BACKENDS
def test_the_policys_mean_ratio_to_itself_is_one(sampler, backend, dtype):
    """Of each step. Over the whole vocabulary it is the probability of the sampler's sets."""
    policy = Policy(sampler, dtype)
    assert policy.expected(torch.ones_like(policy.tokens)[:, :1]).item() == pytest.approx(
        1, rel=1e-6
    )  # no trajectory is missing
    old = policy.drawn(policy.logits.detach())
    head, means = policy.logits.detach().T.contiguous(), []
    for support in (policy.support, None):
        now = linear_logprobs(policy.states, head, policy.tokens, support=support, backend=backend).logprobs
        means.append(policy.expected((now - old).exp()))
    torch.testing.assert_close(means[0], torch.ones(STEPS, dtype=torch.float64), rtol=1e-6, atol=0)
    covered = torch.where(policy.kept, policy.logits.detach().softmax(1), 0).sum(1)[policy.prefixes]
    torch.testing.assert_close(means[1], policy.expected(covered), rtol=1e-5, atol=0)
    assert (means[1] < 0.95).all()


@SAMPLERS
@BACKENDS
@SCHEDULES
def test_the_policy_gradient_is_that_of_the_expected_return(sampler, backend, dtype, schedule):
    policy, exact = Policy(sampler, dtype), 1e-12 if dtype == torch.float64 else 1e-5
    want = policy.exact(policy.logits)
    for objective in (Reinforce(), ImportanceWeighted()):
        got = policy.estimate(policy.logits, objective, policy.support, schedule, backend)
        assert distance(got, want) < exact
        assert not got[~policy.kept].any()  # what is never drawn is not taught
        assert distance(policy.estimate(policy.logits, objective, None, schedule, backend), want) > 0.05


@SAMPLERS
def test_off_policy_samples_are_corrected_by_ratios_over_the_samplers_sets(sampler):
    """The policy has moved; trajectory weights over the sets of the sampler make its gradient exact, others do not."""
    sampled = Policy(sampler, torch.float64)
    moved = sampled.logits.detach() + 0.3 * torch.randn(STATES, V, dtype=torch.float64)
    want, objective = sampled.exact(moved), ImportanceWeighted("trajectory")
    got = sampled.estimate(moved, objective, sampled.support, "two passes", "torch")
    assert distance(got, want) < 1e-12
    assert distance(sampled.estimate(moved, objective, None, "two passes", "torch"), want) > 0.05
