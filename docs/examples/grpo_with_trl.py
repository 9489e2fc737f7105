"""TRL's GRPOTrainer with fastpg's head: `use_fastpg(trainer)` is the one line. The reward counts the word w1. It prints what
the trainer has logged. Seconds on a CPU.

    python docs/examples/grpo_with_trl.py
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from fastpg.integrations.trl import use_fastpg

words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(40))]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
)
torch.manual_seed(0)
model = Qwen3ForCausalLM(
    Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
    )
)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=lambda completions, **kwargs: [float(text.count("w1")) for text in completions],
    args=GRPOConfig(
        output_dir="trl-out",
        loss_type="cispo",
        epsilon_high=5.0,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        bf16=False,
    ),
    train_dataset=Dataset.from_dict({"prompt": ["w3 w4", "w5 w6", "w7 w8", "w9 w2"]}),
    processing_class=tokenizer,
)
use_fastpg(trainer)
trainer.train()

logged = trainer.state.log_history[-1]
print({name: round(logged[name], 4) for name in ("train_loss", "reward", "entropy", "cispo_clip_ratio")})
