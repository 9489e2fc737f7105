"""`fastpg compile-report`: every kernel compiled for four GPU targets, without a GPU.

What can be known of a kernel before it runs: that it compiles, that its registers suffice (spilled ones live in memory), that
its shared memory fits the target, and that its matrix products reach the tensor cores. Compiles the variants that the launchers
in `fastpg.kernels` use: their block sizes, and the alignment of common models (H and strides divisible by 16), which Triton
finds at launch and without which nothing is vectorised.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# target -> (backend, architecture, warp size, shared memory of a program in bytes, its matrix instructions)
TARGETS = {
    "cuda:80": ("cuda", 80, 32, 166_912, r"mma\.sync"),
    "cuda:90": ("cuda", 90, 32, 232_448, r"wgmma\.mma_async"),
    "cuda:100": ("cuda", 100, 32, 232_448, r"tcgen05\.mma"),
    "hip:gfx942": ("hip", "gfx942", 64, 65_536, r"v_mfma"),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TRITON_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

# kernel -> the dtypes that reach it, and what it may be asked for
KERNELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "target": (("bfloat16", "float16", "float32"), ("bias", "softcap", "lora")),
    "anchored_exp": (("bfloat16", "float32"), ("scores", "bias", "softcap", "entropy", "lora")),
    "finalize": (("bfloat16", "float32"), ("scores", "entropy", "cispo")),
    "logsumexp": (("bfloat16", "float16", "float32"), ("bias", "softcap", "entropy", "lora")),
    "combine": (("float32",), ("entropy",)),
    "dlogits": (("bfloat16", "float16", "float32"), ("bias", "softcap", "entropy", "lora")),
    "given_logsumexp": (("bfloat16", "float16", "float32"), ("entropy",)),
    "given_dlogits": (("bfloat16", "float16", "float32"), ("entropy",)),
}
MULTIPLIES = ("anchored_exp", "logsumexp", "dlogits")

# Arguments by what they are; the rest are fp32 vectors. None where no flag asks for them.
_OPERANDS = ("X", "W", "B", "BIAS", "E", "D", "LOGITS")  # in the dtype of the model
_SIZES = (
    "C",
    "V",
    "H",
    "rank",
    "stride_x",
    "stride_w",
    "stride_l",
    "stride_b",
    "stride_e",
    "stride_d",
    "stride_z",
    "tiles",
    "splits",
)
_DIVISIBLE = ("V", "H", "rank", "stride_x", "stride_w", "stride_l", "stride_b", "stride_e", "stride_d", "stride_z")
_SCALARS = ("inner", "ratio_min", "ratio_max")
_FLAG_OF = {
    "BIAS": "bias", "L": "lora", "B": "lora",
    "E": "scores", "RESIDUAL": "scores", "Q": "entropy", "WEIGHTED": "entropy", "H_GRAD": "entropy",
    "ENTROPY": "entropy", "OTHERS": "entropy", "ratio_min": "cispo", "ratio_max": "cispo",
    **dict.fromkeys(
        ("LOG_ANCHOR", "OLD", "ADVANTAGE", "WEIGHT", "MASKED", "ROW_SCALE", "LOGP", "LOSS", "FACTOR", "STATE"), "cispo"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    kernel: str
    target: str
    dtype: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """What a compiler said of a variant. registers and spill_bytes per thread, shared_bytes per program."""

    kernel: str
    target: str
    dtype: str
    flags: list[str]
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    mma_instructions: int

    def problems(self) -> list[str]:
        """What must not be: spilled registers, too much shared memory, products beside the tensor cores."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.kernel in MULTIPLIES and self.dtype != "float32" and not self.mma_instructions:
            found.append("no tensor-core instruction")
        return found


