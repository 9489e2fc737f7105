"""`support=`: softmax, loss, statistics and gradients over the sets of tokens that a sampler kept, against the float64 oracle.

Every schedule on every backend, for sets from the token alone to the whole vocabulary.
"""

import sys
from dataclasses import replace

import pytest
import torch
from objectives import OBJECTIVES
from problems import Result, check_result, random_problem
from sampled_sets import MIXED, check_outside, check_over, largest_sets, logprobs_over, random_sets, sampled_over
from schedules import BACKENDS, KERNEL_DEVICE, SCHEDULES, TORCH, one_pass, one_pass_triton, two_pass_triton

from fastpg import (
    CISPO,
    KLPenalty,
    LinearPolicyLoss,
    LMHead,
    PPOClip,
    Reinforce,
    Support,
    linear_cispo_loss,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    reference,
    selective_logprobs,
)
from fastpg.crosscheck.accuracy import logprob_tolerance
from fastpg.crosscheck.cases import Inputs, Settings
from fastpg.linear.outputs import OUTPUTS
from fastpg.linear.support import most_gathered
from fastpg.tiles import torch_tiles, triton_tiles
from fastpg.tiles.structures import TileShape

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ALL_DTYPES = pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
ON = [(b, d) for b in ("torch", "triton") for d in (f64, f32, bf16, f16) if (b, d) != ("triton", f64)]
ON_EACH = pytest.mark.parametrize(("backend", "dtype"), ON, ids=[f"{b}-{str(d)[6:]}" for b, d in ON])
EVERYTHING = {"bias": True, "softcap": 9.0, "logit_scale": 0.7, "temperature": "per-token", "masked": True, "lora": 5}
V = 1100


# ---- accuracy


@SCHEDULES
@ALL_DTYPES
@pytest.mark.parametrize("size", [1, 2, 8, 1000, V - 1, V, MIXED])
def test_sets_of_each_size(schedule, dtype, size):
    x = random_problem(24, V, dtype)
    members = random_sets(x.tokens, V, size)
    check_over(sampled_over(x, members), members, schedule, CISPO())


@pytest.mark.parametrize("schedule", TORCH, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [1, 2, 8, 1000, V - 1, V, MIXED])
def test_sets_of_each_size_in_float64(schedule, size):
    x = random_problem(24, V, f64)
    x = replace(x, old_logprobs=x.old_logprobs.double())
    members = random_sets(x.tokens, V, size)
    check_over(sampled_over(x, members), members, schedule, CISPO())


@SCHEDULES
@ALL_DTYPES
def test_the_largest_logits(schedule, dtype):
    """As top-k leaves them, where the rest has little probability; and the token, wherever it is."""
    x = random_problem(24, 300, dtype)
    members = largest_sets(x, 20)
    check_over(sampled_over(x, members), members, schedule, CISPO())


@SCHEDULES
@ALL_DTYPES
@pytest.mark.parametrize("size", [2, MIXED])
def test_every_head_option_at_once(schedule, dtype, size):
    x = random_problem(30, 300, dtype, **EVERYTHING, lora_dtype=f32)
    members = random_sets(x.tokens, 300, size)
    got = check_over(sampled_over(x, members), members, schedule, CISPO(), "sum" if dtype == f16 else "token-mean")
    assert got["dA"].any()


@SCHEDULES
@pytest.mark.parametrize(("rows", "vocab"), [(0, 17), (1, 1), (3, 2), (130, 9), (2, 2100)])
def test_ragged_shapes(schedule, rows, vocab):
    x = random_problem(rows, vocab, f32, bias=True)
    members = random_sets(x.tokens, vocab, MIXED)
    check_over(sampled_over(x, members), members, schedule, CISPO())


@pytest.mark.parametrize("schedule", TORCH, ids=lambda f: f.__name__)
def test_over_several_tiles_and_chunks(schedule):
    x = random_problem(600, 4500, f32, hidden_size=16)
    members = random_sets(x.tokens, 4500, MIXED)
    x = sampled_over(x, members)
    got = check_over(x, members, schedule, CISPO(), workspace=10 * 2**20)
    assert torch.equal(got["logp"], schedule(x, CISPO(), support=Support.from_mask(members))["logp"])


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_slices_of_the_vocabulary_on_kernels(dtype, monkeypatch):
    """The backward of two passes, whose slices begin in the middle of the sets' bytes."""
    monkeypatch.setattr(triton_tiles, "tile_shape", lambda head: TileShape(256, 136, 1, 256))
    x = random_problem(24, 500, dtype)
    members = random_sets(x.tokens, 500, MIXED)
    check_over(sampled_over(x, members), members, two_pass_triton, CISPO())


