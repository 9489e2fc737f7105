"""Transient memory stays within the workspace, whatever N and V are."""

import pytest
import torch

from fastpg import linear_logprobs
from fastpg.profiling import transient_bytes

DEFAULT = 256 * 2**20


def gradients_and_copy(hidden, weight) -> tuple[int, int]:
    """Bytes of dX and dW, and of the fp32 copy of dX where that is not the gradient itself. dW needs no copy."""
    results = sum(x.numel() * x.element_size() for x in (hidden, weight))
    return results, 0 if hidden.dtype == torch.float32 else hidden.numel() * 4


def peak(rows, vocab, dtype, workspace=None, masked=False) -> tuple[int, int, int]:
    hidden = torch.randn(rows, 576).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, 576) * 0.05).to(dtype).requires_grad_()
    tokens = torch.randint(0, vocab, (rows,))
    if masked:
        tokens[::2] = -100

    def step():
        return linear_logprobs(hidden, weight, tokens, entropy=True, workspace=workspace).logprobs.sum().backward()

    return transient_bytes(step), *gradients_and_copy(hidden, weight)


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [
        (2048, 49152, torch.float32),
        (2048, 49152, torch.bfloat16),
        (2048, 2 * 49152, torch.bfloat16),
        (4 * 2048, 49152, torch.bfloat16),
    ],
    ids=str,
)
def test_forward_and_backward_stay_within_the_default_workspace(rows, vocab, dtype):
    used, results, copy = peak(rows, vocab, dtype)
    assert results < used <= results + copy + DEFAULT
    assert used < rows * vocab * 4  # less than the logits alone


@pytest.mark.parametrize("masked", [False, True])
def test_a_small_workspace_is_kept_too(masked):
    used, results, copy = peak(4096, 8192, torch.bfloat16, workspace=48 * 2**20, masked=masked)
    assert used <= results + copy + 48 * 2**20


def test_no_grad_needs_tiles_only():
    hidden, weight = torch.randn(2048, 576), torch.randn(49152, 576) * 0.05
    tokens = torch.randint(0, 49152, (2048,))
    with torch.no_grad():
        used = transient_bytes(lambda: linear_logprobs(hidden, weight, tokens, entropy=True))
    assert used < 32 * 2**20


def test_transient_bytes_counts_the_peak_not_the_sum():
    def call():
        for _ in range(3):
            torch.zeros(2**20).add(1)  # two tensors of 4 MiB at a time

    assert 2 * 2**22 <= transient_bytes(call) < 2 * 2**22 + 2**16
