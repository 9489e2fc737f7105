"""All trajectories of a small policy listed, so that expectations are exact sums; then the objectives of sequences
from hidden states, compiled, and given bad input.
"""

import re
from dataclasses import replace

import pytest
import torch
from objectives import INF, NAN, OBJECTIVES, OF_SEQUENCES
from problems import Result, check_result, logprobs_of, oracle, random_problem
from schedules import one_pass, one_pass_triton, two_pass, two_pass_triton

from fastpg import (
    CISPO,
    GSPO,
    SAPO,
    ImportanceWeighted,
    LinearPolicyLoss,
    LMHead,
    PPOClip,
    Reinforce,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    reference,
)
from fastpg.crosscheck.cases import Inputs, Settings

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# ---- enumeration: 3 tokens, at most 3 steps


class Tree:
    """Every trajectory of 3 tokens, 27 in all; or every one that ends at its first 0, 15 of 1 to 3 tokens."""

    def __init__(self, ends: bool) -> None:
        tokens = torch.cartesian_prod(*[torch.arange(3)] * 3)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        if ends:
            mask[:, 1:] = (tokens != 0).cumprod(1)[:, :-1].bool()
        once = (tokens * ~mask == 0).all(1)
        self.tokens, self.mask = tokens[once], mask[once]
        first, second, _ = self.tokens.T
        self.states = torch.stack([torch.zeros_like(first), 1 + first, 4 + 3 * first + second], 1)  # numbers of prefixes
        self.returns = torch.randn(len(self.tokens), dtype=F64)

    def logprobs(self, policy: torch.Tensor) -> torch.Tensor:
        """policy (13, 3): the logits after each prefix -> (M, 3)."""
        return policy.log_softmax(1)[self.states, self.tokens]

    def probabilities(self, policy: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, self.logprobs(policy), 0).sum(1).exp()

    def exact(self, policy: torch.Tensor) -> torch.Tensor:
        """The gradient of the expected return."""
        return torch.autograd.grad(self.probabilities(policy) @ self.returns, policy)[0]

    def estimate(self, policy: torch.Tensor, sampler: torch.Tensor, objective, advantages=None, packed=False):
        """The expectation under `sampler` of the library's loss, and minus its gradient."""
        given = {
            "logprobs": self.logprobs(policy),
            "old_logprobs": self.logprobs(sampler).detach(),
            "mask": self.mask,
            "rollout_weights": self.probabilities(sampler).detach()[:, None].repeat(1, 3),
        }
        if packed:
            order = torch.randperm(self.mask.numel())
            given = {name: x.reshape(-1)[order] for name, x in given.items()}
            given["sequence_ids"] = torch.arange(len(self.mask)).repeat_interleave(3)[order]
        given["advantages"] = self.returns if advantages is None else advantages
        loss = policy_loss(**given, objective=objective, reduction="seq-mean-token-sum", denominator=1.0).loss
        return loss.detach(), -torch.autograd.grad(loss, policy)[0]


def policy_and_sampler():
    policy, other = torch.randn(13, 3, dtype=F64, requires_grad=True), torch.randn(13, 3, dtype=F64)
    return policy, policy.detach() + 0.7 * other


trees = pytest.mark.parametrize("ends", [False, True], ids=["27", "ragged"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["rows", "pack"])


@trees
def test_the_tree_is_complete(ends):
    tree, (policy, sampler) = Tree(ends), policy_and_sampler()
    assert len(tree.tokens) == (15 if ends else 27)
    for p in (policy, sampler):
        assert tree.probabilities(p).sum().item() == pytest.approx(1, rel=1e-14)


@layouts
@trees
def test_reinforce_is_the_gradient_of_the_expected_return(ends, packed):
    tree, (policy, sampler) = Tree(ends), policy_and_sampler()
    torch.testing.assert_close(tree.estimate(policy, policy, Reinforce(), packed=packed)[1], tree.exact(policy))
    biased = tree.estimate(policy, sampler, Reinforce(), packed=packed)[1]  # off-policy samples are not corrected
    assert (biased - tree.exact(policy)).norm() > 0.1 * tree.exact(policy).norm()


@trees
def test_reward_to_go_with_a_baseline_of_the_state_is_it_too(ends):
    tree, (policy, _) = Tree(ends), policy_and_sampler()
    rewards = torch.where(tree.mask, torch.randn(13, 3, dtype=F64)[tree.states, tree.tokens], 0)
    tree.returns = rewards.sum(1)
    to_go = rewards.flip(1).cumsum(1).flip(1) - torch.randn(13, dtype=F64)[tree.states]
    torch.testing.assert_close(tree.estimate(policy, policy, Reinforce(), to_go)[1], tree.exact(policy))


@layouts
@trees
def test_trajectory_weights_make_off_policy_samples_exact_and_the_others_do_not(ends, packed):
    tree, (policy, sampler) = Tree(ends), policy_and_sampler()
    exact = tree.exact(policy)
    loss, gradient = tree.estimate(policy, sampler, ImportanceWeighted("trajectory"), packed=packed)
    torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss, -(tree.probabilities(policy) @ tree.returns).detach(), rtol=1e-12, atol=1e-14)
    for level in ("token", "sequence"):
        objective = ImportanceWeighted(level)
        biased = tree.estimate(policy, sampler, objective, packed=packed)[1]
        assert (biased - exact).norm() > 0.05 * exact.norm(), level
        torch.testing.assert_close(tree.estimate(policy, policy, objective, packed=packed)[1], exact, rtol=1e-12, atol=1e-14)


