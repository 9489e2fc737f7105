"""Run on two processes with torchrun's variables: two steps of TRL's trainers under DeepSpeed's ZeRO-3.

Each trainer runs with TRL's own head and with fastpg's. The models are partitioned when they are loaded, before the trainer has
an engine. The argument is an empty folder. Writes a line of JSON: for each trainer the losses of both runs, the largest
difference of their parameters, how far those have moved, and what was whole while `use_fastpg` ran the model.
"""

import gc
import json
import sys
from pathlib import Path
from unittest import mock

import datasets
import deepspeed
import peft
import torch
import trl.trainer.utils as trl_utils
from tiny_trl import make_tokenizer, reward, tiny_model
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from zero_program import CONFIG, meet

from fastpg.integrations.trl import use_fastpg

FOLDER = Path(sys.argv[1])
AUTO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto"}
OPTIONS = {
    "output_dir": str(FOLDER / "run"), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "seed": 3,
    "disable_tqdm": True, "logging_steps": 1, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "deepspeed": CONFIG | AUTO,
}  # fmt: skip
PROMPTS = ["w3 w4 w5", "w6 w7", "w8", "w9 w10 w11 w12"] * 2
ANSWERS = [f"{prompt} w5 w6 w7" for prompt in PROMPTS]
PREFERENCES = {"prompt": PROMPTS, "chosen": [" w5 w6"] * 8, "rejected": [" w7 w8 w9"] * 8}
LABELLED = {"prompt": PROMPTS, "completion": [" w5 w6", " w7 w8 w9", " w6", " w9 w4"] * 2, "label": [True, False] * 4}
ADAPTER = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
ROLLOUTS = {"num_generations": 4, "max_completion_length": 6, "steps_per_generation": 2, "num_iterations": 2}
CASES = {
    "sft": (SFTTrainer, SFTConfig, {}, {"text": ANSWERS}, {}),
    "sft with lora": (SFTTrainer, SFTConfig, {}, {"text": ANSWERS}, {"peft_config": peft.LoraConfig(**ADAPTER)}),
    "dpo": (DPOTrainer, DPOConfig, {}, PREFERENCES, {}),  # with a reference model, which has an engine from the start
    "kto": (KTOTrainer, KTOConfig, {}, LABELLED, {}),
    "grpo": (GRPOTrainer, GRPOConfig, ROLLOUTS, {"prompt": PROMPTS}, {"reward_funcs": reward}),
    "rloo": (RLOOTrainer, RLOOConfig, ROLLOUTS, {"prompt": PROMPTS}, {"reward_funcs": reward}),  # and a reference model
}


def build(name: str):
    trainer, config, options, data, others = CASES[name]
    torch.manual_seed(0)  # of adapters
    return trainer(
        model=str(FOLDER / "model"),
        args=config(**OPTIONS, **options),
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=make_tokenizer(),
        **others,
    )


def parameters(model) -> list[torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return [p.detach().clone() for p in model.parameters()]


def placed(trainer) -> list[bool]:
    """Calls use_fastpg. Returns, for each decoder layer, whether it was whole while the second one ran."""
    layers, seen = [m for m in trainer.model.modules() if type(m).__name__ == "Qwen3DecoderLayer"], []
    before = [p.shape for p in trainer.model.parameters()]
    look = lambda *_: seen.extend(all(p.numel() for p in layer.parameters()) for layer in layers)  # noqa: E731
    handle = layers[1].register_forward_hook(look)
    use_fastpg(trainer)
    handle.remove()
    assert [p.shape for p in trainer.model.parameters()] == before
    return seen


def run(name: str) -> dict:
    theirs, ours = build(name), build(name)
    before = parameters(ours.model)
    whole, runs = placed(ours), []
    for trainer, head in ((theirs, trl_utils._ChunkedLogProbFunction), (ours, None)):
        torch.manual_seed(0)  # of rollouts
        with mock.patch.object(trl_utils, "_ChunkedLogProbFunction", head):  # None: no call may reach TRL's own head
            trainer.train()
        runs.append(([log["loss"] for log in trainer.state.log_history if "loss" in log], parameters(trainer.model)))
    (their_losses, their_end), (our_losses, our_end) = runs
    difference, moved = (
        max((p - q).abs().max().item() for p, q in zip(our_end, others, strict=True)) for others in (their_end, before)
    )
    return {"theirs": their_losses, "ours": our_losses, "difference": difference, "moved": moved, "whole": whole}


def main() -> None:
    gc.freeze()  # accelerate collects garbage twice a run, and would look at everything that is imported, for a second
    meet()
    if torch.distributed.get_rank() == 0:
        tiny_model().save_pretrained(FOLDER / "model")
    torch.distributed.barrier()
    sys.stdout.write(json.dumps({name: run(name) for name in CASES}) + "\n")


if __name__ == "__main__":
    main()
