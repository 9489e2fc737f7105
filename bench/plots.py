"""Three plots of a run: time over the bare products per method; milliseconds and memory over tokens; memory over V."""

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

_FLOOR = "bare products"


def draw(results: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in results["rows"] if "seconds" in row and row["method"] in COLORS]
    about = f"{results['about']['machine']}, torch {results['about']['versions']['torch']}, {results['about']['date']}"
    _over_the_floor([r for r in rows if r["section"] == "step"], about, out / "time_over_products.png")
    _over_tokens(results["rows"], about, out / "over_tokens.png")
    over_vocab = [r for r in rows if r["section"] == "over V"]
    memory = "peak memory beyond dX and dW, MiB"
    _lines(over_vocab, "vocab", _memory, "V", memory, about, out / "memory_over_vocab.png")


def _memory(row: dict) -> float:
    return (row["peak_bytes"] - row["gradient_bytes"]) / 2**20


def _over_tokens(rows: list[dict], about: str, path: Path) -> None:
    """A step of one head over its tokens, in milliseconds and in MiB, with the name of each method at its line.

    The head is that of the last cell "over N", which have the most methods. Its cell "step" is one more point.
    """
    from matplotlib import pyplot as plt

    over_tokens = [r for r in rows if r["section"] == "over N"]
    if not over_tokens:
        return
    head = {name: over_tokens[-1][name] for name in ("vocab", "hidden", "dtype")}
    rows = [r for r in rows if r["section"] in ("step", "over N") and {k: r[k] for k in head} == head]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names: dict = {time: [], memory: []}  # (height, name, colour) at the end of each line
    for method in dict.fromkeys(r["method"] for r in over_tokens if r["method"] in COLORS):
        of_method = sorted((r for r in rows if r["method"] == method), key=lambda r: r["rows"])
        measured = [r for r in of_method if "seconds" in r]
        name = method if measured == of_method else f"{method} (then fails)"
        names[time] += _line(time, measured, _milliseconds, name, COLORS[method])
        names[memory] += _line(memory, measured, _all_memory, name, COLORS[method])
    floor = [r for r in rows if r["method"] == _FLOOR and "seconds" in r]
    floor = sorted(floor, key=lambda r: r["rows"])
    names[time] += _line(time, floor, _milliseconds, "three bare products", "black", linestyle=":", marker="")
    time.set(xlabel="tokens", ylabel="milliseconds of a step")
    memory.set(xlabel="tokens", ylabel="peak memory, gradients included, MiB")
    for axis in (time, memory):
        axis.set(xlim=(0, 1.4 * max(r["rows"] for r in rows)))  # room for the names
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        _write_names(axis, names[axis], max(r["rows"] for r in rows))
    figure.suptitle(f"V = {head['vocab']}, H = {head['hidden']}, {head['dtype']}: {about}", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _milliseconds(row: dict) -> float:
    return row["seconds"] * 1e3


def _all_memory(row: dict) -> float:
    return row["peak_bytes"] / 2**20


def _line(axis, rows: list[dict], value, name: str, color: str, linestyle: str = "-", marker: str = "o") -> list[tuple]:
    """Draws it, and returns (height of its end, name, colour), or nothing where there are no rows."""
    if not rows:
        return []
    axis.plot([r["rows"] for r in rows], [value(r) for r in rows], color=color, linestyle=linestyle, marker=marker)
    return [(value(rows[-1]), name, color)]


def _write_names(axis, names: list[tuple], x: float) -> None:
    """The names of the lines at their ends, from the lowest up, none less than a line of text above the one before."""
    height, below = 0.045 * axis.get_ylim()[1], -1.0
    for y, name, color in sorted(names):
        below = max(y, below + height)
        axis.annotate(name, (x, below), (6, 0), textcoords="offset points", va="center", fontsize=8, color=color)


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
