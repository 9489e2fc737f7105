"""Further statistics of rows: `linear_logprobs(..., outputs=, top_k=)` on both backends against float64 full logits."""

import inspect
from dataclasses import replace

import pytest
import torch
from operations import counted
from problems import Result, check_result, opcheck, random_problem
from schedules import BACKENDS, KERNEL_DEVICE
from token_statistics import EVERYTHING, ON, ON_EACH, check, logits_of, oracle, whole_numbers

from fastpg import LMHead, TokenLogprobs, TokenStatistics, kept, linear_logprobs, reference
from fastpg.crosscheck.cases import Inputs, Settings
from fastpg.linear.call import head_of
from fastpg.linear.linear_logprobs import LogprobOptions
from fastpg.linear.operators import two_pass_partials, two_pass_statistics, two_pass_targets
from fastpg.linear.outputs import OUTPUTS
from fastpg.linear.rows import Rows
from fastpg.tiles import torch_tiles, triton_tiles
from fastpg.tiles.row_statistics import finish_further
from fastpg.tiles.structures import Asked, TileShape

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def statistics(x: Inputs, backend: str, top_k: int = 0, outputs=OUTPUTS, **options) -> TokenStatistics:
    x = x.to(KERNEL_DEVICE if backend == "triton" else "cpu")
    found = linear_logprobs(
        x.hidden, x.head, x.tokens, mask=x.mask, temperature=x.temperature, outputs=outputs, top_k=top_k, backend=backend,
        **options,
    )  # fmt: skip
    return TokenStatistics(*(None if v is None else v.cpu() for v in found))


@ON_EACH
def test_every_option_of_a_head_at_once(backend, dtype):
    x = random_problem(70, 1200, dtype, **EVERYTHING, lora_dtype=f64 if dtype == f64 else f32)
    check(x, statistics(x, backend, 8), 8)


@ON_EACH
def test_confident_tokens(backend, dtype):
    """Half of the tokens have probabilities from 1/2 to 1 - 1e-12, the others are drawn at random."""
    x = random_problem(60, 2100, dtype)
    want = oracle(x)
    assert (want.logprobs > -1e-10).any()
    assert (want.logprobs < -5).any()
    check(x, statistics(x, backend, 3), 3)


@BACKENDS
@pytest.mark.parametrize(("rows", "vocab", "top_k"), [(0, 17, 3), (1, 1, 1), (3, 2, 2), (130, 17, 8), (257, 1025, 5)])
def test_ragged_shapes(backend, rows, vocab, top_k):
    x = random_problem(rows, vocab, f32, bias=True)
    check(x, statistics(x, backend, top_k), top_k)


@BACKENDS
def test_over_several_tiles_and_splits(backend):
    """The largest logits come late, then early: what was kept is replaced, or stays."""
    vocab = 2 * 8 * 1024 + 700
    for ends in ((-15, 15), (15, -15)):
        x = random_problem(5, vocab, f32, bias=True)
        x.head.bias.copy_(torch.linspace(*ends, vocab))
        check(x, statistics(x, backend, 8), 8)


@BACKENDS
def test_impossible_tokens_and_banned_ones(backend):
    """A token whose probability is e^-200, and columns of -inf: more of them than columns are left for top_k."""
    x = random_problem(40, 40, f32, bias=True)
    x.head.bias[:] = torch.where(torch.arange(40) < 34, -torch.inf, x.head.bias)
    x.head.bias[39] = -200
    x = replace(x, tokens=torch.arange(40) % 6 + 34)
    got, want = statistics(x, backend, 8), oracle(x, 8)
    assert torch.equal(got.top_ids, want.top_ids)  # the last two are the first two of the banned ones
    assert (got.top_logprobs[:, 6:] == -torch.inf).all()
    assert (got.mean_logits == -torch.inf).all()
    torch.testing.assert_close(got.top_logprobs[:, :6].double(), want.top_logprobs[:, :6], rtol=0, atol=3e-4)
    assert torch.equal(got.rank, want.rank)
    assert torch.equal(got.argmax, want.argmax)
    for name in ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=3e-6, atol=3e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("vocab", [60, 3000])
