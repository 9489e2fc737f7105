"""Transient memory stays within the workspace, whatever N and V are."""

import pytest
import torch

from fastpg import LMHead, linear_cispo_loss, linear_logprobs
from fastpg.linear.outputs import OUTPUTS
from fastpg.tools.memory import transient_bytes

DEFAULT = 256 * 2**20


def gradients_and_copies(hidden, weight, schedule) -> tuple[int, int]:
    """Bytes of dX and dW, and of the one fp32 copy that a schedule may hold where they are not fp32: of dX for two passes,
    which sum it over the vocabulary, of dW for one pass, which sums it over chunks. Backward scales both in place."""
    results = sum(x.nbytes for x in (hidden, weight))
    summed = hidden if schedule is two_pass else weight
    return results, 0 if summed.dtype == torch.float32 else summed.numel() * 4


def one_pass(hidden, weight, tokens, workspace):
    """With log ratios of order 1, so that nothing is recomputed: the anchors are the log-probabilities themselves."""
    with torch.no_grad():
        old = linear_logprobs(hidden, weight, tokens).logprobs

    def step():
        loss = linear_cispo_loss(hidden, weight, tokens, old, torch.ones(len(tokens)), entropy=True, workspace=workspace).loss
        if loss.requires_grad:
            loss.backward()

    return step


def two_pass(hidden, weight, tokens, workspace):
    return lambda: linear_logprobs(hidden, weight, tokens, entropy=True, workspace=workspace).logprobs.sum().backward()


SCHEDULES = pytest.mark.parametrize("schedule", [one_pass, two_pass], ids=lambda f: f.__name__)


def peak(schedule, rows, vocab, dtype, workspace=None, masked=False) -> tuple[int, int, int]:
    hidden = torch.randn(rows, 128).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, 128) * 0.05).to(dtype).requires_grad_()
    tokens = torch.randint(0, vocab, (rows,))
    if masked:
        tokens[::2] = -100

    used = transient_bytes(schedule(hidden, weight, tokens, workspace))
    return used, *gradients_and_copies(hidden, weight, schedule)


@pytest.mark.parametrize(
    ("schedule", "rows", "vocab", "dtype"),
    [
        (two_pass, 2048, 49152, torch.bfloat16),
        (one_pass, 2048, 49152, torch.float32),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_forward_and_backward_stay_within_the_default_workspace(schedule, rows, vocab, dtype):
    used, results, copy = peak(schedule, rows, vocab, dtype)
    assert results < used <= results + copy + DEFAULT
    assert used < rows * vocab * 4 or schedule is one_pass  # less than the logits alone


@SCHEDULES
@pytest.mark.parametrize(
    ("rows", "vocab", "dtype", "masked"),
    [
        (4096, 8192, torch.bfloat16, True), (4096, 8192, torch.float32, False), (2 * 4096, 8192, torch.bfloat16, False),
        (4096, 2 * 8192, torch.bfloat16, False),
    ],
    ids=str,
)  # fmt: skip
def test_a_small_workspace_is_kept_too(schedule, rows, vocab, dtype, masked):
    workspace = 2**20 * (48 if schedule is one_pass else 32)  # so small that twice as much would be used
    used, results, copy = peak(schedule, rows, vocab, dtype, workspace=workspace, masked=masked)
    assert used <= results + copy + workspace


def test_further_statistics_stay_within_a_small_workspace():
    """With a bias and a softcap, whose temporaries are there too; their results come on top."""
    hidden, weight = torch.randn(8192, 128), torch.randn(8192, 128) * 0.05
    head, tokens = LMHead(weight, torch.randn(8192), softcap=20.0), torch.randint(0, 8192, (8192,))
    with torch.no_grad():
        used = transient_bytes(
            lambda: linear_logprobs(hidden, head, tokens, outputs=OUTPUTS, top_k=8, workspace=48 * 2**20, backend="torch")
        )
    results = 8192 * (5 * 4 + 2 * 8 + 1 + 8 * (4 + 8))
    assert results < used <= 2 * results + 48 * 2**20


def test_no_grad_needs_tiles_only():
    hidden, weight = torch.randn(2048, 128), torch.randn(49152, 128) * 0.05
    tokens = torch.randint(0, 49152, (2048,))
    with torch.no_grad():
        used = transient_bytes(lambda: linear_logprobs(hidden, weight, tokens, entropy=True))
    assert used < 32 * 2**20


def test_transient_bytes_counts_the_peak_not_the_sum():
    def call():
        for _ in range(3):
            torch.zeros(2**20).add(1)  # two tensors of 4 MiB at a time

    assert 2 * 2**22 <= transient_bytes(call) < 2 * 2**22 + 2**16


@pytest.mark.parametrize("wanted", ["nothing", "weight", "everything"])
def test_hidden_states_of_many_chunks_are_not_kept(wanted):
    hidden = torch.randn(32768, 256).bfloat16().requires_grad_(wanted == "everything")
    weight = (torch.randn(128, 256) * 0.1).bfloat16().requires_grad_(wanted != "nothing")
    tokens = torch.randint(0, 128, (32768,))
    used = transient_bytes(one_pass(hidden, weight, tokens, 10 * 2**20))
    results = hidden.nbytes * 2 if wanted == "everything" else 0  # and its scaled copy
    vectors = 32768 * 4 * 30  # logprobs, metrics, ... of every token
    assert used <= results + vectors + 10 * 2**20


def test_recomputed_rows_and_a_bias_stay_within_the_workspace():
    hidden, weight = torch.randn(2048, 64).bfloat16(), (torch.randn(8192, 64) * 0.2).bfloat16()
    bias, tokens = torch.randn(8192).bfloat16(), torch.randint(0, 8192, (2048,))
    for x in (hidden, weight, bias):
        x.requires_grad_()
    advantages = torch.where(torch.arange(2048) % 2 == 0, 1e-36, 1.0)
    head = LMHead(weight, bias)
    with torch.no_grad():
        old = linear_logprobs(hidden, head, tokens).logprobs
    outs = []

    def step():
        outs.append(linear_cispo_loss(hidden, head, tokens, old, advantages, reduction="sum", workspace=60 * 2**20))
        outs[0].loss.backward()

    used = transient_bytes(step)
    assert outs[0].metrics["recomputed_tokens"] == 1024
    copies = sum(x.numel() * (2 + 4 + 2) for x in (hidden, weight, bias))
    assert used <= copies + 60 * 2**20


def test_a_plan_is_made_once_and_a_workspace_that_is_no_integer_is_refused_all_the_same():
    hidden, weight, tokens = torch.randn(5, 8), torch.randn(20, 8), torch.zeros(5, dtype=torch.int64)
    want = linear_logprobs(hidden, weight, tokens, workspace=2**22).logprobs
    for workspace in (2.0**22, [2**22], "4194304", True):
        with pytest.raises(ValueError, match="workspace"):
            linear_logprobs(hidden, weight, tokens, workspace=workspace)
    assert torch.equal(linear_logprobs(hidden, weight, tokens, workspace=2**22).logprobs, want)
    wide = torch.randn(20, 4096)
    with pytest.raises(ValueError, match="workspace=100000 bytes is too small"):  # not the plan of the narrow head
        linear_logprobs(torch.randn(5, 4096), wide, tokens, workspace=100_000)
