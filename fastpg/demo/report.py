"""What `fastpg demo` prints and writes: a bar while it loads, answers before and after, both losses, a summary, files."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .answers import Answer
from .curves import draw_curves
from .tasks import Told
from .train import Training

LOSSES_SHOWN = 8


@contextmanager
def loading_bar(console: Console) -> Iterator[Told]:
    """A bar for what takes seconds before the first step. Its clock runs while one part of the loading does."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("loading", total=1.0)
        yield lambda doing, share: progress.update(bar, description=doing, completed=share)
        progress.update(bar, description="loaded the model", completed=1.0)


def quarters(history: list[dict[str, Any]]) -> tuple[float, float]:
    """Answer accuracy over the first and the last quarter of the steps."""
    rewards = [row["reward"] for row in history]
    n = max(1, len(rewards) // 4)
    return sum(rewards[:n]) / n, sum(rewards[-n:]) / n


def report_answers(console: Console, asks: str, before: list[Answer], after: list[Answer]) -> None:
    """Prompts with the answers before and after, each marked."""
    table = Table("prompt", "right answer", "before the training", "", "after it", "", title=f"What it answers: {asks}")
    for old, new in zip(before, after, strict=True):
        table.add_row(escape(old.question), old.wanted, *_marked(old), *_marked(new))
    console.print(table)


def _marked(answer: Answer) -> tuple[str, str]:
    return escape(answer.said), "[green]right[/]" if answer.right else "[red]wrong[/]"


def report_losses(console: Console, history: list[dict[str, Any]]) -> None:
    """`--compare`: losses and rewards of both models at some steps, and the largest difference of two losses of one model."""
    table = Table("step", "loss by fastpg", "by full logits", "right answers by fastpg", "by full logits")
    table.title = "The same batches by both"
    for row in evenly(history, LOSSES_SHOWN):
        losses = (f"{row[name]:+.6f}" for name in ("loss", "loss_full_logits"))
        rewards = (f"{row[name]:.0%}" for name in ("reward", "reward_full_logits"))
        table.add_row(str(row["step"]), *losses, *rewards)
    largest = max(row["loss_difference"] for row in history)
    console.print(table)
    console.print(
        f"In all {len(history)} steps the losses of the same weights and the same batch differ by at most {largest:.1e}. The "
        "table has two models, each trained in one of the ways. Rounding errors of a step stay in their weights; as soon as an "
        "answer differs, so do the rewards."
    )


def evenly(rows: list[Any], count: int) -> list[Any]:
    """At most so many rows, from the first to the last."""
    if len(rows) <= count:
        return rows
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def report(console: Console, training: Training) -> None:
    """The summary: what happened."""
    table = Table("", "", show_header=False, title="What happened")
    for label, value in summary(training):
        table.add_row(label, value)
    console.print(table)


def summary(training: Training) -> Iterator[tuple[str, str]]:
    """Lines of a table that fits into 80 columns."""
    history, memory = training.history, training.memory
    first, last = quarters(history)
    n = max(1, len(history) // 4)
    yield "right answers", f"{first:.0%} -> {last:.0%}, first {n} and last {n} of {len(history)} steps"
    for note, count in Counter(row["note"] for row in history if row["note"]).items():
        yield "no gradient", f"{note}, in {count} of {len(history)} steps"
    fastpg, full = (f"{size / 2**20:.1f} MiB" for size in (memory.fastpg, memory.full_logits))
    yield "memory of the loss", f"fastpg {fastpg}, full logits {full}"
    yield "", f"beyond the gradients; {memory.tokens} tokens, V = {memory.vocab}"
    if memory.fastpg >= memory.full_logits:
        yield "", f"{memory.vocab} logits a token are too few to save"
    for phase, seconds in training.seconds.items():
        yield f"seconds: {phase}", f"{seconds:.1f}"
    yield "seconds: all", f"{sum(training.seconds.values()):.1f}"


def save(training: Training, folder: Path, title: str) -> list[Path]:
    """Writes history.csv and curves.png, and returns their paths. A ratio that a step does not have is an empty cell."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "history.csv", folder / "curves.png"]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, training.history[0])
        writer.writeheader()
        writer.writerows(training.history)
    draw_curves(training.history, training.memory, title, paths[1])
    return paths
