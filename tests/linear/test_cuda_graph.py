"""A step in a CUDA graph, which `docs/pages/guides.md` shows. Needs a GPU."""

import pytest
import torch

from fastpg import CISPO, PPOClip, kept, linear_logprobs, linear_policy_loss, policy_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")

N, H, V = 300, 64, 1000


def batch():
    """tokens, old log-probabilities, advantages, mask."""
    given = torch.randint(0, V, (N,)), -4 - torch.rand(N) * 6, torch.randn(N), torch.rand(N) < 0.8
    return [x.cuda() for x in given]


def one_pass(hidden, weight, tokens, old, advantages, mask):
    return linear_policy_loss(hidden, weight, tokens, old, advantages, objective=CISPO(), mask=mask, entropy=True, check=False)


def two_passes(hidden, weight, tokens, old, advantages, mask):
    logprobs = linear_logprobs(hidden, weight, tokens, mask=mask, check=False).logprobs
    return policy_loss(logprobs, old, advantages, objective=PPOClip(), mask=mask, check=False)


@pytest.mark.parametrize("function", [one_pass, two_passes])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_step_has_the_bits_of_the_eager_call(function, dtype):
    hidden = torch.randn(N, H, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(V, H, device="cuda").mul_(0.2).to(dtype).requires_grad_()
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    static = batch()

    def step():
        hidden.grad.zero_()
        weight.grad.zero_()
        out = function(hidden, weight, *static)
        out.loss.backward()
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for place, values in zip(static, batch(), strict=True):
            place.copy_(values)
        graph.replay()
        found = captured.loss.clone(), captured.logprobs.clone(), hidden.grad.clone(), weight.grad.clone()
        metrics = captured.metrics.to_dict()
        eager = step()
        for got, want in zip(found, (eager.loss, eager.logprobs, hidden.grad, weight.grad), strict=True):
            assert torch.equal(got, want)
        assert metrics == eager.metrics.to_dict()


def test_kept_rows_in_a_graph():
    hidden, weight = torch.randn(N, H, device="cuda"), torch.randn(V, H, device="cuda")
    tokens, old, advantages, mask = batch()
    rows = kept(mask, advantages)

    def step():
        return linear_policy_loss(hidden, weight, tokens, old, advantages, objective=CISPO(), mask=rows, check=False)

    want = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    assert torch.equal(out.loss, want.loss)
    torch.testing.assert_close(out.logprobs, want.logprobs, rtol=0, atol=0, equal_nan=True)
