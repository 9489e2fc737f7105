"""`fastpg demo --mismatch`: the tiny model learns from what another engine sampled, without a correction and with one.

Both runs of a seed start from the same model, prompts and random numbers.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from .engines import ENGINES
from .tasks import Task, larger_digit, tiny_model
from .train import sample, train

STEPS, SEEDS = 100, 3


class Run(NamedTuple):
    seed: int
    corrected: bool
    engine: float  # the share of right answers of the engine, over the last quarter of the steps
    policy: float  # ... of the trained policy, which samples itself
    kl: float  # over all steps, as the ess: mismatch_kl_k3, mismatch_ess of tokens
    ess: float


def run_pair(kind: str, seed: int, steps: int, objective: str, advantage: str, device: str) -> Iterator[Run]:
    """The two runs of a seed."""
    task = larger_digit()
    for corrected in (False, True):
        torch.manual_seed(seed)
        model = tiny_model().to(device)
        engine = ENGINES[kind](model, corrected)
        history = train(model, task, steps, seed, advantage, objective, engine=engine).history
        last = history[-max(1, steps // 4) :]
        kl, ess = (mean(row[name] for row in history) for name in ("mismatch_kl_k3", "mismatch_ess"))
        yield Run(seed, corrected, mean(row["reward"] for row in last), own_answers(model, task), kl, ess)


def own_answers(model, task: Task, batches: int = 8) -> float:
    """The share of right answers that a model samples itself; of the same prompts for every model."""
    random, generator = Random(0), torch.Generator(model.device).manual_seed(0)
    return mean(sample(model, task, random, generator).rewards.mean().item() for _ in range(batches))


def report(console: Console, kind: str, runs: list[Run]) -> None:
    """Means over the seeds, and standard deviations."""
    engine = ENGINES[kind]
    table = Table("", "uncorrected", "corrected", title=f"fastpg demo --mismatch {kind}")
    rows = {
        "right answers of the engine, last quarter": ("engine", "{:.0%}"),
        "right answers of the trained policy itself": ("policy", "{:.0%}"),
        "mismatch KL, all steps": ("kl", "{:.3f}"),
        "mismatch ESS, all steps": ("ess", "{:.2f}"),
    }
    for label, (name, form) in rows.items():
        arms = [[getattr(run, name) for run in runs if run.corrected == corrected] for corrected in (False, True)]
        spread = [f" ± {form.format(stdev(arm))}" if len(arm) > 1 else "" for arm in arms]
        table.add_row(label, *(form.format(mean(arm)) + s for arm, s in zip(arms, spread, strict=True)))
    console.print(table)
    console.print(f"{len(runs) // 2} seeds; corrected by {engine.corrected_by}. The engine: {engine.__doc__}")


def save(runs: list[Run], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mismatch.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([Run._fields, *runs])
    return path
