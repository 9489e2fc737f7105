"""`fastpg compile-report`: every kernel compiled for four GPU targets, without a GPU.

The report tells these things about a kernel before it runs: that it compiles, that its registers suffice (spilled ones live in
memory), that its shared memory fits the target, and that its matrix products reach the tensor cores.

A variant of a kernel is compiled exactly as its launcher in `fastpg.kernels` would do it. The launcher is called on tensors
without memory, and the kernel it launches is compiled. Their sizes are those of a common model: H and strides are divisible by
16, which Triton detects at launch, and without which it vectorises nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

# target -> (backend, architecture, warp size, shared memory of a program in bytes, its matrix instructions)
TARGETS = {
    "cuda:80": ("cuda", 80, 32, 166_912, r"mma\.sync"),
    "cuda:90": ("cuda", 90, 32, 232_448, r"wgmma\.mma_async"),
    "cuda:100": ("cuda", 100, 32, 232_448, r"tcgen05\.mma"),
    "hip:gfx942": ("hip", "gfx942", 64, 65_536, r"v_mfma"),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TRITON_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip

OBJECTIVES = ("reinforce", "importance_weighted", "cispo", "ppo_clip", "sapo", "dppo_tv", "dppo_kl", "icepop")
# kernel -> the dtypes it is called with, and its optional features (flags)
KERNELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "keep": (("float32",), ("skip", "rows", "temperature")),
    "target": (("bfloat16", "float16", "float32"), ("anchor", "bias", "softcap", "lora", "temperature")),
    "anchored_exp": (("bfloat16", "float32"), ("exps", "bias", "softcap", "entropy", "lora", "temperature")),
    "finish": (("bfloat16", "float32"), ("exps", "entropy", *OBJECTIVES)),
    "summary": (("float32",), ("entropy",)),
    "logsumexp": (("bfloat16", "float16", "float32"), ("bias", "softcap", "entropy", "lora", "temperature")),
    "combine": (("float32",), ("entropy", "finish")),
    "sum_further": (("float32",), ()),
    "dlogits": (("bfloat16", "float16", "float32"), ("bias", "softcap", "entropy", "lora", "temperature")),
    "gradient_rows": (("bfloat16", "float32"), ("frozen_weight", "frozen_hidden", "places")),
    "scale": (("bfloat16", "float32"), ()),
    "policy_loss": (("float32",), ("cispo",)),
    "gathered_dots": (("bfloat16", "float32"), ()),
    "run_sums": (("bfloat16", "float32"), ("add",)),
    "selective_logsumexp": (("bfloat16", "float16", "float32"), ("entropy", "temperature")),
    "selective_dlogits": (("bfloat16", "float16", "float32"), ("entropy", "temperature")),
}
MULTIPLIES = ("anchored_exp", "logsumexp", "dlogits")
# combinations of flags of `finish`, beside each flag alone
_WITH_KL = [("cispo", "kl_k1"), ("cispo", "kl_k2"), ("cispo", "kl_k3")]
_WHOLE_LOSS = ("exps", "entropy", "ppo_clip", "kl_k3", "temperature")
# beside each flag alone and all: sets of a support; every further statistic, with the argmax or with the most of the largest
# logits; and gradients of the logsumexp and of the mean logit
_ALL = ("bias", "softcap", "entropy", "lora", "temperature")
_PERSISTENT = ((), ("entropy",), ("lora",), ("temperature",))
_FURTHER = {
    ("anchored_exp", "bfloat16"): [
        ("exps", "support"), ("exps", *_ALL, "support"), ("exps", "statistics"), ("exps", *_ALL, "statistics", "top_k"),
        ("exps", *_ALL, "statistics", "top_k", "support"),
    ],
    ("anchored_exp", "float32"): [("exps", *_ALL, "support"), ("exps", *_ALL, "statistics", "top_k", "support")],
    ("logsumexp", "bfloat16"): [
        ("support",), ("statistics",), (*_ALL, "statistics", "top_k"), (*_ALL, "statistics", "top_k", "support")
    ],
    ("logsumexp", "float32"): [(*_ALL, "statistics", "top_k"), (*_ALL, "statistics", "top_k", "support")],
    ("combine", "float32"): [("statistics",), ("entropy", "finish", "statistics")],
    ("dlogits", "bfloat16"): [
        ("support",), (*_ALL, "logsumexp", "mean_logits"), (*_ALL, "logsumexp", "mean_logits", "support")
    ],
    ("dlogits", "float32"): [(*_ALL, "support")],
    ("selective_logsumexp", "bfloat16"): [("support",)],
    ("selective_dlogits", "bfloat16"): [("support",)],
}  # fmt: skip

# rows of a chunk (no multiple of 16), vocabulary of a head (that no tile divides: so more is masked), vocabulary of a slice of
# it, hidden size, LoRA's rank
_ROWS, _VOCAB, _SLICE, _SIZE, _RANK = 1000, 128_272, 8192, 2048, 8


@dataclass(frozen=True)
class Variant:
    kernel: str
    target: str
    dtype: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """The compiler's numbers for a variant. registers and spill_bytes are per thread, shared_bytes per program."""

    kernel: str
    target: str
    dtype: str
    flags: list[str]
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    mma_instructions: int

    def problems(self) -> list[str]:
        """Faults: spilled registers, too much shared memory, products that do not use the tensor cores."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.kernel in MULTIPLIES and self.dtype != "float32" and not self.mma_instructions:
            found.append("no tensor-core instruction")
        return found


def variants(kernels: list[str] | None = None, targets: list[str] | None = None) -> Iterator[Variant]:
    """Every kernel, target, dtype and combination of flags that is compiled. "plain" has no flag.

    combine          plain, entropy, finish, both; with further statistics
    finish           bf16: plain, each flag alone, the KL estimators and a whole loss; fp32: a whole loss
    gradient_rows    plain, and in bf16 each flag alone
    policy_loss      CISPO, and a whole loss
    anchored_exp     as other kernels; with further statistics and sets of a support; on sm_90 also the persistent tile
    logsumexp        as other kernels; also with further statistics, and with sets of a support
    dlogits          as other kernels; also with sets of a support, and with gradients of the logsumexp and of the mean logit
    other kernels    plain, in bf16 each flag alone but temperature, all flags
    """
    for kernel in kernels or KERNELS:
        dtypes, flags = KERNELS[kernel]
        for target in targets or TARGETS:
            for dtype in dtypes:
                alone = [(flag,) for flag in flags if flag != "temperature"] if dtype == "bfloat16" else []
                chosen = [(), *alone, flags]
                if kernel == "combine":
                    chosen = [(), ("entropy",), ("finish",), flags]
                elif kernel == "gradient_rows":
                    chosen = [(), *alone]
                elif (kernel, target, dtype) == ("anchored_exp", "cuda:90", "bfloat16"):
                    chosen += [("persistent", "exps", *more) for more in _PERSISTENT]
                elif kernel == "policy_loss":
                    chosen = [("cispo",), _WHOLE_LOSS]
                elif kernel == "finish":
                    chosen = [(), *alone, *_WITH_KL, _WHOLE_LOSS] if alone else [_WHOLE_LOSS]
                chosen += _FURTHER.get((kernel, dtype), [])
                yield from (Variant(kernel, target, dtype, combination) for combination in dict.fromkeys(chosen))


def launched(variant: Variant) -> tuple[object, list[object], dict[str, int]]:
    """(kernel, arguments in the order of its parameters, compiler options) that the variant's launcher launches."""
    from triton.runtime.jit import KernelInterface

    found = []

    def noted(kernel: object, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: found.append((kernel, arguments, named))

    with mock.patch.object(KernelInterface, "__getitem__", noted):
        _launch(variant)
    ((kernel, arguments, named),) = [launch for launch in found if launch[0].fn.__name__ == f"{variant.kernel}_kernel"]
    bound = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    options = {name: value for name, value in bound.items() if name not in kernel.arg_names}
    return kernel, [bound[name] for name in kernel.arg_names], options


def _launch(variant: Variant) -> None:
    """Calls the variant's launcher on tensors without memory."""
    from ..kernels.anchored_exp import anchored_exp
    from ..kernels.dlogits import Incoming, Statistics, dlogits
    from ..kernels.logsumexp import Running, combine, finished, logsumexp
    from ..kernels.operands import Operands
    from ..kernels.scale import scale as scale_gradients
    from ..kernels.selective import ready_logits, selective_dlogits, selective_logsumexp
    from ..kernels.target import target_logits

    dtype, flags = DTYPES[variant.dtype], variant.flags
    vocab = _SLICE if variant.kernel == "dlogits" else _VOCAB
    entropy, inner = "entropy" in flags, 0.5 if "softcap" in flags else None

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def vector(present: bool = True) -> torch.Tensor | None:
        return meta(_ROWS) if present else None

    lora = (meta(_ROWS, _RANK), meta(vocab, _RANK, dtype=dtype)) if "lora" in flags else None
    bias = meta(vocab, dtype=dtype) if "bias" in flags else None
    scale = vector() if "temperature" in flags else 1.0
    tokens = meta(_ROWS, dtype=torch.int64)
    size = 2 * _SIZE if "persistent" in flags else _SIZE
    sets = meta(_ROWS, vocab // 8, dtype=torch.uint8) if "support" in flags else None
    p = Operands(meta(_ROWS, size, dtype=dtype), meta(vocab, size, dtype=dtype), lora, bias, tokens, scale, inner, sets)
    blocks = _blocks_of(variant, size)
    statistics = Statistics(vector(), vector(entropy), vector(), vector(), vector(entropy))
    unit = vector(variant.kernel == "dlogits" and dtype == torch.float16)
    incoming = Incoming(vector(), vector(entropy), unit, vector("logsumexp" in flags), vector("mean_logits" in flags))

    if variant.kernel in ("keep", "summary", "policy_loss", "gathered_dots", "run_sums", "sum_further"):
        _launch_without_tiles(variant, meta)
    elif variant.kernel == "target":
        target_logits(p, vector("anchor" in flags))
    elif variant.kernel == "anchored_exp":
        exps, further = meta(_ROWS, vocab, dtype=dtype) if "exps" in flags else None, _further(flags, vector(), (_ROWS, 501))
        anchored_exp(p, vector(), entropy, exps, blocks, further)
    elif variant.kernel == "finish":
        _launch_finish(variant, meta)
    elif variant.kernel == "logsumexp":
        logsumexp(p, entropy, blocks, _further(flags, vector(), (_ROWS, 63)))
    elif variant.kernel == "combine":
        parts = Running(meta(_ROWS, 63), meta(_ROWS, 63), meta(_ROWS, 63) if entropy else None)
        sums = _further(flags, vector(), (_ROWS, 63)), _further(flags, vector(), (_ROWS,))
        finished(parts, vector(), *sums) if "finish" in flags else combine(parts, *sums)
    elif variant.kernel == "dlogits":
        dlogits(p, statistics, incoming, meta(_ROWS, vocab, dtype=dtype), blocks)
    elif variant.kernel == "gradient_rows":
        _launch_gradient_rows(p, flags, meta)
    elif variant.kernel == "scale":
        scale_gradients([meta(_ROWS, _SIZE, dtype=dtype), meta(vocab, _SIZE, dtype=dtype)], meta())
    else:
        logits = meta(_ROWS, vocab, dtype=dtype)
        ready = ready_logits(logits, meta(_ROWS, dtype=torch.bool), tokens, vector("temperature" in flags), sets)
        if variant.kernel == "selective_logsumexp":
            selective_logsumexp(ready, entropy)
        else:
            selective_dlogits(ready, statistics, incoming, meta(_ROWS, vocab, dtype=dtype))


def _blocks_of(variant: Variant, size: int) -> object:
    """As `triton_tiles` chooses them."""
    from ..kernels.blocks import blocks_for

    kernel = variant.kernel if variant.kernel in MULTIPLIES else MULTIPLIES[0]  # others have none
    flags = variant.flags
    is_heavy = "softcap" in flags or (kernel == "anchored_exp" and "statistics" in flags)
    return blocks_for(variant.target, DTYPES[variant.dtype], "bias" in flags, is_heavy, kernel, size)


def _further(flags: tuple[str, ...], target: torch.Tensor, shape: tuple[int, ...]) -> object:
    """Every further statistic, of splits or of rows (without keys); nothing without that flag."""
    from ..kernels.row_statistics import NOTHING, Further, empty_further, kept

    keys = 0 if len(shape) == 1 else kept(8 if "top_k" in flags else 1)
    return empty_further(target, shape, keys, Further(None, True, True, True, target)) if "statistics" in flags else NOTHING


def _launch_gradient_rows(p: object, flags: tuple[str, ...], meta: Callable[..., torch.Tensor]) -> None:
    from ..kernels.gradient_rows import HiddenRows, WeightedRows, gradient_rows

    dtype, vocab = p.hidden.dtype, len(p.weight)
    rows, residual = meta(_ROWS, _SIZE, dtype=dtype), None if dtype == torch.float32 else meta(_ROWS)
    places = p.tokens if "places" in flags else None
    hidden = HiddenRows(meta(_ROWS, _SIZE), residual, p.tokens, p.weight, vocab, _SIZE, 1, places, rows, _SIZE)
    gradient_rows(
        meta(_ROWS), HiddenRows() if "frozen_hidden" in flags else hidden,
        WeightedRows() if "frozen_weight" in flags else WeightedRows(p.hidden, _SIZE, rows), _ROWS, _SIZE,
    )  # fmt: skip


def _launch_finish(variant: Variant, meta: Callable[..., torch.Tensor]) -> None:
    from ..kernels.anchored_exp import TileSums
    from ..kernels.finish import Terms, Tokens, finish, finish_with_loss

    dtype, flags, tiles = DTYPES[variant.dtype], variant.flags, 501
    exps = meta(_ROWS, _VOCAB, dtype=dtype) if "exps" in flags else None
    rounds = exps is not None and dtype != torch.float32

    def vector(present: bool = True) -> torch.Tensor | None:
        return meta(_ROWS) if present else None

    sums = TileSums(
        meta(_ROWS, tiles), meta(_ROWS, tiles) if "entropy" in flags else None, meta(_ROWS, tiles) if rounds else None, exps,
        None if exps is None else _VOCAB,
    )  # fmt: skip
    has_temperature = "temperature" in flags
    tokens = Tokens(meta(_ROWS, dtype=torch.int64), None, vector(has_temperature), None if has_temperature else 1.0)
    if not set(flags) & set(OBJECTIVES):
        finish(sums, tokens)
        return
    masked = meta(_ROWS, dtype=torch.uint8) if flags == _WHOLE_LOSS else None
    finish_with_loss(sums, tokens, Terms(masked, *_loss_terms(flags, meta)), _loss(flags))


def _loss(flags: tuple[str, ...]) -> object:
    from ..kernels import objectives

    (objective,), whole = (getattr(objectives, name) for name in flags if name in OBJECTIVES), flags == _WHOLE_LOSS
    kl = next((getattr(objectives, name) for name in flags if name.startswith("kl")), None)
    bounds, ratio_range = objectives.bounds_of(objective, (0.8, 1.2, 3.0)), objectives.RatioRange(0.8, 1.2)
    of_kl = None if kl is None else 0.1, whole, 20.0 if whole else None
    return objectives.Loss(objective, bounds, kl, *of_kl, whole, ratio_range)


def _loss_terms(flags: tuple[str, ...], meta: Callable[..., torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """Old log-probabilities, advantages, weights, rollout weights, reference. Without all flags one weight serves all rows."""
    whole, has_kl = flags == _WHOLE_LOSS, any(name.startswith("kl") for name in flags)
    return (
        meta(_ROWS), meta(_ROWS), meta(_ROWS) if whole else meta(), meta(_ROWS) if whole else None,
        meta(_ROWS) if has_kl else None,
    )  # fmt: skip


def _launch_gathered(variant: Variant, meta: Callable[..., torch.Tensor]) -> None:
    from ..kernels.gathered import gathered_dots, run_sums

    dtype = DTYPES[variant.dtype]
    entries, hidden, weight = (
        meta(8 * _ROWS, dtype=torch.int64), meta(_ROWS, _SIZE, dtype=dtype), meta(_VOCAB, _SIZE, dtype=dtype)
    )  # fmt: skip
    if variant.kernel == "gathered_dots":
        gathered_dots(hidden, entries, weight, entries)
    else:
        adds = "add" in variant.flags
        run_sums(meta(8 * _ROWS), entries, weight, entries, meta(_ROWS, _SIZE) if adds else hidden, adds)


def _launch_without_tiles(variant: Variant, meta: Callable[..., torch.Tensor]) -> None:
    from ..kernels.keep import Factors, Tokens, keep
    from ..kernels.policy_loss import policy_loss
    from ..kernels.row_statistics import sum_further
    from ..kernels.summary import FIELDS, summary

    flags = variant.flags
    mask = meta(_ROWS, dtype=torch.uint8)
    if variant.kernel == "keep":
        temperature = meta(_ROWS) if "temperature" in flags else None
        factors = Factors(meta(_ROWS), meta(_ROWS), meta(_ROWS), meta()) if "skip" in flags else Factors()
        ids = meta(_ROWS, dtype=torch.int64)
        keep(Tokens(ids, mask, temperature, 1), factors, ids if "rows" in flags else None, _VOCAB)
    elif variant.kernel in ("gathered_dots", "run_sums"):
        _launch_gathered(variant, meta)
    elif variant.kernel == "sum_further":
        statistics = ("statistics",)
        further, sums = (_further(statistics, meta(_ROWS), shape) for shape in ((_ROWS, 501), (_ROWS,)))
        sum_further(further, sums, _ROWS, 501)
    elif variant.kernel == "summary":
        summary(meta(FIELDS, 250), "entropy" in flags)
    else:
        policy_loss(meta(_ROWS), mask, _loss_terms(flags, meta), _loss(flags))


class Source(NamedTuple):
    """A kernel's arguments as Triton's compiler wants them: types by parameter, constants and attributes by path."""

    signature: dict[str, object]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]


def source_of(kernel: object, arguments: list[object]) -> Source:
    """As in Triton's own launch: None and 1 are constants; pointers and multiples of 16 are declared divisible by 16."""
    source = Source({}, {}, {})
    hints = kernel.fn.__annotations__
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=True)):
        if "constexpr" in str(hints.get(name)):
            source.signature[name] = "constexpr"
            source.constants[(i,)] = value
        else:
            source.signature[name] = _type_of(value, (i,), source)
    return source


def _type_of(value: object, path: tuple[int, ...], source: Source) -> object:
    if isinstance(value, tuple):
        return type(value)(*(_type_of(item, (*path, i), source) for i, item in enumerate(value)))
    if isinstance(value, torch.Tensor):
        source.attributes[path] = [["tt.divisibility", 16]]
        return f"*{_TRITON_TYPES[value.dtype]}"
    if hasattr(value, "block_shape"):  # a descriptor
        return f"tensordesc<{_TRITON_TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
    if value is None or (isinstance(value, int) and value == 1):
        source.constants[path] = value
        return "constexpr"
    if isinstance(value, int) and value % 16 == 0:
        source.attributes[path] = [["tt.divisibility", 16]]
    return "i32" if isinstance(value, int) else "fp32"


def compile_variant(variant: Variant) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, options = launched(variant)
    found = source_of(kernel, arguments)
    backend, arch, warp_size, shared_limit, mma = TARGETS[variant.target]
    source = ASTSource(fn=kernel, signature=found.signature, constexprs=found.constants, attrs=found.attributes)
    compiled = triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)
    if backend == "cuda":
        registers, spilled = _resources(compiled.asm["cubin"])
        assembly = compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])
    return Compiled(
        variant.kernel, variant.target, variant.dtype, list(variant.flags), registers, spilled,
        compiled.metadata.shared, shared_limit, len(re.findall(mma, assembly)),
    )  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread. The kernels have no local arrays, so a stack means spilled registers."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cubin").write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "kernel.cubin"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))


