"""Vision models of transformers whose forward leaves out the scale of their text model: refused with the reason, and served by
either way that the error names, with images too."""

import pytest
import torch
import transformers
from raising import said

from fastpg import CISPO, LMHead, linear_logprobs
from fastpg.integrations.transformers import causal_lm_policy_loss, patched, token_logprobs

V, IMAGE = 61, 60
TEXT = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
SIGHT = {f"num_{x}": 1 for x in ("hidden_layers", "attention_heads")} | {
    "hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4,
}  # fmt: skip
SCALES = {"Cohere2": ("logit_scale", 0.25), "Granite": ("logits_scaling", 8.0)}
FAMILIES = {  # the text model, the vision model, and further settings
    "AyaVision": ("Cohere2", "siglip_vision_model", {"image_token_index": IMAGE}),
    "Cohere2Vision": ("Cohere2", "siglip_vision_model", {"image_token_id": IMAGE, "alignment_intermediate_size": 32}),
    "LlavaNext": ("Granite", "clip_vision_model", {"image_token_index": IMAGE}),
}
IDS = torch.randint(3, IMAGE, (2, 7), generator=torch.Generator().manual_seed(1))


def build(family):
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    text, sight, more = FAMILIES[family]
    key, given = SCALES[text]
    text = {**TEXT, "model_type": text.lower(), key: given}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config={**SIGHT, "model_type": sight}, **more)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()


def reason(family):
    text, _, _ = FAMILIES[family]
    key, given = SCALES[text]
    name = f"{family}ForConditionalGeneration"
    return (
        f"{name} returns logits without the {key}={given} of its text model's configuration ({text}Config), by which a server "
        f"that runs that text model, such as vLLM, samples. For the logits of {name} set "
        f"model.config.get_text_config().{key} = 1.0; for those of the text model give its last_hidden_state to "
        "linear_logprobs or linear_policy_loss, with LMHead.from_model(model)"
    )


def of_tokens(logits):
    return logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scale_that_the_forward_leaves_out_is_named(family):
    model = build(family)

    def with_labels():
        with patched(model):
            model(input_ids=IDS, labels=IDS)

    for call in (
        lambda: token_logprobs(model, IDS),
        lambda: causal_lm_policy_loss(model, IDS, None, None, torch.ones(2), objective=CISPO()),
        with_labels,
    ):
        assert said(call, before_work=False) == f"ValueError: {reason(family)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_the_text_model(family):
    """Which transformers computes too, where the text model runs alone."""
    model = build(family)
    out = model.base_model(input_ids=IDS)
    got = linear_logprobs(out.last_hidden_state[:, :-1], LMHead.from_model(model), IDS[:, 1:]).logprobs
    text = transformers.AutoModelForCausalLM.from_config(model.config.get_text_config()).eval()
    text.model.load_state_dict(model.base_model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    assert torch.allclose(got, of_tokens(text(input_ids=IDS).logits), atol=1e-5)
    assert not torch.allclose(got, of_tokens(model(input_ids=IDS).logits), atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_the_model_itself(family):
    model = build(family)
    setattr(model.config.get_text_config(), SCALES[FAMILIES[family][0]][0], 1.0)
    ids, images = IDS.clone(), {}
    if family != "LlavaNext":  # whose images need their processor
        ids[:, 2] = IMAGE  # an image of 2 x 2 patches is one token
        images = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
    logits = model(input_ids=ids, **images).logits
    want = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    got = token_logprobs(model, ids, **images).logprobs[:, 1:]
    assert torch.allclose(got, want, atol=1e-5)
    weights, gradients = torch.randn_like(want), []
    for logprobs in (got, want):
        model.zero_grad()
        (weights * logprobs).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert any("vision" in name for name in ours) == bool(images)
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-6), name


def test_under_trl():
    utils = pytest.importorskip("trl.trainer.utils", reason="needs the extra [trl]")
    from tiny_trl import fused, stub

    from fastpg.integrations.trl import use_fastpg

    model = fused(build("AyaVision"))
    words = f"ValueError: {reason('AyaVision')}, or keep TRL's own head, which reads that configuration"
    assert said(lambda: use_fastpg(stub(model)), before_work=False) == words
    model = build("AyaVision")
    model.config.get_text_config().logit_scale = 1.0
    utils.add_fused_lm_head(model)
    theirs = model(IDS, labels=IDS, fused_lm_head=True).log_probs
    with use_fastpg(stub(model)):
        ours = model(IDS, labels=IDS, fused_lm_head=True).log_probs
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(ours, of_tokens(model(input_ids=IDS).logits), atol=1e-5)
