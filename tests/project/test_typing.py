"""The public interface as a type checker sees it, and the wheel: what a user of the installed package gets."""

import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastpg
from fastpg import CISPO
from fastpg.linear.options import CallOptions, LossOptions, ModuleOptions, PolicyLossOptions

ROOT = Path(__file__).resolve().parents[2]

USE = """
import torch

import fastpg
from fastpg import CISPO, KLPenalty, LMHead, PolicyLossOutput, PolicyLossStatistics, TokenLogprobs, TokenStatistics

hidden, weight = torch.randn(2, 3, 8), torch.randn(11, 8)
tokens, old, advantages = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.ones(2)
head = LMHead(weight, softcap=30.0, lora=(torch.randn(2, 8), torch.randn(11, 2), 0.5))
out: PolicyLossOutput = fastpg.linear_policy_loss(
    hidden, head, tokens, old, advantages, objective=CISPO(ratio_max=5.0), kl=KLPenalty(0.1), ref_logprobs=old, mask=tokens >= 0
)
ranked: PolicyLossStatistics = fastpg.linear_cispo_loss(hidden, head, tokens, old, advantages, outputs=("rank",))
best: PolicyLossStatistics = fastpg.linear_policy_loss(
    hidden, head, tokens, old, advantages, objective=CISPO(), top_k=2, reduction="sum"
)
loss: torch.Tensor = out.loss + out.metrics["ratio_mean"]
row: TokenLogprobs = fastpg.linear_logprobs(hidden, weight, tokens, temperature=0.8, entropy=True)
more: TokenStatistics = fastpg.linear_logprobs(hidden, weight, tokens, outputs=("rank",), top_k=2, mask=tokens >= 0)
top: TokenStatistics = fastpg.linear_logprobs(hidden, weight, tokens, top_k=2)
given: TokenLogprobs = fastpg.selective_logprobs(hidden @ weight.T, tokens)
again = fastpg.policy_loss(row.logprobs, None, advantages, objective=lambda logp, old, a: a * logp, reduction="sum")
A: torch.Tensor = fastpg.advantages.grpo(torch.randn(4), torch.tensor([0, 0, 1, 1]), unbiased=False)
w: torch.Tensor = fastpg.rollout.truncated_weights(old, old, tokens >= 0, high=2.0, level="sequence")
three = fastpg.policy_loss(old, old, old, objective=CISPO(), rollout_logprobs=old, rollout_correction=fastpg.rollout.icepop)
found: dict[str, float] = fastpg.rollout.mismatch_metrics(old, old, low=0.5).to_dict()
"""

WRONG = {
    "a string as a tensor": 'fastpg.linear_logprobs("hidden", weight, tokens)',
    "a reduction that does not exist": 'fastpg.policy_loss(old, None, old, objective=CISPO(), reduction="mean")',
    "a level that does not exist": 'fastpg.rollout.truncated_weights(old, old, high=2.0, level="row")',
    "an argument that does not exist": "fastpg.linear_logprobs(hidden, weight, tokens, labels=tokens)",
    "an option that does not exist": "fastpg.linear_cispo_loss(hidden, weight, tokens, old, advantages, ratio=2.0)",
    "an option of another type": 'fastpg.linear_cispo_loss(hidden, weight, tokens, old, advantages, reduction="mean")',
    "an option of the call": "fastpg.LinearPolicyLoss(objective=CISPO(), mask=None)",
    "a result that may be None": "given.entropy.sum()",
    "a tensor as a number": "number: float = out.loss",
    "an option that a module does not have": 'fastpg.LinearPolicyLoss(objective=CISPO()).train("mode")',
}

# Of what fastpg imports, its types need tensors and modules. To read the rest of torch, and transformers, takes far longer.
# What is not read is Any, in which no mistake is found: the wrong lines hold that these are more.
MYPY = """
[mypy]
strict = True
follow_imports = silent

[mypy-torch.*,numpy.*,transformers.*,peft.*,triton.*]
follow_imports = skip
follow_imports_for_stubs = True

[mypy-torch,torch._C.*,torch._tensor,torch.types,torch.nn,torch.nn.modules.*,torch.nn.parameter]
follow_imports = silent
"""


def test_options_are_those_of_linear_policy_loss():
    """Spelled once for its own signature, and once for the functions that hand them on."""
    parameters = inspect.signature(fastpg.linear_policy_loss).parameters.values()
    apart = {"objective", "outputs", "top_k"}  # the last two decide on the type of the result
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in apart}
    assert {name: hint.__forward_arg__ for name, hint in PolicyLossOptions.__annotations__.items()} == keywords
    assert CallOptions.__annotations__.keys() | LossOptions.__annotations__.keys() == keywords.keys()
    assert ModuleOptions.__annotations__.keys() - LossOptions.__annotations__.keys() == apart - {"objective"}


def test_a_module_names_the_options_it_does_not_have():
    words = r"unexpected arguments \['mask'\]; its options are \['temperature', .*'check', 'outputs', 'top_k'\]"
    with pytest.raises(TypeError, match=words):
        fastpg.LinearPolicyLoss(objective=CISPO(), mask=None)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the checkout; without isolation, and so without a download."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("fastpg", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.mark.xdist_group("wheel")
def test_what_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"fastpg", "fastpg_lm"}  # no tests, bench, kernels
    assert {name for name in names if name.startswith("fastpg/")} == {
        *(f"fastpg/{p.relative_to(ROOT / 'fastpg').as_posix()}" for p in (ROOT / "fastpg").rglob("*") if is_shipped(p)),
        *(f"fastpg/kernels/{p.name}" for p in (ROOT / "kernels").iterdir() if is_shipped(p)),
    }
    assert {"fastpg/py.typed", "fastpg/HELP.md", "fastpg/kernels/README.md", "fastpg/integrations/trl.py"} <= names


@pytest.mark.xdist_group("wheel")
def test_what_an_index_shows_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        headers, _, description = files.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in headers
    assert description == (ROOT / "fastpg" / "HELP.md").read_text()


def is_shipped(path: Path) -> bool:
    return path.suffix in (".py", ".md", ".typed")


@pytest.mark.xdist_group("wheel")
def test_types(wheel, tmp_path):
    """Against the wheel and not the checkout, where the mapping of kernels/ hides the package from type checkers."""
    pytest.importorskip("mypy")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    use = tmp_path / "use.py"
    use.write_text(USE)
    before = len(USE.splitlines())
    (tmp_path / "wrong.py").write_text(USE + "\n".join(WRONG.values()) + "\n")
    (tmp_path / "mypy.ini").write_text(MYPY)
    options = ["--config-file", "mypy.ini", "--no-error-summary", "--cache-dir", os.devnull]  # a cache is written for next time
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "use.py", "wrong.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert done.returncode == 1, done.stdout + done.stderr
    found = {int(line.split(":")[1]) - before for line in errors if line.startswith("wrong.py")}
    assert not [line for line in errors if not line.startswith("wrong.py")], done.stdout
    assert found == set(range(1, len(WRONG) + 1)), done.stdout
