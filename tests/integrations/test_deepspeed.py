"""DeepSpeed's ZeRO on two processes. In subprocesses: deepspeed warns and patches where it is imported."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra [deepspeed]")


def on_two_processes(folder, program, *arguments):
    """What each of them says in its last line."""
    # of the address deepspeed only wants that there is one: the programs meet at a file
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "DS_ACCELERATOR": "cpu"}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = [(folder / f"out{r}", folder / f"err{r}") for r in range(2)]  # pipes would fill up with deepspeed's warnings
    ranks = []
    try:
        for r, (out, err) in enumerate(said):
            environment = inherited | common | {"RANK": str(r), "LOCAL_RANK": str(r)}
            with out.open("w") as stdout, err.open("w") as stderr:
                command = [sys.executable, str(SUPPORT / program), *arguments]
                ranks.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout, stderr=stderr))
        codes = [rank.wait(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0, 0], "".join(err.read_text()[-3000:] for _, err in said)
    return [json.loads(out.read_text().splitlines()[-1]) for out, _ in said]


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
