"""Errors of workspaces, of what turns out in the course of the work, of backends and of groups, word by word; see
`test_error_words`."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from programs import run_program
from raising import LINEAR, ONE_PASS, H, V, call, of_shape, said

from fastpg import LMHead, Reinforce, linear_logprobs, linear_policy_loss, policy_loss, selective_logprobs
from fastpg.distributed import global_count
from fastpg.integrations.verl import linear_cross_entropy

# beside a GPU the kernels are not interpreted, and CPU tensors are an error of their own
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted")
ROWS, PACK, ONES = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.arange(6), torch.ones(2, 3)

# ---- workspaces: the byte counts may change, the words may not


@pytest.mark.parametrize("function", LINEAR)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=INTERPRETED)])
def test_a_workspace_too_small_for_a_tile(function, backend):
    head = torch.ones(V, H, requires_grad=True)
    words = said(lambda: call(function, {"head": head, "workspace": 1000, "backend": backend}))
    assert re.fullmatch(
        r"ValueError: workspace=1000 bytes is too small: one tile of a \(7, 4\) torch\.float32 head on cpu needs \d+", words
    ), words


@pytest.mark.parametrize("function", ONE_PASS)
def test_a_workspace_too_small_for_the_rows_of_a_sweep(function):
    """What suffices for a tile of a large vocabulary does not for rows of it, and what is said to be needed suffices."""
    changes = {"head": torch.ones(5000, H, requires_grad=True)}
    needed = said(lambda: call(function, changes | {"workspace": 1})).rpartition(" ")[2]
    words = said(lambda: call(function, changes | {"workspace": int(needed)}))
    pattern = (
        rf"ValueError: workspace={needed} bytes is too small: \d+ rows of a \(5000, 4\) torch\.float32 head on cpu need (\d+)"
    )
    found = re.fullmatch(pattern, words)
    assert found, words
    words = said(lambda: call(function, changes | {"workspace": int(found[1])}))
    assert words.endswith(" before the error"), words


# ---- what only turns out in the course of the work


def leaves(dtype=torch.float32, lora=False, **changes):
    hidden, weight = torch.randn(6, H, dtype=dtype, requires_grad=True), torch.randn(V, H, dtype=dtype, requires_grad=True)
    factors = (torch.randn(2, H, requires_grad=True), torch.randn(V, 2), 1.0) if lora else None
    inputs = of_shape((6,), hidden=hidden, head=LMHead(weight, lora=factors), objective=Reinforce(), **changes)
    return {name: inputs[name] for name in ("hidden", "head", "tokens", "old_logprobs", "advantages", "objective")}


RETURNS = {
    "sum": (lambda logp, old, a: (logp * a).sum(), "ValueError: objective must return one value per token, shape (6,); got ()"),
    "column": (
        lambda logp, old, a: (logp * a)[:, None],
        "ValueError: objective must return one value per token, shape (6,); got (6, 1)",
    ),
    "nothing": (lambda logp, old, a: None, "ValueError: objective must return one value per token, shape (6,); got NoneType"),
    "number": (lambda logp, old, a: 0.0, "ValueError: objective must return one value per token, shape (6,); got float"),
    "tuple": (
        lambda logp, old, a: (logp * a, {}),
        "ValueError: objective must return one value per token, shape (6,); got tuple",
    ),
    "detached": (
        lambda logp, old, a: logp.detach() * a,
        "ValueError: objective must return values that are differentiable in logprobs; got torch.float32 without a gradient",
    ),
    "integers": (
        lambda logp, old, a: (logp * a).long(),
        "ValueError: objective must return values that are differentiable in logprobs; got torch.int64 without a gradient",
    ),
}


@pytest.mark.parametrize(("objective", "words"), RETURNS.values(), ids=RETURNS)
def test_what_an_objective_returns(objective, words):
    """Of policy_loss before its own arithmetic; of the one-pass losses when their first chunk is known."""
    logprobs = -torch.ones(6, requires_grad=True)
    assert said(lambda: policy_loss(logprobs, None, torch.ones(6), objective=objective), before_work=False) == words
    for dtype in (torch.float32, torch.float16):
        assert (
            said(lambda dtype=dtype: linear_policy_loss(**leaves(dtype) | {"objective": objective}), before_work=False) == words
        )


def test_what_an_objective_returns_for_rows():
    words = "ValueError: objective must return one value per token, shape (2, 3); got (2,)"
    assert said(lambda: policy_loss(-ONES, None, ONES, objective=lambda logp, old, a: logp.sum(1)), before_work=False) == words


NO_SECOND = (
    "RuntimeError: the one-pass loss has no second derivative: its gradients are computed in the forward. Use "
    "linear_logprobs and policy_loss without create_graph, or full logits (fastpg.reference)"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_one_pass_loss_has_no_second_derivative(dtype):
    given = leaves(dtype)
    loss = linear_policy_loss(**given).loss
    assert said(lambda: torch.autograd.grad(loss, given["hidden"], create_graph=True)) == NO_SECOND


def test_a_head_with_lora_has_no_second_derivative():
    given = leaves(lora=True)
    total = linear_logprobs(given["hidden"], given["head"], given["tokens"]).logprobs.sum()
    words = "RuntimeError: a head with LoRA has no second derivative; use full logits (fastpg.reference)"
    assert said(lambda: torch.autograd.grad(total, given["hidden"], create_graph=True), before_work=False) == words


@pytest.mark.parametrize("function", [linear_logprobs, selective_logprobs])
def test_two_passes_have_no_second_derivative(function):
    """The words are torch's, which knows no formula for an operator's gradient."""
    x, weight = torch.randn(6, 7, requires_grad=True), torch.eye(7)
    total = (function(x, PACK) if function is selective_logprobs else function(x, weight, PACK)).logprobs.sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    words = said(lambda: gradient.sum().backward(), before_work=False)
    assert words.startswith("RuntimeError: "), words
    assert "no autograd formula was registered" in words


# ---- backends that are not there: read when fastpg is imported, so in a process of its own, which has not imported it

PROGRAM = """
import json, sys
if "without triton" in sys.argv:
    sys.modules["triton"] = None
