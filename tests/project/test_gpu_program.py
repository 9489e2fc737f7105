"""`make gpu` without a GPU: what it says, and its parts with stand-ins in the place of what takes one."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu as program
import pytest
import torch

from fastpg.crosscheck.cases import Case
from fastpg.crosscheck.judge import Checked, Deviation
from fastpg.crosscheck.report import last_line

ROOT = Path(__file__).resolve().parents[2]
FOUND = {"gpu": "a stand-in", "torch": "2.11.0", "triton": "3.6.0", "missing": [], "xdist": False}
CELLS = [
    {"name": f"{head}, bfloat16", "method": "fastpg one pass", "over_products": ratio}
    for head, ratio in zip(program.HEADS, (3.259, 1.289, 1.158), strict=True)
]


def stand_in(name: str, code: str, judge=None) -> program.Part:
    parts = {part.name: part for part in program.parts(sys.executable, FOUND, Path("nowhere"))}
    return program.Part(name, [sys.executable, "-c", code], judge or parts[name].judge)


def lines(*outcomes: str) -> str:
    return "\n".join(f"../tests/test_kernels.py::test_a[bias softcap-{i}] {o}   [ 5%]" for i, o in enumerate(outcomes))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """main() with these parts: exit status, the last line, and summary.json."""

    def run(*parts: program.Part, rows=CELLS, seconds: float = 60):
        def chosen(python, found, out):
            (out / "bench").mkdir(exist_ok=True)
            return parts

        def bench(said, status):
            (tmp_path / "bench" / "results.json").write_text(json.dumps({"rows": rows}))
            return program.of_bench(program.one_pass_ratios(tmp_path), status)

        parts = [part._replace(judge=bench) if part.name == "bench" else part for part in parts]
        monkeypatch.setattr(program, "chosen_python", lambda candidates: (sys.executable, FOUND))
        monkeypatch.setattr(program, "parts", chosen)
        monkeypatch.setattr(program, "commit", lambda: "12db879")
        status = program.main(["--out", str(tmp_path), "--seconds", str(seconds)])
        whole = json.loads((tmp_path / "summary.json").read_text())
        last = capsys.readouterr().out.splitlines()[-1]
        assert whole["line"] == last
        assert whole["passed"] == (status == 0)
        return status, last, whole

    return run


def result(*multiples: float) -> str:
    """The last line of `fastpg check` with errors so many times their tolerance."""
    case = Case("linear_cispo_loss", torch.bfloat16, 64, 151936, 4096)
    return last_line([Checked(case, "triton gpu", [Deviation("logp", m, 1.0) for m in multiples], [])], ["a stand-in"], "")


TESTS = stand_in("tests", f"print({lines('PASSED', 'PASSED', 'SKIPPED (no)')!r})")
CHECK = stand_in("check", f"print({result(0.5, 0.2)!r})")
BENCH = stand_in("bench", "pass")


def test_all_parts_pass(run):
    status, line, whole = run(TESTS, CHECK, BENCH)
    assert status == 0
    assert line == (
        "PASS: a stand-in, torch 2.11.0, triton 3.6.0, fastpg 12db879: tests: 2 passed, 0 failed, 1 skipped; "
        "check: all 2 comparisons hold on a stand-in; "
        "bench: one pass over the bare products: smollm2-135m 3.26 x, llama3.2-1b 1.29 x, qwen3-8b 1.16 x"
    )
    assert [part["passed"] for part in whole["parts"]] == [True] * 3


def test_parts_that_fail(run):
    tests = stand_in("tests", f"import sys; print({lines('PASSED', 'FAILED', 'ERROR')!r}); sys.exit(1)")
    check = stand_in("check", f"import sys; print({result(0.5, 2, 3)!r}); sys.exit(1)")
    status, line, _ = run(tests, check, BENCH, rows=CELLS[:2])
    assert status == 1
    assert line.startswith("FAIL (tests, check, bench): ")
    assert "tests: 1 passed, 2 failed, 0 skipped; check: FAILED: 2 of 3 comparisons on a stand-in are above their" in line
    assert line.endswith("llama3.2-1b 1.29 x, qwen3-8b not measured")


def test_parts_that_end_without_a_word(run):
    gone = program.Part("check", ["/nowhere/python"], program.of_check)
    status, line, _ = run(stand_in("tests", "import sys; sys.exit(4)"), gone, stand_in("bench", "import sys; sys.exit(1)"))
    assert status == 1
    assert "tests: 0 passed, 0 failed, 0 skipped, pytest ended with 4; check: FileNotFoundError" in line
    assert line.startswith("FAIL (tests, check, bench): ")


def test_parts_that_are_stopped(run, tmp_path):
    """Each at its share; what was found until then counts. The processes that they started end with them."""
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    hang = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    tests = stand_in("tests", f"print({lines('PASSED', 'PASSED')!r}, flush=True); {hang}")
    start = time.monotonic()
    status, line, _ = run(tests, stand_in("check", hang), stand_in("bench", hang), seconds=4)
    assert time.monotonic() - start < 20
    assert status == 1
    assert line.startswith("FAIL (check): ")  # the others have what is asked of them
    stopped = r", stopped after \d s"
    assert re.search(rf"tests: 2 passed, 0 failed, 0 skipped{stopped}; check: no result{stopped}; .*1\.16 x{stopped}$", line)
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_an_interrupt_ends_in_the_summary(run):
    interrupt = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(30)"
    status, line, _ = run(stand_in("tests", interrupt), CHECK, BENCH)
    assert status == 1
    assert line.startswith("FAIL (tests, check, bench): ")
    assert "tests: 0 passed, 0 failed, 0 skipped, interrupted; check: not run; bench: not run" in line


def test_a_judge_that_fails_is_no_end(run):
    def judge(said, status):
        raise KeyError("rows")

    status, line, _ = run(TESTS._replace(judge=judge), CHECK, BENCH)
    assert status == 1
    assert "tests: KeyError: 'rows'; check: all 2 comparisons" in line


def test_outcomes_are_counted_in_parallel_too():
    passed = "8 workers [3 items]\n[gw0] [  7%] PASSED ../tests/test_a.py::test_b[x] \n"
    said = passed + "[gw11] [100%] FAILED ../tests/test_a.py::test_c \nFAILED x\n"
    assert program.of_tests(said, None) == (False, "1 passed, 1 failed, 0 skipped")


def test_the_tests_that_it_runs(tmp_path):
    """Its own command, of fewer tests; the package is the one that it made importable, and the root is not on the path."""
    with program.importable_package() as folder:
        part = program.parts(sys.executable, FOUND, tmp_path)[0]
        command, chosen = list(part.command), part.command.index("-k") + 1
        assert "test_kernels or " in command[chosen]
        command[chosen] = "device_functions or 1-2-one_pass_triton"
        status, _ = program.run_part(part._replace(command=command), folder, tmp_path / "log", 100)
        assert program.of_tests((tmp_path / "log").read_text(), status)[0], (tmp_path / "log").read_text()
        code = (
            "import importlib.util, sys; found = importlib.util.find_spec('fastpg').origin; print(found, *sys.path, sep='\\n')"
        )
        where = part._replace(command=[sys.executable, "-c", code])
        assert program.run_part(where, folder, tmp_path / "where", 60) == (0, False)
        package, *path = (tmp_path / "where").read_text().splitlines()
        assert Path(package) == folder / "fastpg" / "__init__.py"
        assert (folder / "fastpg" / "kernels" / "blocks.py").resolve() == ROOT / "kernels" / "blocks.py"
        assert str(ROOT) not in [os.path.realpath(p) for p in path]
    assert not folder.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="they would run")
@pytest.mark.parametrize("name", ["check", "bench"])
def test_the_other_commands_get_as_far_as_they_can(name, tmp_path):
    with program.importable_package() as folder:
        part = {part.name: part for part in program.parts(sys.executable, FOUND, tmp_path)}[name]
        assert program.run_part(part, folder, tmp_path / "log", 100) == (2, False)
    assert (tmp_path / "log").read_text().splitlines()[-1].endswith("error: --device cuda: torch finds no GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "make gpu: needs a GPU" in done.stdout
    assert f"{sys.executable} has torch {torch.__version__}, which finds no GPU" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_python_is_chosen(monkeypatch):
    complete = FOUND | {"missing": []}
    answers = {
        "absent": "is not there", "no torch": {"missing": ["torch", "rich"]}, "cpu": FOUND | {"gpu": None},
        "no rich": FOUND | {"missing": ["rich", "tqdm"]}, "complete": complete,
    }  # fmt: skip
    monkeypatch.setattr(program, "probe", answers.get)
    assert program.chosen_python(["no rich", "complete"]) == ("complete", complete)
    python, said = program.chosen_python(["absent", "no torch", "cpu", "no rich"])
    assert python is None
    assert "absent: is not there" in said
    assert "no torch has no torch" in said
    assert "cpu has torch 2.11.0, which finds no GPU" in said
    assert "no rich -m pip install rich tqdm" in said


def test_probing():
    assert program.probe("/nowhere/python") == "is not there"
    found = program.probe(sys.executable)
    assert found["torch"] == torch.__version__
    assert found["missing"] == []
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    assert program.probe("/bin/false").startswith("fails: ")
