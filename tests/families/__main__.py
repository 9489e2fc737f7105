"""Compares fastpg with the full logits of every model family: `python tests/families [name ...] [--jobs N] [--out FILE]`.

A family is a class that transformers lists for AutoModelForCausalLM or AutoModelForImageTextToText. A tiny random model of each
is built and compared (`compare_family.py`). Families run in processes with a limit of time and of memory, so that one that
crashes or hangs ends nothing else. Without names the results go to `bench/results/families.json` and, as a page, to
`docs/pages/families.md`. Exit status 1 if a family is wrong. Minutes; needs no GPU. pytest does not collect this folder;
`test_families` runs a few of the families.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import queue
import select
import subprocess
import sys
import threading
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "bench" / "results" / "families.json", ROOT / "docs" / "pages" / "families.md"
SECONDS, BYTES = 120, 8 * 2**30  # of one family
SETTINGS = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONSAFEPATH": "1",
}  # fmt: skip


class Worker:
    """A process that compares one family after another; it is started anew where one ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def compare(self, model_type: str, class_name: str) -> dict[str, Any]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent), "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, env=os.environ | SETTINGS,
            )  # fmt: skip
        start = time.monotonic()
        self.process.stdin.write(f"{model_type} {class_name}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line) | {"seconds": round(time.monotonic() - start, 1)}
        reason = "its process ended" if ready else f"not done after {SECONDS} seconds"
        self.end()
        return {"model_type": model_type, "class": class_name, "result": "wrong", "reason": reason}  # until it is known why

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def work() -> None:
    """The worker: names on stdin, rows on stdout."""
    out, sys.stdout = sys.stdout, sys.stderr  # models print
    import resource

    import torch
    from compare_family import compare

    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        print(json.dumps(compare(*line.split())), file=out, flush=True)


def run(families: list[tuple[str, str]], jobs: int) -> list[dict[str, Any]]:
    waiting: queue.Queue[tuple[str, str]] = queue.Queue()
    for family in families:
        waiting.put(family)
    rows: list[dict[str, Any]] = []

    def take() -> None:
        worker = Worker()
        while True:
            try:
                family = waiting.get_nowait()
            except queue.Empty:
                return worker.end()
            row = worker.compare(*family)
            rows.append(row)
            print(
                f"{len(rows):3} of {len(families)} {row['class']:50} {row['result']} {row.get('reason', '')[:100]}", flush=True
            )

    threads = [threading.Thread(target=take) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = {name: i for i, (_, name) in enumerate(families)}
    return sorted(rows, key=lambda row: order[row["class"]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help="model_types or classes; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="families at a time (default: one per core)")
    parser.add_argument("--out", type=Path, help="a file for the results of these names")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return 0
    os.environ.update(SETTINGS)
    from family_page import page
    from tiny_models import families

    chosen = [family for family in families() if not arguments.names or {*family} & {*arguments.names}]
    start = time.monotonic()
    rows = run(chosen, arguments.jobs)
    results = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "minutes": round((time.monotonic() - start) / 60, 1),
        "jobs": arguments.jobs,
        "families": rows,
    }
    out = arguments.out or (None if arguments.names else RESULTS)
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")
    if not arguments.names:
        PAGE.write_text(page(results))
    counts = {name: sum(row["result"] == name for row in rows) for name in dict.fromkeys(row["result"] for row in rows)}
    print(f"{len(rows)} families in {results['minutes']} minutes: {', '.join(f'{n} {name}' for name, n in counts.items())}")
    return int("wrong" in counts)


if __name__ == "__main__":
    sys.exit(main())