@trees
def test_cispo_with_a_bound_that_never_holds_is_token_level_importance_weighting(ends):
    tree, (policy, sampler) = Tree(ends), policy_and_sampler()
    unbounded = tree.estimate(policy, sampler, CISPO(1e30))[1]
    torch.testing.assert_close(unbounded, tree.estimate(policy, sampler, ImportanceWeighted())[1], rtol=1e-12, atol=1e-14)
    logprobs = tree.logprobs(policy)
    ratios = (logprobs - tree.logprobs(sampler)).exp().detach()
    terms = torch.where(tree.mask, tree.probabilities(sampler)[:, None] * ratios * tree.returns[:, None] * logprobs, 0)
    torch.testing.assert_close(unbounded, torch.autograd.grad(terms.sum(), policy)[0], rtol=1e-12, atol=1e-14)
    bounded = tree.estimate(policy, sampler, CISPO(1.1))[1]
    assert (bounded - unbounded).norm() > 0.01 * unbounded.norm()


# ---- the entropy bonus: loss - coef * mean(entropy)


@pytest.mark.parametrize("name", ["cispo", "ppo", "gspo"])
def test_entropy_bonus_equals_autograd_on_full_logits(name):
    objective, theirs, *_ = OBJECTIVES[name]
    problem = random_problem(24, 50, F64, bias=True, masked=True)
    problem = replace(problem, old_logprobs=logprobs_of(problem) - 0.3 * torch.randn(24))
    ids = torch.randperm(24) % 5

    def gradients(total, leaves):
        return torch.autograd.grad(total, (leaves.hidden, leaves.head.weight, leaves.head.bias))

    ours = problem.leaves()
    out = linear_logprobs(ours.hidden, ours.head, ours.tokens, mask=ours.mask, entropy=True)
    given = {"mask": ours.mask, "sequence_ids": ids, "reduction": "seq-mean-token-mean"}
    loss = policy_loss(out.logprobs, ours.old_logprobs, ours.advantages, objective=objective, **given).loss
    bonus = out.entropy.sum() / ours.mask.sum()
    full = problem.leaves()
    log_p = ((full.hidden @ full.head.weight.T + full.head.bias).log_softmax(1))[ours.mask]
    entropies = -(log_p.exp() * log_p).sum(1)
    logprobs = torch.zeros(24, dtype=F64).masked_scatter(ours.mask, log_p.gather(1, ours.tokens[ours.mask][:, None])[:, 0])
    advantages = ours.advantages.double()
    wanted = reference.policy_loss(logprobs, ours.old_logprobs, advantages, objective=theirs, **given) - 0.3 * entropies.mean()
    torch.testing.assert_close(loss - 0.3 * bonus, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(loss - 0.3 * bonus, ours), gradients(wanted, full), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    again = problem.leaves()  # and the sign: the bonus alone raises the entropy
    out = linear_logprobs(again.hidden, again.head, again.tokens, mask=again.mask, entropy=True)
    (step,) = torch.autograd.grad(-out.entropy.mean(), again.hidden)
    raised = linear_logprobs(again.hidden - 0.1 * step, again.head, again.tokens, mask=again.mask, entropy=True)
    assert raised.entropy.mean() > out.entropy.mean()


# ---- token-level objectives from hidden states

TOKEN_LEVEL = ["ppo", "ppo-clip-higher", "ppo-dual", "sapo", "sapo-taus", "dppo-tv", "dppo-kl-weight", "icepop-narrow"]
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])


