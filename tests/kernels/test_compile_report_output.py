"""What `fastpg compile-report` prints, its exit status, and how it shares variants out among processes. Compilers are stand-ins
where they can be."""

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from fastpg.__main__ import main
from fastpg.tools import compile_report, compiling
from fastpg.tools.compiling import Compiled, compile_all
from fastpg.tools.variants import KERNELS, Variant, variants

GOOD = [
    Compiled("keep", "cuda:80", "float32", [], 56, 0, 0, 166_912, 0),
    Compiled("combine", "cuda:90", "float32", [], 64, 0, 128, 232_448, 0),
    Compiled("dlogits", "cuda:90", "bfloat16", [], 200, 0, 131_072, 232_448, 4),
    Compiled("dlogits", "hip:gfx942", "bfloat16", ["bias"], 150, 0, 65_536, 65_536, 48),
    Compiled("dlogits", "cuda:80", "float32", ["bias"], 168, 0, 8192, 166_912, 0),
]
BAD = [*GOOD, Compiled("dlogits", "cuda:90", "bfloat16", ["bias"], 255, 8, 1000, 232_448, 0)]


@pytest.fixture
def report(monkeypatch, capsys):
    """The command on these results: (exit status, stdout, stderr, whether a bar was asked for)."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def report(compiled, *arguments):
        asked = []
        monkeypatch.setattr(compile_report, "compile_all", lambda chosen, progress: asked.append(progress) or compiled)
        status = 0
        try:
            main(["compile-report", *arguments])
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err, bar=asked[0] if asked else None)

    return report


def test_a_line_for_every_kernel_and_the_result(report):
    said = report(GOOD)
    lines = [re.split(r"  +", line.strip()) for line in said.out.splitlines()]
    assert lines[1:] == [
        ["keep", "1", "56, cuda:80", "none", "none", "no products"],
        ["combine", "1", "64, cuda:90", "none", "<1/227 KiB, cuda:90", "no products"],
        ["dlogits", "3", "200, cuda:90", "none", "64/64 KiB, hip:gfx942", "yes"],
        ["5 variants, no spills; each fits into shared memory; 16-bit products use tensor cores"],
    ]
    assert max(map(len, said.out.splitlines())) <= 100
    assert (said.status, said.err) == (0, "")
    assert "tensor cores" not in report(GOOD[:1]).out.splitlines()[-1]


def test_a_fault_is_named_and_is_the_result(report):
    fault = "dlogits cuda:90 bfloat16 bias: spills 8 bytes, no tensor-core instruction"
    said = report(BAD)
    assert (said.status, said.err) == (1, fault + "\n")
    *_, kernel, last = said.out.splitlines()
    assert re.split(r"  +", kernel.strip())[2:] == [
        "255, cuda:90", "1 of 4, 8 bytes", "64/64 KiB, hip:gfx942", "not in 1 of 3"
    ]  # fmt: skip
    assert last == f"FAILED: 1 of 6 variants; the first: {fault}"


def test_every_variant_if_verbose(report):
    said = report(GOOD, "--verbose").out
    assert len(re.findall(r"dlogits", said)) == 3
    assert "166912" in said
    assert said.splitlines()[-1].startswith("5 variants, no spills")


@pytest.mark.parametrize("compiled", [GOOD, BAD], ids=["good", "bad"])
def test_json_and_markdown_are_all_that_is_on_stdout(report, compiled):
    said = report(compiled, "--json")
    assert json.loads(said.out) == [asdict(c) for c in compiled]
    table = report(compiled, "--markdown")
    assert table.out == compile_report.markdown(compiled) + "\n"
    assert said.status == table.status == (compiled is BAD)
    assert bool(said.err) == (compiled is BAD)


def test_a_bar_on_terminals_alone_and_not_with_markdown(report, monkeypatch):
    assert report(GOOD).bar is False
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True, write=lambda text: None, flush=lambda: None))
    assert report(GOOD).bar is True
    assert report(GOOD, "--markdown").bar is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernel", "softmax"], "'softmax' (choose from"),
        (["--target", "cuda:70"], "'cuda:70' (choose from"),
        (["--verbose", "--json"], "not allowed with"),
    ],
)
def test_misuse(report, arguments, said):
    found = report(GOOD, *arguments)
    assert (found.status, found.bar) == (2, None)  # nothing was compiled
    assert said in found.err
    if arguments[0] == "--kernel":
        assert all(kernel in found.err for kernel in KERNELS)


def test_the_interpreter_is_refused(report, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = report(GOOD)
    assert (found.status, found.bar) == (2, None)
    assert "unset TRITON_INTERPRET" in found.err


def test_triton_is_needed(report, monkeypatch):
    monkeypatch.setattr(compile_report.importlib.util, "find_spec", lambda name: None)
    found = report(GOOD)
    assert (found.status, found.bar) == (2, None)
    assert "needs triton, which is not installed" in found.err


@pytest.fixture
def compilers(monkeypatch):
    """Threads in the place of processes, and a compiler that notes what it is given."""
    seen = SimpleNamespace(processes=None, given=[])

    def threads(count, *, mp_context):
        assert mp_context.get_start_method() == "spawn"  # a fork inherits the interpreter
        seen.processes = count
        return ThreadPoolExecutor(1)  # so that the order in which they begin is seen

    def compile_variant(variant):
        seen.given.append(variant)
        return replace(GOOD[0], kernel=variant.kernel, target=variant.target, dtype=variant.dtype, flags=list(variant.flags))

    monkeypatch.setattr(compiling, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(compiling, "compile_variant", compile_variant)
    monkeypatch.setattr(compiling, "cores", lambda: 5)
    return seen


def test_as_many_processes_as_cores_and_the_order_that_was_asked_for(compilers):
    every = list(variants())
    assert [c.variant for c in compile_all(every)] == every
    assert compilers.processes == 5
    assert sorted(map(str, compilers.given)) == sorted(map(str, every))
    heavy = ["statistics" in variant.flags for variant in compilers.given]
    assert heavy == sorted(heavy, reverse=True)


@pytest.mark.parametrize(("count", "processes"), [(1, None), (15, None), (16, 2), (39, 4), (80, 5)])
def test_few_variants_are_not_worth_a_process(compilers, count, processes):
    chosen = list(variants())[:count]
    assert [c.variant for c in compile_all(chosen)] == chosen
    assert compilers.processes == processes


def test_a_variant_that_does_not_compile_ends_the_rest(compilers, monkeypatch):
    def fails(variant):
        compilers.given.append(variant)
        time.sleep(0.01)
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiling, "compile_variant", fails)
    with pytest.raises(RuntimeError, match="no such instruction"):
        compile_all(list(variants()))
    assert len(compilers.given) < 100


def test_the_bar(compilers, capsys):
    compile_all(list(variants())[:20], progress=True)
    assert "/20 [" in capsys.readouterr().err
    compile_all(list(variants())[:20])
    assert capsys.readouterr().err == ""


def test_in_processes_of_its_own(monkeypatch, tmp_path, capfd):
    """The compilers themselves, of sixteen small variants: results in the order of `variants`, and a table of them."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the two processes inherit this
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "cores", lambda: 2)
    main(["compile-report", "--kernel", "scale", "--kernel", "gathered_dots", "--json"])
    said = capfd.readouterr()
    assert said.err == ""
    compiled = [Compiled(**c) for c in json.loads(said.out)]
    assert [c.variant for c in compiled] == list(variants(["scale", "gathered_dots"]))
    assert all(8 <= c.registers <= 255 for c in compiled)
    markdown = compile_report.markdown(compiled).splitlines()
    assert markdown[0].startswith("| kernel | dtype | flags | cuda:80 |")
    assert len(markdown) == 6
    assert all(line.count("|") == 8 for line in markdown)


def test_what_does_not_compile_is_named(monkeypatch):
    triton = pytest.importorskip("triton")
    variant = Variant("scale", "cuda:90", "float32", ())
    monkeypatch.setattr(
        compiling, "launched", lambda variant: (SimpleNamespace(fn=SimpleNamespace(__annotations__={}), arg_names=[]), [], {})
    )
    monkeypatch.setattr("triton.compiler.ASTSource", lambda **options: None)
    monkeypatch.setattr(triton, "compile", lambda *arguments, **options: 1 / 0)
    with pytest.raises(RuntimeError, match=r"^scale cuda:90 float32 plain does not compile: division by zero$"):
        compiling.compile_variant(variant)
