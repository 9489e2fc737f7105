"""Run on two processes with torchrun's variables: two steps of a tiny Llama under DeepSpeed's ZeRO, and of a copy without.

At stage 3 the lm_head is partitioned: its weight is whole in its own forward alone. There adapters are trained too, of the
lm_head among others. The rows are scored without gradients first, as a policy is before it is trained. Writes a line of JSON:
for each case the losses of each step, with those of the copy, and the largest difference of parameters at the end.
"""

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastpg import CISPO
from fastpg.integrations.transformers import causal_lm_policy_loss, token_logprobs

# gloo serves here: this operation would be compiled in every fresh environment, for half a minute, and for this CPU alone
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# every engine imports deepspeed's Muon, where there is one, and its decorators would import torch's compiler
with (
    contextlib.suppress(ImportError),
    mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda function: function)),
):
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")

RANK, RANKS, VOCAB = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 61
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000,
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip
# name -> stage, whether adapters are trained
CASES = {"stage 1": (1, False), "stage 2": (2, False), "stage 3": (3, False), "stage 3, LoRA on the lm_head": (3, True)}


def meet() -> None:
    """At a file: the port that was free may be another program's by the time deepspeed is imported."""
    deepspeed.init_distributed("gloo", init_method=f"file://{Path('meeting').absolute()}", rank=RANK, world_size=RANKS)


def build(adapters: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes))
    if not adapters:
        return model
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))


def losses(model: torch.nn.Module, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By one pass and by two, of the rank's rows."""
    generator = torch.Generator().manual_seed(rank)
    ids, old = torch.randint(0, VOCAB, (2, 8), generator=generator), -3 * torch.rand(2, 8, generator=generator)
    advantages = torch.randn(2, generator=generator)
    one_pass = causal_lm_policy_loss(model, ids, None, old, advantages, objective=CISPO()).loss
    return one_pass, -token_logprobs(model, ids).logprobs.mean()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def run(stage: int, adapters: bool) -> dict:
    model, alone = build(adapters), build(adapters)
    config = CONFIG | {"zero_optimization": CONFIG["zero_optimization"] | {"stage": stage}}
    engine = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)[0]
    optimizer, steps = optimizer_of(alone), []
    with torch.no_grad():
        losses(engine, RANK)
    for _ in range(2):
        one_pass, two_passes = losses(engine, RANK)
        engine.backward(one_pass + 0.3 * two_passes)
        engine.step()
        optimizer.zero_grad()
        expected = [losses(alone, rank) for rank in range(RANKS)]
        sum((a + 0.3 * b) / RANKS for a, b in expected).backward()
        optimizer.step()
        steps.append([[float(a), float(b)] for a, b in zip((one_pass, two_passes), expected[RANK], strict=True)])
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        differences = [(p - q).abs().max().item() for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
    return {"steps": steps, "difference": max(differences)}


def main() -> None:
    meet()
    sys.stdout.write(json.dumps({name: run(*case) for name, case in CASES.items()}) + "\n")


if __name__ == "__main__":
    main()
