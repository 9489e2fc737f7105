"""LoRA on a frozen lm_head: A and B learn, and nothing of the weight's size is allocated. Over a few steps on
one batch it prints how far the log-probabilities have moved, of tokens with A > 0 and of the others. A second on a CPU.

    python docs/examples/lora_on_the_lm_head.py
"""

import torch
import fastpg

torch.manual_seed(0)
weight = torch.randn(1000, 64)  # frozen
a = torch.nn.Parameter(torch.randn(8, 64) / 8)
b = torch.nn.Parameter(torch.zeros(1000, 8))
head = fastpg.LMHead(weight, lora=(a, b, 2.0))  # logits = hidden @ weight.T + 2.0 * (hidden @ a.T) @ b.T

hidden, tokens = torch.randn(20, 64), torch.randint(0, 1000, (20,))
old_logprobs = fastpg.linear_logprobs(hidden, head, tokens).logprobs
out = fastpg.linear_cispo_loss(hidden, head, tokens, old_logprobs, torch.randn(20))
out.loss.backward()
assert weight.grad is None and b.grad is not None

optimizer = torch.optim.AdamW([a, b], lr=3e-3)
advantages = torch.randn(20)
for step in range(4):
    optimizer.zero_grad()
    out = fastpg.linear_cispo_loss(hidden, head, tokens, old_logprobs, advantages)
    out.loss.backward()
    optimizer.step()
    change, better = out.logprobs - old_logprobs.detach(), advantages > 0
    print(f"step {step}: log-probabilities {change[better].mean():+.3f} and {change[~better].mean():+.3f}")
