"""What the integration with TRL refuses, and where TRL's own head stays: nothing is changed before the error."""

# ruff: noqa: E402 (imports behind importorskip)

import dataclasses
import re
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("trl.trainer.utils", reason="needs the extra [trl]")
peft = pytest.importorskip("peft")

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


def test_liger():
    refused(stub(fused(tiny_model()), use_liger_kernel=True), ValueError, "use_liger_kernel=True")


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


def test_a_head_that_is_asked_for_something_unknown(calls):
    trainer = stub(fused(tiny_model(), outputs=("log_probs", "entropy", "variance")), fused(tiny_model()))
    before = [dict(vars(m)) for m in (trainer.model, trainer.ref_model)]
    with pytest.raises(ImportError, match=r"asks its lm_head for variance, which trl 1\.16\.0 did not know"):
        use_fastpg(trainer)
    assert [vars(m) for m in (trainer.model, trainer.ref_model)] == before
    assert not calls


def test_an_output_with_other_fields(monkeypatch):
    fields = dataclasses.fields(trl_utils.FusedCausalLMOutput)
    names = [(field.name, object, None) for field in fields if field.name != "is_top1"] + [("variance", object, None)]
    monkeypatch.setattr(trl_utils, "FusedCausalLMOutput", dataclasses.make_dataclass("FusedCausalLMOutput", names))
    refused(stub(fused(tiny_model())), ImportError, "differs from that of .* in is_top1, variance: use that version")


SAMPLING = {
    "top_p=0.9": {"top_p": 0.9, "top_k": 0, "min_p": None},
    "top_k=20": {"top_p": 1.0, "top_k": 20},
    "min_p=0.05": {"min_p": 0.05, "top_k": -1},
    "top_p=0.8, top_k=5": {"top_p": 1.0, "top_k": 5, "generation_kwargs": {"top_p": 0.8}},
}


@pytest.mark.parametrize(("given", "args"), SAMPLING.items(), ids=SAMPLING)
def test_a_sampler_that_keeps_some_tokens_is_warned_of(given, args):
    words = f"with {given} rollouts are sampled from some tokens of the vocabulary.*biased.*token_logprobs.*fastpg\\.Support"
    with pytest.warns(UserWarning, match=words) as seen, use_fastpg(stub(fused(tiny_model()), **args)):
        pass
    assert [w.filename for w in seen if issubclass(w.category, UserWarning)] == [__file__]


@pytest.mark.parametrize("args", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {}])
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, trl.RLOOTrainer])
def test_trainers_own_settings(trainer_class, args, make):
    """TRL's defaults, which keep all tokens, are no reason to warn."""
    trainer = make(trainer_class, **args)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        use_fastpg(trainer).undo()
    assert [str(w.message).split(" rollouts")[0] for w in seen] == [f"with {k}={v}" for k, v in args.items()]


@pytest.mark.parametrize(
    "args",
    [
        {"top_p": 1, "top_k": 0, "min_p": 0.0},
        {"top_p": None, "top_k": None},
        {"top_k": 5, "generation_kwargs": {"top_k": 0}},
    ],
)
def test_settings_that_keep_all_tokens(args):
    use_fastpg(stub(fused(tiny_model()), **args)).undo()  # a warning would be an error
