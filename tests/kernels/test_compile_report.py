"""Every kernel compiles for every target without a spilled register, within its shared memory, onto the tensor cores."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from pairs import cover
from programs import run_program

from fastpg.kernels.blocks import Blocks, blocks_for
from fastpg.tools import compile_report, compiling, launches
from fastpg.tools.compiling import Compiled
from fastpg.tools.variants import DTYPES, KERNELS, MULTIPLIES, OBJECTIVES, TARGETS, Variant, variants

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
    done = run_program(*arguments, folder=folder, environment=settings, timeout=1200)
    assert done.returncode == 0, done.stderr
    return [Compiled(**c) for c in json.loads(done.stdout)]


def brings(variant: Variant) -> set[tuple]:
    """What of the matrix a variant shows: every kernel in every dtype, with each set of flags that is not the inner part of
    another, for one vendor and the other; of those that multiply, every target, every tile that the table has for 16-bit operands of it, all flags at once on it, and
    statistics with every tile of sm_90.
    """
    kernel, target, flags = variant.kernel, variant.target, variant.flags
    found = {(kernel, variant.dtype)} if inner(variant) else {(kernel, variant.dtype), (kernel, flags)}
    if kernel in MULTIPLIES or target in ("cuda:90", "hip:gfx942"):
        found |= {(kernel, target)}
    if kernel in MULTIPLIES and variant.dtype != "float32":
        found |= {(kernel, target, tile(variant))}
        found |= {(kernel, target, flags)} if flags == KERNELS[kernel][1] else set()
        found |= {(kernel, tile(variant), "statistics")} if on_sm_90(variant) else set()
    return found


def inner(variant: Variant) -> bool:
    """Whether the same flags are there with the sets of a support too, beside everything else."""
    return len(variant.flags) > 6 and (*variant.flags, "support") in {v.flags for v in variants([variant.kernel])}


def on_sm_90(variant: Variant) -> bool:
    """Further statistics, and gradients of them, take the most registers: they come closest to the limit of 255 of sm_90."""
    return variant.target == "cuda:90" and not {"statistics", "logsumexp"}.isdisjoint(variant.flags)


def tile(variant: Variant) -> Blocks:
    flags = variant.flags
    size = 4096 if "persistent" in flags else 2048
    return blocks_for(variant.target, DTYPES[variant.dtype], "bias" in flags, "softcap" in flags, variant.kernel, size)


@cache
def few() -> list[Variant]:
    """Less than a quarter of the matrix that brings all of it.

    What is asked of one target alone is asked of gfx942, where it takes less time, or else of sm_90.
    """
    first = sorted(variants(), key=lambda v: v.flags != KERNELS[v.kernel][1])
    return cover(sorted(first, key=lambda v: not on_sm_90(v) and v.target != "hip:gfx942"), brings)


def judge(found: list[Compiled]) -> None:
    for c in found:
        assert c.spill_bytes == 0, c
        assert c.shared_bytes <= c.shared_limit, c
        assert 8 <= c.registers <= 512, c  # a number was read
        if c.kernel in MULTIPLIES and c.dtype != "float32":
            assert c.mma_instructions > 0, c
        if c.kernel not in MULTIPLIES:
            assert c.mma_instructions == 0, c


PARTS = 2  # each a test and a process


@pytest.mark.parametrize("part", range(PARTS))
def test_a_part_of_the_matrix_in_which_everything_occurs(tmp_path, part):
    """The whole of it: `pytest --full`, `fastpg compile-report`."""
    chosen = sorted(few(), key=lambda v: len(v.flags))[part::PARTS]  # each has some of those that take long
    (tmp_path / "variants").write_text(json.dumps([[*vars(v).values()] for v in chosen]))
    found = compiled(tmp_path, "-c", COMPILE, "variants")
    assert [(c.kernel, c.target, c.dtype, tuple(c.flags)) for c in found] == [tuple(vars(v).values()) for v in chosen]
    judge(found)


def test_what_that_part_holds():
    every, chosen = list(variants()), few()
    assert len(chosen) <= len(every) / 4
    assert {(v.kernel, v.dtype) for v in chosen} == {(v.kernel, v.dtype) for v in every}
    left = {(v.kernel, v.flags) for v in every} - {(v.kernel, v.flags) for v in chosen}
    assert left == {(v.kernel, v.flags) for v in every if inner(v)}
    assert len(left) == 3
    on_targets = {(v.kernel, v.target) for v in chosen}
    assert on_targets >= {(kernel, target) for kernel in KERNELS for target in ("cuda:90", "hip:gfx942")}
    sixteen = [v for v in chosen if v.kernel in MULTIPLIES and v.dtype != "float32"]
    for kernel in MULTIPLIES:
        every_tile = {(v.target, tile(v)) for v in every if v.kernel == kernel and v.dtype != "float32"}
        assert {(v.target, tile(v)) for v in sixteen if v.kernel == kernel} == every_tile
        assert len(every_tile) == (9 if kernel == "anchored_exp" else 8)  # 2, 3, 2 and 1 by target, and the persistent one
        assert {v.target for v in sixteen if (v.kernel, v.flags) == (kernel, KERNELS[kernel][1])} == set(TARGETS)
    registers = {(v.kernel, tile(v)) for v in every if v.kernel in MULTIPLIES and on_sm_90(v) and v.dtype != "float32"}
    assert {(v.kernel, tile(v)) for v in sixteen if on_sm_90(v)} == registers
    assert len(registers) == 5


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