@SCHEDULES
@pytest.mark.parametrize("name", ["reinforce", "ppo-dual", "sapo", "cispo-both-bounds", "dppo-kl", "users-function"])
@pytest.mark.parametrize("kl", [None, KLPenalty(0.1), KLPenalty(0.1, "k2", True)], ids=str)
def test_objectives_and_kl_penalties(schedule, name, kl):
    """With rollout weights. Ratios keep away from jumps of the derivatives."""
    x = random_problem(30, 200, f32)
    members = random_sets(x.tokens, 200, MIXED)
    logprobs, _ = logprobs_over(x, members)
    log_ratio = torch.tensor([-1.0, -0.1, 0.1, 1.0])[torch.arange(30) % 4]
    ref, rollout = (logprobs + torch.randn(30)).float(), torch.rand(30) + 0.5
    x = replace(x, old_logprobs=(logprobs - log_ratio).float(), rollout_weights=rollout)
    x = x if kl is None else replace(x, ref_logprobs=ref)
    check_over(x, members, schedule, OBJECTIVES[name].objective, kl=kl)


@SCHEDULES
@pytest.mark.parametrize("whole", [True, False], ids=["by whole", "by ids"])
def test_the_whole_vocabulary_is_no_support(schedule, whole):
    """Bit for bit: as `whole`, with no ids at all, and as a list of every id."""
    x = random_problem(24, 300, f32, bias=True, masked=True)
    every = Support.from_mask(torch.ones(24, 300, dtype=torch.bool))
    assert len(every.ids) == 0
    if not whole:
        every = Support(torch.arange(300).repeat(24), torch.arange(25) * 300)
    got, want = schedule(x, CISPO(), support=every), schedule(x, CISPO())
    for name, value in want.items():
        assert torch.equal(got[name], value), name


# ---- statistics


def statistics(x: Inputs, support: Support | None, backend: str, outputs=OUTPUTS, top_k: int = 0, **options):
    x = x.to(KERNEL_DEVICE if backend == "triton" else "cpu")
    support = None if support is None else support.to(x.tokens.device)
    found = linear_logprobs(
        x.hidden, x.head, x.tokens, mask=x.mask, support=support, temperature=x.temperature, outputs=outputs, top_k=top_k,
        backend=backend, **options,
    )  # fmt: skip
    return type(found)(*(None if v is None else v.cpu() for v in found))


