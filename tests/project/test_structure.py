"""How short the way from a public name to a kernel is: frames, arguments, and what goes through autograd."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import fastpg
import fastpg.kernels
from fastpg import CISPO, linear_cispo_loss, policy_loss
from fastpg.linear import linear_logprobs, lora, row_losses, selective_logprobs
from fastpg.tiles import triton_tiles

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = [
    linear_logprobs._LinearLogprobs,
    row_losses.OnePassLoss,
    row_losses._TokenLoss,
    selective_logprobs._SelectiveLogprobs,
]
FUNCTIONS += [lora._LoraHidden]


def frames_of_fastpg() -> list[str]:
    """Names of the functions of fastpg between the caller's and this one, outermost first."""
    folders = [Path(fastpg.__file__).parent, *(Path(path) for path in fastpg.kernels.__path__)]
    stack = reversed(inspect.stack())
    return [f.function for f in stack if any(Path(f.filename).is_relative_to(folder) for folder in folders)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CPU tensors, in the interpreter")
@pytest.mark.parametrize("check", [True, False])
def test_at_most_7_frames_from_linear_cispo_loss_to_a_launcher(monkeypatch, check):
    launcher, found = triton_tiles.anchored_tiles, []

    def noted(*arguments):
        found.append(frames_of_fastpg())
        return launcher(*arguments)

    monkeypatch.setattr(triton_tiles, "anchored_tiles", noted)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    linear_cispo_loss(hidden, weight, torch.arange(5), -torch.ones(5), torch.ones(5), backend="triton", check=check)
    (frames,) = found
    assert frames[0] == "linear_cispo_loss"
    assert len([*frames, "anchored_exp"]) <= 7, frames


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_autograd_nodes_take_and_return_at_most_six(function):
    """The context apart. What is returned for the inputs is as many."""
    assert len(inspect.signature(function.forward).parameters) - 1 <= 6
    assert not any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function.forward).parameters.values())


def test_autograd_nodes_of_a_step_have_at_most_six_inputs():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    tokens, old = torch.arange(5), -torch.ones(5)
    logprobs = fastpg.linear_logprobs(hidden, weight, tokens).logprobs
    for loss in (
        linear_cispo_loss(hidden, weight, tokens, old, old).loss,
        policy_loss(logprobs, old, old, objective=CISPO()).loss,
    ):
        nodes, seen = [loss.grad_fn], 0
        while nodes:
            node = nodes.pop()
            seen += node.name().startswith(("_LinearLogprobs", "OnePassLoss"))
            assert len(node.next_functions) <= 6, node
            nodes += [n for n, _ in node.next_functions if n is not None]
        assert seen == 1


def host_functions():
    for path in [*(ROOT / "fastpg").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield path, node


def test_no_host_function_has_more_than_8_positional_arguments():
    """An instance, a class or autograd's context apart. Kernels: `test_compile_report`."""
    long = []
    for path, node in host_functions():
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        if len(names) - (names[:1] in (["self"], ["cls"], ["ctx"])) > 8:
            long.append(f"{path.name}: {node.name}")
    assert not long


def test_no_function_is_longer_than_60_lines():
    """Its docstring apart."""
    for path in [*(ROOT / "fastpg").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
                assert node.end_lineno - node.lineno + 1 - docstring <= 60, f"{path.name}: {node.name}"


# parameters of device functions that are structures
STRUCTURES = {
    "rows", "head", "out", "f", "further", "merged", "statistics", "incoming", "mine", "hidden", "weighted", "factors",
    "tokens", "sums", "terms", "results", "into", "gradients", "partials", "ready", "numbers",
}  # fmt: skip


def test_kernels_ask_fields_whether_they_are_none():
    """Triton 3.5 cannot compare a structure that holds a None with None, and no function of it returns None."""
    seen = 0
    for path in (ROOT / "kernels").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or "triton.jit" not in map(ast.unparse, function.decorator_list):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
                    seen += 1
                    assert ast.unparse(node.left) not in STRUCTURES, f"{path.name}: {ast.unparse(node)}"
                if isinstance(node, ast.Return) and node.value is not None:
                    returned = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                    assert not any(isinstance(x, ast.Constant) and x.value is None for x in returned), path.name
    assert seen > 50
