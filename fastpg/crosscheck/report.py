"""What `fastpg check` prints: a line for every operation, backend and dtype; the errors above tolerance; the result."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch

from .cases import EVERYTHING, Case
from .judge import Checked, Deviation

_COLUMNS, _COLUMNS_OF_CASES = 100, 170  # of a table that is not written to a terminal
# columns of the table of all cases -> the quantities in them
_QUANTITIES = {"logp": ("logp",), "loss": ("loss",), "dX": ("dX, a row", "dlogits, a row", "dlogp"), "dW": ("dW",)}
_QUANTITIES["others"] = ("entropy", "db", "dA", "dB")
_OF_EVERYTHING = Case("", torch.float32, 1, 1, 1, **EVERYTHING).describe().partition(", ")[2]
_TITLE = "the largest error of each operation over its tolerance: above 1 fails"
_CASE = "in the case: tokens x H x V, features"


def print_table(checked: list[Checked], verbose: bool) -> None:
    """A line for every operation, backend and dtype; if verbose, for every case."""
    from rich.console import Console

    columns = _COLUMNS_OF_CASES if verbose else _COLUMNS
    console = Console(width=None if sys.stdout.isatty() else columns, highlight=False)
    console.print(_of_cases(checked) if verbose else _of_groups(checked))
    if not verbose and any(_short(c.case) != c.case.describe() for c in checked):
        console.print(f"everything: {_OF_EVERYTHING}")
    sys.stdout.flush()  # before the lines on stderr


def groups(checked: Iterable[Checked]) -> dict[tuple[str, str, str], list[Checked]]:
    """By operation, backend and dtype."""
    found: dict[tuple[str, str, str], list[Checked]] = {}
    for c in checked:
        found.setdefault((c.case.operation, c.backend, c.dtype), []).append(c)
    return dict(sorted(found.items(), key=lambda item: item[0][:2]))


def worst(checked: Iterable[Checked]) -> tuple[Checked, Deviation]:
    """The quantity that is closest to its tolerance, or furthest above it, and whose it is."""
    return max(((c, d) for c in checked for d in c.deviations), key=lambda pair: pair[1].multiple)


def misses(checked: list[Checked], verbose: bool) -> Iterator[str]:
    """A line for each quantity above its tolerance. Unless verbose, of each operation, backend and dtype its worst case."""
    for of_group in groups(checked).values():
        found: dict[str, list[tuple[Checked, Deviation]]] = {}
        for c in of_group:
            for d in c.deviations:
                if not d.multiple <= 1:
                    found.setdefault(d.quantity, []).append((c, d))
        for above in found.values():
            shown = above if verbose else [max(above, key=lambda pair: pair[1].multiple)]
            yield from (f"{c.name}: {d}" for c, d in shown)


def last_line(checked: list[Checked], devices: Iterable[str], compiled: str) -> str:
    """Whether everything holds, and what is closest to its tolerance. compiled: the last line of a compile report, or ""."""
    multiples = [d.multiple for c in checked for d in c.deviations]
    above = sum(not multiple <= 1 for multiple in multiples)
    c, d = worst(checked)
    place = f"{_quantity(d)} of {c.name}"
    where = f"on {' and '.join(devices)}"
    if above:
        said = (
            f"{above} of {len(multiples)} comparisons {where} are above their tolerance; the worst: {number(d)} times, {place}"
        )
    else:
        said = f"all {len(multiples)} comparisons hold {where}; the closest to its tolerance: {number(d)} of it, {place}"
    failed = above or compiled.startswith("FAILED")
    compiled = f"; compile report: {compiled.removeprefix('FAILED: ')}" if compiled else ""
    return ("FAILED: " if failed else "") + said + compiled


def number(d: Deviation) -> str:
    return f"{d.multiple:.2f}" if d.multiple < 100 else f"{d.multiple:.0e}"


def _quantity(d: Deviation) -> str:
    return d.quantity.removesuffix(", a row")


def _short(case: Case) -> str:
    return case.describe().replace(_OF_EVERYTHING, "everything")


def _of_groups(checked: list[Checked]):
    from rich.table import Table

    table = Table(
        "operation", "backend", "dtype", box=None, pad_edge=False, padding=(0, 2, 0, 0), title=_TITLE, title_justify="left"
    )
    for name in ("error", "of", _CASE):
        table.add_column(name, justify="right" if name == "error" else "left", no_wrap=name != _CASE)
    for key, of_group in groups(checked).items():
        c, d = worst(of_group)
        fails = d.multiple > 1
        said = f"FAIL {number(d)}" if fails else number(d)
        table.add_row(*key, said, _quantity(d), _short(c.case), style="bold red" if fails else None)
    return table


def _of_cases(checked: list[Checked]):
    from rich.table import Table

    table = Table("operation", "backend", "dtype", "tokens x H x V, features", title=_TITLE)
    for name in (*_QUANTITIES, "full logits: logp", "dX"):
        table.add_column(name, justify="right")
    for c in checked:
        numbers = [_largest(c.deviations, names) for names in _QUANTITIES.values()]
        beside = [_largest(c.full_logits, _QUANTITIES[name]) for name in ("logp", "dX")]
        style = "bold red" if any(c.misses()) else None
        table.add_row(c.case.operation, c.backend, c.dtype, c.case.describe(), *numbers, *beside, style=style)
    return table


def _largest(found: list[Deviation], names: tuple[str, ...]) -> str:
    chosen = [d for d in found if d.quantity in names]
    return number(max(chosen, key=lambda d: d.multiple)) if chosen else ""
