"""A policy learns to write even tokens, in plain PyTorch: it samples, a reward and its group give the advantages, and one CISPO
step follows, whose loss never builds the logits. It prints the share of even tokens at each step. A second on a CPU.

    python docs/examples/plain_loop.py
"""

import torch
import fastpg
from fastpg.advantages import grpo

torch.manual_seed(0)
vocab, size = 50, 32


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, size)
        self.body = torch.nn.GRU(size, size, batch_first=True)
        self.lm_head = torch.nn.Linear(size, vocab, bias=False)

    def forward(self, ids):  # hidden states: no logits
        return self.body(self.embedding(ids))[0]


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
head = fastpg.LMHead(model.lm_head.weight)  # the Parameter itself

prompts = torch.randint(0, vocab, (16, 1))
groups = torch.arange(16) // 4  # four answers to each of four prompts
for step in range(3):
    with torch.no_grad():  # sample six tokens of each answer, and reward even ones
        tokens = prompts
        for _ in range(6):
            last = model(tokens)[:, -1]
            tokens = torch.cat([tokens, torch.multinomial((last @ head.weight.T).softmax(-1), 1)], 1)
        inputs, tokens = tokens[:, :-1], tokens[:, 1:]
        old_logprobs = fastpg.linear_logprobs(model(inputs), head, tokens).logprobs
        advantages = grpo((tokens % 2 == 0).float().mean(1), groups)

    hidden = model(inputs)
    out = fastpg.linear_cispo_loss(hidden, head, tokens, old_logprobs, advantages)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: {(tokens % 2 == 0).float().mean():.2f} of the tokens are even")

print({name: round(value, 3) for name, value in out.metrics.to_dict().items()})
