"""curves.png: what a person wants to see of a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compare import LossMemory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FASTPG, FULL = "#1f5fa8", "#f2a65a"
FULL_LINE: dict[str, Any] = {"color": FULL, "linewidth": 6, "solid_capstyle": "round", "label": "full logits"}
FASTPG_LINE: dict[str, Any] = {"color": FASTPG, "linewidth": 2, "label": "fastpg"}


def draw_curves(history: list[dict[str, Any]], memory: LossMemory, title: str, path: Path) -> None:
    """Reward, memory, solved groups, and the length of answers; with `--compare` both losses in the place of the length."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    figure.suptitle(title, fontsize=11, color="0.35")
    (reward, bars), (below, groups) = figure.subplots(2, 2)
    draw_reward(reward, history)
    draw_memory(bars, memory)
    (draw_losses if "loss_full_logits" in history[0] else draw_length)(below, history)
    draw_groups(groups, history)
    for axes in (reward, below, groups):
        axes.set_xlabel(axes.get_xlabel() or "step")
        axes.margins(x=0.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (reward, bars, below, groups):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontweight("bold")
    figure.savefig(path, dpi=120)


def column(history: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in history]


def smooth(values: list[float]) -> list[float]:
    """Means of the last few values."""
    window = smoothing(len(values))
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - window) : end]
        means.append(sum(last) / len(last))
    return means


def smoothing(steps: int) -> int:
    return min(steps, max(3, steps // 10))


def draw_reward(axes: Axes, history: list[dict[str, Any]]) -> None:
    steps, reward = column(history, "step"), column(history, "reward")
    if "reward_full_logits" in history[0]:
        axes.plot(steps, smooth(column(history, "reward_full_logits")), **FULL_LINE)
    axes.plot(steps, smooth(reward), **FASTPG_LINE)
    axes.plot(steps, reward, ".", color=FASTPG, alpha=0.35, markersize=5, label="each step")
    axes.set(title=f"Right answers, mean of {smoothing(len(steps))} steps", ylim=(-0.03, 1.05))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)


def draw_memory(axes: Axes, memory: LossMemory) -> None:
    names, sizes = ("full logits", "fastpg"), (memory.full_logits / 2**20, memory.fastpg / 2**20)
    drawn = axes.barh(names, sizes, color=(FULL, FASTPG), height=0.55)
    axes.bar_label(drawn, [f" {size:.0f} MiB" if size >= 10 else f" {size:.1f} MiB" for size in sizes], fontsize=12)
    axes.set(
        title=f"Memory of the loss of {memory.tokens} tokens, V = {memory.vocab}",
        xlabel="MiB at the peak, beyond the gradients",
    )
    axes.set_xlim(0, 1.25 * max(*sizes, 0.1))
    axes.tick_params(axis="y", length=0, labelsize=11)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def draw_losses(axes: Axes, history: list[dict[str, Any]]) -> None:
    steps = column(history, "step")
    axes.plot(steps, column(history, "loss_full_logits"), **FULL_LINE)
    axes.plot(steps, column(history, "loss"), **FASTPG_LINE)
    largest = max(column(history, "loss_difference"))
    axes.set(title="Loss", xlabel=f"step\nof the same weights they differ by at most {largest:.0e}")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)


def draw_length(axes: Axes, history: list[dict[str, Any]]) -> None:
    steps = column(history, "step")
    axes.plot(steps, smooth(column(history, "tokens")), color=FASTPG, linewidth=2)
    axes.plot(steps, column(history, "tokens"), ".", color=FASTPG, alpha=0.35, markersize=5)
    axes.set(title="Tokens of an answer")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def draw_groups(axes: Axes, history: list[dict[str, Any]]) -> None:
    """Shares of the prompts. Where the answers of a prompt earn alike, a comparison within the group says nothing."""
    steps, solved, failed = (column(history, name) for name in ("step", "groups_solved", "groups_failed"))
    mixed = [1 - one - other for one, other in zip(solved, failed, strict=True)]
    names = ("all answers right", "some right: these teach", "all wrong")
    colors, bottom = ("#9dc3e6", FASTPG, "0.85"), [0.0] * len(steps)
    for name, shares, color in zip(names, (solved, mixed, failed), colors, strict=True):
        axes.bar(steps, shares, bottom=bottom, width=1.0, color=color, label=name)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set(title="Prompts, by their groups of answers", ylim=(0, 1))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False, fontsize=9)
    silent = [row for row in history if row["note"]]
    if silent:
        axes.plot(column(silent, "step"), [0.96] * len(silent), "v", color="0.2", markersize=5)
        axes.set_xlabel(f"step   (▼ {' / '.join(sorted({row['note'] for row in silent}))}: no gradient)")
