"""Choosing a backend, and what only the Triton backend has: products counted from launches, the fused CISPO loss, its operator.

The accuracy of both backends is in test_parity and test_one_pass, the kernels one by one in test_kernels.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from problems import logprobs_of, moderate_problem, opcheck, random_problem, relative_error, row_errors
from programs import run_program
from schedules import KERNEL_DEVICE, one_pass_triton
from torch.profiler import ProfilerActivity, profile

from fastpg import (
    CISPO,
    DPPOKL,
    DPPOTV,
    SAPO,
    IcePop,
    ImportanceWeighted,
    KLPenalty,
    LMHead,
    Objective,
    PPOClip,
    Reinforce,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
)
from fastpg.kernels import anchored_exp, dlogits, finish, logsumexp, operands, target
from fastpg.linear import operators
from fastpg.loss.objectives import device_loss
from fastpg.tiles import backend, products
from fastpg.tiles.backend import tiles_of
from fastpg.tiles.structures import Chunk, Head, LossSums, TokenTerms

# ---- Which backend --------------------------------------------------------------------------------------------------


def small(dtype=torch.float32, **options):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(5, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype), torch.arange(5)
    return linear_logprobs(hidden, weight, tokens, **options).logprobs


def test_unknown_backends_are_errors(monkeypatch):
    with pytest.raises(ValueError, match='backend must be "torch", "triton" or None; got \'cuda\''):
        small(backend="cuda")
    monkeypatch.setattr(backend, "_ENVIRONMENT", "cuda")
    with pytest.raises(ValueError, match='FASTPG_BACKEND must be "torch" or "triton"; got \'cuda\''):
        small()


def test_float64_takes_torch_unless_triton_is_asked_for(monkeypatch):
    with pytest.raises(TypeError, match='"triton" has no float64 kernels'):
        small(torch.float64, backend="triton")
    monkeypatch.setattr(backend, "_ENVIRONMENT", "triton")
    assert torch.equal(small(torch.float64), small(torch.float64, backend="torch"))


def test_the_environment_replaces_the_default_and_an_argument_goes_before_it(monkeypatch):
    chosen = []
    monkeypatch.setattr(
        operators, "tiles_of", lambda backend, original=operators.tiles_of: (chosen.append(backend), original(backend))[1]
    )
    small()
    assert set(chosen) == {"torch"}
    monkeypatch.setattr(backend, "_ENVIRONMENT", "triton")
    if KERNEL_DEVICE == "cpu":
        chosen.clear()
        small()
        assert set(chosen) == {"triton"}
    chosen.clear()
    small(backend="torch")
    assert set(chosen) == {"torch"}


@pytest.mark.xdist_group("programs")
def test_triton_on_cpu_tensors_outside_the_interpreter_says_what_to_do(tmp_path):
    code = "import torch, fastpg; fastpg.linear_logprobs(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))"
    environment = {"FASTPG_BACKEND": "triton", "TRITON_INTERPRET": None}
    done = run_program("-c", code, folder=tmp_path, environment=environment)
    assert 'backend="triton" runs on CUDA and ROCm tensors; hidden is on cpu' in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(backend, "_TRITON_IS_INSTALLED", False)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"):
        small(backend="triton")


# ---- Counts ---------------------------------------------------------------------------------------------------------

MULTIPLYING = {"anchored_exp_kernel": anchored_exp, "logsumexp_kernel": logsumexp, "dlogits_kernel": dlogits}
OTHERS = {"target_kernel": target, "finish_kernel": finish, "combine_kernel": logsumexp}


class Launches:
    """Stands in for a kernel: notes grid and arguments of each launch, and launches."""

    def __init__(self, kernel, name: str, noted: list):
        self.kernel, self.name, self.noted = kernel, name, noted

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.noted.append((self.name, grid, arguments))
            return self.kernel[grid](*arguments, **named)

        return launch


@pytest.fixture
def launches(monkeypatch) -> list:
    noted = []
    for name, module in (MULTIPLYING | OTHERS).items():
        monkeypatch.setattr(module, name, Launches(getattr(module, name), name, noted))
    return noted


def multiplications(launches: list, call) -> float:
    """2 M N K of the kernels' launches (tiles x their size) and of the products that the profiler sees."""
    launches.clear()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    flops = 0
    for name, (programs,), arguments in launches:
        if name in MULTIPLYING:
            (head,) = (x for x in arguments if isinstance(x, operands.Head))
            (tile,) = (x for x in arguments if isinstance(x, operands.Tile))
            tiles = programs * (logsumexp._TILES_PER_SPLIT if name == "logsumexp_kernel" else 1)
            flops += 2 * tiles * tile.ROWS * tile.COLUMNS * head.H
    factors = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}
    for event in profiler.events():
        if event.name in factors and (event.cpu_parent is None or event.cpu_parent.name not in factors):
            (m, k), (_, n) = (event.input_shapes[i] for i in factors[event.name])
            flops += 2 * m * n * k
    return flops


