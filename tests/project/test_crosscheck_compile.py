"""What `fastpg check` does before it runs on a GPU: shares its cases out among processes that compile their kernels."""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastpg.__main__ import main
from fastpg.crosscheck import cases, command, compile_ahead, judge
from fastpg.tools import threads

ALL = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CASES = list(cases.cases(ALL, quick=False, interpret=False))


@pytest.fixture
def pool(monkeypatch):
    """Threads in the place of processes; what they ran, and with how many workers."""
    seen = SimpleNamespace(ran=[], workers=None)

    def in_threads(count, *, mp_context, initializer, initargs):
        assert mp_context.get_start_method() == "spawn"  # a fork of a process that uses CUDA cannot use it
        assert (initializer, initargs) == (torch.set_num_threads, (1,))
        seen.workers = count
        return ThreadPoolExecutor(count)

    monkeypatch.setattr(compile_ahead, "ProcessPoolExecutor", in_threads)
    monkeypatch.setattr(compile_ahead, "run_case", lambda case, device: seen.ran.append((case, device)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    return seen


def test_every_case_of_the_kernels_is_run_once(pool):
    compile_ahead.fill_cache(CASES)
    wanted = [c for c in CASES if c.operation != "policy_loss" and c.dtype != torch.float64]
    assert len(wanted) > 70
    assert sorted(map(str, pool.ran)) == sorted(str((case, "cuda")) for case in wanted)
    assert pool.workers == 12


@pytest.mark.parametrize(
    ("tasks", "cores", "gib", "count"),
    [(76, 64, 70, 16), (76, 3, 70, 3), (76, 64, 11, 5), (76, 64, 1, 0), (30, 64, 70, 16), (23, 64, 70, 0), (76, 1, 70, 1)],
)
def test_workers_are_bounded(pool, monkeypatch, tasks, cores, gib, count):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib * 2**30, 80 * 2**30))
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert compile_ahead.workers(tasks) == count
    if count < 2:
        kernels = [c for c in CASES if c.runs_on("triton")]
        compile_ahead.fill_cache(kernels[:tasks])
        assert pool.workers is None  # one process more than the check itself helps nobody


def test_errors_are_left_to_the_check(pool, monkeypatch):
    def fails(case, device):
        pool.ran.append(case)
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compile_ahead, "run_case", fails)
    compile_ahead.fill_cache(CASES)
    assert len(pool.ran) > 70

    def broken(self, *arguments):
        raise BrokenProcessPool

    monkeypatch.setattr(ThreadPoolExecutor, "submit", broken)
    compile_ahead.fill_cache(CASES)


def test_processes_that_cannot_use_a_gpu_stop_nothing(monkeypatch):
    """Real ones: without a GPU every case fails in them."""
    monkeypatch.setattr(compile_ahead, "workers", lambda tasks: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    compile_ahead.fill_cache(CASES[:2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter, which has the GPU's place elsewhere")
@pytest.mark.parametrize("operation", ["linear_cispo_loss", "linear_policy_loss", "linear_logprobs", "selective_logprobs"])
def test_a_worker_runs_what_the_check_runs_on_the_kernels(monkeypatch, operation):
    """The same launches with the same arguments but for the numbers in them."""
    from triton.runtime.interpreter import GridExecutor

    launches, launch = [], GridExecutor.__call__

    def described(x):
        return (x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x

    def logged(self, *arguments, **named):
        given = [described(x) for x in arguments] + sorted((k, described(x)) for k, x in named.items())
        launches.append((self.fn.__name__, self.grid, str(given)))
        launch(self, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", logged)
    quick = cases.cases(ALL, quick=True, interpret=True)
    for case in [case for case in quick if case.operation == operation and case.runs_on("triton")]:
        case = replace(case, rows=7, vocab=45)  # fewer programs of each launch
        launches.clear()
        compile_ahead.run_case(case, "cpu")
        alone = list(launches)
        launches.clear()
        assert len(list(judge.check(case, {"torch cpu": "cpu", "triton interpreter": "cpu"}))) == 2
        assert launches == alone != []


@pytest.mark.parametrize(
    ("places", "arguments", "compiles"),
    [
        ({"torch cpu": "cpu", "torch gpu": "cpu", "triton gpu": "cpu"}, [], True),
        ({"torch cpu": "cpu", "torch gpu": "cpu"}, [], False),
        ({"torch cpu": "cpu", "triton interpreter": "cpu"}, [], False),
        ({"torch cpu": "cpu"}, [], False),
        ({"torch cpu": "cpu", "triton gpu": "cpu"}, ["--hidden", "16", "--vocab", "40"], False),
    ],
)
def test_only_a_check_of_many_small_cases_on_a_gpu_compiles_first(monkeypatch, capsys, places, arguments, compiles):
    order = []
    monkeypatch.setattr(command, "_places", lambda args: places)
    monkeypatch.setattr(command, "check", lambda case, places: order.append(case) or [])
    monkeypatch.setattr(compile_ahead, "fill_cache", lambda chosen: order.append(list(chosen)))
    main(["check", "--dtype", "fp32", "--json", *arguments])
    first, *rest = order
    assert isinstance(first, list) == compiles
    assert first == rest if compiles else len(rest) > 2
