"""`fastpg check`: compares every operation on every available backend with the float64 oracle, for a user's CI."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from .. import lm_head
from ..tiles.backend import tiles_of
from ..tools.threads import one_thread
from . import cases, compile_ahead
from .cases import Case
from .judge import Checked, Deviation, check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}


def add_command(commands) -> None:
    """Adds `fastpg check` to the parser in __main__."""
    from ..tools.compile_report import TARGETS

    parser = commands.add_parser("check", help="every operation on every backend here against the float64 oracle, for CI")
    parser.add_argument("--interpret", action="store_true", help="the Triton kernels too, in Triton's interpreter on the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the backends of this device alone; default: all")
    parser.add_argument("--operation", action="append", choices=cases.OPERATIONS, help="repeatable; default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="small inputs, all features at once only")
    parser.add_argument("--hidden", type=_size, metavar="H", help="check a head of this hidden size, with --vocab")
    parser.add_argument("--vocab", type=_size, metavar="V", help="... and this vocabulary (about 40 H V bytes of memory)")
    parser.add_argument("--tokens", type=_size, metavar="N", help="... on so many tokens (64)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="the head of a transformers configuration in this directory")
    parser.add_argument(
        "--compile", nargs="+", choices=TARGETS, default=[], metavar="TARGET", help=f"compile report for {', '.join(TARGETS)}"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(run=run, parser=parser)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1; got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> None:
    places = _places(args)
    chosen = _cases(args, places)
    checked, small = [], args.hidden is None and args.model is None
    with one_thread() if small else nullcontext():
        if small and "triton gpu" in places:
            compile_ahead.fill_cache(chosen)
        for case in _progress(chosen):
            checked += check(case, places)
    compiled, compile_failed = _compile_report(args.compile)
    misses = [line for c in checked for line in c.misses()] + compile_failed
    versions = _versions()
    if args.json:
        found = [c.as_json() for c in checked]
        print(json.dumps({"checked": found, "misses": misses, "compiled": compiled, "versions": versions}, indent=1))  # noqa: T201
    else:
        _print_tables(checked, compiled, versions)
        for line in misses:
            print(f"MISS {line}", file=sys.stderr)  # noqa: T201
    if misses:
        raise SystemExit(1)


def _progress(chosen: list[Case]):
    from tqdm import tqdm

    return tqdm(chosen, unit="case", leave=False, disable=not sys.stderr.isatty())


def _cases(args: argparse.Namespace, places: dict[str, str]) -> list[Case]:
    error = args.parser.error
    dtypes, softcap, scale, hidden, vocab = args.dtype, None, 1.0, args.hidden, args.vocab
    if args.model is not None:
        if hidden is not None or vocab is not None:
            error("--model has the sizes already: leave --hidden and --vocab out")
        hidden, vocab, softcap, scale, dtype = _read_model(args)
        dtypes = dtypes or [dtype]
    if (hidden is None) != (vocab is None):
        error("--hidden and --vocab go together")
    if args.tokens is not None and hidden is None:
        error("--tokens needs --hidden and --vocab, or --model")
    chosen_dtypes = [DTYPES[name] for name in dict.fromkeys(dtypes or DTYPES)]
    if hidden is None:
        found = cases.cases(chosen_dtypes, args.quick, "triton interpreter" in places)
    else:
        found = cases.head_cases(chosen_dtypes, args.tokens or 64, hidden, vocab, softcap, scale)
    chosen = [case for case in found if not args.operation or case.operation in args.operation]
    if not chosen:
        error("no case of these operations with these dtypes and sizes")
    return chosen


def _read_model(args: argparse.Namespace) -> tuple[int, int, float | None, float, str]:
    """(hidden size, vocabulary, softcap, logit scale, dtype) of a configuration. No weights are read."""
    error = args.parser.error
    if not (args.model / "config.json").is_file():
        error(f"--model must be a directory with a config.json; got {args.model}")
    if importlib.util.find_spec("transformers") is None:
        error("--model needs transformers, which is not installed: pip install transformers")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(args.model, local_files_only=True)
    except (ValueError, OSError) as problem:
        error(f"--model: {problem}")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = next((cap for name in lm_head._SOFTCAP_NAMES if (cap := getattr(text, name, None))), None)
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    name = next((name for name, known in DTYPES.items() if known == dtype), "fp32")
    hidden, vocab = getattr(text, "hidden_size", None), getattr(text, "vocab_size", None)
    if not isinstance(hidden, int) or not isinstance(vocab, int):
        error(f"--model: {type(text).__name__} has no hidden_size or no vocab_size; use --hidden and --vocab")
    return hidden, vocab, softcap, lm_head._config_scale(text), name


def _places(args: argparse.Namespace) -> dict[str, str]:
    """The backends that can run here, each with its device."""
    triton = importlib.util.find_spec("triton") is not None
    if args.device == "cuda" and (args.interpret or not torch.cuda.is_available()):
        args.parser.error("--device cuda: " + ("--interpret is of the CPU" if args.interpret else "torch finds no GPU"))
    places = {"torch cpu": "cpu"}
    if args.interpret:
        if not triton:
            args.parser.error("--interpret needs triton, which is not installed: pip install triton")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    if os.environ.get("TRITON_INTERPRET") == "1" and triton:
        if not tiles_of("triton").INTERPRETED:
            args.parser.error("--interpret: the kernels were imported without the interpreter; start a new process")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")  # numpy's, of inf
        return places | {"triton interpreter": "cpu"}
    if torch.cuda.is_available() and args.device != "cpu":
        places = {} if args.device == "cuda" else places
        places["torch gpu"] = "cuda"
        if triton:
            places["triton gpu"] = "cuda"
    return places


def _compile_report(targets: list[str]) -> tuple[list[dict], list[str]]:
    """Runs `fastpg compile-report` in a process without the interpreter: (its JSON, one line per problem)."""
    if not targets:
        return [], []
    command = [sys.executable, "-m", "fastpg", "compile-report", "--json"]
    command += [word for target in targets for word in ("--target", target)]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=inherited, capture_output=True, text=True)
    try:
        return json.loads(done.stdout), done.stderr.splitlines() if done.returncode else []
    except json.JSONDecodeError:
        return [], [f"compile-report: {(done.stderr.splitlines() or ['no output'])[-1]}"]


def _versions() -> dict[str, str]:
    from .. import __version__

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    others = {name: version(name) for name in ("triton", "transformers")}
    return {"fastpg": __version__, "python": platform.python_version(), "torch": torch.__version__, **others, "device": device}


def _print_tables(checked: list[Checked], compiled: list[dict], versions: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..tools import compile_report

    console = Console(width=None if sys.stdout.isatty() else 170)
    table = Table(
        "operation", "backend", "dtype", "tokens x H x V, features", title="fastpg check: worst errors, in tolerances"
    )
    columns = {"logp": ("logp",), "loss": ("loss",), "dX": ("dX, a row", "dlogits, a row", "dlogp"), "dW": ("dW",)}
    columns["others"] = ("entropy", "db", "dA", "dB")
    for name in (*columns, "full logits: logp", "dX"):
        table.add_column(name, justify="right")
    for c in checked:
        numbers = [_multiple(c.deviations, names) for names in columns.values()]
        beside = [_multiple(c.full_logits, columns[name]) for name in ("logp", "dX")]
        style = "bold red" if any(c.misses()) else None
        table.add_row(c.case.operation, c.backend, c.dtype, c.case.describe(), *numbers, *beside, style=style)
    console.print(table)
    if compiled:
        compile_report._print_table([compile_report.Compiled(**c) for c in compiled])
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()), highlight=False)
    lines = sum(any(c.misses()) for c in checked)
    console.print(f"{len(checked)} checks, {lines} with an error above 1", highlight=False)


def _multiple(found: list[Deviation], names: tuple[str, ...]) -> str:
    values = [d.multiple for d in found if d.quantity in names]
    if not values:
        return ""
    worst = max(values)
    return f"{worst:.2f}" if worst < 100 else f"{worst:.0e}"
