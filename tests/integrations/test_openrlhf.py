"""OpenRLHF's Actor with fastpg's forward against its own, on two ranks. In subprocesses: OpenRLHF imports deepspeed, which
warns and patches, and flash_attn, for which `openrlhf_program` has a stand-in."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
import torch
from pages import PAGES
from programs import run_program
from raising import said

from fastpg.crosscheck.accuracy import ROW_TOLERANCE, WEIGHT_TOLERANCE, logprob_tolerance

pytest.importorskip("transformers")
SUPPORT = Path(__file__).resolve().parents[1] / "support"
NEEDED = ("openrlhf", "deepspeed", "pylatexenc", "peft", "einops")
there = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)} (make frameworks)"
)
pytestmark = pytest.mark.xdist_group("programs")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes says, the block of frameworks.md having run in them."""
    folder = tmp_path_factory.mktemp("openrlhf")
    text = (PAGES / "frameworks.md").read_text()
    (section,) = re.findall(r"^## OpenRLHF\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (folder / "block.py").write_text(block)
    # torch.compile, of OpenRLHF's entropy, would call a C++ compiler
    settings = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TRITON_INTERPRET": None}
    program = str(SUPPORT / "openrlhf_program.py")
    done = run_program(program, "block.py", folder=folder, environment=settings, ranks=2, timeout=150)
    assert done.returncode == 0, done.stderr[-6000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert len(found) == 2, done.stdout
    return found


@there
@pytest.mark.parametrize("asked", ["actions", "actions and entropy", "all tokens", "all tokens and entropy"])
@pytest.mark.parametrize("layout", ["padded", "packed", "ring attention", "wrapped"])
def test_equals_the_actors_own_forward(found, layout, asked):
    """Padded and packed rows, ring attention over two ranks, and a model that was wrapped afterwards; no logits are built."""
    for of_rank in found:
        cases = {n: c for n, c in of_rank["cases"].items() if n.startswith(f"{asked}, ") and n.endswith(f", {layout}")}
        assert len(cases) == (4 if layout == "padded" else 2)
        for name, case in cases.items():
            dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
            assert case["shape"], name
            assert not case["built"], name
            tolerance = 2 * logprob_tolerance(case["largest"], dtype, 32, "cpu")  # twice, as both are rounded
            assert max(case["log_probs"], case["entropy"]) <= tolerance < case["of values"], name
            assert case["gradients"] <= 2 * max(ROW_TOLERANCE.get(dtype, 0), WEIGHT_TOLERANCE[dtype]), name


@there
def test_only_actions_are_computed(found):
    """The rows that have an entropy, of those of prompts, padding and actions."""
    for of_rank in found:
        cases = [case for name, case in of_rank["cases"].items() if name.startswith("actions and entropy")]
        assert cases
        assert all(0 < case["rows"] == case["actions"] for case in cases)


@there
def test_what_is_refused(found):
    """At set-up, and in a call that wants logits."""
    for of_rank in found:
        assert of_rank["refused"] == {
            "no actor": "TypeError: use_fastpg wants an Actor of OpenRLHF's; got LlamaForCausalLM",
            "images": "ValueError: the Actor's model takes images (is_vlm), which this adapter does not hand on; text models "
            "are served",
            "head": "ValueError: the output embeddings are torch.nn.modules.container.Sequential, whose forward is not that of "
            "torch.nn.Linear; compute the logits in full, or pass LMHead(weight, ...) if they are hidden @ weight.T + bias",
            "logits": "ValueError: action_mask or return_logprobs must be given: the Actor would return logits, of which "
            "fastpg has none",
            "entropy": "ValueError: return_entropy must come with return_output, whose entropy it sets",
            "mask": "ValueError: attention_mask must be given, as for OpenRLHF's own forward",
            "later option": "TypeError: _forward() got an unexpected keyword argument 'pixel_values'",
        }


def test_openrlhf_is_absent(monkeypatch):
    from fastpg.integrations.openrlhf import use_fastpg

    monkeypatch.setattr(metadata, "version", mock.Mock(side_effect=metadata.PackageNotFoundError))
    words = "ImportError: openrlhf is not installed; this adapter was tested with openrlhf 0.11.1 to 0.11.2"
    assert said(lambda: use_fastpg(torch.nn.Linear(1, 1))) == words
