"""Breaks fastpg on purpose, a line at a time, and sees the tests notice: `python tests/mutations [name ...] [--jobs N]`.

Each mutation is made in a copy of the tree in a temporary folder, where pytest runs the tests named beside it until the first
failure. First the same tests run without a mutation, and have to pass. Exit status 1 if a mutation survives, if its old text
is not found exactly once, or if the tests end in anything but a failed test. Minutes; needs no GPU. pytest does not collect
this folder; `test_mutations_apply` keeps the list from rotting.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from all_mutations import MUTATIONS
from mutation import ROOT, Mutation, file_of


class Result(NamedTuple):
    caught: bool
    by: str  # the failed test, or what went wrong
    seconds: float


# Loaded by pytest in the copy: an editable install must not win over it.
_PLUGIN = """
from pathlib import Path

def pytest_collection_finish(session):
    import fastpg, fastpg.kernels
    for module in (fastpg, fastpg.kernels):
        assert Path(__file__).parent in Path(module.__file__).parents, module.__file__
"""


def place(folder: Path, file: str) -> Path:
    """Where a file of the tree is in its copy: the package is laid out as it is installed, in a folder of its own."""
    if file.startswith("bench/"):
        return folder / file
    return folder / "package" / ("fastpg/" + file if file.startswith("kernels/") else file)


def copy_tree(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / "fastpg", folder / "package" / "fastpg", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "package" / "fastpg" / "kernels", ignore=ignored)
    for name in ("tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "package" / "imports_the_copy.py").write_text(_PLUGIN)


def run_tests(folder: Path, tests: str, only: str) -> Result:
    """pytest -x in a copy. Caught: a test ran and failed."""
    files = [str(file_of(name)) for name in tests.split()]
    options = [
        "-x",
        "-q",
        "-rf",
        "--tb=no",
        "-p",
        "imports_the_copy",
        "-p",
        "no:cacheprovider",
        *(["-k", only] if only else []),
    ]
    settings = {"PYTHONPATH": str(folder / "package"), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    failed = re.search(r"^(?:FAILED|ERROR) tests/\w+/test_(\S+?\.py::[^\n]*?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return Result(False, done.stdout.strip().splitlines()[-1], seconds)
    if done.returncode == 1 and failed:
        return Result(True, failed[1], seconds)
    return Result(False, f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}", seconds)


def without_mutation(tests: str, only: list[str]) -> Result:
    """What has to catch something passes as it is."""
    with tempfile.TemporaryDirectory(prefix="fastpg-") as name:
        copy_tree(Path(name))
        return run_tests(Path(name), tests, " or ".join(dict.fromkeys(only)))


def with_mutation(mutation: Mutation) -> Result:
    with tempfile.TemporaryDirectory(prefix="fastpg-") as name:
        copy_tree(Path(name))
        path = place(Path(name), mutation.file)
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return Result(False, f"old text found {text.count(mutation.old)} times in {mutation.file}", 0.0)
        path.write_text(text.replace(mutation.old, mutation.new))
        return run_tests(Path(name), mutation.tests, mutation.only)


def main() -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help="mutations whose names contain this; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations at a time (default: one per core)")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.names or any(n in m.name for n in arguments.names)]
    if not chosen:
        parser.error(f"no mutation has one of {arguments.names} in its name")

    sane: dict[str, list[str]] = {}
    for m in chosen:
        sane.setdefault(m.tests, []).append(f"({m.only})" if m.only else "test")

    start = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        unchanged = pool.map(without_mutation, sane, sane.values())
        results = list(pool.map(with_mutation, chosen))
    table = Table("mutation", "caught by", "s", title=f"{len(chosen)} mutations, {time.monotonic() - start:.0f} s")
    failures = 0
    for tests, result in zip(sane, unchanged, strict=True):
        passes = not result.caught and " passed" in result.by
        failures += not passes
        table.add_row(f"none: {tests}", ("" if passes else "[red]fails[/]: ") + escape(result.by), f"{result.seconds:.0f}")
    table.add_section()
    for mutation, result in zip(chosen, results, strict=True):
        failures += not result.caught
        said = ("" if result.caught else "[red]survives[/]: ") + escape(result.by)
        table.add_row(mutation.name, said, f"{result.seconds:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"{sum(r.caught for r in results)} of {len(chosen)} caught")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
