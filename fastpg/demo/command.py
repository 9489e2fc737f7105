"""`fastpg demo`: the command's options, its report and its curves."""

from __future__ import annotations

import argparse
import csv
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..tools.threads import one_thread
from . import mismatch
from .engines import ENGINES
from .estimators import ESTIMATORS, NEED_STEPS, OBJECTIVES
from .tasks import check_packages, larger_digit, load_smollm2, sums, tiny_model
from .train import Training, train
from .walk import Walk


def quarters(history: list[dict[str, float]]) -> tuple[float, float]:
    """Answer accuracy over the first and the last quarter of the steps."""
    rewards = [row["reward"] for row in history]
    n = max(1, len(rewards) // 4)
    return sum(rewards[:n]) / n, sum(rewards[-n:]) / n


def report(console: Console, training: Training) -> None:
    first, last = quarters(training.history)
    tokens, vocab, *sizes = training.memory
    fastpg, full = (f"{size / 2**20:.1f} MiB" for size in sizes)
    table = Table("", "", show_header=False, title="fastpg demo")
    table.add_row("answer accuracy, first quarter of the steps", f"{first:.0%}")
    table.add_row("answer accuracy, last quarter of the steps", f"{last:.0%}", end_section=True)
    table.add_row(f"memory of the loss of {tokens} tokens, V = {vocab}, beyond dX and dW", fastpg)
    table.add_row("the same with full logits", full, end_section=True)
    for phase, seconds in training.seconds.items():
        table.add_row(f"seconds: {phase}", f"{seconds:.1f}")
    table.add_row("seconds: all", f"{sum(training.seconds.values()):.1f}")
    console.print(table)


def save(training: Training, folder: Path, title: str) -> list[Path]:
    """Writes history.csv and curves.png, and returns their paths."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, training.history[0])
        writer.writeheader()
        writer.writerows(training.history)

    steps = [row["step"] for row in training.history]
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title)
    curves = {"answer accuracy": "reward", "loss": "loss", "largest ratio": "ratio_max", "clip fraction": "clip_fraction"}
    for axes, (label, name) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
        axes.plot(steps, [row[name] for row in training.history], marker="." if len(steps) < 50 else "")
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if name in ("reward", "clip_fraction"):
            axes.set_ylim(bottom=0)
    figure.savefig(folder / "curves.png", dpi=120)
    return [folder / "history.csv", folder / "curves.png"]


def add_command(commands) -> None:
    """Adds `fastpg demo` to the parser in __main__."""
    parser = commands.add_parser("demo", help="train a small language model to answer, with a loss without logits")
    parser.add_argument(
        "--model",
        choices=("smollm2", "tiny", "walk"),
        default="smollm2",
        help="tiny: a random Llama, 10 s; walk: the same in an environment of several steps",
    )
    parser.add_argument("--steps", type=positive, help="batches of rollouts (default: 16 for smollm2, 200 for tiny)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch finds a GPU, else cpu")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of curves.png and history.csv")
    parser.add_argument(
        "--advantage",
        choices=ESTIMATORS,
        default="group",
        help="estimator; none: those of group are shuffled over the batch, a control that must not learn (default: group)",
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="cispo", help="default: cispo")
    parser.add_argument(
        "--top-p",
        type=share,
        default=1.0,
        help="sample with top-p, and train with the tokens that it kept (default: 1, all tokens)",
    )
    parser.add_argument(
        "--mismatch",
        nargs="?",
        choices=ENGINES,
        const="stale",
        help="with --model tiny: learn from what another engine samples, without a correction and with one. stale: its weights "
        "are 16 batches old (the default); broken: three of ten tokens are random; rounded: weights in 4 bits",
    )
    parser.add_argument(
        "--seeds", type=positive, help=f"of --mismatch: how many, from --seed on (default: {mismatch.SEEDS}, two runs each)"
    )
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError  # argparse names the option and the value
    return int(text)


def share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError
    return float(text)


def run(args: argparse.Namespace) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the demo must not download anything
    if args.advantage in NEED_STEPS and args.model != "walk":
        raise SystemExit(f"fastpg demo: --advantage {args.advantage} needs episodes of several steps; add --model walk")
    _check_mismatch(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("fastpg demo: --device cuda: torch finds no GPU; leave --device out, or say cpu")
    console = Console()
    try:
        check_packages(args.model)
    except ModuleNotFoundError as error:
        raise SystemExit(f"fastpg demo: {error}") from None

    if args.mismatch:
        compare_engines(args, console, device)
        return
    with nullcontext() if args.model == "smollm2" else one_thread():
        start = time.perf_counter()
        torch.manual_seed(args.seed)
        if args.model == "smollm2":
            console.print("Loading SmolLM2-135M-Instruct ...")
            model, tokenizer = load_smollm2()
            task = sums(tokenizer)
        else:
            model, task = tiny_model(), Walk() if args.model == "walk" else larger_digit()
        model = model.to(device)
        loading = time.perf_counter() - start

        training = train(model, task, args.steps or task.steps, args.seed, args.advantage, args.objective, args.top_p)
    training.seconds["load"] = loading
    report(console, training)
    title = f"{args.model} on {device}, seed {args.seed}, {args.objective}, advantages: {args.advantage}"
    title += f", top-p {args.top_p:g}" if args.top_p < 1 else ""
    for path in save(training, args.out, title):
        console.print(f"wrote {path}")


def _check_mismatch(args: argparse.Namespace) -> None:
    if args.seeds and not args.mismatch:
        raise SystemExit("fastpg demo: --seeds is of --mismatch; add it, or choose one seed by --seed")
    if args.mismatch and args.model != "tiny":
        raise SystemExit(f"fastpg demo: --mismatch trains the tiny model; got --model {args.model}, add --model tiny")
    if args.mismatch and args.top_p < 1:
        raise SystemExit(f"fastpg demo: --mismatch samples from all tokens; got --top-p {args.top_p:g}, leave it out")


def compare_engines(args: argparse.Namespace, console: Console, device: str) -> None:
    """`--mismatch`"""
    runs: list[mismatch.Run] = []
    with one_thread():
        for seed in range(args.seed, args.seed + (args.seeds or mismatch.SEEDS)):
            settings = args.steps or mismatch.STEPS, args.objective, args.advantage
            runs += mismatch.run_pair(args.mismatch, seed, *settings, device)
    mismatch.report(console, args.mismatch, runs)
    console.print(f"wrote {mismatch.save(runs, args.out)}")
