"""The tables of README.md and of results/README.md, from the files in results/: `python bench/readme_tables.py` prints them.

A test compares the documents with this output, so that no number in them is older than the results.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

from fastpg.crosscheck.accuracy import logprob_tolerance

RESULTS = Path(__file__).parent / "results" / "results.json"
# from one H100: results of run.py, and a longer series of interleaved runs
H100_STEP, H100_SERIES = (RESULTS.parent / f"h100-{name}.json" for name in ("bench-step", "measurements"))

_NAMES = {
    "full logits": "full logits",
    "full logits, compiled": "full logits, `torch.compile`",
    "TRL": "TRL's chunked head",
    "Liger": "Liger's fused linear GRPO",
    "torch linear_cross_entropy": "torch's `linear_cross_entropy`",
    "fastpg one pass": "**`linear_policy_loss`, one pass**",
    "fastpg two passes": "**`linear_logprobs`, two passes**",
}


def step_table(results: dict) -> str:
    """One step of the loss: fastpg and its peers, per dtype."""
    lines = ["| | ends in | memory beyond dX, dW | time, in bare products | error of logp | of dX |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        of_dtype = [r for r in results["rows"] if r["section"] == "step" and r["dtype"] == dtype and "seconds" in r]
        timed = {row["method"]: row for row in of_dtype}
        for method, name in _NAMES.items():
            if method in timed:
                row = timed[method]
                mib = (row["peak_bytes"] - row["gradient_bytes"]) / 2**20
                logp = "" if row["logp_error"] is None else f"{row['logp_error']:.0e}"
                time = f"{row['over_products']:.2f} x"
                lines.append(f"| {short}: {name} | {_ending(row)} | {mib:.0f} MiB | {time} | {logp} | {row['dx_error']:.0e} |")
    return "\n".join(lines) + "\n"


def _ending(row: dict) -> str:
    """How a row's log-probabilities became a loss.

    Files without `ends_in` are older: in them every method without a loss of its own ended in `policy_loss`.
    """
    has_own = row["logp_error"] is None or row["method"].startswith("fastpg one pass")
    said = row.get("ends_in", "its own loss" if has_own else "policy_loss")
    return f"`{said}`" if said == "policy_loss" else said


def loss_table(results: dict) -> str:
    """`policy_loss` on ready log-probabilities, beside the plain lines on the same."""
    timed = {row["method"]: row for row in results["rows"] if row["section"] == "loss alone" and "seconds" in row}
    plain = timed.get("plain lines alone")
    if plain is None:
        return "Not in these results, which are older than this cell.\n"
    lines = ["| on ready log-probabilities | microseconds | over the plain lines | over the bare products of a step |"]
    lines.append("|---|---:|---:|---:|")
    for method, name in (("plain lines alone", "plain lines"), ("policy_loss alone", "**`policy_loss`**")):
        if method in timed:
            row = timed[method]
            over_plain, over_products = f"{row['seconds'] / plain['seconds']:.2f} x", f"{row['over_products']:.1e} x"
            lines.append(f"| {name} | {row['seconds'] * 1e6:.0f} | {over_plain} | {over_products} |")
    return "\n".join(lines) + "\n"


def goals_table(results: dict) -> str:
    lines = ["| | goal | measured | |", "|---|---|---:|---|"]
    for goal in results["goals"]:
        lines.append(f"| {goal['what']} | {goal['goal']} | {goal['measured']:.2f} | {'met' if goal['met'] else 'missed'} |")
    return "\n".join(lines) + "\n"


# of each head: its name in the table, its name in bench-step.json, and its hidden size, the key in measurements.json
_HEADS = (("Qwen3-8B", "qwen3-8b", 4096), ("Llama-3.2-1B", "llama3.2-1b", 2048), ("SmolLM2-135M", "smollm2-135m", 576))
_SERIES = {
    "bare products": "three bare products",
    "as is": "**one pass**",
    "one chunk": "**one pass, one chunk**",
    "fastpg two passes": "**two passes**",
    "full logits, compiled": "full logits, `torch.compile`",
}
_STEP = {
    "bare products": "three bare products",
    "fastpg one pass": "**one pass**",
    "full logits": "full logits",
    "full logits, compiled": "full logits, `torch.compile`",
    "TRL": "TRL's chunked head",
    "verl": "verl",
    "CCE": "CCE, exact",
    "Liger": "Liger's fused linear GRPO",
}


def h100_table(step: dict, series: dict) -> str:
    """Times and peak memory of three heads: rows a from the series, rows b from run.py, each over its own bare products."""
    lines = ["| | " + " | ".join(f"{name}, H = {hidden}" for name, _, hidden in _HEADS) + " |", "|---|---:|---:|---:|"]
    third = series["runs"]["third"]
    for method, name in _SERIES.items():
        cells = [_of_series(third, hidden, method) for _, _, hidden in _HEADS]
        lines.append(f"| a: {name} | " + " | ".join(cells) + " |")
    for method, name in _STEP.items():
        rows = [r for _, head, _ in _HEADS for r in step["rows"] if r["name"].startswith(head) and r["method"] == method]
        lines.append(f"| b: {name} | " + " | ".join(map(_of_step, rows)) + " |")
    return "\n".join(lines) + "\n"


def _of_series(rows: list[dict], hidden: int, method: str) -> str:
    of_head = {(r["section"], r["name"]): r for r in rows if r.get("H") == hidden}
    timed, peak = of_head["proto", method], of_head["peak", method]["peak"]
    return _cell(statistics.median(timed["ms"]), timed["x"], peak, method)


def _of_step(row: dict) -> str:
    if "why_not" in row:
        return "refused" if row["why_not"].startswith("wrong") else "failed"
    return _cell(row["seconds"] * 1e3, row["over_products"], row["peak_bytes"], row["method"])


def _cell(milliseconds: float, ratio: float, peak_bytes: int, method: str) -> str:
    time = f"{milliseconds:.3g} ms" if method == "bare products" else f"{ratio:.2f} x"
    return f"{time}, {peak_bytes / 2**30:.2f} GiB"


_FIRST = {
    "bare products": "three bare products",
    "one chunk": "**fastpg**, one pass",
    "full logits, compiled": "full logits, `torch.compile`",
}
_PEERS = {
    "full logits": "full logits",
    "TRL": "TRL's chunked head",
    "verl": "verl's kernel",
    "CCE": "CCE (cut cross entropy), exact",
    "Liger": "Liger's fused linear GRPO",
}


def first_table(step: dict, series: dict) -> str:
    """The head of Qwen3-8B alone: milliseconds, over the bare products of the same run, and peak memory."""
    _, head, hidden = _HEADS[0]
    of_series = {(r["section"], r["name"]): r for r in series["runs"]["third"] if r.get("H") == hidden}
    rows = [
        (name, statistics.median(of_series["proto", key]["ms"]), of_series["proto", key]["x"], of_series["peak", key]["peak"])
        for key, name in _FIRST.items()
    ]
    of_step = {r["method"]: r for r in step["rows"] if r["name"].startswith(head)}
    rows += [
        (name, of_step[key]["seconds"] * 1e3, of_step[key]["over_products"], of_step[key]["peak_bytes"])
        for key, name in _PEERS.items()
    ]
    lines = ["| | milliseconds | over the bare products | peak memory, gradients included |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {ms:,.0f} | {ratio:.2f} x | {peak / 2**30:.2f} GiB |" for name, ms, ratio, peak in rows]
    return "\n".join(lines) + "\n"


def accuracy_table(series: dict) -> str:
    """Largest errors of log-probabilities on the H100, beside the promise for its logits, which are up to about 12."""
    errors = {(r["H"], r["name"]): r["logp"] for run in series["runs"].values() for r in run if r.get("section") == "errors"}
    lines = ["| H | promised | one pass | TRL, full logits |", "|---:|---:|---:|---:|"]
    for hidden in sorted({hidden for hidden, _ in errors}):
        promised = logprob_tolerance(12.0, torch.bfloat16, hidden, "cuda")
        measured = (errors[hidden, name] for name in ("fastpg one pass", "full logits"))
        lines.append(f"| {hidden} | {promised:.1e} | " + " | ".join(f"{x:.1e}" for x in measured) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    results = json.loads(RESULTS.read_text())
    print(step_table(results))
    print(loss_table(results))
    print(goals_table(results))
    series = json.loads(H100_SERIES.read_text())
    step = json.loads(H100_STEP.read_text())
    print(first_table(step, series))
    print(h100_table(step, series))
    print(accuracy_table(series))


if __name__ == "__main__":
    main()
