"""What a support leaves out reaches nothing: masked positions' sets, logits outside of a set, rows with nothing to choose."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import random_problem
from sampled_sets import MIXED, logprobs_over, random_sets, sampled_over
from schedules import BACKENDS

from fastpg import (
    CISPO,
    ImportanceWeighted,
    LMHead,
    Reinforce,
    Support,
    kept,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    selective_logprobs,
)
from fastpg.crosscheck.cases import Inputs

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
V = 150
CHECKS = pytest.mark.parametrize("check", [True, False])
FUNCTIONS = pytest.mark.parametrize("function", ["logprobs", "loss", "selective"])


def problem(rows: int = 24, dtype: torch.dtype = f32, **options) -> tuple[Inputs, torch.Tensor]:
    x = random_problem(rows, V, dtype, hidden_size=16, bias=True, **options)
    members = random_sets(x.tokens, V, MIXED)
    return sampled_over(x, members), members


def within_range(x: Inputs, members: torch.Tensor) -> Inputs:
    """Without the rows whose 1 - p is too small for one pass, which computes them again: it holds sums from 2^-90 on."""
    logprobs, _ = logprobs_over(x, members)
    return replace(x, mask=x.keep() & ((logprobs < -(2.0**-80)) | (members.sum(1) == 1)))


def results(function: str, x: Inputs, support: Support | None, backend: str, **options) -> dict[str, torch.Tensor]:
    """Everything that comes out: values, and the gradients of a sum of them."""
    x, options = x.leaves(), {"mask": x.mask, "support": support, "backend": backend, **options}
    if function == "selective":
        logits = (x.hidden.float() @ x.head.weight.float().T).to(x.hidden.dtype).detach().requires_grad_()
        found = selective_logprobs(logits, x.tokens, entropy=True, **options)
        (found.logprobs * x.advantages + found.entropy).sum().backward()
        return {"logp": found.logprobs, "entropy": found.entropy, "dlogits": logits.grad}
    if function == "loss":
        out = linear_policy_loss(
            x.hidden, x.head, x.tokens, x.old_logprobs, x.advantages, objective=CISPO(), reduction="sum", **options
        )
        return {"logp": out.logprobs, "loss": out.loss.detach(), **x.gradients(out.loss)}
    found = linear_logprobs(x.hidden, x.head, x.tokens, entropy=True, **options)
    total = (found.logprobs * x.advantages.to(found.logprobs) + found.entropy).sum()
    return {"logp": found.logprobs.detach(), "entropy": found.entropy.detach(), **x.gradients(total)}


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value.isfinite().all(), name
        assert torch.equal(got[name], value), name


# ---- masked positions


def with_garbage(members: torch.Tensor, keep: torch.Tensor) -> Support:
    """The sets; at masked positions empty ones, repeated ids, ids outside the vocabulary, others' tokens, or `whole`."""
    garbage = [[], [5, 5, 5], [-7, 2**31 - 1], [V], list(range(V)) + [0] * 300, None]
    sets = [row.nonzero()[:, 0] if k else garbage[n % 6] for n, (row, k) in enumerate(zip(members, keep.tolist(), strict=True))]
    return Support.from_lists(sets)


@BACKENDS
@CHECKS
@FUNCTIONS
@pytest.mark.parametrize("how", ["mask", "-100", "kept"])
def test_sets_at_masked_positions_may_be_anything(backend, check, function, how):
    if (function, how) == ("selective", "kept"):
        how = "mask"
    x, members = problem(36)
    keep = torch.rand(36) > 0.5
    mask = keep if how == "mask" else None if how == "-100" else kept(keep)
    x = replace(x, tokens=torch.where(keep, x.tokens, -100) if how == "-100" else x.tokens)
    options = {"mask": mask, "check": check}
    got = results(function, x, with_garbage(members, keep), backend, **options)
    same(got, results(function, x, Support.from_mask(members), backend, **options))
    assert not got["logp"][~keep].any()
    assert not got["dlogits" if function == "selective" else "dX"][~keep].any()


@BACKENDS
@CHECKS
@FUNCTIONS
def test_all_positions_masked(backend, check, function):
    x, members = problem(6)
    nothing = torch.zeros(6, dtype=torch.bool)
    got = results(function, x, with_garbage(members, nothing), backend, mask=nothing, check=check)
    assert not any(value.any() for value in got.values())


