"""Further statistics of rows from the one-pass sweep (`linear_policy_loss` with outputs=, top_k=) against float64 logits."""

import inspect
from dataclasses import replace

import pytest
import torch
from operations import counted
from problems import opcheck, random_problem
from schedules import BACKENDS, KERNEL_DEVICE
from token_statistics import EVERYTHING, ON_EACH, check, oracle, whole_numbers

from fastpg import (
    CISPO,
    LinearPolicyLoss,
    LMHead,
    PolicyLossOutput,
    PolicyLossStatistics,
    Support,
    TokenStatistics,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
)
from fastpg.crosscheck.cases import Inputs
from fastpg.linear.call import head_of
from fastpg.linear.operators import anchored_exp, target_logits
from fastpg.linear.outputs import OUTPUTS
from fastpg.tiles.structures import Asked, Chunk
from fastpg.tools.memory import transient_bytes

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def loss_of(x: Inputs, backend: str, **options) -> PolicyLossStatistics:
    return linear_policy_loss(
        x.hidden, x.head, x.tokens, x.old_logprobs, x.advantages, objective=CISPO(), mask=x.mask, temperature=x.temperature,
        backend=backend, **options,
    )  # fmt: skip


def statistics(x: Inputs, backend: str, top_k: int = 0, outputs=OUTPUTS, **options) -> TokenStatistics:
    """Every token has an advantage, so that all are computed; their old log-probabilities may be anything."""
    x = replace(x, advantages=torch.ones(len(x.tokens))).to(KERNEL_DEVICE if backend == "triton" else "cpu").leaves()
    found = loss_of(x, backend, outputs=outputs, top_k=top_k, **options)
    assert torch.equal(found.statistics.logprobs.nan_to_num(1), found.logprobs.nan_to_num(1))
    assert not any(v is not None and v.requires_grad for v in found.statistics)
    return TokenStatistics(*(None if v is None else v.cpu() for v in found.statistics))


def close(x: Inputs) -> Inputs:
    """With old log-probabilities of which no sum leaves its range."""
    return replace(x, old_logprobs=oracle(x).logprobs.float() + 0.1)


@ON_EACH
def test_every_option_of_a_head_at_once(backend, dtype):
    x = random_problem(70, 1200, dtype, **EVERYTHING, lora_dtype=f64 if dtype == f64 else f32)
    check(x, statistics(x, backend, 8), 8)


@ON_EACH
def test_confident_tokens(backend, dtype):
    """Half of the tokens have probabilities from 1/2 to 1 - 1e-12, the others are drawn at random."""
    x = random_problem(60, 2100, dtype)
    assert (oracle(x).logprobs > -1e-10).any()
    check(x, statistics(x, backend, 3), 3)


@BACKENDS
@pytest.mark.parametrize(("rows", "vocab", "top_k"), [(0, 17, 3), (1, 1, 1), (3, 2, 2), (130, 17, 8), (257, 1025, 5)])
def test_ragged_shapes(backend, rows, vocab, top_k):
    x = random_problem(rows, vocab, f32, bias=True)
    check(x, statistics(x, backend, top_k), top_k)


@BACKENDS
@pytest.mark.parametrize("frozen", [False, True], ids=["gradients", "no_grad"])
def test_over_several_tiles_and_chunks(backend, frozen):
    """The largest logits come late, then early: what was kept is replaced, or stays."""
    vocab = 2 * 1024 + 700
    for ends in ((-15, 15), (15, -15)):
        x = random_problem(300, vocab, f32, bias=True)
        x.head.bias.copy_(torch.linspace(*ends, vocab))
        workspace = 24 * 2**20
        with torch.set_grad_enabled(not frozen):
            check(x, statistics(x, backend, 8, workspace=workspace), 8)


