"""AsyncGRPOTrainer of TRL, three steps with fastpg's head and with TRL's own.

A queue of rollouts takes the place of a vLLM server, and attention to packed rows in PyTorch that of FlashAttention 3.
"""

import queue
import types

import datasets
import numpy as np
import pytest
import torch

pytest.importorskip("trl.experimental.async_grpo", reason="needs the extra [trl]")

import trl.trainer.utils as trl_utils
from tiny_trl import VOCAB, make_tokenizer, tiny_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from fastpg.integrations.trl import use_fastpg

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

STEPS = 3
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}


class Rollouts:
    """In the place of AsyncRolloutWorker: two completions to each of eight prompts, of which they share the tokens."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        generator = torch.Generator().manual_seed(1)
        for group in range(8):
            prompt = torch.randint(2, VOCAB, (3,), generator=generator).tolist()
            for n, advantage in enumerate((1.0, -0.5)):
                completion = torch.randint(2, VOCAB, (3 + n,), generator=generator).tolist()
                old = (-4 + torch.rand(len(completion), generator=generator)).tolist()
                sample = RolloutSample(
                    prompt=[], completion=[], input_ids=np.array(prompt + completion), advantage=advantage, model_version=0,
                    completion_mask=np.array([0] * 3 + [1] * len(completion)), old_log_probs=np.array([0.0] * 3 + old),
                    group_id=group, metrics={"reward": float(n)},
                )  # fmt: skip
                self.rollout_buffer.put(sample)

    def start(self): ...

    def stop(self): ...

    def update_model_version(self, model_version): ...

    def check_health(self, stale_after_s):
        raise AssertionError("the trainer asks for more rollouts than there are")


class NoServer:
    """In the place of WeightTransferClient."""

    def init_weight_transfer(self): ...

    def pause(self): ...

    def resume(self): ...

    def destroy(self): ...

    def send_weights(self, iterator):
        assert len(list(iterator)) > 0


def attention(query, key, value, ends_q, ends_k, longest_q, longest_k, *, softmax_scale, causal, window_size):
    """flash_attn_varlen_func: the queries of each segment stand at the end of its keys. (tokens, heads, H) each."""
    assert causal
    assert window_size == (-1, -1)
    share, out = query.shape[1] // key.shape[1], []
    for i in range(len(ends_q) - 1):
        q, keys = query[ends_q[i] : ends_q[i + 1]], slice(ends_k[i], ends_k[i + 1])
        k, v = (x[keys].repeat_interleave(share, 1).transpose(0, 1) for x in (key, value))
        seen = torch.ones(len(q), k.shape[1], dtype=torch.bool).tril(k.shape[1] - len(q))
        given = {"attn_mask": seen, "scale": softmax_scale}
        out.append(torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, **given).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_flash_attn", lambda: types.SimpleNamespace(flash_attn_varlen_func=attention))
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)  # which asks for a GPU's name

    def make(experts=False, **settings):
        model = tiny_model(Qwen3MoeForCausalLM, Qwen3MoeConfig, **EXPERTS) if experts else tiny_model()
        model.save_pretrained(tmp_path / "model")
        options = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
            "disable_tqdm": True, "max_steps": STEPS, "per_device_train_batch_size": 4, "token_budget": 0, "optim": "sgd",
            "learning_rate": 0.05,
        }  # fmt: skip
        return AsyncGRPOTrainer(
            model=str(tmp_path / "model"), args=AsyncGRPOConfig(**{**options, **settings}), processing_class=make_tokenizer(),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w3"] * 4}), rollout_worker=Rollouts(),
            weight_transfer=NoServer(),
        )  # fmt: skip

    return make


def run(trainer):
    """(what was logged at each step, the parameters at the end)"""
    trainer.train()
    clocks = ("perf/", "runtime", "per_second", "time")
    logs = [{k: v for k, v in entry.items() if not any(c in k for c in clocks)} for entry in trainer.state.log_history]
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "epsilon_high": 0.3}, {"token_budget": 20}, {"experts": True, "router_aux_loss_coef": 0.1}],
    ids=str,
)
def test_async_grpo_is_trls(make, calls, monkeypatch, settings):
    theirs = run(make(**settings))
    assert not calls
    trainer = make(**settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    attention = trainer.model.config._attn_implementation
    assert use_fastpg(trainer, backend="torch").models == [trainer.model]
    assert trainer.model.config._attn_implementation == attention == packing.TREE_ATTENTION
    monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    ours = run(trainer)
    assert len(ours[0]) == len(theirs[0]) == STEPS + 1
    for our_log, their_log in zip(ours[0], theirs[0], strict=True):
        assert our_log == pytest.approx(their_log, abs=1e-5, rel=1e-5, nan_ok=True)
    assert {"loss", "ratio", "entropy", "batch/packing_ratio"} <= ours[0][0].keys()
    assert ("aux_loss" in ours[0][0]) == ("experts" in settings)
    assert ours[0][0]["batch/packing_ratio"] > 1  # tokens that completions share are computed once
    for name, parameter in ours[1].items():
        assert torch.allclose(parameter, theirs[1][name], rtol=1e-5, atol=1e-5), name
    assert max(float((p - before[name]).abs().max()) for name, p in ours[1].items()) > 1e-3
    assert len(calls) == STEPS + 1  # and the check against the model's own logits
