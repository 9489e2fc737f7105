"""What `fastpg check` says of given results, and `fastpg --version`."""

import math
import re

import pytest
import torch

from fastpg.__main__ import main
from fastpg.crosscheck import command, report
from fastpg.crosscheck.cases import EVERYTHING, Case
from fastpg.crosscheck.judge import Checked, Deviation
from fastpg.tools import about
from fastpg.tools.compiling import Compiled

FEW = Case("linear_logprobs", torch.float32, 33, 301, 40)
ALL = Case("linear_logprobs", torch.float32, 33, 301, 40, **EVERYTHING)
OTHER = Case("linear_cispo_loss", torch.bfloat16, 33, 301, 40, objective="CISPO")


def checked(case, backend="torch cpu", **multiples):
    """Errors in units of their tolerance, 2e-6."""
    return Checked(case, backend, [Deviation(name, 2e-6 * m, 2e-6) for name, m in multiples.items()], [])


GOOD = [checked(FEW, logp=0.2, dW=0.1), checked(ALL, logp=0.1, dW=0.42), checked(OTHER, loss=0.3, logp=0.0)]
BAD = [*GOOD, checked(FEW, "triton gpu", logp=1.5, dW=0.5), checked(ALL, "triton gpu", logp=math.inf, dW=2.0)]


@pytest.fixture
def run(monkeypatch, capsys):
    """The command with these results: exit status, stdout and stderr as lines."""

    def run(found, *arguments, compiled=([], [])):
        monkeypatch.setattr(command, "_places", lambda args: {"torch cpu": "cpu"})
        monkeypatch.setattr(command, "_cases", lambda args, places: found)
        monkeypatch.setattr(command, "check", lambda case, places: [case])
        monkeypatch.setattr(command, "_compile_report", lambda targets: compiled)
        status = 0
        try:
            main(["check", *arguments])
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return run


def cells(lines: list[str]) -> list[list[str]]:
    return [re.split(r"  +", line.strip()) for line in lines if line.startswith("linear_")]


def test_each_line_has_the_worst_case_of_its_operation_backend_and_dtype(run):
    status, lines, err = run(GOOD)
    assert (status, err) == (0, [])
    assert cells(lines) == [
        ["linear_cispo_loss", "torch cpu", "bfloat16", "0.30", "loss", "33x40x301, CISPO"],
        ["linear_logprobs", "torch cpu", "float32", "0.42", "dW", "33x40x301, everything"],
    ]
    assert "everything: bias, per-token temperature, mask, LoRA, softcap 9, scale 0.7" in [line.rstrip() for line in lines]
    assert lines[-1] == (
        "all 6 comparisons hold on the CPU; the closest to its tolerance: 0.42 of it, dW of linear_logprobs, torch cpu, "
        "float32 (33x40x301, bias, per-token temperature, mask, LoRA, softcap 9, scale 0.7)"
    )


def test_errors_above_tolerance_fail(run):
    status, lines, err = run(BAD)
    assert status == 1
    assert cells(lines)[-1] == ["linear_logprobs", "triton gpu", "float32", "FAIL inf", "logp", "33x40x301, everything"]
    assert [line.split(" tolerance")[0] for line in err] == [
        f"MISS linear_logprobs, triton gpu, float32 ({ALL.describe()}): logp is off by inf,",
        f"MISS linear_logprobs, triton gpu, float32 ({ALL.describe()}): dW is off by 4e-06,",
    ]  # of each quantity the worst case
    assert lines[-1].startswith(
        "FAILED: 3 of 10 comparisons on the CPU are above their tolerance; the worst: inf times, logp of "
    )
    status, lines, err = run(BAD, "--verbose")
    assert (status, len(err)) == (1, 3)
    assert len([line for line in lines if "linear_logprobs" in line]) == 5  # four cases, and the last line
    assert "FAIL" not in "".join(lines[:-1])


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_what_is_not_a_number_is_no_small_error(run, error):
    status, lines, _ = run([Checked(FEW, "torch cpu", [Deviation("logp", error, 1.0)], [])])
    assert status == 1
    assert "FAIL inf" in "".join(lines)


