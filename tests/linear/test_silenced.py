"""Rows whose gradient is 0 leave the products of the gradients. These are counted from outside, and nothing else changes."""

from dataclasses import replace

import pytest
import torch
from problems import check_result, random_problem
from schedules import BACKENDS, one_pass, two_pass

from fastpg import CISPO, KLPenalty, LMHead, PPOClip, linear_logprobs, linear_policy_loss, policy_loss
from fastpg.crosscheck.cases import Inputs
from fastpg.linear.rows import move_rows
from fastpg.tiles import products
from fastpg.tools.memory import transient_bytes

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
CLIP = PPOClip(0.2)
BOTH = pytest.mark.parametrize("schedule", [one_pass, two_pass], ids=lambda f: f.__name__)
SMALLEST = 22 * 2**20  # a workspace of few rows


def clipped(rows: int, vocab: int, dtype: torch.dtype = f32, share: float = 0.5, **options) -> Inputs:
    """A problem in which a clip at 0.2 silences every n-th row, so that `share` of them are left."""
    x = random_problem(rows, vocab, dtype, **options)
    with torch.no_grad():
        logprobs = linear_logprobs(x.hidden, x.head, x.tokens, temperature=x.temperature, backend="torch").logprobs.float()
    advantages = torch.where(torch.arange(rows) % 3 == 0, -1.0, 1.0) * (1 + torch.rand(rows))
    silenced = torch.arange(rows) % 100 >= 100 * share
    old = torch.where(silenced, logprobs - advantages.sign(), logprobs + 0.01)
    return replace(x, old_logprobs=old, advantages=advantages)


@pytest.fixture
def multiplied(monkeypatch) -> list[float]:
    """The multiply-adds of every matrix product, in order."""
    plain, found = products._multiply, []

    def counting(a, b, *others, **options):
        found.append(a.shape[0] * a.shape[1] * b.shape[1])
        return plain(a, b, *others, **options)

    monkeypatch.setattr(products, "_multiply", counting)
    return found


@pytest.mark.parametrize("workspace", [None, SMALLEST])
def test_one_pass_takes_one_product_and_half_of_two(multiplied, workspace):
    x = clipped(1024, 2000, hidden_size=64)
    whole = 1024 * 2000 * 64
    for skip, expected in ((None, 2), (True, 2), (False, 3)):
        multiplied.clear()
        out = one_pass(x, CLIP, workspace=workspace, skip_silenced=skip)
        assert sum(multiplied) / whole == pytest.approx(expected, rel=0.03)
        assert out.metrics["silenced_tokens"] == (500 if skip is not False else 0)
        assert out.metrics["work_saved"] == pytest.approx(2 / 3 * (500 / 1024) if skip is not False else 0)


def test_two_passes_take_one_product_and_half_of_three(multiplied):
    x = clipped(1024, 2000, hidden_size=64)
    whole = 1024 * 2000 * 64
    for skip, expected in ((None, 2.5), (False, 4)):
        multiplied.clear()
        leaves = x.leaves()
        found = linear_logprobs(leaves.hidden, leaves.head, x.tokens, skip_silenced=skip)
        policy_loss(found.logprobs, x.old_logprobs, x.advantages, objective=CLIP).loss.backward()
        assert sum(multiplied) / whole == pytest.approx(expected, rel=0.03)