def test_counts_of_products_from_launches(launches):
    rows, vocab, size, dtype = 256, 8192, 64, torch.bfloat16  # whole tiles and splits of the interpreter's blocks
    one = 2 * rows * vocab * size
    hidden, weight = torch.randn(rows, size).to(dtype), (torch.randn(vocab, size) * 0.2).to(dtype)
    tokens, advantages = torch.randint(0, vocab, (rows,)), torch.randn(rows)
    old, cispo = linear_logprobs(hidden, weight, tokens).logprobs, CISPO()

    def one_pass(hidden_grad, weight_grad, advantages=advantages, objective=cispo):
        h, w = hidden.clone().requires_grad_(hidden_grad), weight.clone().requires_grad_(weight_grad)

        def step():
            out = linear_policy_loss(h, w, tokens, old, advantages, objective=objective, backend="triton")
            if out.loss.requires_grad:
                out.loss.backward()

        return multiplications(launches, step) / one

    mine = lambda logp, old, a: logp * a  # noqa: E731
    assert one_pass(True, True) == one_pass(True, True, objective=Reinforce()) == one_pass(True, True, objective=mine) == 3
    # one launch of each kernel for a chunk, whatever the objective
    assert Counter(name for name, *_ in launches) == {"target_kernel": 1, "anchored_exp_kernel": 1, "finish_kernel": 1}
    assert one_pass(True, False) == one_pass(False, True) == 2
    assert one_pass(False, False) == 1
    assert one_pass(True, True, torch.where(torch.arange(rows) % 2 == 0, 0, advantages)) == 1.5
    assert one_pass(True, True, torch.zeros(rows)) == 0

    def two_passes(grad):
        h, w = hidden.clone().requires_grad_(grad), weight.clone().requires_grad_(grad)
        logprobs = linear_logprobs(h, w, tokens, backend="triton").logprobs
        if grad:
            logprobs.sum().backward()

    assert multiplications(launches, lambda: two_passes(True)) / one == 4
    assert multiplications(launches, lambda: two_passes(False)) / one == 1


@pytest.mark.parametrize("objective", [CISPO(), Reinforce()], ids=["fused", "any"])
def test_no_pass_over_the_scores_beside_products(launches, objective):
    """In PyTorch nothing touches a tensor of a chunk's shape but the two products, and the views they take of it."""
    rows, vocab = 192, 1500
    hidden, weight = torch.randn(rows, 16, requires_grad=True), (torch.randn(vocab, 16) * 0.2).requires_grad_()
    tokens = torch.randint(0, vocab, (rows,))
    old = linear_logprobs(hidden, weight, tokens).logprobs.detach()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        linear_policy_loss(
            hidden, weight, tokens, old, torch.randn(rows), objective=objective, backend="triton"
        ).loss.backward()
    shapes = ([rows, vocab], [vocab, rows])
    wide = {e.name for e in profiler.events() if any(list(shape) in shapes for shape in e.input_shapes)}
    views = {"numpy_T", "t", "permute", "transpose", "as_strided", "resolve_conj", "slice", "new_empty"}
    computing = {name for name in wide if name.startswith("aten::")} - {f"aten::{name}" for name in views}
    assert computing == {"aten::mm"}, computing


def test_a_skinny_product_with_a_16_bit_chunk_keeps_the_digits_of_its_other_factor(monkeypatch):
    """As on a GPU, whose 16-bit products return fp32: u = high + low loses 2^-16 of it, high alone 2^-9."""
    monkeypatch.setattr(products, "multiply", lambda a, b: a.float() @ b.float())
    exps, factor = torch.rand(1, 50).bfloat16(), torch.tensor([1.00390625 / 3])
    exact = exps.T.double() @ factor[:, None].double()
    assert relative_error(products.skinny_product(exps.T, factor[:, None]), exact) < 2**-15


# ---- The fused loss -------------------------------------------------------------------------------------------------


