"""A program that is forked ends as one that Python starts (`programs`)."""

import pytest
import torch
from programs import run_program

pytestmark = [
    pytest.mark.xdist_group("programs"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="they are started by Python itself"),
]


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print(7)", 0, ""),
        ("torch.zeros(3)", 1, "NameError: name 'torch' is not defined\n"),  # the server has imported it
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import subprocess; subprocess.run(['sleep', '60'])", -9, ""),
    ],
)
def test_ends(code, status, said, tmp_path):
    (tmp_path / "program.py").write_text(code)
    timeout = 0.5 if "sleep" in code else 60
    for arguments in (["program.py"], ["-c", code], ["-m", "program"]):
        done = run_program(*arguments, folder=tmp_path, environment={"PYTHONSAFEPATH": None}, timeout=timeout)
        assert done.returncode == status
        assert done.stdout == ("7\n" if "print" in code else "")
        assert done.stderr.endswith(said)
        assert bool(done.stderr) == bool(said)


def test_what_a_program_finds(tmp_path):
    code = "import os, sys; print(__name__, sys.argv[1:], os.getcwd(), os.environ.get('HOME'), os.environ['A']); import helper"
    (tmp_path / "helper.py").touch()
    environment = {"HOME": None, "A": "b", "PYTHONSAFEPATH": "1"}
    done = run_program("-c", code, "--x", "y", folder=tmp_path, environment=environment)
    assert done.stdout == f"__main__ ['--x', 'y'] {tmp_path} None b\n"
    assert "No module named 'helper'" in done.stderr
    assert run_program("-c", code, folder=tmp_path, environment=environment | {"PYTHONPATH": str(tmp_path)}).returncode == 0


def test_threads_and_what_is_registered_end_first(tmp_path):
    code = "import atexit, threading, time; atexit.register(print, 2)\ndef f(): time.sleep(0.2); print(1)\n"
    done = run_program("-c", code + "threading.Thread(target=f).start(); print(0)", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "0\n1\n2\n")


def test_a_rank_that_fails_ends_the_other(tmp_path):
    code = "import os, time, torch.distributed as dist; dist.init_process_group('gloo'); print(dist.get_rank(), flush=True)\n"
    done = run_program("-c", code + "dist.barrier(); dist.destroy_process_group()", folder=tmp_path, ranks=2)
    assert (done.returncode, done.stdout) == (0, "0\n1\n")
    done = run_program("-c", code + "time.sleep(60 * dist.get_rank()); raise KeyError", folder=tmp_path, ranks=2, timeout=30)
    assert done.returncode == 1
    assert "KeyError" in done.stderr
