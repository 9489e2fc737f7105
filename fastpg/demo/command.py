"""`fastpg demo`: the command's options, and what it does in which order."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from ..tools.threads import one_thread
from . import mismatch
from .answers import answers
from .engines import ENGINES
from .estimators import ESTIMATORS, NEED_STEPS, OBJECTIVES
from .report import loading_bar, report, report_answers, report_losses, save
from .tasks import Task, check_packages, larger_digit, load_smollm2, sums, tiny_model
from .train import Clock, train
from .walk import Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_command(commands) -> None:
    """Adds `fastpg demo` to the parser in __main__."""
    parser = commands.add_parser("demo", help="train a small language model to answer, with a loss without logits")
    parser.add_argument(
        "--model",
        choices=("smollm2", "tiny", "walk"),
        default="smollm2",
        # two cores of an AMD EPYC without a GPU, while other work ran: 15 and 18 s of CPU time, imports included
        help="tiny: a random Llama, about 12 s; walk: the same in an environment of several steps, about 13 s",
    )
    parser.add_argument("--steps", type=positive, help="batches of rollouts (default: 16 for smollm2, 100 for the others)")
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
        "--compare",
        action="store_true",
        help="a copy of the model takes the same steps by full logits: losses and rewards of both, in twice the time",
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
        learn(args, console, device)


def learn(args: argparse.Namespace, console: Console, device: str) -> None:
    """Loads, asks, trains, asks again, and reports."""
    clock = Clock()
    torch.manual_seed(args.seed)
    with clock("load"):
        model, task = load(args.model, console)
        model = model.to(device)
    with clock("answer"):
        before = answers(model, task)
    settings = args.steps or task.steps, args.seed, args.advantage, args.objective, args.top_p
    training = train(model, task, *settings, compare=args.compare)
    with clock("answer"):
        after = answers(model, task)
    training.seconds.update(clock.seconds)

    report_answers(console, task.asks, before, after)
    if args.compare:
        report_losses(console, training.history)
    report(console, training)
    title = f"fastpg demo: {args.model} on {device}, seed {args.seed}, {args.objective}, advantages: {args.advantage}"
    title += f", top-p {args.top_p:g}" if args.top_p < 1 else ""
    for path in save(training, args.out, title):
        console.print(f"wrote {path}")


def load(name: str, console: Console) -> tuple[PreTrainedModel, Task | Walk]:
    with loading_bar(console) as told:
        if name == "smollm2":
            model, tokenizer = load_smollm2(told)
            return model, sums(tokenizer)
        told("importing transformers", 0.0)
        return tiny_model(), Walk() if name == "walk" else larger_digit()


def _check_mismatch(args: argparse.Namespace) -> None:
    if args.seeds and not args.mismatch:
        raise SystemExit("fastpg demo: --seeds is of --mismatch; add it, or choose one seed by --seed")
    if args.mismatch and args.model != "tiny":
        raise SystemExit(f"fastpg demo: --mismatch trains the tiny model; got --model {args.model}, add --model tiny")
    if args.mismatch and args.compare:
        raise SystemExit("fastpg demo: --compare and --mismatch are two comparisons; leave one of them out")
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
