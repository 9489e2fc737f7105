"""Every kernel compiles for every target without a spilled register, within its shared memory, onto the tensor cores."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from pairs import cover
from programs import run_program

from fastpg.tools import compile_report, compiling, launches
from fastpg.tools.compiling import Compiled
from fastpg.tools.variants import KERNELS, MULTIPLIES, OBJECTIVES, TARGETS, Variant, variants

README = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text()
COMPILE = """
import gc, json, sys
gc.disable()  # processes that end soon need none
from pathlib import Path
from dataclasses import asdict
from fastpg.tools.compiling import compile_variant
from fastpg.tools.variants import Variant

compiled = []
for kernel, target, dtype, flags in json.loads(Path(sys.argv[1]).read_text()):
    compiled.append(asdict(compile_variant(Variant(kernel, target, dtype, tuple(flags)))))
print(json.dumps(compiled))
"""


def compiled(folder: Path, *arguments: str) -> list[Compiled]:
    """What a program writes as JSON, which compiles from scratch, with no interpreter in the compiler's place."""
    settings = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": None}
    done = run_program(*arguments, folder=folder, environment=settings, timeout=2400)
    assert done.returncode == 0, done.stderr
    return [Compiled(**c) for c in json.loads(done.stdout)]


ASKED = ("cuda:90", "hip:gfx942")  # of each vendor one


def brings(variant: Variant) -> set[tuple]:
    """What of the matrix a variant shows: every kernel in every dtype, and for one vendor and the other; of those that multiply
    16-bit numbers, every target, and all flags at once for both vendors."""
    kernel, target, flags = variant.kernel, variant.target, variant.flags
    found = {(kernel, variant.dtype)}
    if kernel not in MULTIPLIES:
        return found | ({(kernel, target)} if target in ASKED else set())
    if variant.dtype == "float32":
        return found
    return (
        found | {(kernel, target)} | ({(kernel, target, flags)} if target in ASKED and flags == KERNELS[kernel][1] else set())
    )


@cache
def few() -> list[Variant]:
    """A tenth of the matrix that brings all of it. `.ci/run` compiles the whole."""
    first = sorted(variants(), key=lambda v: v.flags != KERNELS[v.kernel][1])
    return cover(sorted(first, key=lambda v: v.target != "hip:gfx942"), brings)  # which takes less time than others


def judge(found: list[Compiled]) -> None:
    for c in found:
        assert c.spill_bytes == 0, c
        assert c.shared_bytes <= c.shared_limit, c
        assert 8 <= c.registers <= 512, c  # a number was read
        if c.kernel in MULTIPLIES and c.dtype != "float32":
            assert c.mma_instructions > 0, c
        if c.kernel not in MULTIPLIES:
            assert c.mma_instructions == 0, c


@pytest.mark.xdist_group("programs")
def test_a_part_of_the_matrix(tmp_path):
    """The whole of it: `pytest --full`, `fastpg compile-report`."""
    (tmp_path / "variants").write_text(json.dumps([[*vars(v).values()] for v in few()]))
    found = compiled(tmp_path, "-c", COMPILE, "variants")
    assert [(c.kernel, c.target, c.dtype, tuple(c.flags)) for c in found] == [tuple(vars(v).values()) for v in few()]
    judge(found)


def test_what_that_part_holds():
    every, chosen = list(variants()), few()
    assert len(chosen) <= len(every) / 8
    assert {(v.kernel, v.dtype) for v in chosen} == {(v.kernel, v.dtype) for v in every}
    assert {(v.kernel, v.target) for v in chosen} >= {(kernel, target) for kernel in KERNELS for target in ASKED}
    sixteen = [v for v in chosen if v.kernel in MULTIPLIES and v.dtype != "float32"]
    assert {(v.kernel, v.target) for v in sixteen} == {(kernel, target) for kernel in MULTIPLIES for target in TARGETS}
    for kernel in MULTIPLIES:
        assert {v.target for v in sixteen if (v.kernel, v.flags) == (kernel, KERNELS[kernel][1])} >= set(ASKED)


@pytest.mark.full
def test_the_whole_matrix_is_the_table_of_the_readme(tmp_path):
    found = compiled(tmp_path, "-m", "fastpg", "compile-report", "--json")
    assert len(found) == len(list(variants()))
    judge(found)
    (table,) = re.findall(r"<!-- compile-report -->\n(.*?)\n<!-- /compile-report -->", README, re.DOTALL)
    assert table == compile_report.markdown(found)