def variants(kernels: list[str] | None = None, targets: list[str] | None = None) -> Iterator[Variant]:
    """16-bit dtypes: plain, each flag alone (bf16), all flags. fp32: plain and all flags. Plain row kernels know no dtype."""
    for kernel in kernels or KERNELS:
        dtypes, flags = KERNELS[kernel]
        for target in targets or TARGETS:
            for dtype in dtypes:
                alone = [(flag,) for flag in flags] if dtype == "bfloat16" else []
                chosen = dict.fromkeys([(), *alone, flags])
                if kernel == "finalize" and dtype == "float32":
                    del chosen[()]  # without E the same kernel as in bf16
                yield from (Variant(kernel, target, dtype, combination) for combination in chosen)


def arguments(variant: Variant) -> tuple[object, dict[str, str], dict[str, object], dict[str, int]]:
    """(kernel, {argument: type}, {argument: constant}, {option: value}) as its launcher would have them."""
    from . import kernels
    from .kernels import anchored_exp, dlogits, finalize, given, logsumexp, target  # noqa: F401 - read from the package below
    from .kernels.blocks import blocks_for

    name = {"combine": "logsumexp", "given_logsumexp": "given", "given_dlogits": "given"}.get(variant.kernel, variant.kernel)
    module = getattr(kernels, name)
    function = getattr(module, f"{variant.kernel}_kernel")
    dtype, softcap = _TRITON_DTYPES[variant.dtype], "softcap" in variant.flags
    constants: dict[str, object] = {
        "SOFTCAP": softcap, "CISPO": "cispo" in variant.flags, "EMULATE": False, "WIDEN": False, "EVEN_H": True,
        "BLOCK": getattr(module, "_BLOCK", None), "TILES": getattr(module, "_TILES_PER_SPLIT", None), "stride_h": 1,
        "DESCRIPTORS": False, "stride_r": 1, "RANK": 16 if variant.dtype == "float32" else 32,
    }  # fmt: skip
    constants["COLUMNS"] = getattr(module, "_COLUMNS", None)
    constants["ROWS"] = 4  # kernels.logits.ROWS_PER_PROGRAM outside the interpreter
    options = {}
    blocks = None
    if variant.kernel in MULTIPLIES:
        blocks = blocks_for(variant.target, DTYPES[variant.dtype], "bias" in variant.flags, softcap)
        constants |= {"ROWS": blocks.rows, "COLUMNS": blocks.columns, "DEPTH": blocks.depth, "PARTS": blocks.parts}
        constants["GROUPS"] = blocks.groups
        constants["DESCRIPTORS"] = blocks.descriptors
        options = blocks.options()
    signature = {}
    for name in function.arg_names:
        if name in constants:
            continue
        if _is_absent(name, variant):
            constants[name] = None
        elif constants["DESCRIPTORS"] and name in ("X", "W"):
            signature[name] = f"tensordesc<{dtype}[{blocks.rows if name == 'X' else blocks.columns},{blocks.depth}]>"
        elif name in ("L", "B") and blocks is not None:  # bf16 parts beside every 16-bit operand
            signature[name] = "*fp32" if dtype == "fp32" else "*bf16"
        else:
            signature[name] = _type_of(name, dtype)
    return function, signature, {k: v for k, v in constants.items() if k in function.arg_names}, options


def _is_absent(name: str, variant: Variant) -> bool:
    """Whether the launcher passes None."""
    if name == "R":  # what rounding takes
        return variant.dtype == "float32" or not (variant.kernel == "dlogits" or "scores" in variant.flags)
    if name == "UNIT":
        return variant.dtype != "float16"
    if name == "LOGP" and variant.kernel != "finalize":
        return False
    flag = _FLAG_OF.get(name)
    return flag is not None and flag not in variant.flags


def _type_of(name: str, dtype: str) -> str:
    if name in _OPERANDS:
        return f"*{dtype}"
    if name in _SIZES:
        return "i32"
    if name in _SCALARS:
        return "fp32"
    return {"TOKENS": "*i64", "MASKED": "*u8", "KEEP": "*u8", "STATE": "*i8"}.get(name, "*fp32")