import torch, fastpg
hidden, weight, tokens = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
words = []
for backend in (None, "triton"):
    for call in (lambda: fastpg.linear_logprobs(hidden, weight, tokens, backend=backend),
                 lambda: fastpg.linear_cispo_loss(hidden, weight, tokens, None, torch.ones(2), backend=backend),
                 lambda: fastpg.selective_logprobs(weight, torch.arange(3).repeat(2)[:4], backend=backend)):
        try:
            call()
        except Exception as error:
            words.append(f"{type(error).__name__}: {error}")
print(json.dumps(words))
"""
ENVIRONMENT = 'ValueError: the environment variable FASTPG_BACKEND must be "torch" or "triton"; got \'cuda\''
MISSING = 'ModuleNotFoundError: backend="triton" needs triton, which is not installed: pip install triton'
ON_CPU = (
    'ValueError: backend="triton" runs on CUDA and ROCm tensors; {} is on cpu. Use backend="torch"; to debug the kernels '
    "on a CPU, start Python with TRITON_INTERPRET=1"
)


@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize("installed", [True, False], ids=["triton", "no-triton"])
def test_backends_that_are_not_there(tmp_path, installed):
    environment = {"FASTPG_BACKEND": "cuda", "TRITON_INTERPRET": None}
    done = run_program("-c", PROGRAM, "" if installed else "without triton", folder=tmp_path, environment=environment)
    assert not done.returncode, done.stderr
    wanted = [ON_CPU.format("hidden"), ON_CPU.format("hidden"), ON_CPU.format("logits")] if installed else [MISSING] * 3
    assert json.loads(done.stdout) == [ENVIRONMENT] * 3 + wanted


# ---- groups, of this process alone


@pytest.fixture
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def of_group(function, weight, group, start=None, **changes):
    return said(lambda: call(function, changes | {"head": LMHead(weight, group=group, vocab_start=start)}))


@pytest.mark.parametrize("function", LINEAR)
def test_groups_that_do_not_fit(function, world):
    weight, for_cuda = torch.ones(V, H), dist.new_group(backend="cuda:gloo")
    assert (
        of_group(function, weight, "WORLD", 0)
        == "TypeError: head.group must be a torch.distributed process group that this rank belongs to; got str"
    )
    assert (
        of_group(function, weight, for_cuda, 0)
        == "ValueError: head.group has no backend for cpu tensors (it has cuda:gloo), but head.weight is on cpu"
    )
    assert (
        of_group(function, weight, world)
        == "ValueError: head.vocab_start is needed with head.group: which entry of the vocabulary row 0 of the weight is"
    )
    assert (
        of_group(function, weight, world, 1)
        == "ValueError: head.vocab_start: the ranks' shards leave a gap at 0; [start, stop) by rank: [(1, 8)]"
    )
    large, small = torch.tensor([[0, 1, 2], [3, 4, 7]]), torch.tensor([[0, -3, 2], [3, 4, 5]])
    assert (
        of_group(function, weight, world, 0, tokens=large)
        == "ValueError: tokens must be in [0, 7), the vocabulary of all ranks, or -100; got 7"
    )
    assert (
        of_group(function, weight, world, 0, tokens=small)
        == "ValueError: tokens must be in [0, 7), the vocabulary of all ranks, or -100; got -3"
    )
    # a rank's own error is raised there as it is without a group, and before what the ranks disagree on
    assert of_group(function, weight, world, 1, temperature=0) == "ValueError: temperature must be a positive number; got 0"


@pytest.mark.parametrize("function", LINEAR)
def test_distributed_weights_that_do_not_fit(function, world):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    rows, columns = (distribute_tensor(torch.ones(V, H), mesh, [Shard(d)]) for d in (0, 1))
    bias = distribute_tensor(torch.ones(V), mesh, [Replicate()])
    b = distribute_tensor(torch.ones(V, 2), mesh, [Shard(1)])
    trained = distribute_tensor(torch.ones(V, H), mesh, [Shard(0)]).requires_grad_()
    for head, words in (
        (LMHead(rows, group=world, vocab_start=0), "head.vocab_start is known from a weight that is a DTensor; leave it out"),
        (
            LMHead(columns, group=world),
            f"head.weight must be sharded along its rows, Shard(0), on head.group; got {Shard(1)} on mesh dimension 0",
        ),
        (
            LMHead(rows, bias, group=world),
            f"head.bias must be sharded along its rows, Shard(0), on head.group; got {Replicate()} on mesh dimension 0",
        ),
        (
            LMHead(rows, lora=(torch.ones(2, H), b, 1.0), group=world),
            f"head.lora's B must be sharded along its rows, Shard(0), on head.group; got {Shard(1)} on mesh dimension 0",
        ),
        (
            LMHead(trained, weight_grad=torch.zeros(V, H)),
            "head.weight_grad needs a weight that is a plain tensor; got a DTensor",
        ),
    ):
        assert said(lambda head=head: call(function, {"head": head})) == f"ValueError: {words}"


@pytest.mark.parametrize("function", LINEAR)
def test_a_group_needs_torch_distributed(function):
    """And says so before anything else, as nothing can be agreed on without it."""
    words = "ValueError: head.group needs torch.distributed.init_process_group to have been called"
    assert of_group(function, torch.ones(V, H), "WORLD", 0) == words
    assert of_group(function, torch.ones(V, H), "WORLD", hidden=None) == words


def test_global_count():
    needs = "RuntimeError: global_count needs torch.distributed.init_process_group; on one process use mask.sum()"
    assert said(lambda: global_count(ONES.bool())) == needs
    assert said(lambda: global_count(ONES)) == "TypeError: mask must be a bool tensor; got torch.float32"
    assert said(lambda: global_count([True])) == "TypeError: mask must be a bool tensor; got list"


# ---- verl's signature, on linear_logprobs: tokens are flat there, as verl's are

VERL = {
    "reduction": ({"reduction": "avg"}, 'ValueError: reduction must be "none", "sum" or "mean"; got \'avg\''),
    "reduction, weight": (
        {"reduction": "AVG", "weight": None},
        'ValueError: reduction must be "none", "sum" or "mean"; got \'avg\'',
    ),
    "weight": ({"weight": [[1.0]]}, "TypeError: head.weight must be a floating-point tensor (V, H); got list"),
    "hidden": (
        {"hidden": torch.ones(2, 3, H).double()},
        "TypeError: hidden is torch.float64 but head.weight is torch.float32; cast one of them, or pass LMHead(weight, "
        "fp32_head=True) for float32 products of both (not of float64), or call under torch.autocast",
    ),
    "labels": (
        {"labels": ROWS[:, 1:]},
        "ValueError: tokens must have the leading shape of hidden, (6,): hidden[..., t, :] predicts tokens[..., t], already "
        "shifted; got shape (4,)",
    ),
    "label": ({"labels": ROWS + 3}, "ValueError: tokens must be in [0, 7) or -100; got 7 at position (4,)"),
    "temperature": ({"temperature": 0}, "ValueError: temperature must be a positive number; got 0"),
    "temperature-shape": (
        {"temperature": torch.ones(2, 2)},
        "ValueError: temperature must be a number or have the shape of tokens, (6,); got (4,)",
    ),
}


@pytest.mark.parametrize(("changes", "words"), VERL.values(), ids=VERL)
def test_verls_signature(changes, words):
    given = {"hidden": torch.ones(2, 3, H), "weight": torch.ones(V, H), "labels": ROWS}
    assert said(lambda: linear_cross_entropy(**given | changes)) == words
