"""The one matrix product: fp32 results from low-precision operands, in every loop of the library.

Logits rounded to bf16 are wrong by 1e-2 in the log-probability, and gradients summed in bf16 are biased, so every product
here returns or accumulates in fp32 (float64 for float64 operands):

    CUDA, ROCm   bf16 operands go to the tensor cores as they are, with `out_dtype=torch.float32`
    CPU          operands are fp32 copies of tiles; where they hold bf16 values, oneDNN is asked to multiply them as bf16
                 with fp32 accumulation, which is exact for the operands and 2x faster than an fp32 product

The CPU request is a process-wide switch of torch, held for the product alone and restored on every path. Another thread that
multiplies fp32 matrices at the same moment may see it. For fp32 operands torch's own precision settings apply, as for any
product.
"""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and gradient sums for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which tiles of inputs of `dtype` are multiplied.

    fp16 is widened: its range loses softmax tails (probabilities below 6e-8) and small gradients.
    """
    if dtype == torch.bfloat16 and device.type != "cpu":
        return dtype
    return accumulation_dtype(dtype)


@torch.library.custom_op("fastpg::product", mutates_args={"out"})
def product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, accumulate: bool, as_bf16: bool) -> None:
    """out = a @ b, or out += a @ b. a (M, K), b (K, N) of one dtype; out (M, N) in their accumulation dtype.

    as_bf16: on a CPU, multiply the fp32 operands rounded to bf16 (exact if they hold bf16 values).
    """
    if a.dtype != out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    if not (as_bf16 and out.device.type == "cpu"):
        _multiply(out, a, b, accumulate)
        return
    # torch.set_float32_matmul_precision must not be used here: it raises once the user has touched this newer switch.
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        _multiply(out, a, b, accumulate)
    finally:
        switch.fp32_precision = before


def _multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, accumulate: bool) -> None:
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in the accumulation dtype. On a CPU a bf16 product is computed as oneDNN does, summed in fp32 and rounded once."""
    dtype = accumulation_dtype(a.dtype)
    if a.dtype == dtype or a.device.type == "cpu":
        return torch.mm(a, b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


@product.register_fake
def _(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, accumulate: bool, as_bf16: bool) -> None:
    torch._check(a.shape[1] == b.shape[0], lambda: f"product: {tuple(a.shape)} @ {tuple(b.shape)}")
