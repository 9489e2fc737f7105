"""A tiny model, its tokenizer, and trainers of TRL on it. Import this behind importorskip."""

import contextlib
import types

import datasets
import torch
import trl.trainer.utils as trl_utils
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

VOCAB, STEPS = 61, 4


def tiny_model(model_class=Qwen3ForCausalLM, config_class=Qwen3Config, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "head_dim": 16, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
        "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    model = model_class(config_class(**{**settings, **changes}))
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 3  # completions end at different lengths
    return model


def make_tokenizer():
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def reward(completion_ids, **_):
    return [sum(ids) % 7 / 3 + len(ids) / 5 for ids in completion_ids]


def maker(tokenizer, folder):
    """A function that makes a trainer on `model`; `build` is its class, or what is called in its stead."""

    def make(trainer_class=GRPOTrainer, model=None, build=None, peft_config=None, **settings):
        config = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[trainer_class]
        options = {
            "output_dir": str(folder / "run"), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
            "disable_tqdm": True, "logging_steps": 1, "seed": 3, "max_steps": STEPS, "per_device_train_batch_size": 4,
            "num_generations": 4, "steps_per_generation": 2, "num_iterations": 2, "max_completion_length": 6, "beta": 0.0,
            "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
        }  # fmt: skip
        return (build or trainer_class)(
            model=tiny_model() if model is None else model,
            reward_funcs=reward,
            args=config(**{**options, **settings}),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w3 w4 w5", "w6 w7", "w8", "w9 w10 w11 w12"]}),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def stub(model, ref_model=None, **args):
    """What use_fastpg reads of a trainer."""
    accelerator = types.SimpleNamespace(autocast=contextlib.nullcontext)
    return types.SimpleNamespace(model=model, ref_model=ref_model, args=types.SimpleNamespace(**args), accelerator=accelerator)


def fused(model, **options):
    trl_utils.add_fused_lm_head(model, **options)
    return model
