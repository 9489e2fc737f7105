"""Supervised fine-tuning with the Trainer of transformers: `patch(model)` is the one line, and no logits are built. It prints
the loss of each step, the perplexity of the answers, and what the model then generates. Seconds on a CPU.

    python docs/examples/patch_trainer.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from fastpg.integrations.transformers import patch

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
model = LlamaForCausalLM(config)  # or AutoModelForCausalLM.from_pretrained(...)
handle = patch(model)  # was: apply_liger_kernel_to_llama(model=model)

prompt = 3  # its labels are -100: the loss is over the answer alone
examples = [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids in torch.randint(0, 60, (64, 12)).tolist()]
arguments = TrainingArguments(output_dir="out", max_steps=5, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True)


def perplexity(found):  # predictions are the log-probabilities of the labels, (B, T)
    kept = found.label_ids[:, 1:] != -100
    return {"perplexity": float(torch.tensor(-found.predictions[:, 1:][kept]).mean().exp())}


trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples[:8], compute_metrics=perplexity)
trainer.train()
trainer.evaluate()

answer = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, pad_token_id=0)
handle.undo()  # the model's own forward again

print("loss of each step:", [round(row["loss"], 3) for row in trainer.state.log_history if "loss" in row])
print("perplexity:", round(trainer.state.log_history[-1]["eval_perplexity"], 2), "generated:", answer[0, 3:].tolist())
