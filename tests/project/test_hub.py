"""`make hub`: the repository for Hugging Face's kernels hub, loaded by its path as `kernels` would load it from there.

Every program here starts in another folder: in the checkout, kernels/ would shadow the library.
"""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import run_program

import fastpg
from fastpg.crosscheck.accuracy import ROW_TOLERANCE, WEIGHT_TOLERANCE, logprob_tolerance

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("torch-cpu", "torch-cuda", "torch-rocm")
pytestmark = pytest.mark.xdist_group("interpreter programs")

needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None, reason="Hugging Face's `kernels` is not installed: pip install -e '.[hub]'"
)

# The card's blocks run as printed, on inputs of this program, beside float64 autograd.
STEP = """
import json, re, sys
from pathlib import Path
import torch

torch.manual_seed(0)
torch.set_num_threads(1)
rows, size, vocab = 33, 24, 9001  # more than one slice of columns
found = []
for dtype in (torch.float32, torch.bfloat16):
    hidden, weight = torch.randn(rows, size).to(dtype), torch.randn(vocab, size).to(dtype)
    tokens = torch.randint(0, vocab, (rows,))
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    z = x @ w.T
    logp = z.log_softmax(-1)[torch.arange(rows), tokens]
    old, advantages = (logp.detach() + torch.randn(rows)).float(), torch.randn(rows)
    want = -((logp.detach() - old).exp().clamp(max=5.0) * advantages * logp).mean()
    want.backward()
    names = {"hidden": hidden, "weight": weight, "tokens": tokens, "old_logprobs": old, "advantages": advantages}
    blocks = re.findall(r"```python\\n(.*?)```", Path("hub-out/README.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)
    dx = (names["hidden_grad"] - x.grad).norm(dim=1) / x.grad.norm(dim=1)
    found.append({
        "dtype": str(dtype).partition(".")[2], "blocks": len(blocks), "largest": z.abs().amax(1).tolist(),
        "logprobs": (names["rows"].logprobs - logp).abs().tolist(), "loss": [names["loss"].item(), want.item()],
        "rows": dx.max().item(), "weight": ((names["weight_grad"] - w.grad).norm() / w.grad.norm()).item(),
    })
print(json.dumps({"found": found, "fastpg": "fastpg" in sys.modules, "file": names["fastpg_kernels"].__file__}))
"""