def test_what_the_matrix_asks_for():
    assert len(list(variants())) <= 460
    count = Counter((v.kernel, v.dtype) for v in variants(targets=["cuda:90"]))
    assert count["anchored_exp", "bfloat16"] == 16  # plain, five flags alone, all; statistics; a support; persistent tiles
    assert count["logsumexp", "float16"] == 2  # plain, all
    assert count["dlogits", "float32"] == 3  # and all with a support
    assert count["logsumexp", "bfloat16"] == 10  # plain, four flags alone, all; statistics and a support, without and with all
    assert len(set(variants())) == (sum(count.values()) - 4) * len(TARGETS) + 4


def test_a_variant_is_what_its_launcher_would_compile():
    """Flags reach the kernel as arguments that are there, and nothing is left without a type."""
    for variant in variants(targets=["cuda:80", "cuda:90"]):
        kernel, arguments, _ = launches.launched(variant)
        given = dict(zip(kernel.arg_names, arguments, strict=True))
        source = compiling.source_of(kernel, arguments)
        assert list(source.signature) == list(kernel.arg_names)
        if "head" in given:
            assert (given["head"].BIAS is not None) == ("bias" in variant.flags)
            assert (given["head"].inner is not None) == ("softcap" in variant.flags)
            assert (given["head"].B is not None) == ("lora" in variant.flags)
            assert (given["rows"].SCALE is not None) == ("temperature" in variant.flags)
        if variant.kernel in MULTIPLIES:
            assert source.signature["W"].startswith("tensordesc") == given["TILE"].DESCRIPTORS
            assert (variant.target == "cuda:90" and variant.dtype != "float32") == given["TILE"].DESCRIPTORS
            assert given["TILE"].EVEN_H
        if "further" in given:
            asked = "statistics" in variant.flags or variant.kernel == "sum_further"
            assert (given["further"].TOP is not None) == asked
            assert given.get("K", 0) in ((2, 8) if asked else (0,)) or variant.kernel in ("combine", "sum_further")
            assert given.get("K", 0) == 8 or "top_k" not in variant.flags
        if variant.kernel == "dlogits":
            assert (given["incoming"].L is not None) == ("logsumexp" in variant.flags)
        if variant.kernel == "finish":
            named = [flag for flag in variant.flags if flag in OBJECTIVES]
            assert (given["OBJECTIVE"] is None) == (not named)
            assert given["sums"].E is None or "exps" in variant.flags


def test_no_kernel_has_more_than_14_parameters():
    names = {}
    for variant in variants(targets=["cuda:90"]):
        kernel, *_ = launches.launched(variant)
        names[variant.kernel] = kernel.arg_names
    assert set(names) == set(KERNELS)
    assert max(len(arguments) for arguments in names.values()) <= 14


def test_pointers_and_multiples_of_16_are_known_and_1_is_a_constant():
    (variant,) = [v for v in variants(["dlogits"], ["cuda:80"]) if v.dtype == "bfloat16" and not v.flags]
    kernel, arguments, options = launches.launched(variant)
    source = compiling.source_of(kernel, arguments)
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    head, place = source.signature["head"], position["head"]
    fields = {field: (place, i) for i, field in enumerate(type(head)._fields)}
    assert head.H == head.stride_w == "i32"
    assert fields["H"] in source.attributes
    assert source.constants[fields["stride_h"]] == 1
    assert source.constants[fields["BIAS"]] is None
    rows = source.signature["rows"]
    assert (rows.TOKENS, rows.C, rows.SCALE, rows.scale) == ("*i64", "i32", "constexpr", "fp32")
    assert (position["rows"], type(rows)._fields.index("C")) not in source.attributes
    assert options == {"num_warps": 8, "num_stages": 3}


def test_problems_are_named():
    good = Compiled("dlogits", "cuda:90", "bfloat16", [], 200, 0, 1000, 2000, 4)
    assert good.problems() == []
    bad = Compiled("dlogits", "cuda:90", "bfloat16", [], 255, 8, 3000, 2000, 0)
    assert bad.problems() == ["spills 8 bytes", "3000 bytes of shared memory", "no tensor-core instruction"]
    assert Compiled("dlogits", "cuda:90", "float32", [], 200, 0, 1000, 2000, 0).problems() == []


def test_variants_are_hashable_values():
    assert Variant("dlogits", "cuda:90", "bfloat16", ()) in set(variants())
