"""Time and peak memory of one training step of the loss (forward and backward), against full logits and bare products.

    python bench/run.py                                   SmolLM2's head, 2048 tokens, fp32 and bf16
    python bench/run.py --head qwen3-0.6b --rows 1024 --dtype bfloat16

Times are medians over --repeats runs, interleaved, as a ratio to the three bare matrix products of the same shapes in the same
dtype (logits, dX, dW). Memory is everything allocated during the step: results (dX, dW) included, inputs not. Log-probabilities
are compared with float64 before anything is timed. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from cases import HEADS, Batch, Head, batch
from rich.console import Console
from rich.table import Table

import fastpg
from fastpg.profiling import transient_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bare_products(b: Batch) -> torch.Tensor:
    logits = b.hidden @ b.weight.T
    _ = logits @ b.weight, logits.T @ b.hidden
    return logits


def full_logits(b: Batch) -> torch.Tensor:
    """What a trainer writes: logits, log_softmax in fp32, gather, loss, backward."""
    b = b.leaves()
    logprobs = torch.log_softmax((b.hidden @ b.weight.T).float(), -1).gather(1, b.tokens[:, None])[:, 0]
    fastpg.policy_loss(logprobs, b.old_logprobs, b.advantages, objective=fastpg.CISPO()).loss.backward()
    return logprobs.detach()


def two_pass(b: Batch) -> torch.Tensor:
    b = b.leaves()
    logprobs = fastpg.linear_logprobs(b.hidden, b.weight, b.tokens).logprobs
    fastpg.policy_loss(logprobs, b.old_logprobs, b.advantages, objective=fastpg.CISPO()).loss.backward()
    return logprobs.detach()


def one_pass(b: Batch) -> torch.Tensor:
    b = b.leaves()
    out = fastpg.linear_cispo_loss(b.hidden, b.weight, b.tokens, b.old_logprobs, b.advantages)
    out.loss.backward()
    return out.logprobs


STEPS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "full logits": full_logits,
    "fastpg, two passes": two_pass,
    "fastpg, one pass": one_pass,
}


def logprob_error(step: Callable[[Batch], torch.Tensor], b: Batch) -> float:
    """Largest |logp - float64| over up to 128 rows."""
    rows = slice(0, 128)
    part = Batch(b.hidden[rows], b.weight, b.tokens[rows], b.old_logprobs[rows], b.advantages[rows])
    exact = torch.log_softmax(part.hidden.double() @ part.weight.double().T, -1).gather(1, part.tokens[:, None])[:, 0]
    return (step(part) - exact).abs().max().item()


def median_seconds(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Medians of calls run in turn, so that a drift of the machine's speed meets all of them alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            seconds[i].append(time.perf_counter() - start)
    return [statistics.median(s[1:]) for s in seconds]


def report(name: str, head: Head, rows: int, dtype: str, repeats: int, console: Console) -> None:
    b = batch(head, rows, DTYPES[dtype])
    errors = {label: logprob_error(step, b) for label, step in STEPS.items()}
    assert max(errors["fastpg, two passes"], errors["fastpg, one pass"]) < 1e-4, f"log-probabilities are wrong: {errors}"
    memory = {label: transient_bytes(lambda step=step: step(b)) for label, step in STEPS.items()}
    floor, *seconds = median_seconds(
        [lambda: bare_products(b), *(lambda step=step: step(b) for step in STEPS.values())], repeats
    )
    table = Table(title=f"{name}: {rows} tokens, V = {head.vocab}, H = {head.hidden}, {dtype}")
    for column in ("loss, forward and backward", "peak memory", "without dX, dW", "seconds", "x three products", "max |dlogp|"):
        table.add_column(column, justify="left" if column.startswith("loss") else "right")
    gradients = sum(x.numel() * x.element_size() for x in (b.hidden, b.weight))
    for (label, used), s in zip(memory.items(), seconds, strict=True):
        mib = (f"{x / 2**20:.0f} MiB" for x in (used, used - gradients))
        table.add_row(label, *mib, f"{s:.2f}", f"{s / floor:.2f}", f"{errors[label]:.0e}")
    table.add_row("three bare products", "", "", f"{floor:.2f}", "1.00", "")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=HEADS, default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=2048, help="tokens")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    console = Console(width=120)
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()} "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    for dtype in options.dtype or DTYPES:
        report(options.head, HEADS[options.head], options.rows, dtype, options.repeats, console)


if __name__ == "__main__":
    main()