def off_policy(problem: Inputs, spread: float | None, objective) -> Inputs:
    """log-ratios of size `spread` (None: as they are, up to 40), ratios 1e-3 away from the jumps."""
    logprobs = logprobs_of(problem)
    old = problem.old_logprobs.double() if spread is None else logprobs - spread * torch.randn(len(logprobs), dtype=F64)
    jumps = torch.tensor([x for x in (*objective.ratio_bounds, getattr(objective, "dual_clip", None)) if x] or [INF], dtype=F64)
    for _ in range(20):
        near = (((logprobs - old).exp()[:, None] / jumps - 1).abs() < 2e-3).any(1)
        old = torch.where(near, old + 3e-3, old)
    assert not near.any()
    return replace(problem, old_logprobs=old.float())


@DTYPES
@pytest.mark.parametrize("spread", [0.5, None], ids=["near", "far"])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
@pytest.mark.parametrize(
    ("schedule", "rows", "vocab"),
    [(two_pass, 100, 1000), (one_pass, 100, 1000), (two_pass_triton, 30, 300), (one_pass_triton, 30, 300)],
    ids=["two_pass", "one_pass", "two_pass_triton", "one_pass_triton"],
)
def test_token_level_objectives(schedule, rows, vocab, name, spread, dtype):
    objective = OBJECTIVES[name].objective
    problem = off_policy(random_problem(rows, vocab, dtype), spread, objective)
    check_result(problem, schedule(problem, objective))


@pytest.mark.parametrize("schedule", [two_pass, one_pass], ids=["two_pass", "one_pass"])
@pytest.mark.parametrize("name", ["ppo", "ppo-dual", "sapo"])
def test_ratios_that_overflow_where_the_value_is_bounded(schedule, name):
    """old = logp - 100: r is inf in fp32, l is at its bound, and no token teaches."""
    objective = OBJECTIVES[name].objective
    problem = random_problem(20, 100, F32)
    advantages = problem.advantages.abs() if name == "ppo" else problem.advantages
    logprobs = logprobs_of(problem)
    problem = replace(problem, old_logprobs=(logprobs - 100).float(), advantages=advantages)
    want = oracle(problem, objective)
    assert want["dX"].norm() < 1e-30
    check_result(problem, schedule(problem, objective), want)


@layouts
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_linear_losses_take_sequences_and_their_advantages(reduction, packed):
    """Sequence 1 has advantage 0: skipped, and counted in D. Ids of tokens that do not count may be anything."""
    problem = random_problem(30, 40, F64, masked=True)
    problem = replace(problem, old_logprobs=logprobs_of(problem) - 0.4 * torch.randn(30))
    advantages, rows = torch.tensor([1.0, 0.0, -2.0, 0.5, -0.3], dtype=F64), torch.arange(5).repeat_interleave(6)
    order = torch.randperm(30) if packed else torch.arange(30)
    ids, mask, tokens = rows[order], problem.mask[order], problem.tokens[order]
    hidden, old = problem.hidden[order].requires_grad_(), problem.old_logprobs[order]
    weight = problem.head.weight.requires_grad_()

    def wanted_of(theirs):
        logprobs, _ = reference.linear_logprobs(hidden, weight, tokens, mask=mask)
        given = {"mask": mask, "reduction": reduction, "sequence_ids": ids}
        return reference.policy_loss(logprobs, old, advantages[ids], objective=theirs, **given)

    def shaped(x):
        return x if packed else x.view(5, 6, *x.shape[1:])

    options = {"mask": shaped(mask), "reduction": reduction}
    if packed:
        options["sequence_ids"] = torch.where(mask & (tokens != -100), ids, 10**9)
    arguments = shaped(hidden), weight, shaped(tokens), shaped(old), advantages
    bounded = {k: x for k, x in options.items() if k != "reduction"}
    module = LinearPolicyLoss(objective=PPOClip(), reduction=reduction)
    for output, theirs in (
        (linear_policy_loss(*arguments, objective=PPOClip(), **options), reference.ppo_clip(0.2, 0.2)),
        (linear_policy_loss(*arguments, objective=PPOClip(), skip_zero_weight=False, **options), reference.ppo_clip(0.2, 0.2)),
        (linear_cispo_loss(*arguments, ratio_max=1.2, **options), reference.cispo(1.2)),
        (module(*arguments, **bounded), reference.ppo_clip(0.2, 0.2)),
    ):
        wanted = wanted_of(theirs)
        torch.testing.assert_close(output.loss, wanted, rtol=1e-11, atol=1e-13)
        got, want = (torch.autograd.grad(x, (hidden, weight)) for x in (output.loss, wanted))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert output.metrics["skipped_tokens"] == (mask & (ids == 1)).sum() > 0