OBJECTIVES = [
    *(CISPO(*bounds) for bounds in ((5.0, None), (1.2, 0.8), (None, 0.5), (None, None))),
    Reinforce(),
    ImportanceWeighted(),
    PPOClip(),
    PPOClip(0.1, 0.3, dual_clip=1.5),
    SAPO(),
    SAPO(2.0, 0.5),
    DPPOTV(),
    DPPOTV(0.1, 0.1, 2.0, two_sided=True),
    DPPOKL(ratio_max=3.0),
    IcePop(2.0, 0.8),
]
KLS = [None, *(KLPenalty(0.3, estimator) for estimator in ("k1", "k2", "k3")), KLPenalty(0.3, "k3", importance_weighted=True)]
KLS += [KLPenalty(0.3, "k3", weighted, max_log_ratio=0.5) for weighted in (False, True)]


LOSSES = [(objective, None) for objective in OBJECTIVES] + [(f, kl) for f in (CISPO(), PPOClip()) for kl in KLS[1:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])  # float16 takes two passes
@pytest.mark.parametrize(("objective", "kl"), LOSSES, ids=str)
def test_the_fused_loss_is_the_objectives(dtype, objective, kl):
    """In the kernel against the same objective as a user's function, which takes the general path."""
    problem = replace(moderate_problem(100, dtype), mask=torch.rand(100) > 0.2)
    problem = replace(problem, rollout_weights=torch.rand(100).to(problem.advantages) * 2)
    if kl is None:
        problem = replace(problem, ref_logprobs=None)
    assert device_loss(objective, kl, show_lost=False) is not None
    assert device_loss(lambda *x: objective(*x), kl, show_lost=False) is None
    fused, general = (
        one_pass_triton(problem, f, "token-mean", kl=kl) for f in (objective, lambda logp, old, a: objective(logp, old, a))
    )
    assert torch.allclose(fused["loss"], general["loss"], rtol=1e-5)
    # of a certain token relative to 1 - p, whose logarithm, up to 28, is rounded
    assert ((fused["logp"] - general["logp"]).abs() <= 4e-6 * general["logp"].abs().clamp(min=1e-30)).all()
    assert (row_errors(fused["dX"], general["dX"].double()) <= (1e-2 if dtype == torch.bfloat16 else 2e-5)).all()
    assert relative_error(fused["dW"], general["dW"].double()) <= (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_which_losses_are_fused():
    """By the class that states a device function; a subclass may have another formula."""

    class Mine(CISPO):
        def __call__(self, logprobs, old_logprobs, advantages):
            return 2 * super().__call__(logprobs, old_logprobs, advantages)

    class MyKL(KLPenalty):
        pass

    class Placed(Objective):  # names that a user may well choose
        device = "cuda"

        def __init__(self):
            self.device_function, self.numbers = torch.device("cpu"), [1.0]

        def __call__(self, logprobs, old_logprobs, advantages):
            return logprobs * advantages

    assert device_loss(CISPO(), None, False) == (
        "cispo", (None, 5.0, None, None), None, 0.0, False, None, False, None, 5.0,
    )  # fmt: skip
    found = device_loss(PPOClip(dual_clip=3.0), KLPenalty(0.1, "k2", True, 7), True)
    assert found[2:] == ("kl_k2", 0.1, True, 7.0, True, 0.8, 1.2)
    assert device_loss(Mine(), None, False) is None
    assert device_loss(Placed(), None, False) is None
    assert device_loss(ImportanceWeighted("sequence"), None, False) is None
    assert device_loss(CISPO(), MyKL(0.1), False) is None
    assert device_loss(lambda logp, old, a: logp, None, False) is None


@pytest.mark.parametrize(("dtype", "entropy"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_opcheck_of_the_fused_operator(dtype, entropy):
    rows, vocab = 70, 33
    hidden, weight, bias = torch.randn(rows, 8).to(dtype), torch.randn(vocab, 8).to(dtype), torch.randn(vocab).to(dtype)

    def on_device(x):
        return x.to(KERNEL_DEVICE)

    tokens, temperature = torch.randint(0, vocab, (rows,)), torch.rand(rows, 1) + 0.5
    chunk = Chunk(on_device(hidden), None, on_device(tokens), on_device(temperature))
    head = Head(on_device(weight), None, on_device(bias), 5.0, 0.9)
    masked, old, advantages, weights, rollout, ref = (
        torch.rand(rows) > 0.7, -torch.rand(rows), torch.randn(rows), torch.rand(rows), torch.rand(rows), -torch.rand(rows)
    )  # fmt: skip
    terms = TokenTerms(*map(on_device, (masked, old, advantages, weights, rollout, ref)))
    loss = device_loss(PPOClip(dual_clip=3.0), KLPenalty(0.1, "k3", max_log_ratio=4.0), show_lost=True)
    sums = LossSums(tiles_of("triton").loss_sums(rows, chunk.hidden.device).zero_(), 0)
    for exps in (torch.zeros(rows, vocab, dtype=dtype, device=KERNEL_DEVICE), None):
        found = opcheck(operators.anchored_loss, chunk, head, terms, loss, exps, entropy, sums)
        assert (found.entropy is not None, found.factor is not None) == (entropy, exps is not None)
    plain = TokenTerms(None, None, terms.advantages, terms.weights.sum(), None, None)
    opcheck(operators.anchored_loss, chunk, head, plain, device_loss(CISPO(), None, show_lost=False), None, entropy, sums)
    opcheck(operators.loss_summary, sums.values, entropy)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, from tracing any autograd.Function
@pytest.mark.parametrize("objective", [CISPO(), ImportanceWeighted()], ids=["fused", "any"])
def test_compiles_without_graph_breaks(objective):
    problem = random_problem(100, 64, torch.float32, masked=True)
    old = logprobs_of(replace(problem, mask=None)).float() - 0.1
    problem = replace(problem, old_logprobs=old).to(KERNEL_DEVICE).leaves()

    def step(hidden, weight):
        arguments = problem.tokens, problem.old_logprobs, problem.advantages
        options = {"objective": objective, "mask": problem.mask, "check": False, "backend": "triton"}
        return linear_policy_loss(hidden, weight, *arguments, **options).loss

    inputs = problem.hidden, problem.head.weight
    want = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


# ---- Batch invariance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_batch(dtype):
    """Alone, in a batch of 3, 64, 157, at another position; both schedules, with and without entropy, gradients, masks."""
    rows, vocab = 200, 1500
    problem = random_problem(rows, vocab, dtype, bias=True, softcap=20.0, temperature="per-token")
    old = logprobs_of(problem).float() - 0.1
    problem = replace(problem, old_logprobs=old).to(KERNEL_DEVICE)

    def score(rows, **options):
        return linear_logprobs(
            problem.hidden[rows], problem.head, problem.tokens[rows], temperature=problem.temperature[rows],
            backend="triton", **options,
        )  # fmt: skip

    def train(rows, **options):
        arguments = problem.tokens[rows], problem.old_logprobs[rows], problem.advantages[rows]
        return linear_policy_loss(
            problem.hidden[rows], problem.head, *arguments, temperature=problem.temperature[rows],
            objective=CISPO(), backend="triton", **options,
        )  # fmt: skip

    whole, trained = score(slice(None), entropy=True), train(slice(None))
    for part in (slice(7, 8), slice(100, 103), slice(3, 67), slice(40, 197)):
        assert torch.equal(score(part).logprobs, whole.logprobs[part])
        assert torch.equal(train(part, entropy=True).logprobs, trained.logprobs[part])
    assert torch.equal(score(slice(None, None, 3), entropy=True).entropy, whole.entropy[::3])
    assert torch.equal(train(slice(None), workspace=2**22).logprobs, trained.logprobs)
    mask = (torch.rand(rows) > 0.5).to(KERNEL_DEVICE)
    for options in ({}, {"check": False}):
        assert torch.equal(score(slice(None), mask=mask, **options).logprobs, torch.where(mask, whole.logprobs, 0))
    leaves = problem.leaves()
    with_gradients = linear_policy_loss(
        leaves.hidden, leaves.head, leaves.tokens, leaves.old_logprobs, leaves.advantages, temperature=leaves.temperature,
        objective=CISPO(), backend="triton",
    )  # fmt: skip
    assert torch.equal(with_gradients.logprobs, trained.logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_ratio_of_the_sampling_policy_to_itself_is_exactly_one(dtype):
    """Scored under no_grad in micro-batches of 50, trained in one batch with gradients."""
    hidden, weight = torch.randn(130, 40).to(dtype), (torch.randn(1100, 40) * 0.3).to(dtype)
    hidden, weight, tokens = (x.to(KERNEL_DEVICE) for x in (hidden, weight, torch.randint(0, 1100, (130,))))
    with torch.no_grad():
        parts = zip(hidden.split(50), tokens.split(50), strict=True)
        old = torch.cat([linear_logprobs(h, weight, t, backend="triton").logprobs for h, t in parts])
    new = linear_logprobs(hidden.requires_grad_(), LMHead(weight), tokens, backend="triton").logprobs
    metrics = policy_loss(new, old, torch.randn_like(old), objective=ImportanceWeighted()).metrics
    assert metrics["ratio_mean"] == metrics["ratio_max"] == metrics["ess"] == 1
