"""Two processes share the rows of an lm_head, and compute the loss and the gradients of the whole one. Each prints the two
losses. Seconds on a CPU.

    torchrun --nproc-per-node 2 docs/examples/vocab_parallel.py
"""

# vocab_parallel.py
import torch
import torch.distributed as dist
import fastpg

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same on every rank
weight, hidden = torch.randn(101, 16), torch.randn(30, 16, requires_grad=True)
tokens, advantages = torch.randint(0, 101, (30,)), torch.randn(30)

share = -(-101 // ranks)  # 51 rows and 50
start = rank * share
shard = weight[start : start + share].clone().requires_grad_()
head = fastpg.LMHead(shard, group=dist.group.WORLD, vocab_start=start)
old_logprobs = fastpg.linear_logprobs(hidden, head, tokens).logprobs.detach()
out = fastpg.linear_cispo_loss(hidden, head, tokens, old_logprobs, advantages)
out.loss.backward()  # hidden.grad is complete on every rank, shard.grad is that of its rows

whole = fastpg.linear_cispo_loss(hidden, weight, tokens, old_logprobs, advantages)
torch.testing.assert_close(out.loss, whole.loss)
dist.destroy_process_group()

losses = f"loss {out.loss.item():.4f}, of the whole head {whole.loss.item():.4f}"
print(f"rank {rank}, rows {start} to {start + len(shard) - 1}: {losses}")
