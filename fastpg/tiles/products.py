"""The one matrix product: fp32 results from low-precision operands, in every loop of the library.

Logits rounded to bf16 are wrong by 1e-2 in the log-probability, and gradients summed in bf16 are biased. So every product here
returns or accumulates in fp32 (float64 for float64 operands):

    CUDA, ROCm   bf16 operands go to the tensor cores as they are, with `out_dtype=torch.float32`
    CPU          operands are fp32 copies of tiles; where both hold bf16 values, oneDNN is asked to multiply them as bf16
                 with fp32 accumulation

That request is exact for operands that hold bf16 values, and for no others. A CPU with matrix instructions (AMX) obeys it and
is faster for it; one without them runs its fp32 kernel. The request therefore depends on the values that operands hold, and
never on the CPU. It is a process-wide switch of torch, set for the product alone and restored on every path. Another thread
that multiplies fp32 matrices at the same moment may see it. For fp32 operands torch's own precision settings apply, as for any
product.

Where a gradient is rounded to bf16 as soon as it is complete, a CPU with bf16 products (`has_bf16_products`) multiplies bf16
operands as they are.

Operands keep no foreign memory between their rows (`dense`). oneDNN's AMX kernels read past the end of a row and multiply the
memory there by 0, which gives NaN where it holds NaN or infinity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .structures import Chunk, Head

# Rows that are copied to another dtype at a time: few, so that the copy is small and stays in the cache.
WIDENED_ROWS = 512


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and gradient sums for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this CPU: with AVX-512 or AMX it does.

    Elsewhere torch multiplies them in loops of its own. Where this was measured (an AMD EPYC with AVX2, one core; 256 x 4096 x
    576), such a product took 42 times as long as that of the same values in fp32.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_products_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of operands in `dtype` is asked for in `dtype`, with one rounding. If not, it is asked for in fp32."""
    if device.type != "cpu" or dtype == accumulation_dtype(dtype):
        return True
    return dtype == torch.bfloat16 and has_bf16_products()


def product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, accumulate: bool, holds_bf16: bool) -> None:
    """out = a @ b, or out += a @ b. a (M, K), b (K, N) of one dtype; out (M, N) in it or in its accumulation dtype.

    holds_bf16: every entry of a and of b is a bf16 value, so that a CPU may multiply the fp32 operands as bf16.
    """
    if a.dtype != out.dtype and out.device.type == "cpu":  # no CPU product takes 16-bit operands and returns fp32
        holds_bf16 = a.dtype == torch.bfloat16
        a, b = a.to(out.dtype), b.to(out.dtype)
    if not (holds_bf16 and out.device.type == "cpu"):
        _multiply(a, b, out, accumulate)
        return
    # torch.set_float32_matmul_precision must not be used here: it raises once the user has touched this newer switch.
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        _multiply(a, b, out, accumulate)
    finally:
        switch.fp32_precision = before


def _multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """a @ b in `dtype`, or in the dtype of `out`, which it is written or added to. Nothing else in the library calls a matrix
    product: in the place of this function, tests put one that behaves like the worst hardware."""
    dtype = (a.dtype if dtype is None else dtype) if out is None else out.dtype
    wider = {} if dtype == a.dtype else {"out_dtype": dtype}
    if accumulate:
        return torch.addmm(out, a, b, **wider, out=out)
    return torch.mm(a, b, **wider) if out is None else torch.mm(a, b, **wider, out=out)


def has_gaps(x: torch.Tensor) -> bool:
    """Whether the rows of x (rows, columns), or its columns, have memory behind them that is not part of x."""
    reach, entries = 0, 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if stride != 0:
            reach, entries = max(reach, size * stride), entries * size
    return x.numel() > 0 and reach > entries