@BACKENDS
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_of_equal_logits_the_first_one_comes_first(backend, dtype):
    x = whole_numbers(64, 3000, dtype)
    got, want = statistics(x, backend, 8), oracle(x, 8)
    for name in ("is_top1", "argmax", "rank", "top_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@BACKENDS
@pytest.mark.parametrize("off", [-1000, -80, -55, -30, 30, 55, 80, 1000])
def test_any_old_logprobs_will_do(backend, off):
    """Sums of squares leave the range of float32 at half the distance at which the sums do; such rows are computed again."""
    x = random_problem(40, 300, f32, temperature=0.5)
    old = oracle(x).logprobs.float() + off
    check(x, statistics(replace(x, old_logprobs=old), backend, 4), 4)


@BACKENDS
def test_improbable_tokens_whose_anchor_is_as_low_as_it_can_be(backend):
    """e^a is 2^-86, and E of the others is near it: their squares underflow, though they are most of sum p^2."""
    x = random_problem(40, 300, f32, bias=True)
    x.head.bias[7] = -60.0
    x = replace(x, tokens=torch.full((40,), 7), old_logprobs=torch.full((40,), -120.0))
    check(x, statistics(x, backend, 4), 4)


@BACKENDS
def test_of_rows_that_have_left_the_range_nothing_is_told_without_checks(backend):
    x = random_problem(9, 60, f32, bias=True)
    x.head.bias[7], x.head.bias[8] = -100.0, -50.0
    x.tokens[:] = torch.tensor([0, 1, 2, 3, 7, 8, 4, 5, 6])
    x.old_logprobs[:] = -1.0
    z = x.hidden @ x.head.weight.T + x.head.bias
    for k in (0, 2):
        got = statistics(x, backend, k, check=False)
        for name in ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits"):
            lost = [4, 5] if name == "log_sum_sq_probs" else [4]
            assert getattr(got, name).isnan().nonzero()[:, 0].tolist() == lost, name
        assert torch.equal(got.argmax, z.argmax(1))


@BACKENDS
def test_loss_gradients_and_metrics_are_those_without(backend):
    names = [name for name in OUTPUTS if name != "log_sum_sq_probs"]  # for which more rows are computed again
    x = random_problem(50, 400, f32, masked=True, bias=True)
    a, b = x.leaves(), x.leaves()
    plain, asked = loss_of(a, backend, entropy=True), loss_of(b, backend, outputs=names, top_k=3)
    assert type(plain) is PolicyLossOutput
    assert type(asked) is PolicyLossStatistics
    plain.loss.backward()
    asked.loss.backward()
    pairs = [(a.hidden, b.hidden), (a.head.weight, b.head.weight), (a.head.bias, b.head.bias)]
    for left, right in [(plain.loss.detach(), asked.loss.detach()), *((p.grad, q.grad) for p, q in pairs)]:
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)
        assert backend == "triton" or torch.equal(left, right)
    metrics = plain.metrics.to_dict()
    assert metrics.keys() == asked.metrics.to_dict().keys()
    for name, value in metrics.items():
        assert asked.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@BACKENDS
@pytest.mark.parametrize("name", OUTPUTS)
def test_one_at_a_time(backend, name):
    x = random_problem(20, 70, f32, masked=True)
    alone, together = statistics(x, backend, outputs=[name]), statistics(x, backend, 2)
    given = [field for field, value in zip(alone._fields, alone, strict=True) if value is not None]
    assert given == [field for field in alone._fields if field in ("logprobs", name)]
    if name == "is_top1":
        assert torch.equal(alone.is_top1, together.is_top1)
    else:
        torch.testing.assert_close(getattr(alone, name), getattr(together, name), rtol=1e-5, atol=1e-5)


