"""Time and memory of one training step of the loss, forward and backward, against the bare matrix products and against peers.

    python bench/run.py                          the CPU cells: minutes, on an idle machine
    python bench/run.py --device cuda            the GPU cells
    python bench/run.py --section step           repeatable; step, H = 2048, over N, over V, loss alone, samples
    python bench/run.py --head qwen3-8b          repeatable; with --method as well

Every number is a median over interleaved runs, as a ratio to the three bare products `X W^T`, `Z W`, `Z^T X` of
the same shapes and dtype. Before a method is timed its log-probabilities, dX and dW are compared with float64: what is wrong
gets no number. Memory is everything that a step allocates, results included, inputs not. Run it on an idle machine.

Peers end in the plain lines that a trainer writes, and fastpg's two passes in `policy_loss`. The table says what each row ends
in. The section "loss alone" has both on ready log-probabilities.

Writes results.json, results.csv and plots (time over the floor, time and memory over N, memory over V) into --out.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import goals
import plots
import torch
from cases import HEADS, Cell, batch, cpu_cells, gpu_cells, tiny_cells
from measure import attempt, machine, measure
from peers import METHODS
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from samples import sampled_cell
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a hundred tokens: exercises the program, measures nothing")
    parser.add_argument("--section", action="append", help="repeatable; default: all")
    parser.add_argument("--head", choices=HEADS, action="append", help="cells of this model's head; repeatable; default: all")
    parser.add_argument("--method", choices=METHODS, action="append", help="beside the bare products; repeatable; default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, help="of one untimed and two timed runs of every method; default: 1 or 2 by cell")
    parser.add_argument("--budget", type=float, default=5.5, help="timed seconds after which a method is not run again")
    parser.add_argument("--no-samples", action="store_true", help="without the cell of SmolLM2's own completions")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    warnings.filterwarnings("ignore", category=UserWarning)  # peers' own
    chosen = chosen_cells(options)
    if not chosen:
        parser.error("no cell of these sections, heads and dtypes")
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=200)
    about = machine(options.device)
    console.print(about)
    results: dict = {"about": about, "rows": []}
    for cell, make in tqdm(chosen, unit="cell"):
        rows = rows_of(cell, make, options)
        results["rows"] += [describe(cell) | row for row in rows]
        save(results, options.out)  # after every cell, so that a run that stops early keeps its results
        tqdm.write("", end="")
        console.print(table(cell, rows))
    if not options.tiny:
        results["goals"] = goals.goals(results["rows"], options.device)
        console.print(goals.table(results["goals"]))
    save(results, options.out)
    written = f"{options.out}/results.json, results.csv"
    if importlib.util.find_spec("matplotlib") is None:
        console.print(f"wrote {written}; no plots: matplotlib is not installed")
        return
    plots.draw(results, options.out)
    console.print(f"wrote {written} and plots")


def rows_of(cell: Cell, make: Callable, options: argparse.Namespace) -> list[dict]:
    """The cell's rows. If its batch cannot be made, for want of memory say, one row tells why."""
    b, why_not = attempt(make, options.device)
    if why_not is not None:
        return [{"method": "bare products", "why_not": f"no batch: {why_not}"}]
    return measure(b, cell.methods, options.rounds or cell.rounds, options.device, options.budget)


def chosen_cells(options: argparse.Namespace) -> list[tuple[Cell, Callable]]:
    """The cells, each with the function that makes its batch."""
    cells = tiny_cells() if options.tiny else gpu_cells() if options.device == "cuda" else cpu_cells()
    made = [(cell, lambda cell=cell: batch(cell, options.device)) for cell in cells]
    # this cell loads a model and samples answers, so it is made only where it is wanted
    if not (options.tiny or options.no_samples) and (not options.section or "samples" in options.section):
        made.append(sampled_cell(options.device))
    heads = [HEADS[name] for name in options.head or ()]
    if options.method:
        made = [(replace(cell, methods=tuple(m for m in cell.methods if m in options.method)), make) for cell, make in made]
    return [
        (cell, make)
        for cell, make in made
        if (not options.section or cell.section in options.section)
        and (not options.dtype or cell.dtype in options.dtype)
        and (not options.head or cell.head in heads)
    ]


def describe(cell: Cell) -> dict:
    head = cell.head
    kept = {k: v for k, v in asdict(cell).items() if k not in ("head", "methods")}
    return kept | {"vocab": head.vocab, "hidden": head.hidden, "softcap": head.softcap}


def table(cell: Cell, rows: list[dict]) -> Table:
    head = cell.head
    title = f"{cell.section}: {cell.name}  ({cell.rows} tokens, V = {head.vocab}, H = {head.hidden})"
    shown = Table("forward and backward", "ends in", title=title, title_justify="left")
    errors_of = {"max |dlogp|": "logp_error", "dX": "dx_error", "dW": "dw_error", "dL/dlogp": "dlogp_error"}
    of_host = ("host ms", "launches") if any("launches" in row for row in rows) else ()
    for column in ("seconds", "x products", *of_host, "peak", "peak without gradients", *errors_of):
        shown.add_column(column, justify="right")
    for row in rows:
        ends_in = row.get("ends_in", "")
        if "why_not" in row:
            blank = [""] * (3 + len(of_host) + len(errors_of))
            shown.add_row(row["method"], ends_in, *blank, escape(row["why_not"]))  # an error's text may look like markup
            continue
        memory = ("", "")
        if "gradient_bytes" in row:
            memory = size(row["peak_bytes"]), size(row["peak_bytes"] - row["gradient_bytes"])
        errors = (f"{row[name]:.0e}" if row.get(name) is not None else "" for name in errors_of.values())
        times = [digits(row["seconds"], 3), digits(row["over_products"], 2)]
        if of_host:
            times += [digits(1e3 * row["host_seconds"], 2), str(row["launches"])] if "launches" in row else ["", ""]
        shown.add_row(row["method"], ends_in, *times, *memory, *errors)
    return shown


def digits(x: float, places: int) -> str:
    """x with that many decimal places, or with two significant digits where it is below 0.1."""
    return f"{x:.{places}f}" if x >= 0.1 else f"{x:#.2g}"


def size(x: float) -> str:
    return f"{x / 2**20:.0f} MiB" if x >= 2**20 else f"{x / 2**10:.0f} KiB"


def save(results: dict, out: Path) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    names = list(dict.fromkeys(name for row in results["rows"] for name in row))
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(results["rows"])


if __name__ == "__main__":
    main()
