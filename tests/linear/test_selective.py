"""selective_logprobs: log-probabilities of ready logits against the oracle, without a copy of them in fp32."""

import pytest
import torch
from problems import opcheck
from schedules import KERNEL_DEVICE

from fastpg import linear_logprobs, reference, selective_logprobs
from fastpg.linear.operators import selective_dlogits, selective_statistics
from fastpg.tiles.structures import Incoming, ReadyLogits
from fastpg.tools.memory import transient_bytes

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def given(rows, vocab, dtype):
    """Every second row is sure of its token, up to 1 - p = 1e-12."""
    logits, tokens = torch.randn(rows, vocab) * 3, torch.randint(0, vocab, (rows,))
    sure = torch.linspace(0, 30, rows) * (torch.arange(rows) % 2 == 0)
    return logits.scatter_add(1, tokens[:, None], sure[:, None]).to(dtype).to(device_of(dtype)), tokens.to(device_of(dtype))


def device_of(dtype):
    return "cpu" if dtype == torch.float64 else KERNEL_DEVICE


def check(logits, tokens, backend, temperature=1.0, entropy=True, mask=None):
    dtype, shape = logits.dtype, tokens.shape
    keep = (torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask) & (tokens != -100)
    leaf = logits.detach().clone().requires_grad_()
    got = selective_logprobs(leaf, tokens, mask=mask, temperature=temperature, entropy=entropy, backend=backend)
    wide = logits.detach().double().cpu().requires_grad_()
    scaled = wide / (temperature[..., None].double().cpu() if isinstance(temperature, torch.Tensor) else temperature)
    want = reference.token_distribution(scaled[keep.cpu()], tokens[keep].cpu())
    g, h = torch.randn(shape).double(), torch.randn(shape).double() * entropy
    loss = (got.logprobs.cpu() * g).sum()
    if entropy:
        loss = loss + (got.entropy.cpu() * h).sum()
    loss.backward()
    (want[0] * g[keep.cpu()] + want[1] * h[keep.cpu()]).sum().backward()
    unit = (1e-14 if dtype == torch.float64 else 1e-6) * scaled[keep.cpu()].detach().abs().amax(-1).clamp(min=10)
    for values, exact in zip(got, want, strict=True):
        if values is not None:
            assert (values[~keep] == 0).all()
            error = (values[keep].cpu().double() - exact.detach()).abs()
            assert (error <= 2 * unit * exact.detach().abs().clamp(max=1)).all()
    assert leaf.grad.dtype == dtype
    assert (leaf.grad[~keep] == 0).all()
    smallest = 1e-2 if dtype == torch.float16 else 1e-4  # below it fp16 entries are subnormal
    error = (leaf.grad.cpu().double() - wide.grad)[keep.cpu()].norm(dim=-1)
    rows = error / wide.grad[keep.cpu()].norm(dim=-1).clamp(min=smallest)
    assert (rows <= (ROUNDING[dtype] if dtype != torch.float32 else 10 * unit)).all()


@BACKENDS
@DTYPES
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 2), (257, 17), (70, 1025), (5, 17_000)])
def test_equals_the_oracle(backend, dtype, rows, vocab):
    check(*given(rows, vocab, dtype), backend)


def test_float64():
    check(*given(40, 300, torch.float64), "torch")


@BACKENDS
def test_masked_rows_reach_nothing(backend):
    logits, tokens = given(60, 300, torch.bfloat16)
    mask = torch.rand(60, device=tokens.device) > 0.4
    garbage = torch.where(mask[:, None], logits, torch.nan).requires_grad_()
    tokens = torch.where(mask, tokens, 10**6)
    out = selective_logprobs(garbage, tokens, mask=mask, entropy=True, backend=backend)
    out.logprobs.sum().backward()
    clean = selective_logprobs(logits, torch.where(mask, tokens, -100), entropy=True, backend=backend)
    assert torch.equal(out.logprobs, clean.logprobs)
    assert torch.equal(out.entropy, clean.entropy)
    assert (garbage.grad[~mask] == 0).all()
    check(logits, torch.where(mask, tokens, -100), backend)


@BACKENDS
def test_masked_rows_count_as_zeros(backend):
    """Not only in the end, where they are masked once more."""
    logits, tokens = given(9, 40, torch.float32)
    keep, temperature = torch.arange(9, device=tokens.device) % 2 == 0, torch.ones(9, 1, device=tokens.device)
    garbage, zeros = (torch.where(keep[:, None], logits, value) for value in (torch.nan, 0.0))
    got, want = (selective_statistics(ReadyLogits(z, tokens, temperature, keep), True, backend) for z in (garbage, zeros))
    for name, value in want._asdict().items():
        assert torch.equal(getattr(got, name), value), name