# Options that the card's step does not use; every line of the result is an error that has to be small.
OPTIONS = """
import json
from pathlib import Path
import torch
from kernels import get_local_kernel

k = get_local_kernel(Path("hub-out"))
torch.manual_seed(0)
torch.set_num_threads(1)
rows, size, vocab = 19, 16, 70
hidden, weight, bias = torch.randn(rows, size), torch.randn(vocab, size), torch.randn(vocab)
tokens, place = torch.randint(0, vocab, (rows,)), torch.arange(rows)
temperature, g, h = torch.rand(rows) + 0.5, torch.randn(rows), torch.randn(rows)
error = {}

def distribution(z):
    logp = z.log_softmax(-1)
    own, others = logp[place, tokens], logp.scatter(1, tokens[:, None], -torch.inf)
    conditional = others.log_softmax(-1)
    entropy = -(conditional.exp() * conditional.clamp(min=-1e9)).sum(-1)
    return own, -(logp.exp() * logp).sum(-1), others.logsumexp(-1) - own, z.logsumexp(-1), entropy

def differences(got, want):
    return max((a - b).abs().max().item() for a, b in zip(got, want))

raw = (hidden.double() @ weight.double().T + bias).detach().requires_grad_()
want = distribution(5 * torch.tanh(raw / 5) / temperature[:, None])
options = {"bias": bias, "softcap": 5.0, "temperature": temperature}
of_rows = k.linear_logprobs(hidden, weight, tokens, entropy=True, **options)
(want[0] * g + want[1] * h).sum().backward()
options["grad_entropies"] = h
got = [k.linear_dlogits(hidden, weight, tokens, of_rows, g, part, **options) for part in (slice(32), slice(32, None))]
error["linear"] = differences(of_rows, want)
error["linear gradient"] = (torch.cat([d for d, _ in got], 1) - raw.grad).abs().max().item()
error["no rounding"] = float(any(rounding is not None for _, rounding in got))

logits = torch.randn(rows, vocab)
raw = logits.double().requires_grad_()
want = distribution(raw / temperature[:, None])
(want[0] * g + want[1] * h).sum().backward()
of_rows = k.selective_logprobs(logits, tokens, temperature=temperature, entropy=True)
got = k.selective_dlogits(logits, tokens, of_rows, g, grad_entropies=h, temperature=temperature)
error["selective"] = differences(of_rows, want)
error["selective gradient"] = (got - raw.grad).abs().max().item()

old, advantages, mask = -torch.rand(rows), torch.randn(rows), torch.rand(rows) > 0.3
logp = (-torch.rand(rows)).double().requires_grad_()
ratio = (logp - old).exp()
formulas = {
    "reinforce": ((), advantages * logp),
    "importance_weighted": ((), ratio * advantages),
    "ppo_clip": ((0.8, 1.3, None), torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)),
    "sapo": ((1.0, 2.0), torch.where(advantages > 0, 4 * (ratio - 1).sigmoid(), 2 * (2 * (ratio - 1)).sigmoid()) * advantages),
}
for name, (bounds, values) in formulas.items():
    want = -values[mask].mean()
    (slope,) = torch.autograd.grad(want, logp, retain_graph=True)
    kept = torch.where(mask, logp.detach().float(), torch.nan)
    got = k.policy_loss(kept, old, advantages, objective=name, bounds=bounds, mask=mask)
    error[name] = differences(got, (want, slope))
fields = {function.__name__: kind._fields for function, kind in k.launchers.objectives._BOUNDS.items()}
error["bounds"] = float(any(len(fields.get(name, ())) != len(bounds) for name, bounds in k.OBJECTIVES.items()))

empty = k.policy_loss(old[:0], old[:0], advantages[:0])  # no token: a loss of 0
error["no token"] = abs(empty[0].item()) + empty[1].numel()

def said(call):
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)

half, r = hidden.half(), k.linear_logprobs(hidden, weight, tokens)
errors = [
    said(lambda: k.linear_logprobs(hidden, weight.half(), tokens)),
    said(lambda: k.linear_logprobs(hidden, weight[:, :8], tokens)),
    said(lambda: k.linear_logprobs(hidden, weight, tokens[:3])),
    said(lambda: k.linear_logprobs(hidden, weight, tokens, bias=bias[:3])),
    said(lambda: k.linear_logprobs(hidden, weight, tokens, temperature=temperature[:3])),
    said(lambda: k.linear_logprobs(hidden, weight.to("meta"), tokens)),
    said(lambda: k.selective_logprobs(logits, tokens.to("meta"))),
    said(lambda: k.policy_loss(old, old, advantages.to("meta"))),
    said(lambda: k.linear_dlogits(half, weight.half(), tokens, r, g, slice(8))),
    said(lambda: k.linear_dlogits(hidden, weight, tokens, r, g, slice(8), grad_entropies=h)),
    said(lambda: k.linear_dlogits(hidden, weight, tokens, r, g[:3], slice(8))),
    said(lambda: k.linear_dlogits(hidden, weight, tokens, r, g, slice(70, 80))),
    said(lambda: k.selective_logprobs(logits, tokens[:3])),
    said(lambda: k.policy_loss(old, old, advantages[:3])),
    said(lambda: k.policy_loss(old, old, advantages, objective="gspo")),
    said(lambda: k.policy_loss(old, old, advantages, objective="ppo_clip", bounds=(0.8, 1.2))),
    said(lambda: k.policy_loss(old, old, advantages, objective="sapo", bounds=(None, 1.0))),
]
print(json.dumps({"error": error, "errors": errors}))
"""

ERRORS = [
    "hidden and weight must both be float32, bfloat16 or float16; got torch.float32 and torch.float16",
    "hidden (N, H) and weight (V, H) must agree in H; got (19, 16) and (70, 8)",
    "tokens must be (19,), one for each row of hidden; got (3,)",
    "bias must be (70,), one for each row of weight; got (3,)",
    "temperature must be (19,), one for each token; got (3,)",
    "weight must be on cpu, as hidden is; got a tensor on meta",
    "tokens must be on cpu, as logits are; got a tensor on meta",
    "advantages must be on cpu, as the tokens are; got a tensor on meta",
    "hidden must be float32 or bfloat16 for a gradient, whose range float16 lacks; got torch.float16",
    "rows must come from a call with entropy=True where grad_entropies is given; got none with entropies",
    "grad_logprobs must be (19,), one for each token; got (3,)",
    "columns must be a slice of at least one row of weight (70, 16), step 1; got slice(70, 80, None)",
    "logits (N, V) and tokens (N,) must agree in N; got (19, 70) and (3,)",
    "advantages must be (19,), one for each token; got (3,)",
    "objective must be one of reinforce, importance_weighted, cispo, ppo_clip, sapo, dppo_tv, dppo_kl, icepop; got 'gspo'",
    "bounds of ppo_clip must be (1 - eps_low, 1 + eps_high, dual_clip); got (0.8, 1.2)",
    "bounds of sapo must be (tau_pos, tau_neg); got (None, 1.0)",
]

