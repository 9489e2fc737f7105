"""Ranks with some tokens of every sequence, as guides.md describes it, against one process. The model attends across ranks.

Also hidden states that are sharded along the tokens before a vocab-parallel head.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import results_of, run_jobs, run_on_ranks
from torch import nn

from fastpg import CISPO, GSPO, ImportanceWeighted, KLPenalty, LMHead, linear_cispo_loss, linear_logprobs, policy_loss
from fastpg.distributed import global_count

RANKS, VOCAB, SIZE, TOKENS = 2, 37, 12, 24
KL = KLPenalty(0.3, importance_weighted=True)
OF_SEQUENCES = {  # what takes the log-probabilities of all ranks
    "GSPO": {"objective": GSPO(0.05, 0.08), "reduction": "seq-mean-token-mean"},
    "GSPO, KL": {"objective": GSPO(0.05, 0.08), "reduction": "token-mean", "kl": KL},
    "ratio of the sequence": {"objective": ImportanceWeighted("sequence"), "reduction": "token-mean"},
    "ratio of the trajectory": {"objective": ImportanceWeighted("trajectory"), "reduction": "seq-mean-token-sum"},
    "means of sequences, KL": {"objective": CISPO(), "reduction": "seq-mean-token-mean", "kl": KL},
}
OF_TOKENS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")  # CISPO in one pass, by reduction
LAYOUTS = {  # (B, T), packed; and the tokens of each rank
    "rows": (4, [[0, 1, 2], [3, 4, 5]]),
    "rows, zigzag": (4, [[0, 5, 1], [2, 3, 4]]),
    "packed": (1, [[*range(12)], [*range(12, 24)]]),
    "packed, zigzag": (1, [[*range(6), *range(18, 24)], [*range(6, 18)]]),
}


class Batch:
    """Four sequences of unequal numbers of counted tokens: one has none, one has them on one rank alone."""

    def __init__(self, layout: str) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows, self.places = LAYOUTS[layout]
        self.order = [place for places in self.places for place in places]  # of what the ranks gather
        self.ids = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
        self.tokens = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
        self.old, self.ref = (-4 + 0.3 * torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)).unbind()
        self.advantages = torch.tensor([1.0, -0.7, 0.4, -1.2], dtype=torch.float64)
        lengths = [6, 6, 6, 6] if self.rows == 4 else [9, 2, 8, 5]
        self.segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
        self.mask = torch.rand(TOKENS, generator=generator) < 0.8
        self.mask[self.segments == 3] = False
        if self.rows == 1:
            self.mask[9:11] = True

    def of(self, name: str, places: list[int] | None = None) -> torch.Tensor:
        """(B, T) or (N,), of all tokens or those in these places."""
        x = getattr(self, name).view(self.rows, -1)
        x = x if places is None else x[:, places]
        return x if self.rows == 4 else x[0]

    def ids_of_sequences(self, places: list[int] | None = None) -> dict:
        return {} if self.rows == 4 else {"sequence_ids": self.of("segments", places)}

    def sequences(self) -> int:
        return len(self.segments[self.mask].unique())


class _Gather(torch.autograd.Function):
    """Along dimension 1; the gradients of all ranks add up."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(RANKS, 1)[dist.get_rank()]


class Attention(nn.Module):
    """Causal attention within sequences. Keys and values come from all ranks, and so do their gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.qkv = nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, 3 * SIZE)
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)
        self.double()

    def forward(self, batch: Batch, places: list[int] | None = None) -> torch.Tensor:
        """Hidden states of the tokens in these places, (B, T, H) or (N, H)."""
        ids, segments = batch.ids.view(batch.rows, -1), batch.segments.view(batch.rows, -1)
        mine = places or [*range(ids.shape[1])]
        x = self.embedding(ids[:, mine])
        q, k, v = self.qkv(x).chunk(3, -1)
        of_keys = torch.tensor(mine)
        if places is not None:
            of_keys = torch.tensor(batch.order)
            k, v = _Gather.apply(k), _Gather.apply(v)
        sees = (of_keys <= torch.tensor(mine)[:, None]) & (segments[:, mine, None] == segments[:, None, of_keys])
        x = x + torch.where(sees, q @ k.mT, -torch.inf).softmax(-1) @ v
        return x.tanh() if batch.rows == 4 else x.tanh()[0]


def loss_of_tokens(hidden: torch.Tensor, head: LMHead, batch: Batch, reduction: str) -> torch.Tensor:
    """One pass over the rank's tokens, for DDP, which averages."""
    places = batch.places[dist.get_rank()]
    mask, options = batch.of("mask", places), {"reduction": reduction} | batch.ids_of_sequences(places)
    count = global_count(mask) if reduction == "token-mean" else batch.sequences()
    if reduction == "seq-mean-token-mean":
        lengths = torch.bincount(batch.segments[batch.mask], minlength=4).clamp(min=1)[batch.of("segments", places)]
        options |= {"reduction": "sum", "rollout_weights": 1 / lengths.double()}
    return linear_cispo_loss(
        hidden, head, batch.of("tokens", places), batch.of("old", places), batch.advantages, mask=mask,
        denominator=count / RANKS, **options,
    ).loss  # fmt: skip


