"""Three plots of a run: time over the bare products per method, memory over V, time over N."""

from __future__ import annotations

from pathlib import Path

# one colour per method, whatever a run contains
COLORS = {
    "fastpg one pass": "#0b6e4f",
    "fastpg two passes": "#6bb392",
    "full logits": "#8d99ae",
    "full logits, compiled": "#5c677d",
    "TRL": "#e07a5f",
    "Liger": "#f2cc8f",
    "torch linear_cross_entropy": "#3d5a80",
    "CCE": "#81b29a",
    "verl": "#b56576",
    "Liger, scaled cross entropy": "#e9c46a",
    "QuACK": "#457b9d",
}


def draw(results: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in results["rows"] if "seconds" in row and row["method"] in COLORS]
    about = f"{results['about']['machine']}, torch {results['about']['versions']['torch']}, {results['about']['date']}"
    _over_the_floor([r for r in rows if r["section"] == "step"], about, out / "time_over_products.png")
    over_vocab = [r for r in rows if r["section"] == "over V"]
    memory = "peak memory beyond dX and dW, MiB"
    _lines(over_vocab, "vocab", _memory, "V", memory, about, out / "memory_over_vocab.png")
    steps = [r for r in rows if r["section"] in ("step", "over N") and r["method"] == "fastpg one pass"]
    _lines(steps, "rows", _microseconds, "tokens", "microseconds per token", about, out / "time_over_tokens.png")


def _memory(row: dict) -> float:
    return (row["peak_bytes"] - row["gradient_bytes"]) / 2**20


def _microseconds(row: dict) -> float:
    return row["seconds"] / row["rows"] * 1e6


def _over_the_floor(rows: list[dict], about: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["name"] for row in rows))
    if not names:
        return
    figure, axes = plt.subplots(1, len(names), figsize=(6.5 * len(names), 3.2), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        bars = sorted((r for r in rows if r["name"] == name), key=lambda r: -r["over_products"])
        colors = [COLORS[r["method"]] for r in bars]
        drawn = axis.barh([_label(r) for r in bars], [r["over_products"] for r in bars], color=colors)
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=name, xlabel="time over three bare products")
        axis.margins(x=0.15)
    figure.suptitle(about, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label(row: dict) -> str:
    """The method, with its ending unless that is part of the method."""
    ends_in = row.get("ends_in", "its own loss")  # older results do not say it
    return row["method"] if ends_in == "its own loss" else f"{row['method']} + {ends_in}"


def _lines(rows: list[dict], x: str, value, xlabel: str, ylabel: str, about: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    if not rows:
        return
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for dtype, style in (("float32", "-"), ("bfloat16", "--")):
        for method, color in COLORS.items():
            points = sorted((r[x], value(r)) for r in rows if r["method"] == method and r["dtype"] == dtype)
            if points:
                axis.plot(*zip(*points, strict=True), style, marker="o", color=color, label=f"{method}, {dtype}")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=about)
    axis.title.set_fontsize(8)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
