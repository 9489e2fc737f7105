"""The pictures of README.md, from the files in results/: `python bench/readme_pictures.py` writes them there."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from memory_over_tokens import COUNTED, HEAD, RESULTS
from readme_tables import H100_SERIES, H100_STEP

GIB = 2**30
MEMORY, MILLISECONDS = RESULTS / "memory_over_tokens.png", RESULTS / "milliseconds.png"
OURS, OTHERS, FULL = "#0b6e4f", "#8d99ae", "#c1443c"
_LINES = {  # method: (colour, name at the end of its line)
    "full logits": (FULL, "full logits"),
    "TRL": (OTHERS, "TRL's chunked head"),
    "fastpg one pass": (OURS, "fastpg, one pass"),
    "fastpg two passes": (OURS, "fastpg, two passes"),
}
# measured on the H100; the name is written where no line has it
_DOTS = dict.fromkeys(("full logits", "TRL", "verl", "CCE", "Liger"), "")
_DOTS["full logits, compiled"] = "torch.compile of full logits"
LIMIT = 80e9 / GIB


def memory_over_tokens(counted: dict, step: dict, path: Path) -> None:
    """Peak memory of a step over its tokens: counted as lines, measured on the H100 as dots."""
    figure, axis = _figure((8, 4.2))
    ends = {}
    for method, (color, name) in _LINES.items():
        points = [(int(rows), peak / GIB) for rows, peak in counted["peak_bytes"][method].items()]
        x, y = zip(*points, strict=True)
        axis.plot(x, y, color=color, linewidth=2.2, linestyle="--" if "two" in method else "-")
        ends[f"{name}: {y[-1]:.1f} GiB"] = (y[-1], color)
        most = x[-1]
    ends = {name: end for name, end in ends.items() if end[0] < LIMIT}
    for place, (name, (_, color)) in enumerate(sorted(ends.items(), key=lambda end: end[1])):
        axis.annotate(name, (most, 0.5 + 4.4 * place), (6, 0), textcoords="offset points", color=color, fontsize=9)
    axis.annotate("full logits", (26000, 48), ha="right", color=FULL, fontsize=10, weight="bold")
    rows, measured = of_the_head(step)
    for method, name in _DOTS.items():
        axis.plot([rows], [measured[method]], "o", color=FULL if "full" in method else OTHERS, markersize=5)
        if name:
            axis.annotate(name, (rows, measured[method]), (8, -3), textcoords="offset points", color=FULL, fontsize=8)
    axis.axhspan(LIMIT, 100, color="#f6d5d2", zorder=0)
    axis.annotate("out of memory on a GPU of 80 GB", (1500, LIMIT + 3), color=FULL, fontsize=9)
    axis.set(xlim=(0, 1.36 * most), ylim=(0, 90), xlabel="tokens in a step", ylabel="GiB")
    axis.set_xticks([0, 16384, 32768, 49152, 65536], ["0", "16,384", "32,768", "49,152", "65,536"])
    axis.set_title("Peak memory of the loss and its gradients: head of Qwen3-8B, bf16", loc="left", fontsize=11)
    said = f"Lines: bytes counted. Dots: measured on an H100, {rows:,} tokens."
    axis.annotate(said, (1.35 * most, 65), ha="right", fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)


def of_the_head(step: dict) -> tuple[int, dict[str, float]]:
    """How many tokens the step had, and the peak in GiB of each method that was measured."""
    rows = [r for r in step["rows"] if _is_head(r)]
    return rows[0]["rows"], {r["method"]: r["peak_bytes"] / GIB for r in rows if "peak_bytes" in r}


def _is_head(row: dict) -> bool:
    return (row["vocab"], row["hidden"], row["section"]) == (HEAD.vocab, HEAD.hidden, "step")


def milliseconds(step: dict, series: dict, path: Path) -> None:
    """A step of the H100 as bars, and the three bare products as a line. What was measured in two runs is named so."""
    of_series = {r["name"]: r for r in series["runs"]["third"] if r.get("H") == HEAD.hidden and r["section"] == "proto"}
    of_step = {r["method"]: r for r in step["rows"] if _is_head(r) and "seconds" in r}
    bars = [("fastpg, one pass", "one chunk", OURS), ("full logits, torch.compile", "full logits, compiled", FULL)]
    found = [(name, statistics.median(of_series[key]["ms"]), of_series[key]["x"], color) for name, key, color in bars]
    others = {"full logits": "full logits", "TRL's chunked head": "TRL", "verl": "verl", "CCE, exact": "CCE"}
    for name, key in others.items():
        row = of_step[key]
        found.append((name, row["seconds"] * 1e3, row["over_products"], FULL if key == "full logits" else OTHERS))
    figure, axis = _figure((8, 3.4))
    found.reverse()  # bars are drawn from below
    beside = {"textcoords": "offset points", "fontsize": 9}
    for place, (_, ms, ratio, color) in enumerate(found):
        axis.barh(place, ms, color=color, height=0.66)
        axis.annotate(f"{ms:.0f} ms ({ratio:.2f} x)", (ms, place), (5, 0), va="center", **beside)
    axis.set_yticks(range(len(found)), [name for name, *_ in found], fontsize=9)
    floor = statistics.median(of_series["bare products"]["ms"])
    axis.axvline(floor, color="black", linewidth=1.5)
    axis.annotate(f"three bare matrix products: {floor:.0f} ms", (floor, len(found) - 0.42), (4, 0), **beside)
    left_out = f"Liger's fused GRPO, {of_step['Liger']['seconds'] * 1e3:,.0f}, is not drawn"
    axis.set(xlim=(0, 215), ylim=(-0.6, len(found)), xlabel=f"milliseconds of a step ({left_out})")
    axis.set_title("Loss and gradients of 8,192 tokens, head of Qwen3-8B, bf16, NVIDIA H100", loc="left", fontsize=11)
    figure.savefig(path, dpi=150)


def _figure(size: tuple[float, float]):
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def main() -> None:
    step, series = (json.loads(path.read_text()) for path in (H100_STEP, H100_SERIES))
    memory_over_tokens(json.loads(COUNTED.read_text()), step, MEMORY)
    milliseconds(step, series, MILLISECONDS)
    print(f"wrote {MEMORY} and {MILLISECONDS}")


if __name__ == "__main__":
    main()