def loss_of_sequences(hidden: torch.Tensor, head: LMHead, batch: Batch, options: dict, summed: bool = False) -> tuple:
    """Loss and metrics, of the log-probabilities of all ranks. summed: by an all-gather that adds up gradients."""
    places = batch.places[dist.get_rank()]
    logprobs = linear_logprobs(hidden, head, batch.of("tokens", places), mask=batch.of("mask", places)).logprobs
    if summed:
        parts = dist.nn.functional.all_gather(logprobs)
    else:
        parts = [torch.empty_like(logprobs) for _ in range(RANKS)]
        dist.all_gather(parts, logprobs.detach())
        parts[dist.get_rank()] = logprobs
    order = batch.order
    count = batch.of("mask").sum() if options["reduction"] == "token-mean" else batch.sequences()
    reference = {"ref_logprobs": batch.of("ref", order)} if "kl" in options else {}
    out = policy_loss(
        torch.cat(parts, -1), batch.of("old", order), batch.advantages, mask=batch.of("mask", order), denominator=count / RANKS,
        **batch.ids_of_sequences(order), **reference, **options,
    )  # fmt: skip
    return out.loss, out.metrics.to_dict()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()]


def of_rank(rank: int, layout: str, name: str, summed: bool = False) -> dict:
    batch, model = Batch(layout), Attention()
    ddp = nn.parallel.DistributedDataParallel(model)  # its hooks live as long as it does
    hidden = ddp(batch, batch.places[rank])
    head, metrics = LMHead(model.lm_head.weight), {}
    if name in OF_TOKENS:
        loss = loss_of_tokens(hidden, head, batch, name)
    else:
        loss, metrics = loss_of_sequences(hidden, head, batch, OF_SEQUENCES[name], summed)
    loss.backward()
    return {"loss": loss.detach() / RANKS, "gradients": gradients(model), "metrics": metrics}


def in_one_process(layout: str, name: str) -> dict:
    batch, model = Batch(layout), Attention()
    options = OF_SEQUENCES.get(name, {"objective": CISPO(), "reduction": name}) | batch.ids_of_sequences()
    options |= {"ref_logprobs": batch.of("ref")} if "kl" in options else {}
    mask = batch.of("mask")
    logprobs = linear_logprobs(model(batch), model.lm_head.weight, batch.of("tokens"), mask=mask).logprobs
    out = policy_loss(logprobs, batch.of("old"), batch.advantages, mask=mask, **options)
    out.loss.backward()
    return {"loss": out.loss.detach(), "gradients": gradients(model), "metrics": out.metrics.to_dict()}


def sharded_tokens(rank: int) -> list[torch.Tensor]:
    """Megatron's sequence parallelism: hidden states sharded along the tokens, and gathered for a vocab-parallel head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, (hidden, weight, tokens, old, advantages) = init_device_mesh("cpu", (RANKS,)), parts_of_the_head()
    states = distribute_tensor(hidden, mesh, [Shard(0)]).requires_grad_()
    rows = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    head = LMHead(rows, group=mesh.get_group())
    linear_cispo_loss(states.full_tensor(), head, tokens, old, advantages).loss.backward()
    return [states.grad.full_tensor(), rows.grad.full_tensor()]


def parts_of_the_head() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, old, advantages = (torch.randn(*s, generator=generator) for s in ((10, SIZE), (VOCAB, SIZE), (10,), (10,)))
    return [hidden, weight, torch.randint(0, VOCAB, (10,), generator=generator), old - 4, advantages]


CASES = [(layout, name) for layout in LAYOUTS for name in (*OF_TOKENS, *OF_SEQUENCES)]


JOBS = {case: (of_rank, *case) for case in CASES}
JOBS |= {"summed": (of_rank, "rows", "GSPO", True), "sharded tokens": (sharded_tokens,)}


def every_job(rank: int) -> dict:
    return run_jobs(JOBS, rank)


@pytest.fixture(scope="module")
def done() -> list[dict]:
    return run_on_ranks(every_job, RANKS, timeout=120)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_gradients_are_those_of_one_process(done, layout, name):
    """Losses of tokens add up over the ranks; that of sequences is the whole one on each of them, with all metrics."""
    results, want = results_of(done, (layout, name)), in_one_process(layout, name)
    losses = torch.stack([r["loss"] for r in results])
    if name in OF_TOKENS:
        losses = losses.sum(0, keepdim=True)
    torch.testing.assert_close(losses, want["loss"].expand_as(losses), rtol=1e-10, atol=0)
    for result in results:
        for mine, whole in zip(result["gradients"], want["gradients"], strict=True):
            assert whole.any()
            torch.testing.assert_close(mine, whole, rtol=1e-8, atol=1e-12)
        for key, value in result["metrics"].items():
            assert value == pytest.approx(want["metrics"][key], rel=1e-10)


def test_a_gather_that_adds_up_gradients_makes_them_too_large(done):
    """What the guide warns of: every rank has the whole loss."""
    want = in_one_process("rows", "GSPO")
    for result in results_of(done, "summed"):
        for mine, whole in zip(result["gradients"], want["gradients"], strict=True):
            torch.testing.assert_close(mine, RANKS * whole, rtol=1e-8, atol=1e-12)


def test_tokens_are_gathered_before_a_vocab_parallel_head(done):
    """Its gradient of them is complete on every rank, which takes its rows of it."""
    hidden, weight, tokens, old, advantages = parts_of_the_head()
    linear_cispo_loss(hidden.requires_grad_(), weight.requires_grad_(), tokens, old, advantages).loss.backward()
    for result in results_of(done, "sharded tokens"):
        torch.testing.assert_close(result, [hidden.grad, weight.grad], rtol=1e-5, atol=1e-7)