def test_a_compile_report_is_part_of_the_result(run):
    good = Compiled("dlogits", "cuda:90", "bfloat16", [], 200, 0, 131_072, 232_448, 4)
    status, lines, err = run(GOOD, "--compile", "cuda:90", compiled=([vars(good)], []))
    assert (status, err) == (0, [])
    assert lines[-1].startswith("all 6 comparisons hold on the CPU; ")
    assert lines[-1].endswith(
        "; compile report: 1 variants, no spills; each fits into shared memory; 16-bit products use tensor cores"
    )
    assert any(line.startswith("dlogits") for line in lines)
    for compiled, fault in (([vars(good)], "dlogits spills"), ([], "compile-report: it crashed")):
        status, lines, err = run(GOOD, "--compile", "cuda:90", compiled=(compiled, [fault]))
        assert (status, err) == (1, [f"MISS {fault}"])
        assert lines[-1].startswith("FAILED: all 6 comparisons hold on the CPU; ")
        assert lines[-1].endswith(fault)


def test_it_says_that_kernels_were_not_checked(run):
    said = "not checked: the Triton kernels, which need a GPU, or --interpret"
    assert run(GOOD)[1].count(said) == 1
    assert said not in run(GOOD, "--device", "cpu")[1]
    assert said not in run(GOOD, "--backend", "torch")[1]


def test_places_of_a_chosen_backend(monkeypatch):
    monkeypatch.setattr(command, "_backends_here", lambda args: {"torch cpu": "cpu", "torch gpu": "cuda", "triton gpu": "cuda"})
    places = []
    monkeypatch.setattr(command, "_cases", lambda args, found: places.append(list(found)) or [])
    monkeypatch.setattr(command, "_print_report", lambda *arguments: None)
    monkeypatch.setattr(command.compile_ahead, "fill_cache", lambda chosen: None)
    for arguments in ([], ["--backend", "triton"], ["--backend", "torch"], ["--backend", "torch", "--backend", "triton"]):
        main(["check", *arguments])
    every = ["torch cpu", "torch gpu", "triton gpu"]
    assert places == [every, ["triton gpu"], every[:2], every]


def test_the_last_line_names_every_device():
    assert report.last_line(GOOD, ["the CPU", "a GPU"], "").startswith("all 6 comparisons hold on the CPU and a GPU; ")


def test_a_missing_package_is_installed_as_the_library_was(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    find = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(SystemExit):
        main(["check", "--model", str(tmp_path)])
    assert about.install_command("transformers") in capsys.readouterr().err
    (tmp_path / "fastpg" / "tools").mkdir(parents=True)
    monkeypatch.setattr(about, "__file__", str(tmp_path / "fastpg" / "tools" / "about.py"))
    assert about.install_command("transformers") == 'pip install "fastpg-lm[transformers]"'
    (tmp_path / "pyproject.toml").touch()
    assert about.install_command("transformers") == 'pip install -e ".[transformers]"'


@pytest.mark.parametrize(("gpu", "device", "backend"), [(False, "cpu", "torch"), (True, "cuda (a GPU)", "triton")])
def test_the_version(monkeypatch, capsys, gpu, device, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(about, "choose_backend", lambda backend, x: "triton" if x == "cuda" else "torch")
    monkeypatch.setattr(about.torch, "empty", lambda size, device: device)
    main(["--version"])
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(rf"fastpg \d\S*, torch {re.escape(torch.__version__)}, triton \S+; on {re.escape(device)}", line)
    assert line.endswith(f": backend {backend}")


def test_the_version_where_the_environment_asks_for_another_backend(monkeypatch, capsys):
    monkeypatch.setattr("fastpg.tiles.backend._ENVIRONMENT", "tpu")
    main(["--version"])
    assert "no backend: the environment variable FASTPG_BACKEND must be" in capsys.readouterr().out
