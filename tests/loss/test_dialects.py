"""The dialect tables of objectives.md and advantages.md: each call written there against the framework's own formula."""

import re
from types import SimpleNamespace

import pytest
import torch
from dialects import F64, PER_SEQUENCE, THEIRS, batch
from dialects_of_advantages import THEIR_ADVANTAGES
from pages import PAGES
from trl_cases import GRPO_LOSSES

import fastpg
import fastpg.advantages

PAGE = "\n".join((PAGES / name).read_text() for name in ("objectives.md", "advantages.md"))
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# | id | setting | `call` |, of the tables whose last column is called CALL
TABLES = [
    dict(re.findall(r"^\| ([\w-]+) \| .* \| `([^`]+)` \|$", table, re.MULTILINE))
    for table in re.findall(r"^\| id \| setting \| CALL \|\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
]
LOSS_CALLS, ADVANTAGE_CALLS = TABLES


def ours(call: str, x: SimpleNamespace, name: str) -> torch.Tensor:
    """The call of the page. TRL and Liger have advantages (B,), and so has ours for them."""
    advantages = x.advantages[:, 0] if name.startswith(PER_SEQUENCE) else x.advantages
    names = {name: getattr(fastpg, name) for name in fastpg.__all__} | vars(x) | {"advantages": advantages}
    return eval(f"policy_loss(logprobs, old_logprobs, advantages, mask=mask, objective={call})", names).loss


@pytest.mark.parametrize("name", THEIRS)
def test_loss_and_gradient_of_the_dialect(name):
    x = batch(name)
    loss, wanted = ours(LOSS_CALLS[name], x, name), THEIRS[name](x)
    (gradient,), (wanted_gradient,) = (torch.autograd.grad(value, x.logprobs, retain_graph=True) for value in (loss, wanted))
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=0)
    assert (gradient[x.mask] != 0).any()


def test_the_batch_leaves_every_bound():
    """On both sides with advantages of both signs, and beyond the dual clip; of tokens and of sequences."""
    for name in ("verl-vanilla", "verl-gspo"):
        x = batch(name)
        r = (x.logprobs - x.old_logprobs).exp()
        if name == "verl-gspo":
            r = ((r.log() * x.mask).sum(1) / x.mask.sum(1).clamp(min=1)).exp()[:, None].expand(8, 6)
        r, positive = r[x.mask], x.advantages[x.mask] > 0
        for outside in (r < 0.7, r > 1.4):
            assert (outside & positive).any()
            assert (outside & ~positive).any()
        assert ((r > 3) & ~positive).any()
        assert ((r > 0.9) & (r < 1.15)).any() or name == "verl-gspo"


@pytest.mark.parametrize("name", THEIR_ADVANTAGES)
def test_advantages_of_the_dialect(name):
    x = SimpleNamespace(
        rewards=torch.randn(8, dtype=F64),
        group_ids=torch.tensor([5, -1, 5, 7, -1, 7, 5, 7]),
        token_rewards=torch.randn(8, 6, dtype=F64),
        values=torch.randn(8, 6, dtype=F64),
        mask=batch("verl").mask,
        gamma=0.9,
        lam=0.8,
    )
    if name in ("trl-group", "trl-batch"):
        x.rewards[0] = torch.nan
    actual = eval(f"advantages.{ADVANTAGE_CALLS[name]}", {"advantages": fastpg.advantages} | vars(x))
    torch.testing.assert_close(actual, THEIR_ADVANTAGES[name](x), rtol=1e-10, atol=1e-15)


# ---- the page


def test_every_row_of_the_page_has_a_test():
    assert len(re.findall(r"^\| id ", PAGE, re.MULTILINE)) == len(TABLES) == 2
    assert list(LOSS_CALLS) == list(THEIRS)
    assert list(ADVANTAGE_CALLS) == list(THEIR_ADVANTAGES)


@pytest.mark.parametrize("name", [*GRPO_LOSSES, "gspo", "sequence", "token"])
def test_a_name_of_trls_is_answered_by_its_call(name):
    """GRPO_LOSSES is held to the installed TRL by its own tests; "sequence" and "token" are levels of its ratio."""
    row = {"sequence": "trl-gspo", "token": "trl-bnpo"}.get(name, f"trl-{name}")
    with pytest.raises(TypeError) as error:
        fastpg.policy_loss(-torch.ones(2, 3, requires_grad=True), None, torch.ones(2), objective=name)
    call = f"in TRL it is objective=fastpg.{LOSS_CALLS[row]};"
    assert f"got {name!r}: what this name means differs between libraries; {call}" in str(error.value)


def test_every_objective_estimator_and_reduction_is_on_the_page():
    named = {c.__name__ for c in fastpg.Objective.__subclasses__() if c.__name__ in fastpg.__all__} | {"KLPenalty"}
    documented = set(re.findall(r"`(?:kl=)?(\w+)\(", PAGE))
    assert len(named) == 13
    assert documented >= named
    estimators = ["reward_to_go", "value_baseline", "gae", "grpo", "rloo", "reinforce_plus_plus", "gigpo", "vineppo"]
    for name in estimators:
        assert callable(getattr(fastpg.advantages, name))
        assert f"| `{name}" in PAGE
    for reduction in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"):
        assert f'| `"{reduction}"` |' in PAGE


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_block_of_the_page_runs(block):
    names = {
        "torch": torch,
        "fastpg": fastpg,
        "hidden": torch.randn(4, 5, 8, requires_grad=True),
        "head": torch.randn(20, 8),
        "tokens": torch.randint(0, 20, (4, 5)),
        "mask": torch.rand(4, 5) > 0.2,
        "old_logprobs": -torch.rand(4, 5) - 2,
        "advantages": torch.randn(4),
        "rewards": torch.randn(4),
        "group_ids": torch.tensor([0, 0, 1, 1]),
    }
    exec(block, names)
    names["loss"].backward()
    assert names["loss"].isfinite()
    assert names["hidden"].grad.isfinite().all()
