"""The tables of README.md and of results/README.md, from results/results.json: `python bench/readme_tables.py` prints both.

A test holds the two documents to what is printed here, so that no number in them is older than the results.
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "results.json"

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
    lines = ["| | memory beyond dX, dW | time, in bare products | error of logp | of dX |", "|---|---:|---:|---:|---:|"]
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        of_dtype = [r for r in results["rows"] if r["section"] == "step" and r["dtype"] == dtype and "seconds" in r]
        timed = {row["method"]: row for row in of_dtype}
        for method, name in _NAMES.items():
            if method in timed:
                row = timed[method]
                mib = (row["peak_bytes"] - row["gradient_bytes"]) / 2**20
                logp = "" if row["logp_error"] is None else f"{row['logp_error']:.0e}"
                time = f"{row['over_products']:.2f} x"
                lines.append(f"| {short}: {name} | {mib:.0f} MiB | {time} | {logp} | {row['dx_error']:.0e} |")
    return "\n".join(lines) + "\n"


def goals_table(results: dict) -> str:
    lines = ["| | goal | measured | |", "|---|---|---:|---|"]
    for goal in results["goals"]:
        lines.append(f"| {goal['what']} | {goal['goal']} | {goal['measured']:.2f} | {'met' if goal['met'] else 'missed'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    results = json.loads(RESULTS.read_text())
    print(step_table(results))
    print(goals_table(results))


if __name__ == "__main__":
    main()
