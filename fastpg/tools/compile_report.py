"""`fastpg compile-report`: every kernel compiled for four GPU targets, without a GPU.

The report tells these things about a kernel before it runs: that it compiles, that its registers suffice (spilled ones live in
memory), that its shared memory fits the target, and that its matrix products reach the tensor cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict

from .compiling import Compiled, compile_all
from .variants import KERNELS, MULTIPLIES, TARGETS, variants

COLUMNS = 100  # of a report that is not written to a terminal


def add_command(commands) -> None:
    """Adds `fastpg compile-report` to the parser in __main__."""
    parser = commands.add_parser(
        "compile-report",
        help="compile every kernel for four GPU targets, without a GPU",
        epilog="Exit status: 0 without a fault; 1 if a variant spills, exceeds its shared memory or leaves the tensor cores "
        "unused; 2 if nothing could be compiled.",
    )
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeatable; default: all")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; default: all")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--verbose", action="store_true", help="a line for every variant, in the place of one for every kernel")
    form.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    form.add_argument("--markdown", action="store_true", help="a Markdown table, one row per kernel, dtype and flags")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        args.parser.error("unset TRITON_INTERPRET, which puts the interpreter in the compiler's place")
    if importlib.util.find_spec("triton") is None:
        args.parser.error("needs triton, which is not installed: pip install triton")
    chosen = list(dict.fromkeys(variants(args.kernel, args.target)))
    compiled = compile_all(chosen, progress=sys.stderr.isatty() and not args.markdown)
    faults = faults_of(compiled)
    if args.json:
        print(json.dumps([asdict(c) for c in compiled], indent=1))  # noqa: T201 - it is what was asked for
    elif args.markdown:
        print(markdown(compiled))  # noqa: T201
    else:
        print_tables(compiled, args.verbose)
    for fault in faults:
        print(fault, file=sys.stderr, flush=True)  # noqa: T201
    if not args.json and not args.markdown:
        print(last_line(compiled, faults))  # noqa: T201
    if faults:
        raise SystemExit(1)


def faults_of(compiled: list[Compiled]) -> list[str]:
    """A line for each variant that has faults."""
    return [f"{c.variant}: {', '.join(c.problems())}" for c in compiled if c.problems()]


def last_line(compiled: list[Compiled], faults: list[str]) -> str:
    if faults:
        return f"FAILED: {len(faults)} of {len(compiled)} variants; the first: {faults[0]}"
    counted = f"{len(compiled)} variants, no spills; each fits into shared memory"
    return counted + ("; 16-bit products use tensor cores" if any(c.multiplies_16_bits() for c in compiled) else "")


def print_tables(compiled: list[Compiled], verbose: bool) -> None:
    """A line for every kernel; if verbose, one for every variant."""
    from rich.console import Console

    table = _of_variants(compiled) if verbose else _of_kernels(compiled)
    Console(width=None if sys.stdout.isatty() else 130 if verbose else COLUMNS).print(table)
    sys.stdout.flush()  # before the lines on stderr


def _of_kernels(compiled: list[Compiled]):
    from rich.table import Table

    table = Table("kernel", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("variants", justify="right")
    for column in ("most registers", "spills", "most shared memory", "tensor cores"):
        table.add_column(column)
    for kernel in dict.fromkeys(c.kernel for c in compiled):
        of_kernel = [c for c in compiled if c.kernel == kernel]
        table.add_row(kernel, str(len(of_kernel)), *worst_of(of_kernel), style="red" if faults_of(of_kernel) else None)
    return table


def worst_of(of_kernel: list[Compiled]) -> tuple[str, str, str, str]:
    """Of the variants of a kernel: the most registers, the spills, the most shared memory, whether tensor cores are used."""
    most = max(of_kernel, key=lambda c: c.registers)
    spills = [c.spill_bytes for c in of_kernel if c.spill_bytes]
    fullest = max(of_kernel, key=lambda c: c.shared_bytes / c.shared_limit)
    used, limit = fullest.shared_bytes / 1024, fullest.shared_limit / 1024
    products = [c for c in of_kernel if c.multiplies_16_bits()]
    without = sum(not c.mma_instructions for c in products)
    return (
        f"{most.registers}, {most.target}",
        f"{len(spills)} of {len(of_kernel)}, {max(spills)} bytes" if spills else "none",
        f"{'<1' if used < 1 else f'{used:.0f}'}/{limit:.0f} KiB, {fullest.target}" if fullest.shared_bytes else "none",
        (f"not in {without} of {len(products)}" if without else "yes") if products else "no products",
    )


def _of_variants(compiled: list[Compiled]):
    from rich.table import Table

    table = Table("kernel", "target", "dtype", "flags", title="fastpg compile-report")
    for column in ("registers", "spilled bytes", "shared bytes", "of", "matrix instructions"):
        table.add_column(column, justify="right")
    for c in compiled:
        numbers = (c.registers, c.spill_bytes, c.shared_bytes, c.shared_limit, c.mma_instructions)
        table.add_row(c.kernel, c.target, c.dtype, " ".join(c.flags) or "plain", *(str(n) for n in numbers))
    return table


def markdown(compiled: list[Compiled]) -> str:
    """A table with one row per kernel, dtype and flags. Per target: registers / shared KiB / matrix instructions."""
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
