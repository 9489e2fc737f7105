"""A step that waits for nothing is captured in a CUDA graph and replayed: all its launches are one. It prints the loss and the
effective sample size of each replay. Without a GPU it says so, and runs the same step without a graph.

    python docs/examples/cuda_graph.py
"""

import torch
import fastpg

device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the step below runs as it is
torch.manual_seed(0)
tokens, size, vocab = 64, 32, 100
hidden = torch.randn(tokens, size, device=device, requires_grad=True)
weight = torch.randn(vocab, size, device=device, requires_grad=True)
batch = {
    "tokens": torch.randint(0, vocab, (tokens,), device=device),
    "old_logprobs": torch.full((tokens,), -4.6, device=device),
    "advantages": torch.randn(tokens, device=device),
}
hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)


def step():
    hidden.grad.zero_()
    weight.grad.zero_()
    out = fastpg.linear_cispo_loss(hidden, weight, **batch, check=False)
    out.loss.backward()
    return out


out = step()  # what is compiled, is compiled now
replay = step
if device == "cuda":
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once more beside the default stream, as capturing asks for
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    replay = graph.replay

for _ in range(3):
    batch["advantages"].copy_(torch.randn(tokens))  # the next batch, in its place
    replay()
    print(out.loss.item(), out.metrics["ess"].item())

print("each step was a replay of a CUDA graph" if device == "cuda" else "no GPU is here: the steps ran without a graph")