@BACKENDS
@pytest.mark.parametrize("skips", [False, True])
@CHECKS
def test_kept_rows_are_the_mask(backend, skips, check):
    """With tokens of advantage 0 left out, or in; the sets follow their rows."""
    x, members = problem(30, masked=True)
    x = replace(x, advantages=torch.where(torch.arange(30) % 3 == 0, 0.0, x.advantages))
    support, rows = Support.from_mask(members), kept(x.mask, x.advantages if skips else None)
    got = results("loss", x, support, backend, mask=rows, check=check, skip_zero_weight=skips)
    want = results("loss", x, support, backend, skip_zero_weight=skips)
    skipped = want.pop("logp").isnan()
    assert torch.equal(got.pop("logp").isnan(), skipped)
    assert skipped.any() == skips
    assert torch.equal(skipped, skips & x.mask & (x.advantages == 0))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_zero_weights_are_skipped_beside_certain_rows():
    """A token may be both: it counts as skipped, and its log-probability is NaN as that of any skipped one."""
    x, members = problem(30)
    x = replace(x, advantages=torch.where(torch.arange(30) % 4 == 0, 0.0, x.advantages))
    out = linear_cispo_loss(x.hidden, x.head, x.tokens, None, x.advantages, support=Support.from_mask(members))
    certain, zero = members.sum(1) == 1, x.advantages == 0
    assert (certain & zero).any()
    assert out.metrics["skipped_tokens"] == zero.sum()
    assert torch.equal(out.logprobs.isnan(), zero)
    assert (out.logprobs[certain & ~zero] == 0).all()
    torch.testing.assert_close(out.logprobs[~zero].double(), logprobs_over(x, members)[0][~zero], rtol=1e-5, atol=1e-5)


# ---- rows whose set is their token alone


def alone(x: Inputs, every: int = 1) -> Support:
    return Support.from_lists([[int(t)] if n % every == 0 else None for n, t in enumerate(x.tokens)])


@BACKENDS
@FUNCTIONS
@CHECKS
def test_certain_rows(backend, function, check):
    """Every second row: logp 0, entropy 0, no gradient, and none of it in the head's."""
    x, _ = problem(20)
    got = results(function, x, alone(x, 2), backend, check=check)
    others = torch.arange(20) % 2 == 1
    want = results(function, x, None, backend, mask=others)
    for name in got.keys() - {"loss"}:
        rows = slice(None) if name in ("dW", "db") else others
        torch.testing.assert_close(got[name][rows], want[name][rows], rtol=1e-5, atol=1e-6)
    for name in {"logp", "entropy", "dX", "dlogits"} & got.keys():
        assert not got[name][~others].any(), name


@BACKENDS
@CHECKS
@FUNCTIONS
@pytest.mark.parametrize("dtype", [f32, f16], ids=str)
def test_nothing_but_certain_rows(backend, check, function, dtype):
    x, _ = problem(9, dtype)
    got = results(function, x, alone(x), backend, check=check)
    assert not got.pop("loss", torch.zeros(())).any()  # CISPO's term is a multiple of logp
    assert all(value is not None and not value.any() for value in got.values())


@BACKENDS
@pytest.mark.parametrize("function", ["logprobs", "loss"])
def test_certain_rows_are_not_computed_where_the_host_may_read(backend, function):
    """Their hidden states are not read."""
    x, _ = problem(20)
    spoilt = replace(x, hidden=x.hidden.index_fill(0, torch.arange(0, 20, 2), torch.nan))
    same(results(function, spoilt, alone(x, 2), backend), results(function, x, alone(x, 2), backend))


@BACKENDS
@CHECKS
@pytest.mark.parametrize("objective", [ImportanceWeighted(), lambda logp, old, a: a * logp.exp() - old], ids=["iw", "users"])
def test_the_loss_and_the_metrics_count_certain_rows(backend, check, objective):
    """As policy_loss does with log-probabilities of 0: their ratio is exp(-old), and their entropy is 0."""
    x, members = problem(30, masked=True)
    x, old = within_range(x, members), logprobs_over(x, members)[0].float() - 0.2
    support, given = Support.from_mask(members), {"objective": objective, "mask": x.mask}
    arguments = x.hidden, x.head, x.tokens
    options = {"support": support, "backend": backend, "check": check, "entropy": True}
    out = linear_policy_loss(*arguments, old, x.advantages, **given, **options)
    ready = linear_logprobs(*arguments, mask=x.mask, support=support, entropy=True)
    want = policy_loss(ready.logprobs, old, x.advantages, **given)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-6)
    metrics = out.metrics.to_dict()
    assert metrics.pop("recomputed_tokens") == 0
    assert metrics["entropy"] == pytest.approx(float(ready.entropy.sum() / x.mask.sum()), rel=1e-5)
    expected = want.metrics.to_dict()
    expected.pop("recomputed_tokens")
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert metrics["tokens"] == x.mask.sum()