def dense(x: torch.Tensor) -> torch.Tensor:
    """x (rows, columns) as an operand: on a CPU, a copy where x has gaps."""
    if x.device.type != "cpu" or not has_gaps(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() is x itself where x is one row


def inner_size(size: int, device: torch.device) -> int:
    """The number of terms in each sum of a product: on a CPU `size` rounded up to a multiple of 8, with zeros at the end.

    MKL adds up a last vector that is not full in an order that depends on the row's place in the matrix. A token's bits would
    depend on that place too.
    """
    return -(-size // 8) * 8 if device.type == "cpu" else size


def to_inner_size(x: torch.Tensor, size: int) -> torch.Tensor:
    """x (M, K) -> (M, size), with zeros at the end of each row."""
    return x if x.shape[1] == size else F.pad(x, (0, size - x.shape[1]))


def weight_product(out: torch.Tensor, d: torch.Tensor, x: torch.Tensor, accumulate: bool, holds_bf16: bool) -> None:
    """out (V, H) = or += d^T @ x, d (C, V), x (C, H): a slice of dW.

    Where this product is the whole of the slice, out may be bf16 (`has_products_in`). On a CPU the operands, which then hold
    bf16 values, are multiplied as bf16: at that product's speed, and with a single rounding. (Not for D @ W, where the
    component that all rows of W share cancels between slices: none of them may be rounded before that.)
    """
    if out.dtype == torch.bfloat16 and out.device.type == "cpu":
        _multiply(d.to(torch.bfloat16).T, x.to(torch.bfloat16), out)
    else:
        product(out, d.T, x, accumulate, holds_bf16)


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in the accumulation dtype. On a CPU a bf16 product is oneDNN's: summed in fp32 and rounded to bf16 once."""
    dtype = accumulation_dtype(a.dtype)
    return _multiply(a, b).to(dtype) if a.device.type == "cpu" else _multiply(a, b, dtype=dtype)


def _tiled_product(exps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """exps (C, V) @ weight (V, H) on a CPU, from tiles of both: in the accumulation dtype, and not rounded before.

    For sums that other ranks' sums are added to, as the component that all rows of W share cancels only in the total; for a
    weight with gaps between its rows; and for a CPU without bf16 products.
    """
    dtype = accumulation_dtype(exps.dtype)
    columns, sums = tile_columns(weight.shape[1]), exps.new_empty(len(exps), weight.shape[1], dtype=dtype)
    for v in range(0, len(weight), columns):
        w = dense(weight[v : v + columns].to(dtype))
        for r in range(0, len(exps), WIDENED_ROWS):
            e = exps[r : r + WIDENED_ROWS, v : v + columns].to(dtype)
            product(sums[r : r + WIDENED_ROWS], e, w, v > 0, holds_bf16=exps.dtype == torch.bfloat16)
    return sums


def skinny_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, K) @ b (K, r) in the accumulation dtype, for small r. b is in the accumulation dtype or in a's.

    a, the large operand, is never widened as a whole. Where it has 16 bits, a GPU multiplies a wider b as two 16-bit terms,
    whose sum has twice the digits, and a CPU widens a few rows of a at a time.
    """
    dtype = accumulation_dtype(a.dtype)
    if a.dtype == dtype:
        return _multiply(a, dense(b.to(dtype)))
    if a.device.type == "cpu":  # where a product of 16-bit operands would be rounded to 16 bits
        out, b = a.new_empty(len(a), b.shape[1], dtype=dtype), dense(b.to(dtype))
        rows = max(1, widened_entries(min(a.shape)) // a.shape[1])
        for start in range(0, len(a), rows):
            span = slice(start, start + rows)
            _multiply(a[span].to(dtype), b, out[span])
        return out
    if b.dtype == a.dtype:
        return multiply(a, b)
    high = b.to(a.dtype)
    low = (b - high.to(b.dtype)).to(a.dtype)
    sums = multiply(a, torch.cat([high, low], 1))
    return sums[:, : b.shape[1]] + sums[:, b.shape[1] :]


def widened_entries(vocab: int) -> int:
    return min(2**20, WIDENED_ROWS * vocab)


def tile_columns(hidden_size: int) -> int:
    """Vocabulary entries of a tile on a CPU: at most 8 MiB of fp32 weights and 4 MiB of logits, which stay in the cache."""
    return max(128, min(4096, 2**21 // hidden_size // 64 * 64))


class Sums(NamedTuple):
    """The tensors that a chunk's products are written or added to; None where a gradient is not wanted.

    hidden and lora_hidden have the chunk's rows, or with `chunk.places` those of the call. A weight in the head's dtype is
    written once, with one rounding; one in the accumulation dtype may be added to. lora_weight and bias are in the accumulation
    dtype.
    """

    hidden: torch.Tensor | None  # (C, H), or (N, H)
    lora_hidden: torch.Tensor | None  # (C, r), or (N, r), in the accumulation dtype
    weight: torch.Tensor | None  # (V, H)
    lora_weight: torch.Tensor | None  # (V, r)
    bias: torch.Tensor | None  # (V,)


def gradient_products(
    exps: torch.Tensor,  # E (C, V)
    factor: torch.Tensor,  # u (C,) in the accumulation dtype
    residual: torch.Tensor | None,  # (C,), of `anchored_exp`
    chunk: Chunk,  # of these C rows, and perhaps padding after them
    head: Head,
    sums: Sums,
    add: bool,
    gradient_rows: Callable[..., None],  # of the backend
) -> None:
    """Products 2 and 3: hidden = u (E @ W);  weight = or += E^T @ (u x);  bias likewise E^T u.

    With LoRA also lora_hidden = u (E @ B);  lora_weight = or += E^T @ (u z): so narrow that each costs no more than reading E.

    The rounding error of each row of E is added back at its target's row of W, in fp32. add: weight, lora_weight and bias are
    added to; otherwise they are overwritten.
    """
    of_rows = weighted = None
    if sums.hidden is not None:
        of_rows = _hidden_product(exps, head.weight, is_last=sums.hidden.dtype == exps.dtype)
    if sums.weight is not None:
        weighted = chunk.hidden.new_empty(len(factor), head.weight.shape[1], dtype=exps.dtype)
    if sums.hidden is not None or sums.weight is not None:
        gradient_rows(of_rows, chunk, head, factor, residual, sums.hidden, weighted)
        del of_rows
    # no CPU product of bf16 operands returns fp32: E is widened, tile by tile
    widens = exps.device.type == "cpu" and exps.dtype != factor.dtype
    if sums.weight is not None:
        if widens and (sums.weight.dtype != exps.dtype or not has_products_in(exps.dtype, exps.device)):
            _widened_products(sums.weight, exps, weighted.to(factor.dtype), add, holds_bf16=True)
        else:
            product(sums.weight, exps.T, weighted, add, holds_bf16=False)
    if sums.bias is not None and widens:
        _widened_products(sums.bias[:, None], exps, factor[:, None], add, holds_bf16=False)
    elif sums.bias is not None:
        _store(sums.bias, skinny_product(exps.T, factor[:, None])[:, 0], add)
    if sums.lora_hidden is not None:
        of_rows = skinny_product(exps, head.lora_weight)
        add_residual(of_rows, residual, chunk.tokens[: len(factor)], head.lora_weight)
        store_rows(sums.lora_hidden, chunk.places, of_rows, factor)
    if sums.lora_weight is not None:
        z = chunk.lora_hidden[: len(factor)]
        _store(sums.lora_weight, skinny_product(exps.T, z * factor[:, None]), add)


def _hidden_product(exps: torch.Tensor, weight: torch.Tensor, is_last: bool) -> torch.Tensor:
    """E @ W in the accumulation dtype.

    is_last: dX is rounded to the dtype of E at once, so that a bf16 product on a CPU may be rounded here already. It may not
    where other ranks' sums are to be added.
    """
    may_round = is_last and has_products_in(exps.dtype, exps.device)
    tiled = exps.device.type == "cpu" and (not may_round or has_gaps(weight))
    return _tiled_product(exps, weight) if tiled else multiply(exps, weight)


def store_rows(out: torch.Tensor, places: torch.Tensor | None, values: torch.Tensor, factor: torch.Tensor | None) -> None:
    """out (C, ...) = values * factor (C,), rounded once; with places (C,) these rows of out. factor: None is 1."""
    into = out if places is None else out.new_empty(values.shape)
    if factor is None:
        into.copy_(values)
    else:
        torch.mul(values, factor[:, None], out=into)
    if places is not None:
        out.index_copy_(0, places, into)


def add_residual(out: torch.Tensor, residual: torch.Tensor | None, tokens: torch.Tensor, weight: torch.Tensor) -> None:
    """out (C, ...) += residual (C,) times the token's row of the weight.

    For a token on another rank any row will do: the correction only has to cancel the component that all rows share.
    """
    if residual is not None:
        out.add_(weight[tokens.clamp(0, len(weight) - 1)].to(out.dtype).mul_(residual[:, None]))


def _store(out: torch.Tensor, values: torch.Tensor, add: bool) -> None:
    if add:
        out.add_(values)
    else:
        out.copy_(values)


def _widened_products(out: torch.Tensor, exps: torch.Tensor, x: torch.Tensor, accumulate: bool, holds_bf16: bool) -> None:
    """out (V, K) = or += E^T @ x, x (C, K) in the accumulation dtype. out is in it too, or, where nothing is added, in E's."""
    columns = tile_columns(x.shape[1])
    buffer = None if out.dtype == x.dtype else x.new_empty(min(columns, len(out)), x.shape[1])
    for v in range(0, exps.shape[1], columns):
        into = out[v : v + columns]
        sums = into if buffer is None else buffer[: len(into)]
        for r in range(0, len(exps), WIDENED_ROWS):
            rows = slice(r, r + WIDENED_ROWS)
            e = exps[rows, v : v + columns].to(x.dtype).T
            product(sums, e, x[rows], accumulate or r > 0, holds_bf16)
        if sums is not into:
            into.copy_(sums)
