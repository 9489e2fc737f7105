"""Runs a Python program as its command line would, in a directory of its own, forked from a process that has imported much.

Importing torch takes seconds, and transformers and TRL take more; a suite starts dozens of programs. The server has imported
them and has done nothing else. It has not imported fastpg, so that a program may bring a copy of its own.

A program has its own namespace and fails where it forgot an import. A submodule that it names without importing it would be
there all the same: tests keep programs of every kind in fresh processes (`fresh=True`). With a GPU all of them are, as CUDA
cannot be used after a fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import warnings
from functools import cache, partial
from pathlib import Path

# Nothing that changes other libraries when it is imported, and nothing that starts threads. By whether triton is imported for
# its interpreter, which it decides once; programs for that ask for little else.
_IMPORTS = {
    False: (
        "torch.distributed.fsdp", "torch._dynamo", "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3.modeling_qwen3", "transformers.trainer", "trl.trainer.grpo_trainer",
    ),
    True: ("torch._dynamo", "triton.language"),
}  # fmt: skip


def run_program(
    *arguments: str,
    folder: Path,
    environment: dict[str, str | None] | None = None,
    ranks: int = 0,
    interpreter: bool = False,
    fresh: bool = False,
    timeout: float = 120,
) -> subprocess.CompletedProcess:
    """`python *arguments` in folder: a file, or -m and a module, or -c and code, with what follows.

    environment: changes of this process's; None: not set. ranks: processes as torchrun starts them, 0 for none; outputs are
    one after the other. interpreter: TRITON_INTERPRET=1 was set when triton was imported, which `fast_interpreter` has changed.
    """
    import torch

    changes = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if interpreter else "0"} | (environment or {})
    settings = {name: value for name, value in (os.environ | changes).items() if value is not None}
    if fresh or torch.cuda.is_available():
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks)) if ranks else ()
        command = [sys.executable, *launcher, *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, env=settings)
    # as torchrun: who starts the ranks has the store, on a port that is free
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks else None
    started = [settings | _of_rank(rank, ranks, store.port) for rank in range(ranks)] or [settings]
    with tempfile.TemporaryDirectory() as outputs:
        server = _server(interpreter)
        server.stdin.write(json.dumps([arguments, str(folder), started, timeout, outputs]) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline() or "[1]")
        texts = {name: "".join(path.read_text() for path in sorted(Path(outputs).glob(f"{name}*"))) for name in ("out", "err")}
    return subprocess.CompletedProcess(arguments, next(filter(None, codes), 0), texts["out"], texts["err"])


def _of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    fixed = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return fixed | {name: str(value) for name, value in places.items()}


@cache
def _server(interpreter: bool) -> subprocess.Popen:
    """Of this process, which ends it."""
    settings = {"TRITON_INTERPRET": str(int(interpreter)), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], env=os.environ | settings, **pipes)
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    """A line of input is a command line, a folder, environments, a time limit and where outputs go; its answer, statuses."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    own = str(Path(__file__).parent)
    sys.path.insert(0, own)
    import forks

    interpreter = os.environ["TRITON_INTERPRET"] == "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _IMPORTS[interpreter]:
            if importlib.util.find_spec(name.partition(".")[0]):
                importlib.import_module(name)
    if interpreter and importlib.util.find_spec("triton"):
        import fast_interpreter

        fast_interpreter.use()  # as conftest
    sys.path.remove(own)  # a program does not find it
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        arguments, folder, environments, timeout, outputs = json.loads(line)
        processes = [
            forks.start(
                partial(_become, arguments, folder, environment), Path(outputs, f"out{rank}"), Path(outputs, f"err{rank}")
            )
            for rank, environment in enumerate(environments)
        ]
        answers.write(json.dumps(forks.statuses_of(processes, timeout)) + "\n")
        answers.flush()


def _become(arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    """The exit status of the program."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status = _status_of(lambda: _run(*arguments))
    threading._shutdown()  # as at the end of an interpreter: threads are waited for, then what was registered is called
    atexit._run_exitfuncs()
    return status


def _status_of(program) -> int:
    try:
        program()
    except SystemExit as stopped:
        if isinstance(stopped.code, int) or stopped.code is None:
            return stopped.code or 0
        print(stopped.code, file=sys.stderr)  # noqa: T201
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _run(first: str, *rest: str) -> None:
    if os.environ.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    path = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if "PYTHONSAFEPATH" not in os.environ:
        path.insert(0, os.getcwd() if first.startswith("-") else str(Path(first).resolve().parent))
    sys.path[:0] = path
    if first == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _serve()
