"""The benchmark program on a tiny case: its gate, its files, its peers; both backends. Nothing here is timed."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import measure
import peers
import pytest
import torch
from cases import HEADS, Cell, Head, batch, cpu_cells, exact_logprobs, gpu_cells
from goals import goals

BENCH = Path(__file__).resolve().parents[1] / "bench"
TINY = Cell("step", "tiny", Head(300, 32), 64, "float32", ())


def run(folder: Path, *arguments: str, **settings: str) -> dict:
    command = [sys.executable, str(BENCH / "run.py"), "--tiny", "--rounds", "1", "--out", str(folder), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"OMP_NUM_THREADS": "1"} | settings
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def test_the_program_writes_a_table_files_and_plots(tmp_path):
    results = run(tmp_path)
    assert {"machine", "date", "versions"} <= set(results["about"])
    timed = [row for row in results["rows"] if "seconds" in row]
    assert {row["section"] for row in timed} == {"step", "over N", "over V"}
    methods = {row["method"] for row in timed if row["section"] == "step"}
    assert {"bare products", "fastpg one pass", "fastpg one pass, frozen weight", "full logits", "TRL", "Liger"} <= methods
    for row in timed:
        assert row["seconds"] > 0
        assert row["over_products"] > 0
        assert row["method"] == "bare products" or row["peak_bytes"] >= row["gradient_bytes"]
    with open(tmp_path / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"])
    for plot in ("time_over_products", "memory_over_vocab", "time_over_tokens"):
        assert (tmp_path / f"{plot}.png").stat().st_size > 5000


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run there")
def test_the_kernels_pass_its_gate(tmp_path):
    """In the interpreter: what a GPU's run does before it times anything."""
    results = run(tmp_path, "--section", "step", TRITON_INTERPRET="1", FASTPG_BACKEND="triton")
    ours = [row for row in results["rows"] if row["method"].startswith("fastpg")]
    assert len(ours) == 8
    assert all("why_not" not in row for row in ours), ours


def test_events_are_used_on_a_gpu(monkeypatch):
    """The timing of --device cuda, with events that count calls in the place of the GPU's."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, other):
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(8, **options))
    runs = measure.runs_of({"a": lambda: log.append("call")}, 2, "cuda", 100)
    assert runs["a"].seconds == [1.5] * 4
    assert log == ["call", *["record", "call", "record", "synchronize"] * 2] * 2


@pytest.mark.parametrize("name", ["fastpg one pass", "fastpg two passes"])
@pytest.mark.parametrize("mistake", ["logprobs", "dX", "dW"])
def test_what_is_wrong_gets_no_number(monkeypatch, name, mistake):
    method = peers.METHODS[name]

    def step(b):
        logprobs = method.step(b)
        if mistake == "logprobs":
            return logprobs * 1.0001
        grad = b.hidden.grad if mistake == "dX" else b.weight.grad
        grad[:, 0] *= 1.01
        return logprobs

    monkeypatch.setitem(peers.METHODS, "wrong", method._replace(step=step))
    rows = measure.measure(batch(TINY), ("wrong", name), 1, "cpu", 10)
    assert rows[1]["why_not"].startswith("wrong: ")
    assert "seconds" not in rows[1]
    assert "why_not" not in rows[2]


def test_a_peer_that_is_absent_or_fails_is_reported(monkeypatch):
    def fails(b):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(peers.METHODS, "fails", peers.Method(fails, lambda b: None))
    rows = measure.measure(batch(TINY), ("verl", "fails"), 1, "cpu", 10)
    assert "not installed" in rows[1]["why_not"] or "GPU" in rows[1]["why_not"]
    assert rows[2]["why_not"] == "failed: no such kernel"


def test_a_peer_without_enough_memory_is_reported(monkeypatch):
    def step(b):
        if len(b.tokens) == TINY.rows:
            raise torch.OutOfMemoryError
        return peers.one_pass(b)

    monkeypatch.setattr(measure, "_GATE_ROWS", 16)
    monkeypatch.setitem(peers.METHODS, "large", peers.Method(step, lambda b: None))
    rows = measure.measure(batch(TINY), ("large", "fastpg one pass"), 2, "cpu", 10)
    assert rows[1]["why_not"] == "out of memory"
    assert "seconds" in rows[2]


def test_cells_ask_for_methods_that_exist():
    for cell in (*cpu_cells(), *gpu_cells()):
        assert set(cell.methods) <= set(peers.METHODS), cell
    assert {cell.head for cell in gpu_cells() if cell.section == "step"} == set(HEADS.values())


def test_batches_are_what_they_say():
    b = batch(Cell("", "", Head(300, 32, 5.0), 64, "float32", (), zero_share=0.25))
    assert (b.advantages == 0).sum() == 16
    z = 5 * torch.tanh(b.hidden.double() @ b.weight.double().T / 5)
    assert torch.allclose(exact_logprobs(b), z.log_softmax(-1).gather(1, b.tokens[:, None])[:, 0])


def test_goals_are_met_or_missed_by_what_was_measured():
    def row(section, method, seconds, **changes):
        sizes = {"dtype": "float32", "rows": 2048, "vocab": 49152, "hidden": 576, "workspace": None}
        measured = {"seconds": seconds, "over_products": seconds, "peak_bytes": 5, "gradient_bytes": 5}
        return {"section": section, "name": "SmolLM2's head", "method": method} | sizes | measured | changes

    rows = [
        row("step", "fastpg one pass", 1.0),
        row("step", "full logits", 1.2),
        row("step", "fastpg one pass, frozen weight", 0.6),
    ]
    found = {goal["what"]: goal for goal in goals(rows)}
    assert found["one pass over products, fp32, default workspace"]["met"]
    assert not found["full logits over one pass, fp32"]["met"]
    assert found["frozen weight over trainable, fp32"]["measured"] == 0.6
    assert "TRL over one pass, bf16" not in found
    assert all(goal["what"].startswith(("time per", "memory")) for goal in goals(rows, "cuda"))  # not its step
    on_gpu = goals([r | {"name": "qwen3-8b, bfloat16"} for r in rows], "cuda")
    assert on_gpu[0]["what"] == "one pass over products, fp32, default workspace"
