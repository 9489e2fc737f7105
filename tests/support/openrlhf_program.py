"""Run on two processes with torchrun's variables: OpenRLHF's Actor with fastpg's forward, and with its own.

OpenRLHF imports flash_attn, which cannot be built without CUDA. Of it the Actor needs functions that move tensors; they are
written out here. Its attention is transformers'. Writes a line of JSON: by case, how far the results of the two are apart.
Arguments: a file with a block of code to run first.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

RANK, RANKS, VOCAB, LENGTH = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 61, 12


class AllGather(torch.autograd.Function):
    """Of the first dimension; its gradient is summed over the ranks, which each take their own."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.length = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.narrow(0, dist.get_rank(ctx.group) * ctx.length, ctx.length), None


def unpad_input(x: torch.Tensor, mask: torch.Tensor) -> tuple:
    indices, lengths = mask.flatten().nonzero()[:, 0], mask.sum(1)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return x.flatten(0, 1)[indices], indices, starts, lengths.max().item(), lengths


def pad_input(x: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    return torch.zeros(batch * length, *x.shape[1:], dtype=x.dtype).index_copy(0, indices, x).view(batch, length, *x.shape[1:])


def stand_ins() -> None:
    from einops import rearrange

    names: dict[str, dict[str, Any]] = {
        "flash_attn": {},
        "flash_attn.bert_padding": {
            "index_first_axis": lambda x, indices: x[indices], "pad_input": pad_input, "unpad_input": unpad_input,
            "rearrange": rearrange,
        },
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": AllGather.apply},
        "ring_flash_attn": {"update_ring_flash_attn_params": lambda *_: None},
    }  # fmt: skip
    for name, functions in names.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        sys.modules[name] = module


def model_of(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes)).to(dtype)


def batch() -> dict[str, torch.Tensor]:
    """Rows with padding on both sides; some of the last 7 tokens are actions, one of which counts half."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (4, LENGTH), generator=generator)
    attention = torch.ones(4, LENGTH, dtype=torch.int64)
    attention[1, :3] = attention[2, 10:] = attention[3, :1] = attention[3, 9:] = 0
    actions = attention[:, -7:] * (torch.rand(4, 7, generator=generator) < 0.8).float()
    actions[0, actions[0].argmax()] = 0.5
    return {"ids": ids * attention, "attention": attention, "actions": actions}


CASES = {
    f"{asked}, temperature {temperature}, {str(dtype)[6:]}, {layout}": (temperature, dtype, layout, asked)
    for layout, temperatures in {"padded": (1.0, 0.7), "packed": (0.7,), "ring attention": (0.7,), "wrapped": (0.7,)}.items()
    for asked in ("actions", "actions and entropy", "all tokens", "all tokens and entropy")
    for temperature in temperatures
    for dtype in (torch.float32, torch.bfloat16)
}


def in_float32(layer: torch.nn.Linear) -> None:
    """Its logits are not rounded to bfloat16; fastpg's are not."""
    layer.forward = lambda x: torch.nn.functional.linear(x.float(), layer.weight.float())


def outcome(temperature: float, dtype: torch.dtype, layout: str, asked: str, use_fastpg: Any) -> dict[str, Any]:
    from openrlhf.models import Actor

    b, group = batch(), dist.group.WORLD if layout == "ring attention" else None
    torch.manual_seed(2)
    factors, actions = torch.randn(2, 4, LENGTH - 1), b["actions"] if asked.startswith("actions") else None
    actor = Actor(model_of(dtype), temperature=temperature)
    actor.packing_samples = layout in ("packed", "ring attention")
    if use_fastpg is None:
        in_float32(actor.model.lm_head)
    else:
        use_fastpg(actor)
    if layout == "wrapped":  # afterwards, as OpenRLHF puts the model into DeepSpeed's engine
        actor.model = torch.nn.parallel.DistributedDataParallel(actor.model)
    options = {"return_logprobs": actions is None, "return_output": True, "return_entropy": "entropy" in asked}
    log_probs, output = actor(b["ids"], actions, b["attention"], ring_attn_group=group, **options)
    real = b["attention"][:, 1:] * b["attention"][:, :-1]
    of_values = real if actions is None else actions
    width = of_values.shape[1]
    loss = (log_probs * of_values * factors[0, :, -width:]).sum()
    if "entropy" in asked:
        loss = loss + (output.entropy[:, -width:] * of_values * factors[1, :, -width:]).sum()
    loss.backward()
    entropy = output.entropy[:, -width:] * of_values if "entropy" in asked else log_probs * 0
    gradients = {name: p.grad for name, p in actor.model.named_parameters()}
    rows = (output.entropy != 0).sum().item() if "entropy" in asked else None
    values = {"log_probs": log_probs.detach(), "entropy": entropy.detach(), "rows": rows}
    return values | {"gradients": gradients, "logits": output.logits, "actions": b["actions"].count_nonzero().item()}


def compare(case: tuple, use_fastpg: Any) -> dict[str, Any]:
    """The largest difference of values, and of the gradients of parameters, relative to their norm."""
    theirs, ours = outcome(*case, None), outcome(*case, use_fastpg)
    found = {"shape": ours["log_probs"].shape == theirs["log_probs"].shape, "built": ours["logits"] is not None}
    found |= {name: ours[name] for name in ("rows", "actions")}
    found["largest"] = theirs["logits"].abs().max().item()
    for name in ("log_probs", "entropy"):
        found[name] = (ours[name] - theirs[name]).abs().max().item()
    found["of values"] = theirs["log_probs"].abs().max().item()
    gradients = [(ours["gradients"][name].double(), want.double()) for name, want in theirs["gradients"].items()]
    found["gradients"] = max(((got - want).norm() / want.norm()).item() for got, want in gradients)
    return found


def said(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(use_fastpg: Any) -> dict[str, str]:
    from openrlhf.models import Actor

    b, model = batch(), model_of(torch.float32)
    actor, images, other = Actor(model), Actor(model), Actor(model_of(torch.float32))
    use_fastpg(actor)
    images.is_vlm, actor.packing_samples = True, False
    other.model.lm_head = torch.nn.Sequential(other.model.lm_head)
    return {
        "no actor": said(lambda: use_fastpg(model)),
        "images": said(lambda: use_fastpg(images)),
        "head": said(lambda: use_fastpg(other)),
        "logits": said(lambda: actor(b["ids"], attention_mask=b["attention"], return_output=True)),
        "entropy": said(lambda: actor(b["ids"], b["actions"], b["attention"], return_entropy=True)),
        "mask": said(lambda: actor(b["ids"], b["actions"])),
        "later option": said(lambda: actor(b["ids"], b["actions"], b["attention"], pixel_values=None)),
    }


def main() -> None:
    stand_ins()
    dist.init_process_group("gloo", init_method=f"file://{Path('meeting').absolute()}", rank=RANK, world_size=RANKS)
    from openrlhf.models import ring_attn_utils

    from fastpg.integrations.openrlhf import use_fastpg

    ring_attn_utils.set_ring_attn_group(dist.group.WORLD)
    exec(Path(sys.argv[1]).read_text(), {})
    found = {"cases": {name: compare(case, use_fastpg) for name, case in CASES.items()}, "refused": refused(use_fastpg)}
    dist.barrier()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
