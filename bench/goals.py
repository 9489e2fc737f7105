"""The goals of the bench: each with the measured number, and whether it was met.

Most were set for a CPU. Those of `_STEPS_ON_GPU` are for an H100 and its kin: time over the three bare products.
"""

from __future__ import annotations

from rich.table import Table

# per device: the head whose step the goals are about, and the bytes of the default workspace
_STEPS = {"cpu": "SmolLM2's head", "cuda": "qwen3-8b"}
_WORKSPACES = {"cpu": 2**28, "cuda": 2**30}
# (section, head and batch, method, most)
_STEPS_ON_GPU = (
    ("step", "qwen3-8b", "fastpg one pass", 1.02),
    ("step", "llama3.2-1b", "fastpg one pass", 1.2),
    ("step", "llama3.2-1b", "fastpg one pass, one chunk", 1.1),
    ("step", "smollm2-135m", "fastpg one pass", 1.5),
    ("small batch", "smollm2-135m, N = 2048", "fastpg one pass", 2.4),
    ("step", "qwen3-8b", "fastpg two passes", 1.36),
    ("step", "smollm2-135m", "fastpg two passes", 2.4),
)


def goals(rows: list[dict], device: str = "cpu") -> list[dict]:
    """One {what, goal, measured, met} for every goal whose cells are among the rows."""
    found, every = [], rows
    rows = [r for r in rows if r["section"] != "step" or r["name"].startswith(_STEPS[device])]

    def add(what: str, goal: str, measured: float | None, met: bool | None) -> None:
        if measured is not None:
            found.append({"what": what, "goal": goal, "measured": round(measured, 3), "met": bool(met)})

    def value(section: str, dtype: str, method: str, field: str = "over_products") -> float | None:
        return next((r.get(field) for r in rows if (r["section"], r["dtype"], r["method"]) == (section, dtype, method)), None)

    def at_most(what: str, limit: float, measured: float | None) -> None:
        add(what, f"<= {limit}", measured, measured is not None and measured <= limit)

    def at_least(what: str, limit: float, measured: float | None) -> None:
        add(what, f">= {limit}", measured, measured is not None and measured >= limit)

    def over_one_pass(section: str, dtype: str, method: str) -> float | None:
        above, under = value(section, dtype, method, "seconds"), value(section, dtype, one, "seconds")
        return None if above is None or under is None else above / under

    one, two = "fastpg one pass", "fastpg two passes"
    at_most("one pass over products, fp32, default workspace", 1.03, value("step", "float32", one))
    # by default the step is one chunk; on a GPU several are not measured
    at_most("one pass over products, bf16, one chunk", 1.12, value("step", "bfloat16", one))
    at_most("one pass over products, bf16, several chunks", 1.40, value("step", "bfloat16", f"{one}, several chunks"))
    at_most("two passes over products, fp32", 1.36, value("step", "float32", two))
    at_most("two passes over products, bf16", 1.65, value("step", "bfloat16", two))
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        zero, frozen = f"{one}, half zero weights", f"{one}, frozen weight"
        at_most(f"half of the tokens at weight zero over all, {short}", 0.58, over_one_pass("step", dtype, zero))
        at_most(f"frozen weight over trainable, {short}", 0.72, over_one_pass("step", dtype, frozen))
    at_least("full logits over one pass, fp32", 1.3, over_one_pass("step", "float32", "full logits"))
    at_least("full logits over one pass, bf16", 2.2, over_one_pass("step", "bfloat16", "full logits"))
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        at_least(f"the same at H = 2048, {short}", 1.0, over_one_pass("H = 2048", dtype, "full logits"))
    at_least("TRL over one pass, bf16", 5.0, over_one_pass("step", "bfloat16", "TRL"))
    at_least("Liger over one pass, bf16", 3.0, over_one_pass("step", "bfloat16", "Liger"))
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        mine = [r for r in rows if r["dtype"] == dtype and r["method"] == one and "seconds" in r]
        per_token = [r["seconds"] / r["rows"] for r in mine if r["section"] in ("step", "over N")]
        if len(per_token) > 1:
            at_most(f"time per token, over N, largest over smallest, {short}", 1.25, max(per_token) / min(per_token))
        per_column = [r["seconds"] / r["vocab"] for r in mine if r["section"] == "over V"]
        if len(per_column) > 1:
            at_most(f"time per entry of V, over V, largest over smallest, {short}", 1.25, max(per_column) / min(per_column))
        if mine:
            at_most(
                f"memory beyond dX and dW over workspace (and fp32 dW in bf16), largest, {short}",
                1.0,
                _excess(mine, _WORKSPACES[device]),
            )
    for section, name, method, most in _STEPS_ON_GPU if device == "cuda" else ():
        of_step = [r for r in every if r["section"] == section and r["name"].startswith(name) and r["method"] == method]
        at_most(f"{method} over products, {name}", most, next((r.get("over_products") for r in of_step), None))
    return found


def _excess(rows: list[dict], workspace: int) -> float:
    """The largest ratio of the memory beyond dX and dW to the memory that is allowed there.

    Allowed are the workspace and, unless dW is fp32 itself, one fp32 copy of dW, in which chunks are summed.
    """

    def allowed(row: dict) -> float:
        wide = row["vocab"] * row["hidden"] * 4 if row["dtype"] != "float32" else 0
        return workspace + wide

    return max((r["peak_bytes"] - r["gradient_bytes"]) / allowed(r) for r in rows if r["workspace"] is None)


def table(found: list[dict]) -> Table:
    shown = Table("goal", "", "measured", "met", title="What this run is held to", title_justify="left")
    for row in found:
        shown.add_row(row["what"], row["goal"], f"{row['measured']:.2f}", "yes" if row["met"] else "no")
    return shown