@BACKENDS
@FUNCTIONS
@pytest.mark.parametrize("options", [{}, {"masked": True, "temperature": "per-token"}, {"softcap": 5.0, "lora": 3}], ids=str)
def test_without_checks_as_with_them(backend, function, options):
    """But for rounding: without checks small sets are not gathered, as the host does not know their number."""
    x, members = problem(30, **options)
    x = replace(within_range(x, members), old_logprobs=(logprobs_over(x, members)[0] - 0.1).float())
    with_checks, without = (results(function, x, Support.from_mask(members), backend, check=check) for check in (True, False))
    for name, value in with_checks.items():
        tolerance = 0.0 if name == "dlogits" else 1e-5
        torch.testing.assert_close(without[name], value, rtol=tolerance, atol=tolerance, msg=name)


@BACKENDS
def test_large_sets_have_the_same_bits_without_checks(backend):
    x = random_problem(20, 200, f32)
    members = torch.rand(20, 200) < 0.5
    support = Support.from_mask(members.scatter(1, x.tokens[:, None], True))
    options = {"support": support, "entropy": True, "backend": backend}
    with_checks, without = (linear_logprobs(x.hidden, x.head, x.tokens, check=c, **options) for c in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_checks, without, strict=True))


@BACKENDS
@FUNCTIONS
def test_without_checks_a_rows_own_token_is_in_its_set(backend, function):
    """As if `with_tokens` had added it: an engine may have left it out."""
    x, members = problem(30, masked=True)
    bare = Support.from_mask(members.scatter(1, x.tokens[:, None], members.sum(1, keepdim=True) == V))
    got = results(function, x, bare, backend, check=False)
    same(got, results(function, x, bare.with_tokens(x.tokens), backend, check=False))
    same(got, results(function, x, Support.from_mask(members), backend, check=False))


# ---- logits outside of a set

UNUSED = torch.arange(3, V, 7)  # in no set


def poisoned(kind: str, **options) -> tuple[Inputs, Inputs, Support]:
    """A problem, the same one with something else in the columns that are in no set, and the sets."""
    x = random_problem(20, V, bf16 if kind == "bf16" else f32, hidden_size=16, bias=True, **options)
    inside = torch.ones(V, dtype=torch.bool).index_fill(0, UNUSED, False)
    x = replace(x, tokens=torch.where(inside[x.tokens], x.tokens, x.tokens - 1))
    support = Support.from_mask(random_sets(x.tokens, V, MIXED) & inside)
    weight, bias = x.head.weight.clone(), x.head.bias.clone()
    if "bias" in kind:
        bias[UNUSED] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])[torch.arange(len(UNUSED)) % 4]
    elif kind == "nan weights":
        weight[UNUSED] = torch.tensor([torch.nan, torch.inf])[torch.arange(len(UNUSED)) % 2, None]
    else:  # finite, but their logits are not
        weight[UNUSED] = torch.randn(len(UNUSED), 16).sign().to(weight) * 3e38
    return x, replace(x, head=replace(x.head, weight=weight, bias=bias)), support


@BACKENDS
@CHECKS
@pytest.mark.parametrize("kind", ["bias", "bias, softcap", "weights", "bf16"])
def test_what_the_logits_are_outside_of_every_set(backend, check, kind):
    """NaN, infinities, and logits that overflow."""
    x, spoilt, support = poisoned(kind, softcap=5.0 if "softcap" in kind else None)
    for function in ("logprobs", "loss"):
        got, want = (results(function, p, support, backend, check=check) for p in (spoilt, x))
        same(got, want)
        assert not got["dW"][UNUSED].any()
        assert not got["db"][UNUSED].any()


