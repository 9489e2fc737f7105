"""Long and large: 250 training steps, and one call with a vocabulary of 262144."""

import os

import pytest
import torch

from fastpg import CISPO, LMHead, linear_cispo_loss, linear_logprobs, policy_loss
from fastpg.demo.tasks import tiny_model
from fastpg.tools.memory import transient_bytes

STEPS = 250


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def train(loss_of, steps: int = STEPS) -> tuple[list[float], list[int]]:
    """The losses of the demo's tiny model on fresh random batches, and the process's memory at each fiftieth step."""
    torch.manual_seed(0)
    model = tiny_model().train()
    head, vocab = LMHead.from_model(model), model.config.vocab_size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses, memory = [], []
    for step in range(steps):
        ids, advantages = torch.randint(0, vocab, (8, 13)), torch.randn(8)
        hidden, tokens = model.base_model(ids[:, :-1]).last_hidden_state, ids[:, 1:]
        with torch.no_grad():
            old = linear_logprobs(hidden, head, tokens).logprobs + 0.1 * torch.randn(tokens.shape)
        loss = loss_of(hidden, head, tokens, old, advantages)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49 and os.path.exists("/proc/self/statm"):
            memory.append(resident_bytes())
    return losses, memory


def ours(hidden, head, tokens, old, advantages):
    return linear_cispo_loss(hidden, head, tokens, old, advantages).loss


def full_logits(hidden, head, tokens, old, advantages):
    logprobs = torch.log_softmax(hidden @ head.weight.T, -1).gather(-1, tokens[..., None])[..., 0]
    return policy_loss(logprobs, old, advantages, objective=CISPO()).loss


@pytest.fixture(scope="module")
def run():
    return train(ours)


def test_250_steps_keep_memory_flat(run):
    _, memory = run
    if not memory:
        pytest.skip("/proc is not there")
    assert memory[-1] - memory[0] < 8 * 2**20, memory


def test_250_steps_have_the_losses_of_full_logits(run):
    want, _ = train(full_logits)
    torch.testing.assert_close(torch.tensor(run[0]), torch.tensor(want), rtol=1e-4, atol=1e-5)


def test_two_runs_are_identical(run):
    again, _ = train(ours, 100)
    assert again == run[0][:100]


@pytest.mark.parametrize("schedule", ["one-pass", "two-pass forward"])
def test_a_large_head_stays_within_its_workspace(schedule):
    """N = 512, H = 256, V = 262144 in bf16: logits would take 256 MiB, and twice as much in fp32."""
    rows, size, vocab, workspace = 512, 256, 262_144, 2**28
    weight = torch.empty(4096, size).uniform_(-0.05, 0.05).bfloat16().repeat(64, 1)  # frozen: its gradient would take 128 MiB
    hidden = torch.randn(rows, size).bfloat16().requires_grad_()
    tokens = torch.randint(0, vocab, (rows,))

    def step():
        if schedule == "one-pass":
            old = torch.full((rows,), -12.5)
            linear_cispo_loss(hidden, weight, tokens, old, torch.ones(rows), workspace=workspace).loss.backward()
        else:
            linear_logprobs(hidden.detach(), weight, tokens, workspace=workspace)

    used = transient_bytes(step)
    assert used <= workspace + 4 * rows * size + 2 * hidden.nbytes
    if schedule == "one-pass":
        assert hidden.grad.isfinite().all()
        assert hidden.grad.abs().amax(1).min() > 0
