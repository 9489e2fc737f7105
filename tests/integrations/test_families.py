"""A few of the families that `tests/families` compares: the best known, and each kind of head. The page is tested elsewhere."""

import warnings

import compare_family
import pytest
import tiny_models
import torch
import transformers
from compare_family import compare

TEXT = ["text", "left padding", "right padding", "policy loss"]
IMAGES = ["images", "images, policy loss", "images, left padding"]
OK = {  # the class: what is compared of it, and what its head is said to have
    "LlamaForCausalLM": (TEXT, []),
    "Qwen3ForCausalLM": (TEXT, []),
    "GPT2LMHeadModel": (TEXT, ["tied"]),
    "PhiForCausalLM": (TEXT, ["bias"]),
    "Gemma2ForCausalLM": (TEXT, ["final_logit_softcapping=30", "tied"]),
    "CohereForCausalLM": (TEXT, ["logit_scale=0.0625", "tied"]),
    "GraniteForCausalLM": (TEXT, []),  # whose scale is neutral, and active in a second model
    "MiniCPM3ForCausalLM": (TEXT, ["logits_scaling=0.125", "tied"]),
    "MambaForCausalLM": (TEXT, ["tied"]),
    "MixtralForCausalLM": ([*TEXT, "router loss"], []),
    "Qwen3MoeForCausalLM": ([*TEXT, "router loss"], []),
    "Qwen2_5_VLForConditionalGeneration": (TEXT + IMAGES, None),
    "Qwen3VLForConditionalGeneration": (TEXT + IMAGES, None),
    "LlavaForConditionalGeneration": (TEXT + IMAGES, None),
    "Gemma3ForConditionalGeneration": (TEXT + IMAGES, None),
}
REFUSED = {
    "AyaVisionForConditionalGeneration": "without the logit_scale=0.0625 of its text model's configuration",
    "BartForConditionalGeneration": "has an encoder; a decoder-only model is wanted",
    "MusicgenForCausalLM": "the output embeddings are torch.nn.modules.container.ModuleList",
}
# under another name or another default in older versions
MODEL_TYPES = {name: model_type for model_type, name in tiny_models.families()} | {"BartForConditionalGeneration": "bart"}


def row_of(name):
    if name not in MODEL_TYPES or not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, which differ from version to version
        return compare(MODEL_TYPES[name], name)


@pytest.mark.parametrize("name", OK)
def test_families_that_agree(name):
    row, (checks, head) = row_of(name), OK[name]
    assert row["result"] == "ok", row["reason"]
    assert row["checks"] == checks
    assert head is None or row["head"] == head
    assert row["error"] < 1e-4
    if name == "GraniteForCausalLM":
        assert row["with"] == {"settings": "logits_scaling=4", "result": "ok", "reason": ""}


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_refused(name):
    row = row_of(name)
    assert row["result"] == "refused"
    assert REFUSED[name] in row["reason"]


@pytest.mark.parametrize("name", ["HunYuanVLForConditionalGeneration", "ChameleonForConditionalGeneration"])
def test_families_that_were_wrong(name):
    """Positions of text beside padding, where a model has positions of its own; logits that a model bans in place."""
    row = row_of(name)
    assert row["result"] in ("ok", "refused"), row["reason"]


def test_caps_are_active():
    """Logits reach the bend of the cap: without it they would be others."""
    model = tiny_models.tiny_model("gemma2", "Gemma2ForCausalLM")
    ids = torch.randint(40, 60, (2, 9))
    logits = model(input_ids=ids).logits
    assert logits.abs().max() > 0.6 * 30
    assert logits.abs().max() < 30


@pytest.mark.parametrize("broken", ["values", "gradients", "kept tokens", "error"])
def test_a_wrong_family_is_called_wrong(broken, monkeypatch):
    right = compare_family.token_logprobs

    def wrong(model, ids, mask=None, **options):
        out = right(model, ids, mask, **options)
        if broken == "values":
            return out._replace(logprobs=out.logprobs + 1e-3)
        if broken == "gradients":
            return out._replace(logprobs=out.logprobs.detach() + 0.5 * (out.logprobs - out.logprobs.detach()))
        if broken == "kept tokens":
            return out._replace(mask=~out.mask)
        raise RuntimeError("of no argument")

    monkeypatch.setattr(compare_family, "token_logprobs", wrong)
    row = row_of("LlamaForCausalLM")
    words = {
        "values": "log-probabilities differ", "gradients": "differs by", "kept tokens": "other tokens", "error": "RuntimeError",
    }  # fmt: skip
    assert row["result"] == "wrong"
    assert words[broken] in row["reason"]
