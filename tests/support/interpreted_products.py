"""tl.dot in Triton's interpreter, with the sums of every entry in one order.

The interpreter multiplies with numpy, whose BLAS on some processors (AVX2) adds up a row in an order that depends on the row's
place in the tile. A GPU's instruction has no such places. Tests that compare bits would depend on the processor they meet.
"""

import numpy as np

_matmul = np.matmul


def use_one_order() -> None:
    """For this process and those that are forked from it. The interpreter looks `numpy.matmul` up at every product."""
    np.matmul = one_order


def one_order(a, b, *arguments, dtype=None, **options):
    """`numpy.matmul`; of two float32 or float16 matrices by `numpy.einsum`, which calls no BLAS unless asked to optimize."""
    if dtype != np.float32 or a.ndim != 2 or arguments or options:
        return _matmul(a, b, *arguments, dtype=dtype, **options)
    return np.einsum("mk,kn->mn", a.astype(dtype, copy=False), b.astype(dtype, copy=False), optimize=False)