@pytest.mark.parametrize("check", [True, False], ids=["check", "no-check"])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_zero_advantages_give_exactly_zero_from_hidden_states(name, check):
    problem = random_problem(20, 30, F32).leaves()
    out = linear_policy_loss(
        problem.hidden, problem.head, problem.tokens, problem.old_logprobs, torch.zeros(20), objective=OBJECTIVES[name][0],
        check=check, skip_zero_weight=False,
    )  # fmt: skip
    assert out.loss == 0
    for gradient in torch.autograd.grad(out.loss, (problem.hidden, problem.head.weight)):
        assert (gradient == 0).all()


# ---- ratios of sequences from hidden states: linear_logprobs and policy_loss


@layouts
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("name", ["iw-sequence", "iw-trajectory", "gspo"])
def test_objectives_of_sequences(name, dtype, packed):
    objective = OBJECTIVES[name].objective
    problem = random_problem(48, 500, dtype, masked=True)
    ids = torch.arange(8).repeat_interleave(6)
    logprobs, mask = logprobs_of(problem), problem.mask
    # rho on both sides of gspo's bounds 0.7 and 1.45 with both signs of A, and not close to them
    d, means = 0.2 * torch.randn(48, dtype=F64), torch.tensor([0.6, -0.6, 0.1, -0.1, 0.5, -0.5, 0.2, -0.2], dtype=F64)
    for number in range(8):
        tokens = (ids == number) & mask
        d[tokens] += means[number] - d[tokens].mean()
    advantages = torch.tensor([1.0, -1.0, 0.7, -2.0, -0.5, 0.8, -1.2, 1.5])
    names = {"hidden": problem.hidden, "tokens": problem.tokens, "mask": mask}
    names |= {"old_logprobs": torch.where(mask, logprobs - d, NAN).float()}
    problem = replace(problem, advantages=advantages, **{n: x.view(8, 6, *x.shape[1:]) for n, x in names.items()})

    x, shuffled = problem.leaves(), torch.randperm(48)

    def shaped(values):
        return values.flatten(0, 1)[shuffled] if packed else values

    out = linear_logprobs(shaped(x.hidden), x.head, shaped(x.tokens), mask=shaped(x.mask))
    given = {"mask": shaped(x.mask), "reduction": "seq-mean-token-mean"} | ({"sequence_ids": ids[shuffled]} if packed else {})
    output = policy_loss(out.logprobs, shaped(x.old_logprobs), advantages, objective=objective, **given)
    logprobs = output.logprobs[shuffled.argsort()].view(8, 6) if packed else output.logprobs
    # a row inherits the errors of its sequence's log-probabilities: their mean, or for the trajectory their sum
    check_result(problem, Result.of(x, Settings(objective, "seq-mean-token-mean"), logprobs, output.loss))
    if name == "gspo":  # sequences 0, 1, 4 and 5
        outside = ((means.abs() > 0.45)[ids] & mask).sum() / mask.sum()
        assert output.metrics["clip_fraction"].item() == pytest.approx(outside.item(), rel=1e-6)


