"""What `use_fastpg` and `replace_fused_kernels` refuse, and what they leave alone; verl is not imported here."""

import sys
import types
import warnings
from importlib import metadata

import pytest
import torch
from raising import said

from fastpg.integrations import verl

transformers = pytest.importorskip("transformers")

V, IDS = 61, torch.ones(2, 4, dtype=torch.int64)
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
CALL = {"input_ids": IDS, "temperature": 1.0, "return_dict": True}


def llama(model_class=transformers.LlamaForCausalLM):
    return model_class(transformers.LlamaConfig(**SIZES))


@pytest.fixture(autouse=True)
def tested_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"verl": "0.9.1"}[name])


@pytest.fixture
def model():
    found = llama()
    verl.use_fastpg(found)
    return found


def module(monkeypatch, name, **attributes):
    """A module of that name, with those around it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(attributes)
    return sys.modules[name]


def test_a_critic_has_no_head():
    words = "ValueError: LlamaForTokenClassification has no output embeddings; pass LMHead(weight, ...) instead of "
    critic = llama(transformers.LlamaForTokenClassification)
    assert said(lambda: verl.use_fastpg(critic)) == words + "LMHead.from_model(model)"
    assert "forward" not in vars(critic)


def test_a_second_time(model):
    words = "ValueError: this LlamaForCausalLM has fastpg's forward already; call use_fastpg once"
    assert said(lambda: verl.use_fastpg(model)) == words


def test_after_verls_own_patch():
    def forward_with_triton_backend(self, **_):
        raise AssertionError

    patched = type("LlamaForCausalLM", (transformers.LlamaForCausalLM,), {"forward": forward_with_triton_backend})
    assert said(lambda: verl.use_fastpg(llama(patched))) == (
        "ValueError: LlamaForCausalLM.forward is verl's forward_with_triton_backend, which calls no lm_head; use_fastpg must "
        "come before verl's patch: set external_lib=fastpg.integrations.verl_fused, or leave use_fused_kernels off"
    )


@pytest.mark.parametrize("place", [lambda: verl.use_fastpg(llama()), verl.replace_fused_kernels], ids=["model", "kernels"])
def test_without_verl(monkeypatch, place):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert said(place) == "ImportError: verl is not installed; this adapter was tested with verl 0.6.0 to 0.9.1"


def test_another_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.10.0")
    with pytest.warns(UserWarning, match="verl 0.10.0 is installed; this adapter was tested with verl 0.6.0 to 0.9.1"):
        verl.use_fastpg(llama())


@pytest.mark.parametrize("labels", [{}, {"labels": IDS}])
def test_a_share_of_a_sequence_without_shifted_labels(monkeypatch, model, labels):
    """verl 0.6 and 0.7 give none; their own forwards then take the token after a rank's last from its first."""
    module(monkeypatch, "verl.utils.ulysses", get_ulysses_sequence_parallel_world_size=lambda: 2)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran before the error"))
    assert said(lambda: model(**CALL, **labels)) == (
        "ValueError: shift_labels must be given where 2 ranks share a sequence: the token after a rank's last is another "
        "rank's. verl gives them since 0.8; with an older one set ulysses_sequence_parallel_size=1"
    )


def test_shifted_labels_of_a_share_are_used(monkeypatch, model):
    module(monkeypatch, "verl.utils.ulysses", get_ulysses_sequence_parallel_world_size=lambda: 2)
    shifted = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        out = model(**CALL, shift_labels=shifted)
        want = model(input_ids=IDS).logits.log_softmax(-1).gather(-1, shifted[..., None])[..., 0]
    torch.testing.assert_close(out.log_probs, want)


def test_labels_come_before_input_ids(model):
    """Both are moved by one position, as in verl: the last state predicts the row's first token."""
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with torch.no_grad():
        logp = model(input_ids=IDS).logits.log_softmax(-1)
        for given, tokens in (({"labels": labels}, labels), ({}, IDS)):
            want = logp.gather(-1, tokens.roll(-1, 1)[..., None])[..., 0]
            torch.testing.assert_close(model(**CALL, **given).log_probs, want)


def test_no_tokens(model):
    words = "ValueError: one of shift_labels, labels and input_ids must be given; got none"
    assert said(lambda: model(inputs_embeds=torch.zeros(1, 2, 16), temperature=1.0)) == words


def test_a_call_without_temperature_is_the_models_own(model):
    other = llama()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)
        assert model(input_ids=IDS, labels=IDS).loss == other(input_ids=IDS, labels=IDS).loss


@pytest.fixture
def fakes(monkeypatch):
    """verl's modules, in which a function says that it was called. Of its two Megatron modules one is imported."""
    called = []
    patch = module(
        monkeypatch, "verl.models.transformers.monkey_patch", patch_forward_with_backends=lambda *given: called.append(given)
    )
    kernel = module(monkeypatch, "verl.utils.kernel.linear_cross_entropy", linear_cross_entropy="verl's")
    caller = types.ModuleType("verl.models.mcore.model_forward_fused")
    caller.linear_cross_entropy = "verl's"
    monkeypatch.setitem(sys.modules, "verl.models.mcore.model_forward_fused", caller)
    return types.SimpleNamespace(called=called, patch=patch, kernel=kernel, caller=caller)


def test_megatron_takes_our_function(fakes):
    verl.replace_fused_kernels()
    assert fakes.kernel.linear_cross_entropy is fakes.caller.linear_cross_entropy is verl.linear_cross_entropy


def test_options_reach_the_models(fakes, monkeypatch):
    given = []
    monkeypatch.setattr(verl, "use_fastpg", lambda model, **options: given.append((model, options)))
    verl.replace_fused_kernels(fp32_head=True, check=False)
    fakes.patch.patch_forward_with_backends("model", use_fused_kernels=True, fused_kernels_backend="torch")
    assert given == [("model", {"fp32_head": True, "check": False})]
    assert not fakes.called


def test_without_use_fused_kernels_verl_computes_logits(fakes):
    verl.replace_fused_kernels()
    model, critic = llama(), llama(transformers.LlamaForTokenClassification)
    with pytest.warns(UserWarning, match="use_fused_kernels is off, so that verl computes the logits and fastpg is not used"):
        fakes.patch.patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fakes.patch.patch_forward_with_backends(critic, False, None)
    assert fakes.called == [(model, False, "torch"), (critic, False, None)]
    assert "forward" not in vars(model)


def test_importing_the_external_lib_replaces(fakes, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastpg.integrations.verl_fused", raising=False)
    import fastpg.integrations.verl_fused  # noqa: F401

    monkeypatch.delitem(sys.modules, "fastpg.integrations.verl_fused")
    assert fakes.kernel.linear_cross_entropy is verl.linear_cross_entropy