def check_statistics(x: Inputs, members: torch.Tensor, got, top_k: int) -> None:
    """Floats within the promise. Ids and ranks exactly: whoever calls has no two logits that are nearly equal."""
    want, wide, keep = logprobs_over(x, members, outputs=OUTPUTS, top_k=top_k), x.leaves(f64), x.keep()
    z = reference.logits(wide.hidden, wide.head, wide.temperature).detach()
    tolerance = logprob_tolerance(z.abs().amax(1) if len(z) else z.new_zeros(0), x.hidden.dtype, x.head.hidden_size, "cpu")
    for name in ("logprobs", "entropy", "logsumexp", "mean_logits", "log_sum_sq_probs", "top_logprobs"):
        value, exact = getattr(got, name).double(), getattr(want, name)
        limit = tolerance * want.logprobs.abs().clamp(max=1) if name == "logprobs" else 2 * tolerance
        error = torch.where(value == exact, 0, (value - exact).abs())
        assert (error <= (limit if exact.dim() == 1 else limit[:, None]) + 1e-37).all(), (name, error.max())
    for name in ("is_top1", "argmax", "rank", "top_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert (got.argmax[~keep] == -1).all()


def spread(x: Inputs) -> Inputs:
    """The problem without the rows in which two logits are nearly equal."""
    wide = x.leaves(f64)
    z = reference.logits(wide.hidden, wide.head, wide.temperature).detach()
    return replace(x, mask=x.keep() & (z.sort(1).values.diff(dim=1) > 1e-5).all(1))


@ON_EACH
def test_statistics(backend, dtype):
    x = spread(random_problem(30, 300, dtype, **EVERYTHING, lora_dtype=f64 if dtype == f64 else f32))
    assert x.keep().sum() > 8
    members = random_sets(x.tokens, 300, MIXED)
    check_statistics(x, members, statistics(x, Support.from_mask(members), backend, top_k=8), 8)


@BACKENDS
@pytest.mark.parametrize(("size", "vocab"), [(1, 40), (2, 40), (8, 40), (1000, V), (V - 1, V), (1, 1), (1, 2)])
def test_statistics_of_each_size(backend, size, vocab):
    """Of sets with fewer tokens than top_k, the rest is -inf and -1."""
    x = spread(random_problem(18, vocab, f32, bias=True))
    members, top_k = random_sets(x.tokens, vocab, size), min(8, vocab)
    got = statistics(x, Support.from_mask(members), backend, top_k=top_k)
    check_statistics(x, members, got, top_k)
    assert (got.top_ids[x.keep(), size:] == -1).all()
    assert (got.top_logprobs[x.keep(), size:] == -torch.inf).all()


@BACKENDS
def test_banned_tokens_of_a_set_are_among_its_largest_as_no_token(backend):
    """A member with a bias of -inf has no probability, and no id outside of the set stands in its place."""
    bias = torch.zeros(12).index_fill(0, torch.tensor([5, 0]), -torch.inf)
    hidden, weight, tokens = torch.randn(3, 4), torch.randn(12, 4), torch.tensor([1, 2, 3])
    support = Support.from_lists([[1, 5, 0], [5, 2, 7], None])
    found = linear_logprobs(hidden, LMHead(weight, bias), tokens, support=support, top_k=3, backend=backend)
    assert found.top_ids[:2, 1:].tolist() == [[-1, -1], [2 if found.top_ids[1, 0] == 7 else 7, -1]]
    assert found.top_ids[0, 0] == 1
    assert found.top_logprobs[:2, 2].tolist() == [-torch.inf] * 2
    assert (found.top_ids[2] >= 0).all()


@BACKENDS
@pytest.mark.parametrize("name", OUTPUTS)
def test_each_statistic_alone_has_the_bits_of_all_together(backend, name):
    """Also those that skip rows whose set is their token alone."""
    x = random_problem(18, 200, bf16, masked=True)
    support = Support.from_mask(random_sets(x.tokens, 200, MIXED))
    whole, alone = statistics(x, support, backend, top_k=5), statistics(x, support, backend, [name])
    assert torch.equal(getattr(alone, name), getattr(whole, name))
    assert torch.equal(alone.logprobs, whole.logprobs)


@BACKENDS
@pytest.mark.parametrize("names", ["entropy", "logsumexp", "mean_logits", "logprobs entropy logsumexp mean_logits"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_gradients_of_statistics(backend, dtype, names):
    """Errors of terms that may cancel are judged on the scale of a row without cancellation."""
    x = random_problem(30, 300, dtype, **EVERYTHING, lora_dtype=f32)
    members = random_sets(x.tokens, 300, MIXED)
    weights = {name: torch.randn(30) for name in names.split()}

    def gradients(weights, call, leaves, support):
        outputs = tuple(name for name in weights if name != "logprobs") or ("logsumexp",)
        found = call(
            leaves.hidden, leaves.head, leaves.tokens, mask=leaves.mask, temperature=leaves.temperature, outputs=outputs,
            support=support,
        )  # fmt: skip
        total = sum((getattr(found, name) * w.to(getattr(found, name))).sum() for name, w in weights.items())
        return {"logp": found.logprobs.detach().cpu(), **{n: g.cpu() for n, g in leaves.gradients(total).items()}}

    moved = x.to(KERNEL_DEVICE if backend == "triton" else "cpu")
    support = Support.from_mask(members).to(moved.tokens.device)

    def ours(*arguments, **options):
        return linear_logprobs(*arguments, backend=backend, **options)

    got = gradients({n: w.to(moved.tokens.device) for n, w in weights.items()}, ours, moved.leaves(), support)
    want = gradients(weights, reference.linear_logprobs, x.leaves(f64), members)
    alone = [gradients({n: w}, reference.linear_logprobs, x.leaves(f64), members)["dX"] for n, w in weights.items()]
    want["scale"] = sum(g.norm(dim=1) for g in alone)
    if names == "mean_logits":  # no softmax in it: the terms of a row are as large as its set's weights
        rows = x.head.weight.double().norm(dim=1).mean() * weights[names].abs()
        want["scale"] = want["scale"].maximum(rows)
    check_result(x, Result(got, Settings()), want)
    check_outside(x, members, got)


def test_gradcheck():
    hidden, weight, bias = (torch.randn(*shape, dtype=f64, requires_grad=True) for shape in ((7, 4), (9, 4), (9,)))
    mask, tokens = torch.tensor([True, True, False, True, True, True, True]), torch.arange(7)
    support = Support.from_mask(random_sets(tokens, 9, MIXED))

    def values(hidden, weight, bias):
        head = LMHead(weight, bias, 3.0, logit_scale=0.8)
        outputs = ("entropy", "logsumexp", "mean_logits")
        found = linear_logprobs(hidden, head, tokens, mask=mask, support=support, outputs=outputs)
        return found.logprobs, found.entropy, found.logsumexp, found.mean_logits

    def two_values(hidden, weight, bias):  # which leave out rows whose set is their token alone
        head = LMHead(weight, bias, 3.0, logit_scale=0.8)
        return tuple(linear_logprobs(hidden, head, tokens, mask=mask, support=support, entropy=True))

    def loss(hidden, weight, bias):
        head = LMHead(weight, bias, 3.0, logit_scale=0.8)
        options = {"objective": Reinforce(), "mask": mask, "support": support}
        return linear_policy_loss(hidden, head, tokens, None, torch.linspace(-1, 1, 7).double(), **options).loss

    for function in (values, two_values, loss):
        assert torch.autograd.gradcheck(function, (hidden, weight, bias))
    logits = torch.randn(7, 9, dtype=f64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: tuple(selective_logprobs(z, tokens, mask=mask, support=support, temperature=0.8, entropy=True)), (logits,)
    )


# ---- ready logits


@ON_EACH
@pytest.mark.parametrize("temperature", [1.0, "per-token"])
def test_ready_logits(backend, dtype, temperature):
    """dL/dz itself: exactly 0 outside of the sets, and everything where the set is the token alone."""
    logits, tokens = 3 * torch.randn(30, 1100), torch.randint(0, 1100, (30,))
    logits = logits.scatter_add(1, tokens[:, None], 20 * torch.rand(30, 1)).to(dtype)
    members, keep = random_sets(tokens, 1100, MIXED), torch.rand(30) > 0.3
    T = torch.rand(30) + 0.5 if temperature == "per-token" else 1.0
    device = KERNEL_DEVICE if backend == "triton" else "cpu"
    leaf, wide = (z.detach().clone().requires_grad_() for z in (logits.to(device), logits.double()))
    got = selective_logprobs(
        leaf, tokens.to(device), mask=keep.to(device), support=Support.from_mask(members).to(device),
        temperature=T.to(device) if isinstance(T, torch.Tensor) else T, entropy=True, backend=backend,
    )  # fmt: skip
    z = wide / (T[:, None].double() if isinstance(T, torch.Tensor) else T)
    want = reference.token_distribution(torch.where(members, z, -torch.inf)[keep], tokens[keep])
    g, h = torch.randn(2, 30, dtype=f64)
    ((got.logprobs.cpu() * g).sum() + (got.entropy.cpu() * h).sum()).backward()
    (want[0] * g[keep] + want[1] * h[keep]).sum().backward()
    unit = (1e-14 if dtype == f64 else 1e-6) * z[keep].detach().abs().amax(-1).clamp(min=10)
    for values, exact in zip(got, want, strict=True):
        assert not values[~keep.to(device)].any()
        error = (values.cpu()[keep].double() - exact.detach()).abs()
        assert (error <= 2 * unit * exact.detach().abs().clamp(max=1) + 1e-37).all()
    gradient = leaf.grad.cpu()
    assert not gradient[~(members & keep[:, None])].any()
    assert not gradient[members.sum(1) == 1].any()
    smallest = 1e-2 if dtype == f16 else 1e-4  # below it fp16 entries are subnormal
    error = (gradient.double() - wide.grad)[keep].norm(dim=-1) / wide.grad[keep].norm(dim=-1).clamp(min=smallest)
    assert (error <= {f64: 1e-12, f32: 10 * unit, bf16: 2.0**-8, f16: 2.0**-10}[dtype]).all()


# ---- bits


@BACKENDS
@ALL_DTYPES
def test_bits_of_a_row_do_not_depend_on_the_batch(backend, dtype):
    """Alone, in a part, in another order, and beside rows of other sets; in both schedules, and from ready logits."""
    x = random_problem(60, 300, dtype, bias=True, softcap=9.0)
    x = x.to(KERNEL_DEVICE if backend == "triton" else "cpu")
    members = random_sets(x.tokens.cpu(), 300, MIXED).to(x.tokens.device)
    logits = torch.randn(60, 300, device=x.tokens.device).to(dtype)

    def values(rows):
        support, tokens = Support.from_mask(members[rows]), x.tokens[rows]
        hidden, old = x.hidden[rows].clone(), x.old_logprobs[rows]
        options = {"support": support, "backend": backend}
        two = linear_logprobs(hidden, x.head, tokens, entropy=True, **options)
        one = linear_cispo_loss(hidden, x.head, tokens, old, old, **options)
        return *two, one.logprobs, *selective_logprobs(logits[rows], tokens, entropy=True, **options)

    whole = values(slice(None))
    for rows in ([7], [6], slice(10, 40), torch.randperm(60), torch.arange(1, 60, 6)):
        for a, b in zip(values(rows), whole, strict=True):
            assert torch.equal(a, b[rows])


@pytest.mark.parametrize("size", [7, 64, 65, 20000])
def test_bits_of_a_dot_product_do_not_depend_on_where_its_operands_are(size):
    """Nor on how many there are, where there are several threads. Equal rows of the weight have equal logits."""
    x, table = torch.randn(12, size), torch.randn(20, size)
    table[1::2] = table[::2]
    place, index = torch.arange(12).repeat_interleave(20), torch.arange(20).repeat(12)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = torch_tiles.gathered_dots(x, place, table, index)
        for n in range(12):
            alone = torch_tiles.gathered_dots(x[n, None].clone(), torch.zeros(1, dtype=torch.int64), table, index[n, None])
            assert torch.equal(alone, whole[n * 21, None])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[::2], whole[1::2])
    torch.testing.assert_close(whole.double(), (x.double() @ table.double().T).flatten(), rtol=0, atol=1e-6 * size**0.5 * 5)


@BACKENDS
def test_the_order_of_ids_and_their_dtype_change_no_bit(backend):
    x = random_problem(20, 200, f32)
    support = Support.from_mask(random_sets(x.tokens, 200, MIXED))
    shuffled = [ids[torch.randperm(len(ids))] for ids in support.ids.long().split(support.sizes().tolist())]
    other = Support(torch.cat(shuffled), support.offsets.int(), support.whole)
    for a, b in zip(statistics(x, support, backend), statistics(x, other, backend), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@SCHEDULES
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_the_layout_of_hidden_states_and_of_the_weight_changes_no_bit_of_small_sets(schedule, dtype):
    x = random_problem(24, 300, dtype)
    support = Support.from_mask(random_sets(x.tokens, 300, 8))
    other = replace(x, hidden=x.hidden.T.contiguous().T, head=LMHead(x.head.weight.T.contiguous().T))
    got, want = (schedule(y, CISPO(), support=support) for y in (other, x))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@SCHEDULES
def test_repeated_calls_have_the_same_bits(schedule):
    x = random_problem(24, 300, bf16, masked=True)
    support = Support.from_mask(random_sets(x.tokens, 300, MIXED))
    once, again = (schedule(x, CISPO(), support=support) for _ in range(2))
    for name, value in once.items():
        assert torch.equal(again[name], value), name


# ---- the functions that take a support agree


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_function_is_linear_policy_loss(backend):
    """linear_cispo_loss and the module to the bit; linear_logprobs and policy_loss as an equation. With ids of sequences."""
    x = random_problem(24, 200, f32).to(KERNEL_DEVICE if backend == "triton" else "cpu")
    device = x.tokens.device
    support = Support.from_mask(random_sets(x.tokens.cpu(), 200, MIXED)).to(device)
    old = logprobs_over(x.to("cpu"), support.to("cpu").mask(200))[0].float().to(device) - 0.1
    sequences = torch.arange(24, device=device) // 5
    arguments = x.hidden, x.head, x.tokens, old, torch.linspace(-1, 2, 5, device=device)
    for reduction in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"):
        held, batch = {"reduction": reduction, "backend": backend}, {"support": support, "sequence_ids": sequences}
        want = linear_policy_loss(*arguments, objective=PPOClip(), **held, **batch)
        module = LinearPolicyLoss(objective=PPOClip(), **held)(*arguments, **batch)
        assert torch.equal(module.loss, want.loss)
        ready = linear_logprobs(*arguments[:3], support=support, backend=backend).logprobs
        again = policy_loss(ready, *arguments[3:], objective=PPOClip(), reduction=reduction, sequence_ids=sequences)
        torch.testing.assert_close(again.loss, want.loss, rtol=1e-5, atol=1e-6)
        cispo = linear_cispo_loss(*arguments, ratio_max=1.5, **held, **batch)
        assert torch.equal(cispo.loss, linear_policy_loss(*arguments, objective=CISPO(1.5), **held, **batch).loss)
    rows = [v.view(4, 6, *v.shape[1:]) for v in (x.hidden, x.tokens, old)]  # a support is of flattened positions
    a = linear_cispo_loss(rows[0], x.head, rows[1], rows[2], torch.ones(4, device=device), support=support, backend=backend)
    b = linear_cispo_loss(*arguments[:4], torch.ones(24, device=device), support=support, backend=backend)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.logprobs.flatten(), b.logprobs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # and where it looks at results before a graph that broke
# check: the host reads, which breaks the graph, and small sets are gathered
@pytest.mark.parametrize(
    ("function", "check"),
    [
        ("logprobs", False), ("loss", False), ("selective", False), ("selective", True),
        pytest.param("logprobs", True, marks=pytest.mark.full), pytest.param("loss", True, marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_under_torch_compile(function, check):
    if check and torch.__version__.startswith("2.9") and (function == "loss" or sys.version_info < (3, 11)):
        pytest.skip("Dynamo of torch 2.9 cannot compile the loss with checks, nor on Python 3.10 the others")
    x = random_problem(12, 40, f32, masked=True)
    support = Support.from_mask(random_sets(x.tokens, 40, MIXED))
    options = {"mask": x.mask, "check": check, "backend": "torch"}

    def call(hidden, weight, support):
        if function == "selective":
            return selective_logprobs(hidden @ weight.T, x.tokens, support=support, **options).logprobs.sum()
        if function == "loss":
            return linear_cispo_loss(hidden, weight, x.tokens, None, x.advantages, support=support, **options).loss
        found = linear_logprobs(hidden, weight, x.tokens, support=support, outputs=OUTPUTS, top_k=3, **options)
        return (found.logprobs + found.entropy + found.mean_logits).sum()

    inputs = x.hidden.clone().requires_grad_(), x.head.weight.clone().requires_grad_()
    want, got = call(*inputs, support), torch.compile(call, fullgraph=not check, backend="aot_eager")(*inputs, support)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", [one_pass, one_pass_triton], ids=lambda f: f.__name__)
def test_rows_that_are_recomputed(schedule):
    """Tokens 150 nats below the others, thought certain: such rows are computed again, over their own sets. Others are not, nor
    is a row whose set is its token alone."""
    x = random_problem(36, 200, f32, bias=True)
    x = replace(x, tokens=torch.randperm(200)[:36])
    low = torch.arange(36) % 4 < 2
    x.head.bias[x.tokens[low]] -= 150
    members = random_sets(x.tokens, 200, MIXED)
    others = torch.ones(200, dtype=torch.bool).index_fill(0, x.tokens[low], False)
    members[~low] &= others  # where such a token is the only other one, the sum is too small
    old = torch.where(low, 0.0, logprobs_over(x, members)[0].float())
    got = check_over(replace(x, old_logprobs=old), members, schedule, Reinforce())
    again = (
        low & (members & others).any(1) & (members.sum(1) > most_gathered(200, x.head.weight))
    )  # gathered rows have no anchor
    assert got.metrics["recomputed_tokens"] == again.sum() > 5
    assert (~again & (members.sum(1) > 1)).sum() > 10