@BACKENDS
@pytest.mark.parametrize("temperature", [0.7, "per-token"])
def test_shapes_strides_and_temperatures(backend, temperature):
    logits, tokens = given(12, 400, torch.float32)
    logits, tokens = logits.view(3, 4, 400), tokens.view(3, 4)
    if temperature == "per-token":
        temperature = torch.rand(3, 4, device=tokens.device) + 0.5
    check(logits, tokens, backend, temperature)
    check(logits.transpose(0, 1), tokens.T, backend, temperature if isinstance(temperature, float) else temperature.T)
    check(torch.cat([logits, logits], -1)[..., 200:600], tokens.clamp(max=399), backend, temperature, entropy=False)
    check(logits.permute(2, 0, 1).contiguous().permute(1, 2, 0), tokens, backend, temperature)


@BACKENDS
def test_rows_do_not_depend_on_the_batch(backend):
    logits, tokens = given(300, 5000, torch.float32)
    every = selective_logprobs(logits, tokens, entropy=True, backend=backend)
    for rows in (slice(7, 8), slice(250, 300)):
        some = selective_logprobs(logits[rows], tokens[rows], entropy=True, backend=backend)
        assert torch.equal(some.logprobs, every.logprobs[rows])
        assert torch.equal(some.entropy, every.entropy[rows])


def test_memory():
    """The forward allocates a tile; the backward one tensor in the logits' dtype. fp32 logits would be 39 MiB."""
    rows, vocab = 512, 20_000
    logits = torch.randn(rows, vocab).bfloat16().requires_grad_()
    tokens = torch.randint(0, vocab, (rows,))
    tiles = 256 * 4096 * 4 * 4
    assert transient_bytes(lambda: selective_logprobs(logits, tokens)) < tiles + 2**20
    logits.grad = torch.zeros_like(logits)
    used = transient_bytes(lambda: selective_logprobs(logits, tokens, entropy=True).logprobs.sum().backward())
    assert logits.nbytes <= used < logits.nbytes + tiles + 2**20


def test_agrees_with_linear_logprobs_on_exact_logits():
    hidden, weight, tokens = torch.randn(20, 8).double(), torch.randn(50, 8).double(), torch.randint(0, 50, (20,))
    want, got = linear_logprobs(hidden, weight, tokens), selective_logprobs(hidden @ weight.T, tokens)
    assert torch.allclose(got.logprobs, want.logprobs, rtol=1e-13)


def test_gradcheck_and_no_second_derivative():
    logits, tokens = torch.randn(6, 9, dtype=torch.float64, requires_grad=True), torch.tensor([0, 8, -100, 3, 4, 5])
    assert torch.autograd.gradcheck(lambda z: tuple(selective_logprobs(z, tokens, temperature=0.8, entropy=True)), (logits,))
    total = selective_logprobs(logits, tokens).logprobs.sum()
    (g,) = torch.autograd.grad(total, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


@BACKENDS
@pytest.mark.parametrize("entropy", [True, False])
def test_opcheck(backend, entropy):
    logits, tokens = given(9, 40, torch.bfloat16)
    temperature, keep = torch.rand(9, 1, device=tokens.device) + 0.5, torch.rand(9, device=tokens.device) > 0.3
    rows = ReadyLogits(logits, tokens, temperature, keep)
    statistics = opcheck(selective_statistics, rows, entropy, backend)
    g = torch.randn_like(statistics.t)
    opcheck(selective_dlogits, rows, statistics, Incoming(g, g if entropy else None), backend)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
def test_compiles_without_graph_breaks():
    logits, tokens = given(9, 40, torch.float32)

    def total(z):
        return selective_logprobs(z, tokens, entropy=True, backend="torch", check=False).logprobs.sum()

    got = torch.compile(total, fullgraph=True, backend="aot_eager")(logits)
    assert torch.equal(got, total(logits))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1.0], torch.tensor([0])), "logits must be a tensor"),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)), "logits must be float16"),
        ((torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)), "V >= 1"),
        ((torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)), "tokens must have the leading shape of logits"),
        ((torch.zeros(2, 3), torch.zeros(2)), "tokens must be int64"),
        ((torch.zeros(2, 3), torch.tensor([0, 3])), "tokens must be in [0, 3)"),
    ],
)
def test_bad_input_is_named(arguments, said):
    with pytest.raises((TypeError, ValueError)) as error:
        selective_logprobs(*arguments)
    assert said in str(error.value)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("token", [-1, 40, 2**32 + 5, -(2**32) + 5, 2**40])
def test_a_token_outside_is_nan_without_checks(backend, token):
    """Also where its lowest 32 bits are a token's."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    tokens = torch.tensor([3, token, 5], device=device)
    out = selective_logprobs(torch.randn(3, 40, device=device), tokens, backend=backend, check=False)
    assert out.logprobs.isnan().tolist() == [False, True, False]
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(40, 8, device=device)
    out = linear_logprobs(hidden, weight, tokens, backend=backend, check=False)
    assert out.logprobs.isnan().tolist() == [False, True, False]