@BACKENDS
@pytest.mark.parametrize("function", ["logprobs", "loss"])
def test_weights_of_nan_outside_of_every_set(backend, function):
    """They reach no value, and no gradient of the head. (dX is a product with all of the weight, where 0 times NaN is NaN.)"""
    x, spoilt, support = poisoned("nan weights")
    got, want = (results(function, p, support, backend) for p in (spoilt, x))
    for found in (got, want):
        found.pop("dX")
    same(got, want)


@BACKENDS
@pytest.mark.parametrize("outputs", [("logsumexp", "mean_logits"), ("argmax", "rank", "log_sum_sq_probs")], ids=str)
def test_statistics_do_not_see_what_is_outside(backend, outputs):
    x, spoilt, support = poisoned("bias")
    call = partial(linear_logprobs, tokens=x.tokens, support=support, outputs=outputs, top_k=4, backend=backend)
    got, want = (call(p.hidden, p.head) for p in (spoilt, x))
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name


@BACKENDS
@CHECKS
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_ready_logits_outside_of_a_set(backend, check, dtype):
    """In each row others are NaN or infinite."""
    tokens, logits = torch.randint(0, V, (20,)), torch.randn(20, V).to(dtype)
    members = random_sets(tokens, V, MIXED)
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(V) % 3].to(dtype)
    found = []
    for z in (logits, torch.where(members, logits, poison)):
        leaf, options = z.clone().requires_grad_(), {"entropy": True, "backend": backend, "check": check}
        out = selective_logprobs(leaf, tokens, support=Support.from_mask(members), **options)
        (out.logprobs - out.entropy).sum().backward()
        found.append({"logp": out.logprobs, "entropy": out.entropy, "dlogits": leaf.grad})
    same(found[1], found[0])
    assert not found[1]["dlogits"][~members].any()


@BACKENDS
@FUNCTIONS
def test_nan_inside_of_a_set_is_not_hidden(backend, function):
    x, members = problem(12)
    members[:, 70] = torch.arange(12) % 2 == 0
    members.scatter_(1, x.tokens[:, None], True)
    members[:, 71] |= members.sum(1) == 1
    x.head.weight[70] = torch.nan
    logp = results(function, x, Support.from_mask(members), backend)["logp"]
    assert torch.equal(logp.isnan(), members[:, 70])


# ---- beside what a head and a training loop have


@BACKENDS
@pytest.mark.parametrize("function", ["logprobs", "loss"])
def test_gradients_into_a_buffer(backend, function):
    x, members = problem(20)
    buffer, support = torch.ones(V, 16), Support.from_mask(members)
    want = results(function, x, support, backend)
    leaf = x.head.weight.detach().clone().requires_grad_()
    head = LMHead(leaf, x.head.bias, weight_grad=buffer)
    if function == "loss":
        options = {"objective": CISPO(), "reduction": "sum", "support": support, "backend": backend}
        linear_policy_loss(x.hidden, head, x.tokens, x.old_logprobs, x.advantages, **options).loss.backward()
    else:
        found = linear_logprobs(x.hidden, head, x.tokens, support=support, entropy=True, backend=backend)
        (found.logprobs * x.advantages + found.entropy).sum().backward()
    assert leaf.grad is None
    torch.testing.assert_close(buffer - 1, want["dW"], rtol=1e-4, atol=1e-5)


@BACKENDS
def test_autocast_checkpointing_and_two_backwards(backend):
    x, members = problem(20)
    support = Support.from_mask(members)
    narrow = replace(
        x, hidden=x.hidden.bfloat16(), head=replace(x.head, weight=x.head.weight.bfloat16(), bias=x.head.bias.bfloat16())
    )
    with torch.autocast("cpu", bf16):
        cast = results("loss", x, support, backend)
    assert torch.equal(cast["logp"], results("loss", narrow, support, backend)["logp"])

    def total(hidden):
        found = linear_logprobs(hidden, x.head, x.tokens, support=support, entropy=True, backend=backend)
        return (found.logprobs + found.entropy).sum()

    hidden = x.hidden.clone().requires_grad_()
    (want,) = torch.autograd.grad(total(hidden), hidden)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(total, hidden, use_reentrant=False), hidden)
    assert torch.equal(got, want)
    loss = linear_policy_loss(
        hidden, x.head, x.tokens, None, x.advantages, objective=Reinforce(), support=support, backend=backend
    ).loss
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(2 * loss, hidden)
    assert torch.equal(again, 2 * once)
