"""The promised accuracy, stated once. `fastpg check`, the tests and the gate of `bench/` hold the library to it.

All errors are differences from the oracle in float64 on the same inputs.
"""

from __future__ import annotations

import torch

# A log-probability is a difference of logits. Its rounding error in fp32 is proportional to the largest logit of its row, or to
# 10 if all are smaller.
UNIT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
SMALLEST_RANGE = 10
# The accumulators of tensor cores drop the last bits of every partial sum, so that the error of a logit grows with H. On an
# H100 it was linear in H: 0.27 to 0.43 of the promise, with logits taken as 12 (`bench/results/h100-*.json`).
TENSOR_CORE_TERMS = 1024

# Of a row of dX, relative to its norm. In 16 bits the stored tile of gradients is rounded once, and the result once or twice.
# In fp32 a row is a coefficient (the exp of a log-probability) times a product: its tolerance is that of a log-probability.
ROW_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3}
# Of dW, db, dA and dB as a whole, relative to the norm. In bf16 roundings average out over rows. In fp32 the error is that of
# sums over all tokens.
WEIGHT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}
# Of `policy_loss` on ready log-probabilities: elementwise fp32 on numbers of order 10.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def logprob_tolerance(
    largest_logit: torch.Tensor | float,  # (...)
    dtype: torch.dtype,
    hidden_size: int,
    device: torch.device | str,
) -> torch.Tensor | float:
    """The promised bound on |error| of a log-probability or an entropy, for a row with this largest |logit|; (...).

        1e-6 max(10, |z|max)                          on CPUs, and for fp32 inputs on GPUs (1e-14 for float64)
        1e-6 max(10, |z|max) max(1, H / 1024)         for 16-bit inputs on GPUs, whose products use tensor cores

    Where |logp| < 1, it is relative to |logp| (`judge` multiplies by it): confident tokens are as accurate.

    dtype: of hidden and weight. hidden_size: H, the number of terms of a logit. device: where the products run.
    """
    on_tensor_cores = torch.device(device).type == "cuda" and dtype.itemsize == 2
    terms = max(1.0, hidden_size / TENSOR_CORE_TERMS) if on_tensor_cores else 1.0
    if isinstance(largest_logit, torch.Tensor):
        return UNIT[dtype] * terms * largest_logit.clamp(min=SMALLEST_RANGE)
    return UNIT[dtype] * terms * max(SMALLEST_RANGE, largest_logit)