def test_of_equal_logits_the_first_one_comes_first(backend, dtype, vocab):
    """As in torch.argmax: a token whose twin stands before it is not the first, and has rank 1."""
    x = whole_numbers(64, vocab, dtype)
    z = logits_of(x)
    x = replace(x, tokens=torch.where(torch.arange(64) % 2 == 0, z.argmax(1) + vocab // 2, x.tokens))
    got, want = statistics(x, backend, 8), oracle(x, 8)
    for name in ("is_top1", "argmax", "rank", "top_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert not got.is_top1[::2].any()
    assert (got.rank[::2] == 1).all()
    assert (x.tokens[::2] != got.argmax[::2]).all()


@BACKENDS
def test_zeros_of_both_signs_are_equal(backend):
    hidden, weight = -torch.ones(1, 1), torch.tensor([[1.0], [0.0], [-0.0], [0.0]])
    found = linear_logprobs(hidden, weight, torch.tensor([2]), outputs=("argmax", "rank"), top_k=4, backend=backend)
    assert (found.argmax.tolist(), found.rank.tolist(), found.top_ids.tolist()) == ([1], [1], [[1, 2, 3, 0]])


@BACKENDS
@pytest.mark.parametrize("check", [True, False])
def test_masked_positions(backend, check):
    """NaN there reaches nothing; floats are 0, is_top1 is False, ids and ranks are -1. With -100, a mask, or `kept`."""
    x = random_problem(24, 300, f32)
    mask = torch.rand(4, 6) > 0.4
    hidden = torch.where(mask[..., None], x.hidden.view(4, 6, -1), torch.nan)
    tokens = x.tokens.view(4, 6)
    whole = linear_logprobs(x.hidden.view(4, 6, -1), x.head, tokens, outputs=OUTPUTS, top_k=3, backend=backend)
    options = {"outputs": OUTPUTS, "top_k": 3, "backend": backend, "check": check}
    for given in (
        {"tokens": tokens, "mask": mask},
        {"tokens": torch.where(mask, tokens, -100)},
        {"tokens": tokens, "mask": kept(mask)},
    ):
        found = linear_logprobs(hidden, x.head, **given, **options)
        for name, value, exact in zip(found._fields, found, whole, strict=True):
            fill = -1 if name in ("argmax", "rank", "top_ids") else 0
            where = mask if value.dim() == 2 else mask[..., None]
            assert value.dtype == exact.dtype
            assert torch.equal(value, torch.where(where, exact, torch.full_like(exact, fill))), name
    found = linear_logprobs(hidden, x.head, tokens, mask=torch.zeros_like(mask), **options)
    assert not any(v.any() for v in (found.logprobs, found.logsumexp, found.is_top1, found.top_logprobs))
    assert all((v == -1).all() for v in (found.argmax, found.rank, found.top_ids))


@BACKENDS
def test_nan_at_a_token_that_counts(backend):
    """Of one row in its hidden state, and of all rows in one column. Floats are NaN; ids are those of some column."""
    for spoil in (lambda x: x.hidden[3].fill_(torch.nan), lambda x: x.head.weight[200].fill_(torch.nan)):
        x = random_problem(6, 300, f32)
        spoil(x)
        got = statistics(x, backend, 8)
        rows = got.logprobs.isnan()
        assert rows[3]
        for name in ("entropy", "logsumexp", "mean_logits", "log_sum_sq_probs", "top_logprobs"):
            assert getattr(got, name)[rows].isnan().all(), name
            assert not getattr(got, name)[~rows].isnan().any(), name
        for ids in (got.argmax, got.rank, got.top_ids):
            assert ((ids >= 0) & (ids < 300)).all()


# ---- which are there, and what asking costs


@BACKENDS
@pytest.mark.parametrize("name", OUTPUTS)
def test_each_alone_has_the_bits_of_all_together(backend, name):
    x = random_problem(20, 1500, bf16, masked=True)
    whole = statistics(x, backend, 5)
    alone = statistics(x, backend, outputs=[name])  # a list will do
    assert isinstance(alone, TokenStatistics)
    assert {field for field in alone._fields if getattr(alone, field) is not None} == {"logprobs", name}
    assert torch.equal(getattr(alone, name), getattr(whole, name))
    assert torch.equal(alone.logprobs, whole.logprobs)


@BACKENDS
def test_top_k_alone_and_entropy_by_its_flag(backend):
    x = random_problem(20, 1500, f32)
    whole, alone = statistics(x, backend, 8), statistics(x, backend, 3, ())
    assert [field for field in alone._fields if getattr(alone, field) is not None] == ["logprobs", "top_logprobs", "top_ids"]
    assert torch.equal(alone.top_ids, whole.top_ids[:, :3])
    assert torch.equal(alone.top_logprobs, whole.top_logprobs[:, :3])
    for outputs in ((), ("entropy",)):
        found = statistics(x, backend, 1, outputs, entropy=True)
        assert torch.equal(found.entropy, whole.entropy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CPU tensors, in the interpreter")
def test_asking_for_none_changes_no_bit_no_type_and_no_launch():
    x = random_problem(20, 1500, f32)
    plain = linear_logprobs(x.hidden, x.head, x.tokens, entropy=True, backend="triton")
    assert type(plain) is TokenLogprobs
    with torch.no_grad(), counted() as before:
        none = linear_logprobs(x.hidden, x.head, x.tokens, entropy=True, outputs=(), top_k=0, backend="triton")
    assert type(none) is TokenLogprobs
    assert all(torch.equal(a, b) for a, b in zip(plain, none, strict=True))
    with torch.no_grad(), counted() as after:
        asked = linear_logprobs(x.hidden, x.head, x.tokens, outputs=OUTPUTS, top_k=4, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, asked[:2], strict=True))
    launches = {name: count for name, count in before.counts.items() if name.startswith("launch")}
    assert launches == {name: count for name, count in after.counts.items() if name.startswith("launch")}
    assert sum(launches.values()) == 4  # which tokens count, their logits, the sweep, the splits
    assert before.total <= 8


@BACKENDS
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_bits_depend_neither_on_the_batch_nor_on_chunks(backend, dtype, monkeypatch):
    x = random_problem(300, 1300, dtype, bias=True, temperature="per-token")
    whole, tiles = statistics(x, backend, 5), torch_tiles if backend == "torch" else triton_tiles
    rows = slice(255, 258)
    part = replace(x, hidden=x.hidden[rows].clone(), tokens=x.tokens[rows], temperature=x.temperature[rows])
    for a, b in zip(statistics(part, backend, 5), whole, strict=True):
        assert torch.equal(a, b[rows])
    shape = tiles.tile_shape(x.head)
    monkeypatch.setattr(tiles, "tile_shape", lambda head: TileShape(shape.rows, shape.columns, shape.padding, shape.rows))
    for a, b in zip(statistics(x, backend, 5), whole, strict=True):  # two chunks
        assert torch.equal(a, b)


# ---- gradients


def gradients(x: Inputs, weights: dict[str, torch.Tensor], backend: str | None, **options) -> dict[str, torch.Tensor]:
    """Of the sum of statistics times weights; backend None: the oracle's."""
    leaves = x.leaves(f64 if backend is None else None)
    call = reference.linear_logprobs if backend is None else linear_logprobs
    options |= {} if backend is None else {"backend": backend}
    names = tuple(name for name in weights if name != "logprobs")  # which are always there
    found = call(
        leaves.hidden, leaves.head, leaves.tokens, mask=x.mask, temperature=leaves.temperature, outputs=names, top_k=1,
        **options,
    )  # fmt: skip
    sum((getattr(found, name) * w.to(getattr(found, name))).sum() for name, w in weights.items()).backward()
    a, b = (None, None) if leaves.head.lora is None else leaves.head.lora[:2]
    named = {"dX": leaves.hidden, "dW": leaves.head.weight, "db": leaves.head.bias, "dA": a, "dB": b}
    return {"logp": found.logprobs.detach()} | {name: v.grad for name, v in named.items() if v is not None}


def check_gradients(x: Inputs, weights: dict[str, torch.Tensor], backend: str, **options) -> None:
    """Errors of terms that may cancel are judged on the scale of a row without cancellation."""
    got = gradients(x, weights, backend, **options)
    want = gradients(x, weights, None)
    if len(weights) > 1:
        want["scale"] = sum(gradients(x, {n: w}, None)["dX"].norm(dim=1) for n, w in weights.items())
    check_result(x, Result(got, Settings()), want)


@pytest.mark.parametrize(("backend", "dtype"), ON[1:], ids=[f"{b}-{str(d)[6:]}" for b, d in ON[1:]])
@pytest.mark.parametrize("names", ["logsumexp", "logprobs logsumexp", "logprobs entropy logsumexp"])
def test_gradients(backend, dtype, names):
    """A z-loss alone, and beside other terms. Tokens from p = 1e-12 to 1 - 1e-12 in their own column."""
    x = random_problem(60, 1000, dtype, **EVERYTHING, lora_dtype=f32)
    if dtype == f16:
        x = replace(x, mask=x.mask & (oracle(x).logprobs < -0.1))
    check_gradients(x, {name: torch.randn(60) for name in names.split()}, backend)


@BACKENDS
def test_a_z_loss_of_nearly_uniform_rows(backend):
    """The target's entry, l p_y, is one of 20 000 equal ones: (g - l) (1 - p_y) + l would leave rounding noise in its place."""
    tokens = torch.arange(8)
    x = Inputs(1e-3 * torch.randn(8, 16), LMHead(torch.randn(20_000, 16)), tokens, torch.zeros(8), torch.zeros(8))
    hidden = x.hidden.clone().requires_grad_()
    weight = x.head.weight.clone().requires_grad_()
    found = linear_logprobs(hidden, weight, tokens, outputs=("logsumexp",), backend=backend)
    found.logsumexp.sum().backward()
    p = torch.softmax(x.hidden.double() @ x.head.weight.double().T, 1)
    want = p.T @ x.hidden.double()
    rows = (weight.grad[:8].double() - want[:8]).norm(dim=1) / want[:8].norm(dim=1)
    assert rows.max() <= 1e-5


def test_gradcheck():
    hidden, weight, bias = (torch.randn(*shape, dtype=f64, requires_grad=True) for shape in ((7, 4), (9, 4), (9,)))
    mask = torch.tensor([True, True, False, True, True, True, True])

    def values(hidden, weight, bias):
        head = LMHead(weight, bias, 3.0, logit_scale=0.8)
        found = linear_logprobs(hidden, head, torch.arange(7), mask=mask, outputs=("entropy", "logsumexp", "mean_logits"))
        return found.logprobs, found.entropy, found.logsumexp, found.mean_logits

    assert torch.autograd.gradcheck(values, (hidden, weight, bias))


@BACKENDS
def test_what_has_a_gradient(backend):
    x = random_problem(9, 50, f32).leaves()
    found = linear_logprobs(x.hidden, x.head, x.tokens, outputs=OUTPUTS, top_k=2, backend=backend)
    with_gradient = {name for name, value in zip(found._fields, found, strict=True) if value.requires_grad}
    assert with_gradient == {"logprobs", "entropy", "logsumexp", "mean_logits"}
    with torch.no_grad():
        again = linear_logprobs(x.hidden, x.head, x.tokens, outputs=OUTPUTS, top_k=2, backend=backend)
    assert not any(value.requires_grad for value in again)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_several_chunks_and_slices(monkeypatch):
    """In fp16 on Triton, whose rows of D have a unit each, which has to hold l too."""
    x = random_problem(300, 1100, f16)
    x = replace(x, mask=oracle(x).logprobs < -0.1)
    weights = {"logprobs": 1e-3 * torch.randn(300), "logsumexp": 30 * torch.randn(300)}
    monkeypatch.setattr(triton_tiles, "tile_shape", lambda head: TileShape(256, 600, 1, 256))
    check_gradients(x, weights, "triton")


@BACKENDS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
def test_under_torch_compile(backend):
    x = random_problem(12, 40, f32, masked=True)

    def call(hidden, weight):
        found = linear_logprobs(
            hidden, LMHead(weight), x.tokens, mask=x.mask, outputs=OUTPUTS, top_k=3, check=False, backend=backend
        )
        loss = (found.logprobs * torch.where(found.is_top1, 0.5, 1.0) + 0.1 * found.logsumexp.square() + found.entropy).sum()
        return loss, found

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = x.hidden.clone().requires_grad_(), x.head.weight.clone().requires_grad_()
    (loss, want), (compiled_loss, got) = call(*inputs), compiled(*inputs)
    for name, a, b in zip(want._fields, want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
        assert a.requires_grad == b.requires_grad, name
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(compiled_loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for a, b in zip(compiled(*inputs)[1], want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


OF_BACKENDS = [("torch", asked) for asked in (Asked(), Asked(*(True,) * 6, 3), Asked(argmax=True), Asked(top_k=2))]
OF_BACKENDS += [("triton", Asked(*(True,) * 6, 3))] if KERNEL_DEVICE == "cpu" else []


@pytest.mark.parametrize(("backend", "asked"), OF_BACKENDS, ids=str)
def test_operators(backend, asked):
    """What the operators say that they return is what they return, and no two results share memory."""
    x = random_problem(5, 9, f32)
    rows, head = Rows(x.hidden, None, torch.tensor([0, 2, 3]), None, x.tokens[:3], None), head_of(x.head)
    statistics, further = opcheck(two_pass_statistics, rows, head, asked, 2**24, backend)
    target = opcheck(two_pass_targets, rows, head, 2**24, backend)
    partials = opcheck(two_pass_partials, rows, head, asked, 2**24, backend, target)
    assert torch.equal(partials.target, target)
    for a, b in zip(finish_further(partials.further, statistics, rows.tokens, 9, asked), further, strict=True):
        assert a is b is None or torch.equal(a, b)


@BACKENDS
def test_fp32_head_and_autocast(backend):
    x = random_problem(9, 50, bf16)
    with torch.autocast("cpu", bf16):
        wide = replace(x, head=replace(x.head, fp32_head=True))
        found, cast = statistics(wide, backend, 3), statistics(x, backend, 3)
    by_hand = replace(x, hidden=x.hidden.float(), head=replace(x.head, weight=x.head.weight.float()))
    for a, b in zip(found, statistics(by_hand, backend, 3), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(cast, statistics(x, backend, 3), strict=True):
        assert torch.equal(a, b)


def test_the_types_of_the_arguments():
    """Type checkers know a call by its overloads."""
    parameters = inspect.signature(linear_logprobs).parameters
    named = {name: p.annotation for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    types = {name: hint.__forward_arg__ for name, hint in LogprobOptions.__annotations__.items()}
    assert named == types | {"outputs": "Sequence[str]", "top_k": "int"}


# ---- errors

KNOWN = "entropy, logsumexp, is_top1, argmax, mean_logits, log_sum_sq_probs, rank"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"outputs": "rank"},
            TypeError,
            f"outputs must be a sequence of names, such as (\"rank\",), out of: {KNOWN}; got 'rank'",
        ),
        (
            {"outputs": None},
            TypeError,
            f'outputs must be a sequence of names, such as ("rank",), out of: {KNOWN}; got NoneType',
        ),
        ({"outputs": {"rank"}}, TypeError, f'outputs must be a sequence of names, such as ("rank",), out of: {KNOWN}; got set'),
        ({"outputs": ("ranks",)}, ValueError, f"outputs must have names out of: {KNOWN}; got 'ranks'"),
        ({"outputs": ("rank", 3)}, ValueError, f"outputs must have names out of: {KNOWN}; got 3"),
        ({"outputs": ("rank", "rank")}, ValueError, "outputs must name each statistic once; got ('rank', 'rank')"),
        ({"top_k": True}, TypeError, "top_k must be an int from 0 to 8; got True"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int from 0 to 8; got 2.0"),
        ({"top_k": None}, TypeError, "top_k must be an int from 0 to 8; got None"),
        ({"top_k": -1}, ValueError, "top_k must be an int from 0 to 8; got -1"),
        ({"top_k": 9}, ValueError, "top_k must be an int from 0 to 8; got 9"),
        ({"top_k": 6}, ValueError, "top_k must be at most V = 5, the number of tokens in the vocabulary; got 6"),
    ],
)
@BACKENDS
def test_errors(backend, options, error, words, monkeypatch):
    def no_work(*arguments):
        raise AssertionError("work before the checks")

    monkeypatch.setattr(torch_tiles, "row_statistics", no_work)
    monkeypatch.setattr(triton_tiles, "row_statistics", no_work)
    with pytest.raises(error) as raised:
        linear_logprobs(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1]), backend=backend, **options)
    assert str(raised.value) == words
