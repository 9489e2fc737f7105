"""`fastpg check`: compares every operation on every available backend with the float64 oracle, for a user's CI."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from .. import lm_head
from ..tiles.backend import BACKENDS, tiles_of
from ..tools import compile_report
from ..tools.about import device_name, install_command, versions
from ..tools.compiling import Compiled
from ..tools.threads import one_thread
from ..tools.variants import TARGETS
from . import cases, compile_ahead, report
from .cases import Case
from .judge import Checked, check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}


def add_command(commands) -> None:
    """Adds `fastpg check` to the parser in __main__."""
    parser = commands.add_parser(
        "check",
        help="every operation on every backend here against the float64 oracle, for CI",
        epilog="Exit status: 0 if every error is within its tolerance; 1 if one is not; 2 if nothing could be checked.",
    )
    parser.add_argument("--interpret", action="store_true", help="the Triton kernels too, in Triton's interpreter on the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the backends of this device alone; default: all")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="repeatable; default: all")
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
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--verbose", action="store_true", help="a line for every case, beside plain code with full logits")
    form.add_argument("--json", action="store_true", help="one JSON object instead of tables")
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
    compiled, faults = _compile_report(args.compile)
    if args.json:
        _print_json(checked, compiled, faults)
    else:
        _print_report(checked, compiled, faults, places, args)
    if faults or any(any(c.misses()) for c in checked):
        raise SystemExit(1)


def _print_json(checked: list[Checked], compiled: list[dict], faults: list[str]) -> None:
    misses = [line for c in checked for line in c.misses()] + faults
    found = {"checked": [c.as_json() for c in checked], "misses": misses, "compiled": compiled}
    print(json.dumps(found | {"versions": versions() | {"device": device_name()}}, indent=1))  # noqa: T201


def _print_report(
    checked: list[Checked], compiled: list[dict], faults: list[str], places: dict[str, str], args: argparse.Namespace
) -> None:
    print(", ".join(f"{name} {version}" for name, version in versions().items()))  # noqa: T201
    report.print_table(checked, args.verbose)
    variants = [Compiled(**c) for c in compiled]
    if variants:
        compile_report.print_tables(variants, args.verbose)
    for line in [*report.misses(checked, args.verbose), *faults]:
        print(f"MISS {line}", file=sys.stderr, flush=True)  # noqa: T201
    if places == {"torch cpu": "cpu"} and not args.backend and not args.device:
        print("not checked: the Triton kernels, which need a GPU, or --interpret")  # noqa: T201
    devices = dict.fromkeys("the CPU" if device == "cpu" else device_name() for device in places.values())
    of_compiler = ""
    if args.compile:
        of_compiler = compile_report.last_line(variants, faults) if variants else f"FAILED: {faults[0]}"
    print(report.last_line(checked, devices, of_compiler))  # noqa: T201


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
    backends = {name.split()[0] for name in places}
    chosen = [case for case in found if any(map(case.runs_on, backends))]
    chosen = [case for case in chosen if not args.operation or case.operation in args.operation]
    if not chosen:
        error(f"no case of these operations with these dtypes and sizes on {' and '.join(places)}")
    return chosen


def _read_model(args: argparse.Namespace) -> tuple[int, int, float | None, float, str]:
    """(hidden size, vocabulary, softcap, logit scale, dtype) of a configuration. No weights are read."""
    error = args.parser.error
    if not (args.model / "config.json").is_file():
        error(f"--model must be a directory with a config.json; got {args.model}")
    if importlib.util.find_spec("transformers") is None:
        error(f"--model needs transformers, which is not installed: {install_command('transformers')}")
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
    """The backends that can run here and are asked for, each with its device."""
    places = _backends_here(args)
    if args.backend:
        places = {name: device for name, device in places.items() if name.split()[0] in args.backend}
    if not places:
        args.parser.error("--backend triton needs triton and a GPU that torch finds, or --interpret")
    return places


def _backends_here(args: argparse.Namespace) -> dict[str, str]:
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
