"""What the integration with TRL refuses, and where TRL's own head stays: nothing is changed before the error."""

# ruff: noqa: E402 (imports behind importorskip)

import re
import types

import pytest
import torch
from torch import nn

pytest.importorskip("trl.trainer.utils", reason="needs the extra [trl]")
peft = pytest.importorskip("peft")

import datasets
import trl
import trl.trainer.utils as trl_utils
from tiny_trl import VOCAB, fused, stub, tiny_model
from transformers import (
    Qwen3ForCausalLM,
)
from trl import GRPOTrainer

from fastpg.integrations import trl as fastpg_trl
from fastpg.integrations.trl import build_trainer, use_fastpg

# Of trl 1.16 under transformers 5.23, and of peft's prompt tuning.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]


def refused(trainer, error, match):
    before = dict(vars(trainer.model))
    with pytest.raises(error, match=match):
        use_fastpg(trainer)
    assert vars(trainer.model) == before


def test_a_trl_without_the_contract(monkeypatch):
    trainer = stub(fused(tiny_model()))
    monkeypatch.setattr(trl, "__version__", "1.7.0")
    monkeypatch.delattr(trl_utils, "FusedCausalLMOutput")
    refused(trainer, ImportError, re.escape("needs trl >= 1.16") + ".*found trl 1.7.0")


def test_another_contract(monkeypatch):
    trainer = stub(fused(tiny_model()))
    monkeypatch.setattr(fastpg_trl._Settings, "_fields", ("temperature", "something_new"))
    refused(trainer, ImportError, "has no 'something_new'")


def test_what_is_no_trainer_of_trls():
    with pytest.raises(TypeError, match="a trainer of TRL's; got Qwen3ForCausalLM"):
        use_fastpg(tiny_model())
    refused(stub(tiny_model()), ValueError, "have no fused lm_head")
    with pytest.raises(TypeError, match="the model itself, loaded before; got str"):
        build_trainer(GRPOTrainer, "Qwen/Qwen3-0.6B")


def test_liger_and_zero3():
    refused(stub(fused(tiny_model()), use_liger_kernel=True), ValueError, "use_liger_kernel=True")
    trainer = stub(fused(tiny_model()))
    trainer.accelerator.state.deepspeed_plugin = types.SimpleNamespace(zero_stage=3)
    refused(trainer, ValueError, "ZeRO-3")


class Cosine(nn.Linear):
    def forward(self, hidden):
        return nn.functional.linear(nn.functional.normalize(hidden, dim=-1), self.weight)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(VOCAB, 32))

    def forward(self, hidden):
        return hidden @ self.weight.T


class Scaled(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.3
        return output


def test_heads_that_are_no_linear_layer():
    for head in (Packed(), Cosine(32, VOCAB, bias=False)):
        model = tiny_model()
        model.lm_head = head
        refused(stub(fused(model)), ValueError, f"{type(head).__name__}, whose forward is not that of torch.nn.Linear")
    refused(stub(fused(tiny_model(Scaled))), ValueError, "own logits are not those of")


@pytest.mark.parametrize(("changes", "match"), [({"use_dora": True}, "DoRA"), ({"lora_dropout": 0.1}, "dropout 0.1")])
def test_adapters_that_would_train_something_else(changes, match):
    model = peft.get_peft_model(fused(tiny_model()), peft.LoraConfig(r=2, target_modules=["lm_head"], **changes)).eval()
    refused(stub(model), ValueError, match)
    assert not model.get_output_embeddings().training


def test_the_reference_is_checked_before_anything_changes():
    reference = fused(tiny_model())
    reference.lm_head = Packed()
    refused(stub(fused(tiny_model()), reference), ValueError, "Packed")


@pytest.mark.parametrize("outputs", [("is_top1",), ("mean_logits", "log_sum_sq_probs")])
def test_trainers_that_read_more_keep_trls_head(calls, outputs):
    trainer = stub(fused(tiny_model(), outputs=("log_probs", "entropy", *outputs)), fused(tiny_model()))
    before = [dict(vars(m)) for m in (trainer.model, trainer.ref_model)]
    with pytest.warns(UserWarning, match=f"{', '.join(sorted(outputs))} of TRL's .*TRL's own head stays"):
        heads = use_fastpg(trainer)
    assert not heads.models
    assert [vars(m) for m in (trainer.model, trainer.ref_model)] == before
    assert not calls


def test_sft_keeps_trls_head(tokenizer, tmp_path):
    rows = datasets.Dataset.from_dict({"prompt": ["w3 w4", "w5"], "completion": [" w6", " w7 w8"]})
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = trl.SFTTrainer(tiny_model(), args, train_dataset=rows, processing_class=tokenizer)
    with pytest.warns(UserWarning, match="SFTTrainer reads is_top1"):
        use_fastpg(trainer)
    options = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": peft.LoraConfig(target_modules=["lm_head"])}
    with pytest.warns(UserWarning, match="is_top1"), pytest.raises(ValueError, match="would not train the adapter"):
        build_trainer(trl.SFTTrainer, tiny_model(), args, **options)