@BACKENDS
def test_tokens_that_cost_no_work_have_none(backend):
    x = random_problem(30, 70, f32, masked=True)
    x.advantages[::3] = 0
    got = loss_of(x, backend, outputs=OUTPUTS, top_k=2).statistics
    keep = x.keep()
    skipped = keep & (x.advantages == 0)
    assert skipped.any()
    for name in ("logprobs", "entropy", "logsumexp", "mean_logits", "log_sum_sq_probs", "top_logprobs"):
        value = getattr(got, name)
        assert value[skipped].isnan().all(), name
        assert (value[~keep] == 0).all(), name
        assert value[keep & ~skipped].isfinite().all(), name
    for name in ("argmax", "rank", "top_ids"):
        assert (getattr(got, name)[skipped | ~keep] == -1).all(), name
    assert not got.is_top1[skipped | ~keep].any()
    every = loss_of(x, backend, outputs=OUTPUTS, top_k=2, skip_zero_weight=False).statistics
    check(x, every, 2)


@BACKENDS
def test_sequences_and_both_ways_to_check(backend):
    x = close(random_problem(24, 70, f32, masked=True))
    x = replace(x, advantages=torch.ones(24))
    packed = loss_of(x, backend, outputs=OUTPUTS, top_k=3).statistics
    options = {"objective": CISPO(), "outputs": OUTPUTS, "top_k": 3, "backend": backend}
    for check_values in (True, False):
        found = linear_policy_loss(
            x.hidden.view(4, 6, -1), x.head, x.tokens.view(4, 6), x.old_logprobs.view(4, 6), torch.ones(4),
            mask=None if x.mask is None else x.mask.view(4, 6), temperature=x.temperature, check=check_values, **options,
        ).statistics  # fmt: skip
        for name, a, b in zip(packed._fields, packed, found, strict=True):
            assert b.shape[:2] == (4, 6), name
            torch.testing.assert_close(a, b.flatten(0, 1), rtol=1e-5, atol=1e-5, msg=name)