def compile_all(chosen: list[Variant], progress: bool = False) -> list[Compiled]:
    """Compiles in one process per core, spawned so that none inherits an interpreter; few variants are compiled in this one."""
    from multiprocessing import get_context

    from tqdm import tqdm

    if len(chosen) <= 24:
        return [compile_variant(variant) for variant in chosen]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(tqdm(pool.map(compile_variant, chosen), total=len(chosen), disable=not progress, unit="kernel"))


def add_command(commands) -> None:
    """Adds `fastpg compile-report` to the parser in __main__."""
    parser = commands.add_parser("compile-report", help="compile every kernel for four GPU targets, without a GPU")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeatable; default: all")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; default: all")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    form.add_argument("--markdown", action="store_true", help="a Markdown table, one row per kernel, dtype and flags")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("fastpg compile-report: unset TRITON_INTERPRET, which puts the interpreter in the compiler's place")
    compiled = compile_all(list(variants(args.kernel, args.target)), progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps([asdict(c) for c in compiled], indent=1))  # noqa: T201 - it is what was asked for
    elif args.markdown:
        print(markdown(compiled))  # noqa: T201
    else:
        _print_table(compiled)
    bad = [c for c in compiled if c.problems()]
    if bad:
        raise SystemExit(
            "\n".join(f"{c.kernel} {c.target} {c.dtype} {' '.join(c.flags)}: {', '.join(c.problems())}" for c in bad)
        )