@BOTH
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("workspace", [None, SMALLEST])
def test_gradients_are_those_of_all_rows(schedule, dtype, workspace):
    x = clipped(600, 1500, dtype, bias=True, temperature="per-token", masked=True, lora=4, softcap=20.0)
    plain, skipped, again = (schedule(x, CLIP, skip_silenced=s, workspace=workspace) for s in (False, True, True))
    for name in ("logp", "loss"):
        assert torch.equal(plain[name], skipped[name]), name
    assert all(torch.equal(value, again[name]) for name, value in skipped.items())
    assert schedule is two_pass or dtype == f16 or skipped.metrics["silenced_tokens"] > 100
    check_result(x, skipped)


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_where_all_are_silenced_nothing_is_multiplied_after_product_1(multiplied, schedule, masked):
    x = clipped(300, 500, bias=True, lora=3, share=0, masked=masked)
    multiplied.clear()
    with torch.no_grad():
        linear_logprobs(x.hidden, x.head, x.tokens, mask=x.mask)
    forward = sum(multiplied)
    multiplied.clear()
    out = schedule(x, CLIP)
    assert sum(multiplied) == pytest.approx(forward, rel=0.03)  # dA of LoRA is a small product of its own
    for name in ("dX", "dW", "db", "dA", "dB"):
        assert not out[name].any(), name
    if schedule is one_pass:
        assert out.metrics["silenced_tokens"] == x.keep().sum()
        assert out.metrics["work_saved"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("workspace", [None, SMALLEST])
def test_beside_rows_that_are_computed_again(dtype, workspace):
    """Both kinds leave the first products 2 and 3; only the silenced ones are out for good. In bf16 dW is written twice."""
    x = clipped(600, 1500, dtype, bias=True)
    x.old_logprobs[8::50] = -60.0  # r is huge, but that of a token with A < 0 is not clipped from above
    x.advantages[8::50] = torch.tensor([1.0, -1.0]).repeat(6)
    x.old_logprobs[10::50] = -60.0
    out = one_pass(x, CISPO(5.0), workspace=workspace)
    assert out.metrics["recomputed_tokens"] > 0
    assert out.metrics["silenced_tokens"] == 0
    check_result(x, out)
    x.advantages[8::50] = x.advantages[10::50] = 1.0
    out = one_pass(x, CLIP, workspace=workspace)
    check_result(x, out)
    assert out.metrics["silenced_tokens"] > 200
    assert out.metrics["recomputed_tokens"] > 0


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@BOTH
def test_with_one_input_frozen(schedule, frozen):
    x = clipped(400, 700)

    def gradient(skip: bool) -> torch.Tensor:
        hidden, weight = x.hidden.clone(), x.head.weight.clone()
        wanted = weight if frozen == "hidden" else hidden
        wanted.requires_grad_()
        if schedule is one_pass:
            loss = linear_policy_loss(
                hidden, weight, x.tokens, x.old_logprobs, x.advantages, objective=CLIP, skip_silenced=skip
            ).loss
        else:
            found = linear_logprobs(hidden, weight, x.tokens, skip_silenced=skip)
            loss = policy_loss(found.logprobs, x.old_logprobs, x.advantages, objective=CLIP).loss
        loss.backward()
        return wanted.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-7)


@BOTH
def test_added_to_a_buffer(schedule):
    x = clipped(300, 400)
    buffers = []
    for skip in (True, False):
        buffers.append(torch.ones_like(x.head.weight))
        weight = x.head.weight.clone().requires_grad_()
        leaves = x.hidden.clone().requires_grad_(), LMHead(weight, weight_grad=buffers[-1])
        if schedule is one_pass:
            loss = linear_policy_loss(*leaves, x.tokens, x.old_logprobs, x.advantages, objective=CLIP, skip_silenced=skip).loss
        else:
            found = linear_logprobs(*leaves, x.tokens, skip_silenced=skip)
            loss = policy_loss(found.logprobs, x.old_logprobs, x.advantages, objective=CLIP).loss
        loss.backward()
    torch.testing.assert_close(*buffers, rtol=1e-5, atol=1e-6)
    assert (buffers[0] != 1).any()


def test_a_kl_penalty_or_an_entropy_bonus_keeps_a_clipped_row():
    x = clipped(300, 500, share=0)
    x = replace(x, ref_logprobs=x.old_logprobs - 0.5)
    out = one_pass(x, CLIP, kl=KLPenalty(0.1))
    assert out.metrics["silenced_tokens"] == 0
    check_result(x, out)
    gradients = []
    for skip in (True, False):
        leaves = x.leaves()
        found = linear_logprobs(leaves.hidden, leaves.head, x.tokens, entropy=True, skip_silenced=skip)
        loss = policy_loss(
            found.logprobs, x.old_logprobs, x.advantages, objective=CLIP, entropies=found.entropy, entropy_coef=0.1
        ).loss
        gradients.append(torch.autograd.grad(loss, leaves.hidden)[0])
    assert torch.equal(*gradients)
    assert gradients[0].any(1).all()