# ---- torch.compile


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
@pytest.mark.parametrize("name", ["gspo", "iw-trajectory"])
def test_policy_loss_compiles_with_packed_sequences(name):
    ids, mask, advantages = torch.randperm(20) % 4, torch.rand(20) > 0.2, torch.randn(4)
    old, start = -torch.rand(20), (-torch.rand(20)).requires_grad_()

    def step(logprobs):
        given = {"mask": mask, "sequence_ids": ids, "reduction": "seq-mean-token-mean"}
        out = policy_loss(logprobs, old, advantages, objective=OBJECTIVES[name][0], **given)
        return out.loss, out.metrics["clip_fraction"]

    want, got = step(start), torch.compile(step, fullgraph=True, backend="aot_eager")(start)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x[0], start)[0] for x in (got, want)), rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_linear_policy_loss_compiles_with_packed_sequences():
    problem = random_problem(30, 40, F32, masked=True).leaves()
    ids, advantages = torch.randperm(30) % 4, torch.randn(4)
    old = (logprobs_of(problem) - 0.3 * torch.randn(30)).float()

    def step(hidden, weight):
        return linear_policy_loss(
            hidden, LMHead(weight), problem.tokens, old, advantages, objective=PPOClip(), mask=problem.mask, sequence_ids=ids,
            reduction="seq-mean-token-mean", check=False,
        ).loss  # fmt: skip

    inputs = problem.hidden, problem.head.weight
    want, got = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


# ---- bad input


def pack_inputs(**changes):
    inputs = {"logprobs": -torch.rand(4), "old_logprobs": -torch.rand(4), "advantages": torch.ones(3), "objective": GSPO()}
    return inputs | {"sequence_ids": torch.tensor([0, 2, 0, 1])} | changes


def ids(*values):
    return torch.tensor(values)


OF_RANGE = r"sequence_ids must be in \[0, {}\): number the sequences of a pack from 0; got {} at position {}"
SHAPED = r"sequence_ids must have the shape of (logprobs|tokens), \(4,\); got "
BAD_IDS = {
    "list": ({"sequence_ids": [0, 2, 0, 1]}, TypeError, r"sequence_ids must be int64 or int32; got list"),
    "float": ({"sequence_ids": torch.zeros(4)}, TypeError, r"sequence_ids must be int64 or int32; got torch.float32"),
    "bool": ({"sequence_ids": torch.ones(4).bool()}, TypeError, r"sequence_ids must be int64 or int32; got torch.bool"),
    "uint8": ({"sequence_ids": ids(0, 1, 2, 0).byte()}, TypeError, r"sequence_ids must be .*; got torch.uint8"),
    "short": ({"sequence_ids": ids(0, 2, 0)}, ValueError, SHAPED + r"\(3,\)"),
    "column": ({"sequence_ids": ids(0, 2, 0, 1)[:, None]}, ValueError, SHAPED + r"\(4, 1\)"),
    "device": ({"sequence_ids": ids(0, 2, 0, 1).to("meta")}, ValueError, r"sequence_ids is on meta but \w+ is on cpu"),
    "negative": ({"sequence_ids": ids(0, 2, -1, 1)}, ValueError, OF_RANGE.format(3, -1, 2)),
    "number-of-advantages": ({"sequence_ids": ids(0, 2, 0, 3)}, ValueError, OF_RANGE.format(3, 3, 3)),
    "number-of-tokens": ({"sequence_ids": ids(0, 4, 0, 1), "advantages": torch.ones(4)}, ValueError, OF_RANGE.format(4, 4, 1)),
    "more-advantages": ({"sequence_ids": ids(0, 4, 0, 1), "advantages": torch.ones(9)}, ValueError, OF_RANGE.format(4, 4, 1)),
    "advantages-2d": (
        {"advantages": torch.ones(3, 1)},
        ValueError,
        r"advantages must be .* or one per sequence \(S,\); got shape",
    ),
    "advantages-0d": (
        {"advantages": torch.tensor(1.0)},
        ValueError,
        r"advantages must be .* or one per sequence \(S,\); got shape",
    ),
    "no-ids": ({"sequence_ids": None}, ValueError, r"advantages must be per token \(4,\).*; got shape \(3,\)"),
    "no-ids-for-the-reduction": (
        {"sequence_ids": None, "advantages": torch.ones(4), "objective": PPOClip(), "reduction": "seq-mean-token-mean"},
        ValueError,
        r'reduction="seq-mean-token-mean" needs sequences: .*sequence_ids=, or \(B, T\); got shape \(4,\)',
    ),
    "reduction": ({"reduction": "seq-mean"}, ValueError, r"reduction must be one of token-mean, .*, sum; got 'seq-mean'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_IDS.values(), ids=BAD_IDS)
def test_bad_ids_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        policy_loss(**pack_inputs(**changes))
    given = pack_inputs(objective=PPOClip()) | {k: x for k, x in changes.items() if k != "objective"}
    objective = given.pop("objective")
    given.pop("logprobs")
    arguments = torch.randn(4, 2), torch.randn(5, 2), ids(0, 1, 2, 3)
    with pytest.raises(error, match=message):
        linear_policy_loss(*arguments, **given, objective=objective)
    with pytest.raises(error, match=message):
        linear_cispo_loss(*arguments, **given)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), ()], ids=str)
