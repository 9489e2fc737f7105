"""PEFT's prompt tuning, p-tuning, prefix tuning and CPT: against the model's own logits, from which virtual tokens are cut."""

import pytest
import torch
import transformers

from fastpg import CISPO
from fastpg.integrations.transformers import causal_lm_policy_loss, patched, token_logprobs

peft = pytest.importorskip("peft")

V, VIRTUAL = 61, 3
IDS = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[1, :2] = 0  # on the left, where PEFT's virtual tokens are
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SETTINGS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
KINDS = {
    "prompt": lambda: peft.PromptTuningConfig(**SETTINGS),
    "p-tuning": lambda: peft.PromptEncoderConfig(**SETTINGS),
    "prefix": lambda: peft.PrefixTuningConfig(**SETTINGS),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[4, 5, 6], cpt_mask=[1] * VIRTUAL, cpt_tokens_type_mask=[1, 2, 3]
    ),
    "adaption": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=VIRTUAL, adapter_layers=1),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


def model_with(kind):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).double().eval()
    model = peft.get_peft_model(model, KINDS[kind]()).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def own_logprobs(model, **inputs):
    logits = model(input_ids=IDS, **inputs).logits[:, -IDS.shape[1] :]
    return torch.log_softmax(logits[:, :-1], -1).gather(-1, IDS[:, 1:, None])[..., 0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EVERY_KIND
@pytest.mark.parametrize("padded", [False, True])
def test_the_models_own_logits(kind, padded):
    """Log-probabilities, and the gradients of the virtual tokens. (Positions of padded rows are those of `generate`.)"""
    model, mask = model_with(kind), PADDED if padded else None
    positions = (PADDED.cumsum(1) - 1).clamp(min=0) if padded and kind in ("prefix", "adaption") else None
    keep = (PADDED[:, 1:] * PADDED[:, :-1]).bool() if padded else torch.ones(2, 6, dtype=torch.bool)
    want = own_logprobs(model, attention_mask=mask, position_ids=positions).masked_fill(~keep, 0)
    got = token_logprobs(model, IDS, mask).logprobs
    assert torch.allclose(got[:, 1:], want, atol=1e-6)
    assert not got[:, 0].any()
    weights, old = torch.rand_like(want), want.detach() - 0.1
    out = causal_lm_policy_loss(model, IDS, mask, torch.nn.functional.pad(old, (1, 0)), torch.ones(2), objective=CISPO())
    assert torch.allclose(out.logprobs[:, 1:], want, atol=1e-6)
    again = own_logprobs(model, attention_mask=mask, position_ids=positions).masked_fill(~keep, 0)
    full = -(0.1 * torch.ones(())).double().exp() * again.sum() / keep.sum()
    theirs, ours = gradients(model, full), gradients(model, out.loss)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, gradient in theirs.items():
        assert gradient.any(), name
        assert torch.allclose(ours[name], gradient, atol=1e-5), name
    again = own_logprobs(model, attention_mask=mask, position_ids=positions).masked_fill(~keep, 0)
    theirs = gradients(model, (weights * again).sum())
    for name, gradient in gradients(model, (weights * token_logprobs(model, IDS, mask).logprobs[:, 1:]).sum()).items():
        assert torch.allclose(gradient, theirs[name], atol=1e-5), name


@EVERY_KIND
def test_a_disabled_adapter(kind):
    """The reference model of RL: the same tokens without the virtual ones."""
    model = model_with(kind)
    want = own_logprobs(model.get_base_model()) if kind != "adaption" else None
    with model.disable_adapter():
        forward = model.forward
        got = token_logprobs(model, IDS).logprobs[:, 1:]
        assert torch.allclose(got, own_logprobs(model), atol=1e-6)
        assert model.forward == forward  # as PEFT has placed it
    assert want is None or torch.allclose(got, want, atol=1e-6)
    assert not torch.allclose(got, token_logprobs(model, IDS).logprobs[:, 1:], atol=1e-3)


@EVERY_KIND
def test_positions_beside_virtual_tokens(kind):
    model, positions = model_with(kind), torch.arange(7).expand(2, 7)
    for use in (
        lambda: token_logprobs(model, IDS, position_ids=positions),
        lambda: causal_lm_policy_loss(model, IDS, None, None, torch.ones(2), objective=CISPO(), position_ids=positions),
    ):
        if kind == "adaption":  # there are none in the sequence
            use()
            continue
        model.get_base_model().model.forward = None  # no work
        with pytest.raises(ValueError, match=r"position_ids cannot be given to a model with PEFT's .*: leave them out"):
            use()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "cpt"])
def test_patched(kind):
    model, labels = model_with(kind), IDS.masked_fill(PADDED == 0, -100)
    with patched(model):
        out = model(input_ids=IDS, attention_mask=PADDED, labels=labels)
    own = model(input_ids=IDS, attention_mask=PADDED, labels=labels)
    assert torch.allclose(out.loss, own.loss.double(), rtol=1e-5)  # which transformers computes in float32
    assert out.log_probs.shape == own.logits.shape[:2]
    logprobs = torch.log_softmax(own.logits[:, -7:-1], -1).gather(-1, IDS[:, 1:, None])[..., 0]
    assert torch.allclose(out.log_probs[:, -6:], logprobs.masked_fill(labels[:, 1:] == -100, 0), atol=1e-6)


def test_labels_that_patched_cannot_take():
    with (
        pytest.raises(ValueError, match="PEFT's CPT computes the loss of labels itself, from logits"),
        patched(model_with("cpt")),
    ):
        pass
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    words = r"shift_labels must have one label a state, \(2, 10\); got \(2, 7\); states of PEFT's virtual tokens come first"
    model = model_with("prompt")
    with patched(model):
        with pytest.raises(ValueError, match=words):
            model(input_ids=IDS, shift_labels=shifted)
        longer = torch.nn.functional.pad(shifted, (VIRTUAL, 0), value=-100)
        out, same = (
            model(input_ids=IDS, shift_labels=longer),
            model(input_ids=IDS, labels=IDS.index_fill(1, torch.tensor([0]), -100)),
        )
    assert torch.allclose(out.loss, same.loss)