def compile_variant(variant: Variant) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, signature, constants, options = arguments(variant)
    backend, arch, warp_size, shared_limit, mma = TARGETS[variant.target]
    positions = {name: i for i, name in enumerate(function.arg_names)}
    divisible = [n for n, kind in signature.items() if kind.startswith("*") or n in _DIVISIBLE]
    source = ASTSource(
        fn=function,
        signature={name: signature.get(name, "constexpr") for name in function.arg_names},
        constexprs={(positions[name],): value for name, value in constants.items()},
        attrs={(positions[name],): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)
    if backend == "cuda":
        registers, spilled = _resources(compiled.asm["cubin"])
        assembly = compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])
    return Compiled(
        variant.kernel, variant.target, variant.dtype, list(variant.flags), registers, spilled,
        compiled.metadata.shared, shared_limit, len(re.findall(mma, assembly)),
    )  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread. Our kernels have no arrays of their own, so that a stack is spilled registers."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cubin").write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "kernel.cubin"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))


def compile_all(chosen: list[Variant], progress: bool = False) -> list[Compiled]:
    """In one process per core, none of which may have the interpreter in the kernels' place; few are not worth a process."""
    from multiprocessing import get_context

    from tqdm import tqdm

    if len(chosen) <= 24:
        return [compile_variant(variant) for variant in chosen]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(tqdm(pool.map(compile_variant, chosen), total=len(chosen), disable=not progress, unit="kernel"))


def add_command(commands) -> None:
    """`fastpg compile-report`, for the parser in __main__."""
    parser = commands.add_parser("compile-report", help="compile every kernel for four GPU targets, without a GPU")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeatable; default: all")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; default: all")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    form.add_argument("--markdown", action="store_true", help="a Markdown table, one row per kernel, dtype and flags")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("fastpg compile-report: unset TRITON_INTERPRET, which puts the interpreter in the compiler's place")
    compiled = compile_all(list(variants(args.kernel, args.target)), progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps([asdict(c) for c in compiled], indent=1))  # noqa: T201 - it is what was asked for
    elif args.markdown:
        print(markdown(compiled))  # noqa: T201
    else:
        _print_table(compiled)
    bad = [c for c in compiled if c.problems()]
    if bad:
        raise SystemExit(
            "\n".join(f"{c.kernel} {c.target} {c.dtype} {' '.join(c.flags)}: {', '.join(c.problems())}" for c in bad)
        )


def _print_table(compiled: list[Compiled]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "target", "dtype", "flags", title="fastpg compile-report")
    for column in ("registers", "spilled bytes", "shared bytes", "of", "matrix instructions"):
        table.add_column(column, justify="right")
    for c in compiled:
        numbers = (c.registers, c.spill_bytes, c.shared_bytes, c.shared_limit, c.mma_instructions)
        table.add_row(c.kernel, c.target, c.dtype, " ".join(c.flags) or "plain", *(str(n) for n in numbers))
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def markdown(compiled: list[Compiled]) -> str:
    """One row per kernel, dtype and flags; for each target registers / shared KiB / matrix instructions."""
    cells: dict[tuple, dict[str, str]] = {}
    for c in compiled:
        spilled = f", {c.spill_bytes} spilled" if c.spill_bytes else ""
        mma = f" / {c.mma_instructions}" if c.kernel in MULTIPLIES else ""
        key = c.kernel, c.dtype, " ".join(c.flags) or "plain"
        cells.setdefault(key, {})[c.target] = f"{c.registers} / {c.shared_bytes / 1024:.0f}{mma}{spilled}"
    rows = ["| kernel | dtype | flags | " + " | ".join(TARGETS) + " |", "|---" * (3 + len(TARGETS)) + "|"]
    rows += [
        "| " + " | ".join([*key, *(by_target.get(target, "") for target in TARGETS)]) + " |" for key, by_target in cells.items()
    ]
    return "\n".join(rows)
