"""Ranks with tokens of their own: global_count, DDP, FSDP2 and HSDP, and a tensor-parallel model, against one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import results_of, run_jobs, run_on_ranks
from torch import nn

from fastpg import LMHead, linear_cispo_loss, linear_logprobs, masked_mean
from fastpg.distributed import global_count

pytestmark = pytest.mark.xdist_group("data-parallel ranks")  # its ranks are started once, not in every process

VOCAB, SIZE, STEPS = 51, 32, 3  # a vocabulary that no number of ranks here divides
RANKS = {"two": 2, "four": 4}
IMPORTED_BY_FUNCTIONS = ("transformers.models.llama.modeling_llama",)


class Batch:
    """Sequences of unequal numbers of counted tokens; the last half of them, or all, can be left without any."""

    def __init__(self, without: str = "") -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, VOCAB, (8, 10), generator=generator)
        self.old = -4 + torch.randn(8, 9, generator=generator)
        self.advantages = torch.randn(8, 9, generator=generator)
        self.mask = torch.arange(9) < torch.tensor([9, 8, 9, 7, 1, 0, 5, 2])[:, None]
        self.mask[{"": 8, "half": 4, "all": 0}[without] :] = False

    def of_rank(self, rank: int, ranks: int) -> Batch:
        mine = copy.copy(self)
        share = 8 // ranks
        for name in ("ids", "old", "advantages", "mask"):
            setattr(mine, name, getattr(self, name)[rank * share : (rank + 1) * share])
        return mine


class Model(nn.Module):
    """Hidden states of a sequence, and an lm_head that only its weight is used of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.body = nn.Embedding(VOCAB, SIZE), nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh())
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(ids))


class WithLoss(nn.Module):
    """DDP wants the whole step in a forward."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, denominator: torch.Tensor, one_pass: bool) -> torch.Tensor:
        return loss_of(self.model(batch.ids), LMHead(self.model.lm_head.weight), batch, denominator, one_pass)


def loss_of(
    hidden: torch.Tensor, head: LMHead, batch: Batch, denominator: torch.Tensor | float, one_pass: bool = True
) -> torch.Tensor:
    """Of hidden states (B, T, H) and the tokens after them; mean over tokens."""
    hidden, tokens = hidden[:, :-1], batch.ids[:, 1:]
    if one_pass:
        arguments = hidden, head, tokens, batch.old, batch.advantages
        return linear_cispo_loss(*arguments, mask=batch.mask, denominator=denominator).loss
    logprobs, entropies = linear_logprobs(hidden, head, tokens, mask=batch.mask, entropy=True)
    return -masked_mean(batch.advantages * logprobs + 0.1 * entropies, batch.mask, denominator)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=SIZE, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(
    model: nn.Module, hidden_of: Callable, head_of: Callable, batch: Batch, denominator: torch.Tensor, one_pass: bool
) -> dict:
    """Three steps: the losses, and the weights of the lm_head and of the embedding after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, foreach=False)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(hidden_of(batch.ids), head_of(), batch, denominator, one_pass)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model.embedding
    weights = [model.lm_head.weight.detach(), embedding.weight.detach()]
    return {"losses": torch.stack(losses), "weights": [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]}


def in_one_process(make: Callable, one_pass: bool) -> dict:
    model, batch = make(), Batch()
    body = model.model if hasattr(model, "model") else model
    return train(model, lambda ids: states(body(ids)), lambda: LMHead(model.lm_head.weight), batch, batch.mask.sum(), one_pass)