def _print_table(compiled: list[Compiled]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "target", "dtype", "flags", title="fastpg compile-report")
    for column in ("registers", "spilled bytes", "shared bytes", "of", "matrix instructions"):
        table.add_column(column, justify="right")
    for c in compiled:
        numbers = (c.registers, c.spill_bytes, c.shared_bytes, c.shared_limit, c.mma_instructions)
        table.add_row(c.kernel, c.target, c.dtype, " ".join(c.flags) or "plain", *(str(n) for n in numbers))
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def markdown(compiled: list[Compiled]) -> str:
    """A table with one row per kernel, dtype and flags. Per target: registers / shared KiB / matrix instructions."""
    cells: dict[tuple, dict[str, str]] = {}
    for c in compiled:
        spilled = f", {c.spill_bytes} spilled" if c.spill_bytes else ""
        mma = f" / {c.mma_instructions}" if c.kernel in MULTIPLIES else ""
        key = c.kernel, c.dtype, " ".join(c.flags) or "plain"
        cells.setdefault(key, {})[c.target] = f"{c.registers} / {c.shared_bytes / 1024:.0f}{mma}{spilled}"
    rows = ["| kernel | dtype | flags | " + " | ".join(TARGETS) + " |", "|---" * (3 + len(TARGETS)) + "|"]
    rows += [
        "| " + " | ".join([*key, *(by_target.get(target, "") for target in TARGETS)]) + " |" for key, by_target in cells.items()
    ]
    return "\n".join(rows)