EVERY_VARIANT = """
import importlib.util, json
from pathlib import Path
from kernels import get_loaded_kernels, get_local_kernel
from kernels._rust import Digest, DigestAlgorithm

import torch
found = {}
for folder in sorted(Path("hub-out/build").iterdir()):
    names = get_local_kernel(folder).__all__
    metadata = get_loaded_kernels()[-1].metadata
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))  # raises
    spec = importlib.util.spec_from_file_location("older", folder / "fastpg_kernels" / "__init__.py")
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    found[folder.name] = [str(metadata.name), metadata.version, metadata.license, str(metadata.backend.backend_type)]
    assert names == older.__all__ and all(callable(getattr(older, name)) for name in names)
try:
    get_local_kernel(Path("hub-out/build/torch-cpu")).policy_loss(torch.zeros(3), None, torch.zeros(3))
except ValueError as error:
    found["without the interpreter"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where hub-out/ was built."""
    folder = tmp_path_factory.mktemp("hub")
    program = [sys.executable, str(ROOT / ".ci" / "hub" / "build.py")]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def run(code: str, folder: Path, interpreter: bool = True):
    """With the interpreter in a process forked from one that has imported it; without, in a fresh one."""
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = run_program("-c", code, folder=folder, environment=settings, interpreter=interpreter, fresh=not interpreter)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_kernels
def test_the_step_of_the_card_equals_float64_autograd(folder):
    said = run(STEP, folder)
    assert not said["fastpg"]  # the repository stands alone
    assert Path(said["file"]).parent.parent == folder / "hub-out" / "build"
    assert [case["dtype"] for case in said["found"]] == ["float32", "bfloat16"]
    for case in said["found"]:
        dtype, largest = getattr(torch, case["dtype"]), torch.tensor(case["largest"])
        promised = logprob_tolerance(largest, dtype, 24, "cpu")
        assert case["blocks"] == 2
        assert (torch.tensor(case["logprobs"]) <= promised).all()
        got, want = case["loss"]
        assert abs(got - want) <= 1e-5 * max(1, abs(want))
        assert case["rows"] <= ROW_TOLERANCE.get(dtype, promised.max().item())
        assert case["weight"] <= WEIGHT_TOLERANCE[dtype]


@needs_kernels
def test_options_and_errors(folder):
    said = run(OPTIONS, folder)
    assert {name: error for name, error in said["error"].items() if error > 1e-5} == {}
    assert said["errors"] == ERRORS


@needs_kernels
def test_every_variant_is_what_its_metadata_says(folder):
    said = run(EVERY_VARIANT, folder, interpreter=False)
    assert "TRITON_INTERPRET=1" in said.pop("without the interpreter")
    major = int(fastpg.__version__.split(".")[0])
    assert said == {name: ["fastpg-kernels", major, "Apache-2.0", name.partition("-")[2]] for name in VARIANTS}


def test_a_variant_is_all_of_kernels_by_relative_imports(folder):
    assert tuple(sorted(path.name for path in (folder / "hub-out" / "build").iterdir())) == VARIANTS
    for name in VARIANTS:
        variant = folder / "hub-out" / "build" / name
        assert {p.name: p.read_bytes() for p in (variant / "launchers").iterdir()} == {
            p.name: p.read_bytes() for p in (ROOT / "kernels").glob("*.py")
        }
        metadata = json.loads((variant / "metadata.json").read_text())
        there = {p.relative_to(variant).as_posix() for p in variant.rglob("*") if p.is_file()}
        assert set(metadata["digest"]["files"]) == there - {"metadata.json"}
        assert metadata["id"].isidentifier()
        for path in variant.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                absolute += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert {module.split(".")[0] for module in absolute} <= {"torch", "triton", *sys.stdlib_module_names}


def test_other_sources_have_another_id(folder, tmp_path):
    """Two builds may be loaded in one process, each as the module of its id."""
    for part in (".ci/hub", "kernels", "fastpg"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", tmp_path)

    def built() -> str:
        subprocess.run(
            [sys.executable, str(tmp_path / ".ci" / "hub" / "build.py")], cwd=tmp_path, check=True, capture_output=True
        )
        return json.loads((tmp_path / "hub-out" / "build" / "torch-cuda" / "metadata.json").read_text())["id"]

    before = built()
    assert before == json.loads((folder / "hub-out" / "build" / "torch-cuda" / "metadata.json").read_text())["id"]
    with (tmp_path / "kernels" / "scale.py").open("a") as file:
        file.write("# another line\n")
    assert built() != before


def test_the_card_names_every_function(folder):
    card = (folder / "hub-out" / "README.md").read_text()
    (names,) = re.findall(r"__all__ = \[(.*?)\]", (ROOT / ".ci" / "hub" / "api.py").read_text(), re.DOTALL)
    for name in re.findall(r'"(\w+)"', names):
        assert f"`{name}" in card, name
    assert (folder / "hub-out" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