def test_ids_are_for_packed_tokens_alone(shape):
    sequence_ids = torch.zeros(shape, dtype=torch.long)
    message = rf"sequence_ids are for packed \w+ of shape \(N,\); \w+ has shape {re.escape(str(shape))}.*leave sequence_ids out"
    given = {"old_logprobs": None, "advantages": torch.ones(shape), "objective": PPOClip(), "sequence_ids": sequence_ids}
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(shape), **given)
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(torch.randn(*shape, 2), torch.randn(5, 2), sequence_ids, **given)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_objectives_of_sequences_need_sequences(name, shape):
    objective = OBJECTIVES[name][0]
    message = rf"objective={type(objective).__name__}\(.*needs sequences: .*\(B, T\), or packed \(N,\) with sequence_ids="
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(shape), None, torch.ones(shape), objective=objective)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "pack"])
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_the_one_pass_loss_refuses_objectives_of_sequences(name, packed):
    objective = OBJECTIVES[name][0]
    tokens = torch.zeros(4 if packed else (2, 2), dtype=torch.long)
    arguments = torch.randn(*tokens.shape, 2), torch.randn(5, 2), tokens, None, torch.ones(tokens.shape)
    options = {"sequence_ids": tokens} if packed else {}
    message = rf"objective={type(objective).__name__}\(.*use linear_logprobs and policy_loss"
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(*arguments, objective=objective, **options)
    with pytest.raises(ValueError, match=message):
        LinearPolicyLoss(objective=objective)(*arguments, **options)


BAD_OBJECTIVES = {
    "eps-low-negative": (lambda: PPOClip(-0.1), r"eps_low must be in \[0, 1\].*; got -0.1"),
    "eps-low-above-1": (lambda: PPOClip(1.2), r"eps_low must be in \[0, 1\].*; got 1.2"),
    "eps-low-nan": (lambda: GSPO(NAN), r"eps_low must be in \[0, 1\].*; got nan"),
    "eps-low-none": (lambda: PPOClip(eps_low=None), r"eps_low must be .*; got None"),
    "eps-high-negative": (lambda: GSPO(eps_high=-0.1), r"eps_high must be >= 0.*; got -0.1"),
    "eps-high-inf": (lambda: PPOClip(eps_high=INF), r"eps_high must be >= 0 and finite.*; got inf"),
    "eps-high-nan": (lambda: PPOClip(eps_high=NAN), r"eps_high must be >= 0 and finite.*; got nan"),
    "eps-high-str": (lambda: PPOClip(eps_high="0.2"), r"eps_high must be .*; got '0.2'"),
    "dual-1": (lambda: PPOClip(dual_clip=1.0), r"dual_clip must be > 1.* or None; got 1.0"),
    "dual-inf": (lambda: PPOClip(dual_clip=INF), r"dual_clip must be > 1.*; got inf"),
    "dual-nan": (lambda: PPOClip(dual_clip=NAN), r"dual_clip must be > 1.*; got nan"),
    "dual-true": (lambda: PPOClip(dual_clip=True), r"dual_clip must be > 1.*; got True"),
    "tau-pos-zero": (lambda: SAPO(0.0), r"tau_pos must be positive and finite; got 0.0"),
    "tau-neg-negative": (lambda: SAPO(tau_neg=-1.0), r"tau_neg must be positive and finite; got -1.0"),
    "tau-neg-str": (lambda: SAPO(tau_neg="1"), r"tau_neg must be positive and finite; got '1'"),
    "level": (lambda: ImportanceWeighted("sequences"), r'level must be "token", "sequence" or "trajectory"; got \'sequences\''),
}


@pytest.mark.parametrize(("make", "message"), BAD_OBJECTIVES.values(), ids=BAD_OBJECTIVES)
def test_objectives_name_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_that_are_allowed():
    assert PPOClip(1.0, 3).ratio_bounds == (0.0, 4)
    assert GSPO(0, 0).ratio_bounds == (1, 1)
    assert policy_loss(**pack_inputs(sequence_ids=ids(2, 2, 0, 2).int())).loss.isfinite()
