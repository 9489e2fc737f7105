"""Triton's interpreter without work whose results it does not use, which was most of what a test of a kernel took.

    device functions   Every call of a `@triton.jit` function by another went through all members of `triton.language` and put
                       the interpreter's functions in their places, where they have stood since the kernel was launched.
    overflow           Every sum of two integers was computed once more in int64, and an assertion made of it that is not
                       looked at unless `debug` is set, which it never is.
    dtypes             The table from Triton's dtypes to numpy's was written anew for every look at it.
    shapes             Every tensor, and every type of one, made objects of its sizes, of which there are few.
    bfloat16           A widened number went through a conversion between any two formats: a shift does, of all but subnormal
                       numbers.

Tests of kernels take 0.4 of the time (24 launches of each kernel: 15 CPU seconds instead of 38, on an AMD EPYC with AVX2).
It was tried with Triton 3.5 to 3.8; `tests/kernels/test_fast_interpreter.py` holds its bits.
"""

from dataclasses import replace
from functools import cache, wraps

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def use() -> None:
    """For this process and those that are forked from it; once."""
    interpreter._get_np_dtype = _dtypes_once(interpreter._get_np_dtype)
    interpreter._convert_float = _widen_by_a_shift(interpreter._convert_float)
    _patch_once_per_launch()
    tl.block_type.__init__ = _block_type_once(tl.block_type.__init__)
    tl.tensor.__init__ = _tensor_once(tl.tensor.__init__)
    options = interpreter.interpreter_builder.options
    assert not options.debug  # else overflow would raise
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _dtypes_once(numpy_dtype):
    """Of Triton's scalar dtypes. A pointer's or a block's is found without the table."""
    scalar = cache(numpy_dtype)

    def cached(dtype):
        return scalar(dtype) if type(dtype) is tl.dtype else numpy_dtype(dtype)

    return cached


def _widen_by_a_shift(convert):
    """Of bfloat16, which is the upper half of float32's bits. Triton's own function converts the rest."""

    def converted(bits, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) == (tl.bfloat16, tl.float32):
            magnitude = bits.view(np.uint16) & 0x7FFF
            if not (magnitude - np.uint16(1) < 0x7F).any():  # 1 to 0x7F are subnormal; 0 wraps around
                return bits.view(np.uint16).astype(np.uint32) << 16
        return convert(bits, input_dtype, output_dtype, rounding_mode)

    return converted


def _patch_once_per_launch() -> None:
    """`_patch_lang(fn)` patches the modules of `triton.language` that fn can see. A launch patches anew, and undoes it."""
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    @cache
    def seen_by(function) -> frozenset[str]:
        return frozenset(x.__name__ for x in function.__globals__.values() if x is tl or x is tl.core)

    def patch_lang(function):
        new = seen_by(function) - patched
        patched.update(new)
        return patch(function) if new else None  # nobody looks at what patching for a device function returns

    @wraps(launch)
    def call(self, *arguments, **options):
        patched.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def _block_type_once(make):
    """Its name, sizes and number of entries are found once for each name of a dtype and shape."""
    made = {}

    @wraps(make)
    def init(self, element_ty, shape):
        key = str(element_ty), *(x.value if isinstance(x, tl.constexpr) else x for x in shape)
        if key not in made:
            make(self, element_ty, shape)
            made[key] = dict(vars(self))
        vars(self).update(made[key], element_ty=element_ty)

    return init


def _tensor_once(make):
    """Its sizes and number of entries are found once for each name of a type."""
    made = {}

    @wraps(make)
    def init(self, handle, type):
        if type.name not in made:
            make(self, handle, type)
            made[type.name] = vars(self) | {"handle": None}
        vars(self).update(made[type.name], handle=handle, type=type, dtype=type.scalar)

    return init