def states(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def share_of_the_count(batch: Batch) -> torch.Tensor:
    return global_count(batch.mask).clamp(min=1) / dist.get_world_size()


# Jobs, by number of ranks: what one set of processes does.


def counts(rank: int, ranks: int) -> list:
    half = dist.new_group([0, 1])
    masks = [torch.ones(3, 2 + rank, dtype=torch.bool), torch.zeros(4, dtype=torch.bool), torch.ones(rank, dtype=torch.bool)]
    results = [global_count(mask) for mask in masks] + [global_count(masks[0], half)]
    for wrong in (torch.ones(3), None):
        try:
            global_count(wrong)
        except TypeError as error:
            results.append(str(error))
    return results


def ddp(rank: int, ranks: int, without: str, one_pass: bool) -> dict:
    batch = Batch(without).of_rank(rank, ranks)
    module = nn.parallel.DistributedDataParallel(WithLoss(Model()))
    loss = module(batch, share_of_the_count(batch), one_pass)
    loss.backward()
    gradients = {name.removeprefix("module.model."): p.grad for name, p in module.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients}


def fsdp(rank: int, ranks: int, make: Callable, mesh_shape: tuple[int, ...], one_pass: bool) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, batch = make(), Batch().of_rank(rank, ranks)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    body = model.model if hasattr(model, "model") else model.body
    for part in (*getattr(body, "layers", ()), body, model.lm_head):
        fully_shard(part, mesh=mesh)
    if body is not getattr(model, "model", None):
        fully_shard(model.embedding, mesh=mesh)
    hidden_of = model if hasattr(model, "body") else body
    denominator = share_of_the_count(batch)
    return train(model, lambda ids: states(hidden_of(ids)), lambda: LMHead(model.lm_head.weight), batch, denominator, one_pass)


def fsdp_of_the_whole(rank: int, ranks: int, one_pass: bool) -> dict:
    """The lm_head belongs to the root, whose weights FSDP leaves gathered, as plain tensors, between forward and backward."""
    from torch.distributed.fsdp import fully_shard

    model, batch = Model(), Batch().of_rank(rank, ranks)
    fully_shard(model.body)
    fully_shard(model)
    return train(model, model, lambda: LMHead(model.lm_head.weight), batch, share_of_the_count(batch), one_pass)


def tensor_parallel(rank: int, ranks: int, one_pass: bool) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, batch, mesh = llama(), Batch(), init_device_mesh("cpu", (ranks,))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    for layer in model.model.layers:
        plan = {name: ColwiseParallel() for name in columns}
        parallelize_module(layer, mesh, plan | {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")})
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    return train(
        model, lambda ids: states(model.model(ids)), lambda: LMHead(model.lm_head.weight, group=mesh.get_group()), batch,
        batch.mask.sum(), one_pass,
    )  # fmt: skip


def sharded_twice(rank: int, ranks: int, one_pass: bool) -> dict:
    """Rows on the tensor-parallel ranks, and each rank's on the data-parallel ones: placements (_StridedShard(0), Shard(0))."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, batch = Model(), Batch().of_rank(rank // 2, 2)
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh["tp"], [Shard(0)]))
    for part in (model.embedding, model.body, model.lm_head):
        fully_shard(part, mesh=mesh["dp"])
    group = mesh["tp"].get_group()
    count = global_count(batch.mask, mesh["dp"].get_group()).clamp(min=1) / 2
    return train(model, model, lambda: LMHead(model.lm_head.weight, group=group), batch, count, one_pass)


def dtensors_beside_the_weight(rank: int, ranks: int, group_of: str, one_pass: bool) -> dict:
    """Gradients of weight, bias and LoRA's factors that are DTensors, and with "mesh" of hidden too.

    group_of: "mesh"; "equal mesh", another object of the same ranks; or "none": then the tokens are the rank's own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, batch, with_group = init_device_mesh("cpu", (ranks,)), Batch(), group_of != "none"
    group = {"mesh": mesh.get_group(), "equal mesh": dist.new_group(list(range(ranks))), "none": None}[group_of]
    hidden, *parts = head_parts()
    placements = Shard(0), Shard(0), Replicate() if with_group else Shard(0), Shard(0)
    weight, bias, a, b = (distribute_tensor(x, mesh, [p]).requires_grad_() for x, p in zip(parts, placements, strict=True))
    head = LMHead(weight, bias, lora=(a, b, 0.5), group=group)
    denominator = batch.mask.sum()
    if not with_group:
        share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        batch, hidden = batch.of_rank(rank, ranks), hidden[share]
        denominator = share_of_the_count(batch)
    leaves = [weight, bias, a, b]
    if group_of == "mesh":
        hidden = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
        leaves.append(hidden)
    loss = loss_of(hidden, head, batch, denominator, one_pass)
    loss.backward()
    assert all(x.grad.placements == x.placements for x in leaves)
    return {"loss": loss.detach(), "gradients": [x.grad.full_tensor() for x in leaves]}


def head_parts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(*s, generator=generator) for s in ((8, 10, SIZE), (VOCAB, SIZE), (VOCAB,), (3, SIZE), (VOCAB, 3))]


def wrong_dtensors(rank: int, ranks: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, batch = init_device_mesh("cpu", (ranks,)), Batch()
    hidden, weight, bias, _, _ = head_parts()
    group, rows = mesh.get_group(), distribute_tensor(weight, mesh, [Shard(0)])
    alone = [dist.new_group([r]) for r in range(ranks)][rank]
    heads = [
        lambda: LMHead(distribute_tensor(weight, mesh, [Shard(1)]), group=group),
        lambda: LMHead(distribute_tensor(weight, mesh, [Replicate()]), group=group),
        lambda: LMHead(rows, distribute_tensor(bias, mesh, [Replicate()]), group=group),
        lambda: LMHead(rows, group=group, vocab_start=0),
        lambda: LMHead(rows, group=alone),
        lambda: LMHead(distribute_tensor(weight[:1], mesh, [Shard(0)]), group=group),
        lambda: LMHead(rows.requires_grad_(), weight_grad=torch.zeros(VOCAB, SIZE)),
    ]
    messages = []
    for head in heads:
        try:
            loss_of(hidden, head(), batch, 1.0)
            messages.append("no error")
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return messages


TRAINED = {  # by name: ranks, job, its arguments, and the model that one process trains
    "FSDP2": (2, fsdp, (llama, (2,)), llama),
    "FSDP2 of the whole": (2, fsdp_of_the_whole, (), Model),
    "tensor-parallel": (2, tensor_parallel, (), llama),
    "HSDP": (4, fsdp, (Model, (2, 2)), Model),
    "FSDP2 of tensor-parallel": (4, sharded_twice, (), Model),
}
ONE_CALL = {
    "DDP": (2, ddp, ("",)),
    "DDP, half without tokens": (2, ddp, ("half",)),
    "DDP, all without tokens": (2, ddp, ("all",)),
    "DTensors sharded on the group": (2, dtensors_beside_the_weight, ("mesh",)),
    "DTensors sharded on an equal group": (2, dtensors_beside_the_weight, ("equal mesh",)),
    "DTensors gathered": (2, dtensors_beside_the_weight, ("none",)),
}
ONCE = {"counts": (2, counts, ()), "wrong DTensors": (2, wrong_dtensors, ())}


def every_job(rank: int, ranks: int) -> dict:
    jobs = {
        (n, one): (r, job, (*given, one)) for n, (r, job, given, *_) in (TRAINED | ONE_CALL).items() for one in (True, False)
    }
    mine = {name: (job, *arguments) for name, (on, job, arguments) in (jobs | ONCE).items() if on == ranks}
    return run_jobs(mine, rank, ranks)


@pytest.fixture(scope="module")
def done() -> dict:
    return {}


def of_each_rank(done: dict, ranks: int, name: object) -> list:
    """By rank, of one job; the first one asked for runs all of that number of ranks."""
    if ranks not in done:
        done[ranks] = None
        done[ranks] = run_on_ranks(every_job, ranks, ranks, timeout=150)
    if done[ranks] is None:
        pytest.fail(f"the processes of the {ranks} ranks failed, as another test shows")
    return results_of(done[ranks], name)


ONE_PASS = pytest.mark.parametrize("one_pass", [True, False], ids=["one-pass", "two-pass"])


@ONE_PASS
@pytest.mark.parametrize("name", TRAINED)
def test_trains_like_one_process(done, name, one_pass):
    """Three steps have the losses of one process on the whole batch, and end at its weights."""
    ranks, _, _, make = TRAINED[name]
    results, want = of_each_rank(done, ranks, (name, one_pass)), in_one_process(make, one_pass)
    losses = torch.stack([r["losses"] for r in results])
    if name == "tensor-parallel":
        assert all(torch.equal(losses[0], other) for other in losses)
    assert (losses.mean(0) - want["losses"]).abs().max() < 1e-5
    assert want["losses"].std() > 1e-2  # it trains
    for result in results:
        for mine, other in zip(result["weights"], want["weights"], strict=True):
            assert (mine - other).norm() / other.norm() < 1e-5


@ONE_PASS
@pytest.mark.parametrize("without", ["", "half", "all"])
def test_ddp(done, without, one_pass):
    """Averaged gradients and losses are those of one process, though ranks have unequal numbers of tokens, or none."""
    name = f"DDP, {without} without tokens" if without else "DDP"
    results, model, batch = of_each_rank(done, 2, (name, one_pass)), Model(), Batch(without)
    loss = WithLoss(model)(batch, batch.mask.sum().clamp(min=1), one_pass)
    loss.backward()
    assert torch.isclose(torch.stack([r["loss"] for r in results]).mean(), loss.detach(), rtol=1e-5)
    assert (results[1]["loss"] == 0) == (without != "")
    assert (results[0]["loss"] == 0) == (without == "all")
    for result in results:
        assert result["gradients"].keys() == dict(model.named_parameters()).keys()
        for parameter, gradient in result["gradients"].items():
            want = model.get_parameter(parameter).grad
            assert (gradient - want).norm() <= 1e-5 * want.norm(), parameter


@ONE_PASS
@pytest.mark.parametrize("name", [n for n in ONE_CALL if n.startswith("DTensors")])
def test_bias_lora_and_hidden_that_are_dtensors(done, name, one_pass):
    hidden, weight, bias, a, b = (x.requires_grad_() for x in head_parts())
    loss = loss_of(hidden, LMHead(weight, bias, lora=(a, b, 0.5)), Batch(), Batch().mask.sum(), one_pass)
    loss.backward()
    results = of_each_rank(done, 2, (name, one_pass))
    assert torch.isclose(torch.stack([r["loss"] for r in results]).mean(), loss.detach(), rtol=1e-5)
    for result in results:
        leaves = (weight, bias, a, b, hidden) if name == "DTensors sharded on the group" else (weight, bias, a, b)
        for gradient, x in zip(result["gradients"], leaves, strict=True):
            assert (gradient - x.grad).norm() / x.grad.norm() < 1e-5


def test_what_does_not_fit_of_dtensors(done):
    said = (
        "head.weight must be sharded along its rows, Shard(0), on head.group; got S(1)",
        "head.weight must be sharded along its rows, Shard(0), on head.group; got R",
        "head.bias must be sharded along its rows",
        "head.vocab_start is known from a weight that is a DTensor",
        "no dimension of which is head.group",
        "has 1 rows on 2 ranks of which the last has none",
        "head.weight_grad needs a weight that is a plain tensor",
    )
    for messages in of_each_rank(done, 2, "wrong DTensors"):
        for message, expected in zip(messages, said, strict=True):
            assert expected in message


def test_global_count(done):
    """Masks of unequal shapes; none has a token; one rank's mask is empty; a group of some ranks; no masks."""
    for values in of_each_rank(done, 2, "counts"):
        *found, not_bool, no_tensor = values
        assert all(x.shape == () and x.dtype == torch.float32 for x in found)
        assert [x.item() for x in found] == [15, 0, 1, 15]
        assert not_bool == "mask must be a bool tensor; got torch.float32"
        assert no_tensor == "mask must be a bool tensor; got NoneType"


def test_global_count_without_torch_distributed():
    with pytest.raises(RuntimeError, match=r"init_process_group; on one process use mask\.sum"):
        global_count(torch.ones(2, dtype=torch.bool))