@BOTH
def test_nan_is_not_hidden(schedule):
    """A row of NaN has no gradient of 0, whatever a loss makes of its log-probability."""
    x = clipped(300, 400)
    x.hidden[299] = torch.nan
    out = schedule(x, CLIP)
    assert out["loss"].isnan()
    assert out["dX"][299].isnan().all()
    assert out["dW"].isnan().all()
    leaves = x.leaves()
    logprobs = linear_logprobs(leaves.hidden, leaves.head, x.tokens).logprobs
    torch.where(logprobs.isnan(), 0, logprobs).sum().backward()
    assert leaves.head.weight.grad.isnan().any()


@BACKENDS
def test_without_checks_all_rows_are_computed(multiplied, backend):
    x = clipped(300, 400)
    leaves = x.leaves()
    out = linear_policy_loss(
        leaves.hidden, leaves.head, x.tokens, x.old_logprobs, x.advantages, objective=CLIP, check=False, backend=backend
    )
    assert out.metrics["silenced_tokens"] == 0
    with torch.no_grad():
        assert out.metrics["work_saved"] == 0


@BACKENDS
def test_kernels_skip_them_where_they_are_asked_to(backend):
    x = clipped(300, 400, bf16, bias=True)
    found = {}
    for skip in (None, False, True):
        leaves = x.leaves()
        out = linear_policy_loss(
            leaves.hidden, leaves.head, x.tokens, x.old_logprobs, x.advantages, objective=CLIP, backend=backend,
            skip_silenced=skip,
        )  # fmt: skip
        out.loss.backward()
        found[skip] = out, leaves.hidden.grad, leaves.head.weight.grad
    silenced = [found[skip][0].metrics["silenced_tokens"].item() for skip in (None, False, True)]
    assert silenced == [150 if backend == "torch" else 0, 0, 150]
    assert torch.equal(found[True][0].logprobs, found[False][0].logprobs)
    for a, b in zip(found[True][1:], found[False][1:], strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=1e-4)
    metrics = [found[skip][0].metrics.to_dict() for skip in (False, True)]
    for name in metrics[0].keys() - {"silenced_tokens", "work_saved"}:
        assert metrics[0][name] == metrics[1][name], name


@BOTH
def test_hardly_more_memory_is_taken(schedule):
    x = clipped(1024, 4000, hidden_size=64)

    def used(skip: bool) -> int:
        return transient_bytes(lambda: schedule(x, CLIP, workspace=24 * 2**20, skip_silenced=skip))

    assert used(True) <= used(False) + 100 * 1024  # which rows are where


def test_move_rows():
    for count in (0, 1, 5, 40):
        chosen = torch.zeros(40, dtype=torch.bool)
        chosen[torch.randperm(40)[:count]] = True
        x = torch.arange(40.0)[:, None].repeat(1, 3)
        order = move_rows(x, chosen, count)
        assert sorted(order.tolist()) == chosen.nonzero()[:, 0].tolist()
        assert torch.equal(x[:count, 0], order.float())
        stay = chosen[:count].nonzero()[:, 0]
        assert torch.equal(order[stay], stay)  # a row that may stay does


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"skip_silenced": 1}, TypeError, "skip_silenced must be True, False or None; got 1"),
        (
            {"skip_silenced": True, "check": False},
            ValueError,
            "skip_silenced=True needs check=True: the host reads how many rows are left",
        ),
    ],
)
def test_errors(options, error, words):
    x = random_problem(3, 7, f32)
    calls = (
        lambda: linear_policy_loss(x.hidden, x.head, x.tokens, x.old_logprobs, x.advantages, objective=CLIP, **options),
        lambda: linear_logprobs(x.hidden, x.head, x.tokens, **options),
    )
    for call in calls:
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == words
