"""Triton's interpreter without work whose results it does not use, which was most of what a test of a kernel took.

    device functions   Every call of a `@triton.jit` function by another went through all members of `triton.language` and put
                       the interpreter's functions in their places, where they have stood since the kernel was launched.
                       A launch does so; the members are looked for once.
    overflow           Every sum of two integers was computed once more in int64, and an assertion made of it that is not
                       looked at unless `debug` is set, which it never is.
    dtypes             The table from Triton's dtypes to numpy's was written anew for every look at it.
    shapes             Every tensor, and every type of one, made objects of its sizes, of which there are few.
    bfloat16           Its numbers went through a conversion between any two formats: a shift does, of all but subnormal ones.

Tests of kernels take 0.4 of the time (24 launches of each kernel: 15 CPU seconds instead of 38, on an AMD EPYC with AVX2).
It was tried with Triton 3.5 to 3.8; `tests/kernels/test_fast_interpreter.py` holds its bits.
"""

import inspect
from dataclasses import replace
from functools import cache, wraps

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def use() -> None:
    """For this process and those that are forked from it; once."""
    interpreter._get_np_dtype = _dtypes_once(interpreter._get_np_dtype)
    interpreter._convert_float = _bfloat16_by_a_shift(interpreter._convert_float)
    interpreter._patch_builtin = _members_once(interpreter._patch_attr)
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


def _bfloat16_by_a_shift(convert):
    """bfloat16 is the upper half of float32's bits, rounded towards 0 where no rounding is named. Triton's own function
    converts subnormal numbers, and the rest."""

    def converted(numbers, given, wanted, rounding_mode):
        if (given, wanted) == (tl.bfloat16, tl.float32):
            bits, smallest = numbers.view(np.uint16), np.uint16(0x80)
            found = np.asarray(bits.astype(np.uint32) << 16)
        elif (given, wanted, rounding_mode) == (tl.float32, tl.bfloat16, None):
            bits, smallest = numbers.view(np.uint32), np.uint32(0x800000)
            found = np.asarray((bits >> 16).astype(np.uint16))
        else:
            return convert(numbers, given, wanted, rounding_mode)
        magnitude = bits & (np.iinfo(bits.dtype).max >> 1)
        subnormal = (magnitude < smallest) & (magnitude != 0)
        if subnormal.any():
            found[subnormal] = convert(bits[subnormal], given, wanted, rounding_mode)
        return found

    return converted


def _members_once(patch_member):
    """Of a module or class of `triton.language`: its functions that need a builder. They are back in place after a launch."""

    @cache
    def builtins_of(owner):
        return [(name, member) for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]

    def patch_builtin(owner, *how):
        for name, member in builtins_of(owner):
            patch_member(owner, name, member, *how)

    return patch_builtin


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
