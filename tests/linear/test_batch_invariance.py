"""A token's log-probability has the same bits whatever else is in the batch, and repeated calls give the same bits."""

import pytest
import torch

from fastpg import ImportanceWeighted as Weighted
from fastpg import LMHead, linear_logprobs, linear_policy_loss, policy_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def batch(dtype, rows=700, vocab=5003, hidden_size=96):
    weight = (torch.randn(vocab, hidden_size) * 0.2).to(dtype)
    head = LMHead(weight, torch.randn(vocab).to(dtype), softcap=20.0, logit_scale=0.9)
    return torch.randn(rows, hidden_size).to(dtype), head, torch.randint(0, vocab, (rows,)), torch.rand(rows) + 0.5


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_of_a_row_do_not_depend_on_the_batch(dtype, threads):
    hidden, head, tokens, temperature = batch(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = linear_logprobs(hidden, head, tokens, temperature=temperature, entropy=True)
        for rows in (slice(0, 1), slice(5, 6), slice(255, 258), slice(100, 613), slice(699, 700), slice(None, None, 3)):
            part = linear_logprobs(hidden[rows].contiguous(), head, tokens[rows], temperature=temperature[rows], entropy=True)
            assert torch.equal(part.logprobs, whole.logprobs[rows])
            assert torch.equal(part.entropy, whole.entropy[rows])
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_bits_do_not_depend_on_masks_checks_or_the_workspace(dtype):
    hidden, head, tokens, temperature = batch(dtype)
    mask = torch.rand(700) > 0.5
    whole = linear_logprobs(hidden, head, tokens, temperature=temperature).logprobs
    for options in ({}, {"check": False}, {"workspace": 64 * 2**20}):
        masked = linear_logprobs(hidden, head, tokens, mask=mask, temperature=temperature, **options).logprobs
        assert torch.equal(masked, torch.where(mask, whole, 0))


@DTYPES
def test_the_ratio_of_the_sampling_policy_to_itself_is_exactly_one(dtype):
    """Scored in micro-batches of 64, trained in one batch of 700."""
    hidden, head, tokens, temperature = batch(dtype)
    parts = zip(hidden.split(64), tokens.split(64), temperature.split(64), strict=True)
    old = torch.cat([linear_logprobs(h, head, t, temperature=T).logprobs for h, t, T in parts])
    new = linear_logprobs(hidden, head, tokens, temperature=temperature).logprobs
    metrics = policy_loss(new, old, torch.randn(700), objective=Weighted()).metrics
    assert metrics["ratio_mean"] == metrics["ratio_max"] == metrics["ess"] == 1
    assert metrics["kl_k3"] == 0


@DTYPES
@pytest.mark.parametrize("schedule", ["one pass", "two passes"])
@pytest.mark.parametrize("size", [64, 72, 577])
def test_bits_do_not_depend_on_the_layout_of_hidden_states(dtype, schedule, size):
    """Rows side by side in memory: chunks of 256 would be used as they are, and shorter ones copied to be padded."""
    transposed, weight = torch.randn(size, 512).to(dtype).T, (torch.randn(61, size) / size**0.5).to(dtype)
    tokens = torch.randint(0, 61, (512,))

    def logprobs(hidden, tokens):
        if schedule == "two passes":
            return linear_logprobs(hidden, weight, tokens).logprobs
        old = torch.full(tokens.shape, -4.0)
        return linear_policy_loss(hidden, weight, tokens, old, old, objective=Weighted()).logprobs

    whole = logprobs(transposed, tokens)
    assert torch.equal(logprobs(transposed.contiguous(), tokens), whole)
    assert torch.equal(logprobs(transposed[300:301], tokens[300:301]), whole[300:301])
    assert torch.equal(logprobs(transposed[:300], tokens[:300]), whole[:300])


@DTYPES
def test_repeated_gradients_have_the_same_bits(dtype):
    hidden, head, tokens, temperature = batch(dtype)

    def gradients():
        h, w = hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
        linear_logprobs(h, LMHead(w), tokens, temperature=temperature).logprobs.sum().backward()
        return h.grad, w.grad

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [None, 3, 8])
@pytest.mark.parametrize("size", [1, 5, 33, 97])
def test_equal_rows_have_equal_bits(size, rank, dtype):
    """Also where the hidden size, or a LoRA's rank, is no multiple of what a vector register holds."""
    for vocab in (2, 8, 33, 1037):
        hidden, weight = torch.randn(1, size).repeat(40, 1).to(dtype), torch.randn(vocab, size).to(dtype)
        lora = None if rank is None else (torch.randn(rank, size).to(dtype), torch.randn(vocab, rank).to(dtype), 1.0)
        logprobs = linear_logprobs(hidden, LMHead(weight, lora=lora), torch.zeros(40, dtype=torch.int64)).logprobs
        assert (logprobs == logprobs[0]).all(), vocab


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [None, 6, 8])
def test_a_transposed_head_is_like_any_other(rank, dtype):
    for vocab in range(2, 60, 3):
        hidden, weight = torch.randn(30, 16).to(dtype), torch.randn(16, vocab).to(dtype).T
        lora = None if rank is None else (torch.randn(16, rank).to(dtype).T, torch.randn(rank, vocab).to(dtype).T, 0.1)
        head, tokens, order = LMHead(weight, lora=lora), torch.randint(0, vocab, (30,)), torch.randperm(30)
        whole = linear_logprobs(hidden, head, tokens).logprobs
        assert torch.equal(linear_logprobs(hidden[order], head, tokens[order]).logprobs, whole[order])