@BACKENDS
@pytest.mark.parametrize("dtype", [f32, f16])
def test_over_the_sets_of_a_support(backend, dtype):
    """Sets of one, small ones, large ones and whole rows: as `linear_logprobs` has them."""
    x = random_problem(40, 900, dtype, masked=True, bias=True)
    x = replace(x, advantages=torch.ones(40))
    share = torch.tensor([0.0, 0.004, 0.4, 1.0])[torch.arange(40) % 4, None]
    members = torch.rand(40, 900) < share
    members[torch.arange(40), x.tokens] = True
    options = {"support": Support.from_mask(members), "outputs": OUTPUTS, "top_k": 4}
    leaves = x.leaves()
    got = loss_of(leaves, backend, **options)
    got.loss.backward()
    want = linear_logprobs(x.hidden, x.head, x.tokens, mask=x.mask, backend=backend, **options)
    for name, a, b in zip(want._fields, got.statistics, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5, msg=name)
    assert (want.entropy[::4] == 0).all()
    plain = x.leaves()
    loss_of(plain, backend, support=options["support"]).loss.backward()
    torch.testing.assert_close(leaves.hidden.grad, plain.hidden.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(leaves.head.weight.grad, plain.head.weight.grad, rtol=1e-3, atol=1e-6)


def test_the_module_and_cispo():
    x = random_problem(12, 40, f32)
    want = loss_of(x, "torch", outputs=("rank",), top_k=1)
    module = LinearPolicyLoss(objective=CISPO(), outputs=("rank",), top_k=1, backend="torch")
    arguments = x.hidden, x.head, x.tokens, x.old_logprobs, x.advantages
    for found in (module(*arguments), linear_cispo_loss(*arguments, outputs=("rank",), top_k=1, backend="torch")):
        assert torch.equal(found.loss, want.loss)
        assert torch.equal(found.statistics.rank, want.statistics.rank)
        assert torch.equal(found.statistics.top_ids, want.statistics.top_ids)


@pytest.mark.skipif(KERNEL_DEVICE != "cpu", reason="counts launches of the interpreter")
def test_asking_costs_one_launch_and_no_product():
    """Beside it, PyTorch completes the rows, as it does for a user's own objective."""

    def objective(logprobs, old, advantages):
        return (logprobs - old).exp() * advantages

    x = random_problem(20, 70, f32)

    def launches(**options) -> int:
        y = x.leaves()
        with counted() as found:
            linear_policy_loss(
                y.hidden, y.head, y.tokens, y.old_logprobs, y.advantages, objective=objective, backend="triton", **options
            ).loss.backward()
        return sum(count for name, count in found.counts.items() if name.startswith("launch"))

    assert launches(outputs=("mean_logits", "argmax"), top_k=4) == launches(entropy=True) + 1
    assert launches(outputs=("argmax", "entropy")) == launches(entropy=True)


def test_they_stay_within_a_small_workspace():
    rows, vocab, hidden_size = 2048, 8192, 64
    hidden, head = torch.randn(rows, hidden_size, requires_grad=True), torch.randn(vocab, hidden_size, requires_grad=True)
    tokens, ones, workspace = torch.randint(0, vocab, (rows,)), torch.ones(rows), 48 * 2**20

    def step(**options):
        return transient_bytes(
            lambda: linear_policy_loss(
                hidden, head, tokens, None, ones, objective=CISPO(), workspace=workspace, backend="torch", **options
            )
        )

    gradients = 4 * (hidden.numel() + head.numel())
    results = rows * (5 * 4 + 2 * 8 + 1 + 8 * (4 + 8))
    assert step(outputs=OUTPUTS, top_k=8) <= workspace + gradients + 2 * results


@pytest.mark.parametrize("backend", ["torch", "triton"] if KERNEL_DEVICE == "cpu" else ["torch"])
@pytest.mark.parametrize("asked", [Asked(*(True,) * 6, 3), Asked(argmax=True), Asked(top_k=2)], ids=str)
def test_operator(backend, asked):
    x = random_problem(256, 9, f32)
    chunk, head = Chunk(x.hidden, None, x.tokens, None), head_of(x.head)
    target = target_logits(chunk, head, backend)
    opcheck(anchored_exp, chunk, head, x.old_logprobs, target, torch.empty(256, 9), asked, backend)


@BACKENDS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
def test_under_torch_compile(backend):
    x = close(random_problem(12, 40, f32, masked=True))

    def call(hidden, weight):
        return linear_policy_loss(
            hidden, LMHead(weight), x.tokens, x.old_logprobs, x.advantages, objective=CISPO(), mask=x.mask, outputs=OUTPUTS,
            top_k=3, check=False, backend=backend,
        )  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = x.hidden.clone().requires_grad_(), x.head.weight.clone().requires_grad_()
    want, got = call(*inputs), compiled(*inputs)
    for name, a, b in zip(want.statistics._fields, want.statistics, got.statistics, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    for a, b in zip(torch.autograd.grad(want.loss, inputs), torch.autograd.grad(got.loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_arguments_have_the_names_of_linear_logprobs():
    one, two = (inspect.signature(f).parameters for f in (linear_policy_loss, linear_logprobs))
    for name in ("outputs", "top_k"):
        assert (one[name].annotation, one[name].default) == (two[name].annotation, two[name].default)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"outputs": "rank"}, TypeError, "outputs must be a sequence of names"),
        ({"outputs": ("ranks",)}, ValueError, "outputs must have names out of"),
        ({"outputs": ("rank", "rank")}, ValueError, "outputs must name each statistic once"),
        ({"top_k": 9}, ValueError, "top_k must be an int from 0 to 8; got 9"),
        ({"top_k": 8}, ValueError, "top_k must be at most V = 7, the number of tokens in the vocabulary; got 8"),
        ({"top_k": True}, TypeError, "top_k must be an int from 0 to 8; got True"),
    ],
)
def test_errors(options, error, words):
    x = random_problem(3, 7, f32)
    with pytest.raises(error) as raised:
        loss_of(x, "torch", **options)
    assert str(raised.value).startswith(words)
