"""The benchmark program on a tiny case: its gate, its files, its peers; both backends. Nothing here is timed."""

import contextlib
import csv
import gc
import importlib.util
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import host_time
import measure
import peers
import pytest
import run as program
import sampled_support
import torch
from cases import HEADS, LOSSES, Cell, Head, batch, cpu_cells, exact_logprobs, gpu_cells, tiny_cells
from goals import goals
from programs import run_program

from fastpg import Support

BENCH = Path(__file__).resolve().parents[2] / "bench"
OF_THE_HOST = measure.of_the_host
TINY = Cell("step", "tiny", Head(300, 32), 64, "float32", ())


def results_of(folder: Path, *arguments: str, interpreter: bool = False, **settings: str) -> dict:
    command = [str(BENCH / "run.py"), "--tiny", "--rounds", "1", "--out", str(folder), *arguments]
    environment = {"PYTHONSAFEPATH": None, **settings}
    done = run_program(*command, folder=folder, environment=environment, interpreter=interpreter, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.xdist_group("programs")
def test_the_program_writes_a_table_files_and_plots(tmp_path):
    results = results_of(tmp_path)
    assert {"machine", "date", "versions"} <= set(results["about"])
    timed = [row for row in results["rows"] if "seconds" in row]
    assert {row["section"] for row in timed} == {"step", "over N", "over V", "loss alone"}
    assert {row["method"] for row in timed if row["section"] == "loss alone"} == {"bare products", *LOSSES}
    methods = {row["method"] for row in timed if row["section"] == "step"}
    assert {"bare products", "fastpg one pass", "fastpg one pass, frozen weight", "full logits", "TRL", "Liger"} <= methods
    for row in timed:
        assert row["seconds"] > 0
        assert row["over_products"] > 0
        if row["method"] != "bare products":
            assert row["peak_bytes"] >= row["gradient_bytes"]
            assert row["ends_in"] == peers.METHODS[row["method"]].ends_in
    with open(tmp_path / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"])
    for plot in ("time_over_products", "over_tokens", "memory_over_vocab"):
        assert (tmp_path / f"{plot}.png").stat().st_size > 5000


@pytest.mark.xdist_group("interpreter programs")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run there")
def test_the_kernels_pass_its_gate(tmp_path):
    """In the interpreter: what a GPU's run does before it times anything."""
    methods = [word for name, method in peers.METHODS.items() if method.is_ours for word in ("--method", name)]
    results = results_of(tmp_path, "--section", "step", *methods, interpreter=True, FASTPG_BACKEND="triton")
    ours = [row for row in results["rows"] if row["method"].startswith("fastpg")]
    assert len(ours) == 8
    assert all("why_not" not in row for row in ours), ours


@pytest.fixture
def gpu(monkeypatch):
    """Stand-ins on the CPU for what --device cuda asks of torch.cuda; the list of what was called."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, other):
            return 1500.0

    empty = torch.empty
    stand_ins = {
        "Event": Event,
        "is_available": lambda: True,
        "synchronize": lambda: log.append("synchronize"),
        "empty_cache": lambda: log.append("empty_cache"),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 2**30,
        "get_device_name": lambda: "a stand-in",
        "get_device_capability": lambda: (9, 0),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(measure, "of_the_host", lambda call: {"host_seconds": 0.002, "launches": 31})
    on_the_gpu = lambda *shape, device=None, **options: empty(*((8,) if device == "cuda" else shape), **options)  # noqa: E731
    monkeypatch.setattr(torch, "empty", on_the_gpu)
    return log


def test_events_are_used_on_a_gpu(gpu, monkeypatch):
    """The timing of --device cuda, with events that count calls in the place of the GPU's."""
    monkeypatch.setattr(measure, "transient_bytes", lambda call, device: call() or 0)
    timings = measure.runs_of({"a": lambda: gpu.append("call")}, 2, "cuda", 100)
    assert timings.runs["a"].seconds == [1.5] * 4
    assert gpu == ["call", *["record", "call", "record", "synchronize"] * 2] * 2


def test_what_a_step_costs_the_host_is_counted_on_a_gpu(gpu, monkeypatch):
    """The device's events are its launches and copies; the others are the host's."""
    kinds = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    events = SimpleNamespace(events=lambda: [SimpleNamespace(device_type=kind) for kind in kinds])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(events))
    found = OF_THE_HOST(lambda: gpu.append("call"))
    assert found["launches"] == 2
    assert 0 < found["host_seconds"] < 0.1
    assert gpu[:4] == ["synchronize", "call", "synchronize", "call"]  # the queue is empty before each
    monkeypatch.setattr(measure, "transient_bytes", lambda call, device: (call(), 0)[1])
    rows = measure.measure(batch(TINY), ("fastpg one pass",), 1, "cuda", 10)
    assert [row.get("launches") for row in rows] == [31, 31]
    header = [column.header for column in program.table(TINY, rows).columns]
    assert "launches" in header
    assert "launches" not in [column.header for column in program.table(TINY, [{"method": "a", "why_not": "b"}]).columns]


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


class UnspeakableError(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no such kernel"), "failed: RuntimeError: no such kernel"),
        (AssertionError(), "failed: AssertionError"),
        (TypeError("\n\nmany\nlines"), "failed: TypeError:"),
        (
            torch._dynamo.exc.Unsupported("a [/graph] break\nand where"),
            "failed: torch._dynamo.exc.Unsupported: a [/graph] break",
        ),
        (KeyError("x" * 500), "failed: KeyError: 'xxx"),
        (UnspeakableError(), "failed: "),
        (torch.OutOfMemoryError("20 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_whatever_a_method_raises_in_the_gate_is_reported(monkeypatch, error, said):
    def fails(b):
        raise error

    monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # takes long beside other tests
    monkeypatch.setitem(peers.METHODS, "fails", peers.Method(fails, lambda b: None, isinstance(error, MemoryError)))
    rows = measure.measure(batch(TINY), ("verl", "fails", "full logits"), 1, "cpu", 10)
    assert "not installed" in rows[1]["why_not"] or "GPU" in rows[1]["why_not"]
    assert rows[2]["why_not"].startswith(said)
    assert len(rows[2]["why_not"].splitlines()) == 1
    assert len(rows[2]["why_not"]) < 140
    assert "seconds" in rows[3]


def raises_in_visit(monkeypatch, name: str, visit: int, error: BaseException) -> list:
    """A method that runs well until its visit-th run on all of the cell's rows; the list of those runs."""
    runs = []

    def step(b):
        if len(b.tokens) == TINY.rows:
            runs.append(name)
            if len(runs) == visit:
                raise error
        return peers.full_logits(b)

    monkeypatch.setattr(measure, "_GATE_ROWS", 16)
    monkeypatch.setitem(peers.METHODS, name, peers.Method(step, lambda b: None))
    return runs


@pytest.mark.parametrize("visit", [1, 2, 3, 4, 6], ids=["untimed", "timed", "timed again", "second round", "last"])
@pytest.mark.parametrize("error", [AssertionError("Dynamo"), torch.OutOfMemoryError(), MemoryError()], ids=repr)
def test_a_method_that_raises_while_it_is_timed_is_reported(monkeypatch, visit, error):
    runs = raises_in_visit(monkeypatch, "fails", visit, error)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # takes long beside other tests
    rows = measure.measure(batch(TINY), ("fails", "full logits"), 2, "cpu", 10)
    said = "failed: AssertionError: Dynamo" if isinstance(error, AssertionError) else "out of memory"
    assert rows[1]["why_not"] == said
    assert "seconds" not in rows[1]
    assert len(runs) == visit  # and it is not tried again
    assert [row["runs"] for row in (rows[0], rows[2])] == [4, 4]


def test_the_memory_of_a_method_that_failed_is_released(monkeypatch):
    held = []

    def step(b):
        large = torch.zeros(10)
        large.itself = [large, b.leaves()]  # a cycle: dropping the error alone would not free it
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError

    monkeypatch.setitem(peers.METHODS, "large", peers.Method(step, lambda b: None))
    gc.disable()
    try:
        assert measure.attempt(lambda: step(batch(TINY)), "cpu") == (None, "out of memory")
        assert held[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("visit", [1, 2])
def test_an_interrupt_ends_the_run(monkeypatch, visit):
    raises_in_visit(monkeypatch, "stop", visit, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        measure.measure(batch(TINY), ("stop",), 1, "cpu", 10)


@pytest.mark.parametrize("visit", [1, 2, 4])
def test_without_the_bare_products_a_cell_says_so_and_ends(monkeypatch, visit):
    count, products = [], peers.bare_products

    def floor(b):
        count.append(1)
        if len(count) == visit:
            raise torch.OutOfMemoryError
        return products(b)

    monkeypatch.setattr(measure, "bare_products", floor)
    rows = measure.measure(batch(TINY), ("full logits",), 1, "cpu", 10)
    assert rows == [{"method": "bare products", "why_not": "out of memory"}]


def test_a_run_on_a_gpu_goes_on_after_bad_peers(gpu, monkeypatch, tmp_path, capsys):
    """The whole program with --device cuda, on stand-ins: three bad methods in its first cell, no memory for its second."""
    good = ("fastpg one pass", "fastpg two passes", "full logits")
    bad = {1: RuntimeError("a [/bold] kernel"), 2: torch._dynamo.exc.InternalTorchDynamoError("first shapes only")}
    for visit, error in bad.items():
        raises_in_visit(monkeypatch, f"fails in run {visit}", visit, error)
    raises_in_visit(monkeypatch, "large", 1, torch.OutOfMemoryError())

    def in_the_gate(b):
        raise TypeError("no such argument")

    monkeypatch.setitem(peers.METHODS, "in the gate", peers.Method(in_the_gate, lambda b: None, True))
    bad_names = ("in the gate", *(f"fails in run {visit}" for visit in bad), "large")
    first = replace(TINY, methods=(*bad_names, *good))
    cells = [first, replace(first, name="too large", rows=65), replace(first, section="over N", methods=good)]

    def on_stand_ins(cell, device):
        assert device == "cuda"
        if cell.rows == 65:
            raise torch.OutOfMemoryError
        return batch(cell)

    monkeypatch.setattr(program, "gpu_cells", lambda: cells)
    monkeypatch.setattr(program, "batch", on_stand_ins)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda", "--no-samples", "--rounds", "1", "--out", str(tmp_path)])
    program.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["about"]["machine"] == "a stand-in"
    rows = {(row["section"], row["name"], row["method"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 1 + 4 + 3 + 1 + 1 + 3
    why_not = {method: rows["step", "tiny", method]["why_not"] for method in bad_names}
    assert why_not == {
        "in the gate": "failed: TypeError: no such argument",
        "fails in run 1": "failed: RuntimeError: a [/bold] kernel",
        "fails in run 2": "failed: torch._dynamo.exc.InternalTorchDynamoError: first shapes only",
        "large": "out of memory",
    }
    assert rows["step", "too large", "bare products"]["why_not"] == "no batch: out of memory"
    for section in ("step", "over N"):
        for method in ("bare products", *good):
            assert rows[section, "tiny", method]["seconds"] == 1.5
    assert gpu.count("empty_cache") == len(bad_names) + 1
    shown = capsys.readouterr().out
    assert "a [/bold] kernel" in shown
    assert "no batch: out of memory" in shown


def test_cells_can_be_chosen(monkeypatch):
    """By head and method; the model of the sampled cell is loaded only where that is among them."""
    sampled = []
    monkeypatch.setattr(
        program, "sampled_cell", lambda device: sampled.append(device) or (replace(TINY, section="samples"), None)
    )
    every = {"device": "cuda", "tiny": False, "no_samples": False, "section": None, "dtype": None, "head": None, "method": None}

    def chosen(**options):
        return [cell for cell, _ in program.chosen_cells(SimpleNamespace(**every | options))]

    assert len(chosen()) == len(gpu_cells()) + 1
    assert sampled.pop() == "cuda"
    heads, methods = ["qwen3-8b", "smollm2-135m"], ["full logits", "fastpg one pass"]
    cells = chosen(section=["step"], head=heads, method=methods)
    assert not sampled
    assert [cell.name for cell in cells] == ["smollm2-135m, bfloat16", "qwen3-8b, bfloat16"]
    assert all(cell.methods == ("fastpg one pass", "full logits") for cell in cells)
    assert {cell.section for cell in chosen(head=["qwen3-8b"])} == {"step", "over N", "over V"}
    assert [cell.section for cell in chosen(section=["samples"])] == ["samples"]


def test_without_matplotlib_there_are_results(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(program, "tiny_cells", lambda: [replace(TINY, methods=("full logits",))])
    monkeypatch.setattr(sys, "argv", ["run.py", "--tiny", "--rounds", "1", "--out", str(tmp_path)])
    program.main()
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.csv"}
    assert "no plots: matplotlib is not installed" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(sys, "argv", ["run.py", "--tiny", "--section", "walk", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        program.main()
    assert "no cell of these sections" in capsys.readouterr().err


def test_cells_ask_for_methods_that_exist():
    for cell in (*cpu_cells(), *gpu_cells()):
        assert set(cell.methods) <= set(peers.METHODS), cell
    for cells in (cpu_cells(), gpu_cells(), tiny_cells()):
        assert [cell.methods for cell in cells if cell.section == "loss alone"] == [LOSSES]
    assert {cell.head for cell in gpu_cells() if cell.section == "step"} == set(HEADS.values())


def test_batches_are_what_they_say():
    b = batch(Cell("", "", Head(300, 32, 5.0), 64, "float32", (), zero_share=0.25))
    assert (b.advantages == 0).sum() == 16
    z = 5 * torch.tanh(b.hidden.double() @ b.weight.double().T / 5)
    assert torch.allclose(exact_logprobs(b), z.log_softmax(-1).gather(1, b.tokens[:, None])[:, 0])


@pytest.mark.xdist_group("programs")
def test_host_time_measures_two_checkouts_in_turns(tmp_path):
    """It replays what kernels wrote: the steps behind them are the same, and it says what each took."""
    command = [str(BENCH / "host_time.py"), "--against", str(BENCH.parent), "--rounds", "1", "--repeats", "3"]
    done = run_program(*command, folder=tmp_path, environment={"PYTHONSAFEPATH": None}, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert {row[0].strip() for row in rows} >= {"one pass, CISPO", "two passes and policy_loss", "scoring", "full logits"}
    assert all(float(row[1]) > 0 and float(row[3]) > 0 for row in rows)  # nothing is timed here


def test_a_replayed_launch_writes_what_the_recorded_one_wrote():
    launches, x, y = host_time.Launches(), torch.zeros(3), torch.ones(3)
    runs = []

    def run(kernel, x, y, *, grid, warmup):
        runs.append(kernel)
        y += 1

    launch = launches.replaced(run)
    launches.step(lambda: launch("kernel", x, y, grid=(1,), warmup=False))
    again = torch.zeros(3)
    launches.step(lambda: launch("kernel", x, again, grid=(1,), warmup=False))
    assert runs == ["kernel"], "recorded once, then replayed"
    assert torch.equal(again, y)
    assert launches.seconds > 0


def test_a_launch_that_writes_what_was_there_is_recorded_all_the_same():
    """What a step allocates holds anything: here the result, by chance, while the step is recorded, and not later."""
    launches, seen = host_time.Launches(), []

    def run(kernel, out, *, grid, warmup):
        out.zero_()

    launch = launches.replaced(run)

    def step():
        state = torch.empty(8, dtype=torch.int8)
        if not torch.are_deterministic_algorithms_enabled():
            state.fill_(len(seen))
        launch("kernel", state, grid=(1,), warmup=False)
        seen.append(state.tolist())

    torch.use_deterministic_algorithms(False)  # the suite's own filling
    for _ in range(3):
        launches.step(step)
    assert seen == [[0] * 8] * 3
    with pytest.raises(RuntimeError, match="a step of 1 launches had 0"):
        launches.step(lambda: None)


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
    one = next(goal for goal in on_gpu if goal["what"] == "fastpg one pass over products, qwen3-8b")
    assert (one["goal"], one["measured"]) == ("<= 1.02", rows[0]["over_products"])


@pytest.mark.parametrize("method", sampled_support.METHODS)
def test_every_way_over_a_support_computes_the_same(method):
    torch.manual_seed(0)
    members = torch.rand(70, 900) < torch.tensor([0.002, 0.01, 0.5])[torch.arange(70) % 3][:, None]
    tokens = torch.randint(0, 900, (70,))
    support = Support.from_mask(members.scatter(1, tokens[:, None], True))
    batch = sampled_support.Batch(
        torch.randn(70, 16), torch.randn(900, 16), tokens, -torch.rand(70), torch.randn(70), support
    )  # fmt: skip
    assert sampled_support.check(sampled_support.METHODS[method], batch) < 1e-5
