"""The metrics of a loss in a tracker such as wandb, and in the log of transformers' Trainer. They are computed when they are
looked at, so that steps that log nothing pay nothing. It prints what the two have received. Seconds on a CPU.

    python docs/examples/logging_metrics.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
import fastpg
from fastpg.integrations.transformers import causal_lm_policy_loss
from fastpg.rollout import mismatch_metrics


class Tracker:  # stands for yours: wandb's `log` takes the same arguments
    def __init__(self):
        self.rows = []

    def log(self, numbers, step):
        self.rows.append({"step": step} | numbers)


# a plain loop
torch.manual_seed(0)
tracker = Tracker()
hidden, weight = torch.randn(20, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
tokens, advantages = torch.randint(0, 50, (20,)), torch.randn(20)
old_logprobs = fastpg.linear_logprobs(hidden, weight, tokens).logprobs.detach()
rollout_logprobs = old_logprobs + 0.01 * torch.randn(20)  # of the engine
rows = []
for step in range(4):
    out = fastpg.linear_cispo_loss(hidden, weight, tokens, old_logprobs, advantages, entropy=True)
    out.loss.backward()
    if step % 2 == 0:  # only now is anything computed
        metrics = out.metrics | mismatch_metrics(old_logprobs, rollout_logprobs) | {"loss": out.loss.detach()}
        tracker.log(metrics.to_dict(), step=step)  # or metrics.named("verl").to_dict()
assert tracker.rows[0]["ess"] > 0.99 and tracker.rows[0]["mismatch_abs_max"] < 0.1
assert metrics.named("verl").to_dict()["actor/ppo_kl"] == tracker.rows[1]["kl_k1"]


# transformers' Trainer: the loss leaves its metrics with a callback, which looks at them when the Trainer logs
class LogMetrics(TrainerCallback):
    metrics = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:  # not the summary at the end of training
            numbers = self.metrics.named("trl").to_dict() | self.metrics.to_dict()
            state.log_history[-1].update(numbers)  # and to your tracker


class PolicyTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = inputs["old_logprobs"], inputs["advantages"]
        options = {"objective": fastpg.CISPO(), "completion_mask": inputs["completion_mask"], "entropy": True}
        out = causal_lm_policy_loss(model, inputs["input_ids"], None, *given, **options)
        log_metrics.metrics = out.metrics
        return out.loss


sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
answer = {"old_logprobs": -4 * torch.ones(10), "completion_mask": torch.arange(10) > 4}  # five sampled tokens
samples = [{"input_ids": torch.randint(0, 60, (10,)), "advantages": (-1.0) ** i, **answer} for i in range(8)]
log_metrics = LogMetrics()
options = {"max_steps": 4, "logging_steps": 2, "report_to": [], "use_cpu": True, "remove_unused_columns": False}
trainer = PolicyTrainer(
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes)),
    TrainingArguments("trainer-out", per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True, **options),
    train_dataset=samples,
    callbacks=[log_metrics],
)
trainer.train()
assert all(row["tokens"] == 20 and row["entropy"] > 0 for row in trainer.state.log_history[:2])

print("the tracker, at step 2:", {name: round(value, 4) for name, value in tracker.rows[1].items()})
print("the Trainer's log:", {name: round(value, 4) for name, value in trainer.state.log_history[0].items()})
