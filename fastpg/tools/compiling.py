"""A variant of a kernel, compiled for a GPU target without a GPU: registers, spills, shared memory, tensor-core instructions.

It is compiled exactly as its launcher in `fastpg.kernels` would do it (`launches.py`).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from .launches import launched
from .threads import cores
from .variants import MULTIPLIES, TARGETS, Variant

_TRITON_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip
_ENOUGH = 8  # variants that are worth the start of a process


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

    @property
    def variant(self) -> Variant:
        return Variant(self.kernel, self.target, self.dtype, tuple(self.flags))

    def multiplies_16_bits(self) -> bool:
        return self.kernel in MULTIPLIES and self.dtype != "float32"

    def problems(self) -> list[str]:
        """Faults: spilled registers, too much shared memory, products that do not use the tensor cores."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.multiplies_16_bits() and not self.mma_instructions:
            found.append("no tensor-core instruction")
        return found


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
    """Raises RuntimeError with the variant's name if it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, options = launched(variant)
    found = source_of(kernel, arguments)
    backend, arch, warp_size, shared_limit, mma = TARGETS[variant.target]
    source = ASTSource(fn=kernel, signature=found.signature, constexprs=found.constants, attrs=found.attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)
    except Exception as error:
        raise RuntimeError(f"{variant} does not compile: {error}") from error
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
    """The variants compiled, in their order, by as many processes as there are cores; few of them by this process alone.

    progress: a bar on stderr. The slowest variants are begun first, so that no process ends long after the others.
    """
    from tqdm import tqdm

    processes = min(cores(), len(chosen) // _ENOUGH)
    found: dict[int, Compiled] = {}
    with tqdm(total=len(chosen), unit="variant", leave=False, disable=not progress, file=sys.stderr) as bar:
        if processes < 2:
            for place, variant in enumerate(chosen):
                found[place] = compile_variant(variant)
                bar.update()
            return list(found.values())
        # spawned: a fork would inherit the interpreter, where there is one
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            order = sorted(range(len(chosen)), key=lambda place: _work(chosen[place]), reverse=True)
            running = {pool.submit(compile_variant, chosen[place]): place for place in order}
            try:
                for done in as_completed(running):
                    found[running[done]] = done.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else the context waits for all that have not begun
                raise
    return [found[place] for place in range(len(chosen))]


def _work(variant: Variant) -> tuple[bool, bool, int]:
    """Sorts variants by the time that they take. Further statistics take most of it: they sort the logits in registers."""
    return "statistics" in variant.flags, variant.kernel in MULTIPLIES, len(variant.flags)
