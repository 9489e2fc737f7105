"""DeepSpeed's ZeRO-1 to 3 on two processes. In subprocesses: deepspeed warns and patches where it is imported."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "zero_program.py"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra [deepspeed]")
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_zero_trains_as_without_it(tmp_path, stage):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), stage], cwd=tmp_path,
            env=inherited | common | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, err) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, err[-3000:]
        found = json.loads(out.splitlines()[-1])
        assert len(found["steps"]) == 3
        for step in found["steps"]:
            for ours, theirs in step:
                assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        assert found["difference"] < 1e-5
