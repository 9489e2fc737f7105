"""DeepSpeed's ZeRO on two processes of its own: deepspeed warns and patches where it is imported."""

import importlib.util
import json
from pathlib import Path

import pytest
from programs import run_program

SUPPORT = Path(__file__).resolve().parents[1] / "support"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra [deepspeed]"),
    pytest.mark.xdist_group("programs"),
]


def on_two_processes(folder, program, *arguments):
    """What each of them says in its line of JSON."""
    # of the address deepspeed only wants that there is one: the programs meet at a file
    settings = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(SUPPORT), "TRITON_INTERPRET": None}
    done = run_program(str(SUPPORT / program), *arguments, folder=folder, environment=settings, ranks=2, timeout=150)
    assert done.returncode == 0, done.stderr[-6000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert len(said) == 2, done.stdout
    return said


def test_zero_trains_as_without_it(tmp_path):
    for found in on_two_processes(tmp_path, "zero_program.py"):
        assert found.keys() == {"stage 1", "stage 2", "stage 3", "stage 3, LoRA on the lm_head"}
        for name, run in found.items():
            assert len(run["steps"]) == 2, name
            for step in run["steps"]:
                for ours, theirs in step:
                    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), name
            assert run["difference"] < 1e-5, name


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the extra [trl]")
def test_trls_trainers_under_zero3(tmp_path):
    for found in on_two_processes(tmp_path, "zero3_trl_program.py", str(tmp_path)):
        assert found.keys() == {"sft", "sft with lora", "dpo", "kto", "grpo", "rloo"}
        for name, run in found.items():
            assert len(run["ours"]) == 2, name
            assert run["ours"] == pytest.approx(run["theirs"], rel=1e-5, abs=1e-5), name
            assert run["difference"] < 1e-5 < 1e-2 < run["moved"], name
            assert run["whole"] == [False, True], name  # use_fastpg runs the model with one layer whole at a time
