"""`patch(model)`: transformers' own Trainer, generation, copies and wrappers, beside the same model without it."""

import copy
import functools
import warnings

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from fastpg import CISPO
from fastpg.integrations.transformers import causal_lm_policy_loss, patch, patched, token_logprobs

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

V = 61
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3, "output_router_logits": True}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **EXPERTS),
}
IDS = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))


def build(name="llama"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)


def rows(number):
    """Sequences of different lengths, with a prompt that is not learnt."""
    generator = torch.Generator().manual_seed(2)
    for length in torch.randint(4, 12, (number,), generator=generator).tolist():
        ids = torch.randint(3, V, (length,), generator=generator)
        yield {"input_ids": ids, "labels": ids.where(torch.arange(length) > 1, -100)}


def collate(batch):
    def padded(name, value):
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != 0).long()}


def trainer_of(model, folder, compute_metrics=None, **settings):
    settings = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | settings
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=3, **settings
    )
    data = list(rows(24))
    return Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:8], data_collator=collate, compute_metrics=compute_metrics
    )


def losses(trainer):
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.fixture
def rows_of_logits(monkeypatch):
    """How many rows the lm_head itself multiplied, of each of its calls."""
    seen, linear = [], torch.nn.functional.linear

    def counted(states, weight, bias=None):
        if len(weight) == V:
            seen.append(states[..., 0].numel())
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return seen


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"gradient_accumulation_steps": 2}),
        ("llama", {"label_smoothing_factor": 0.1}),
        ("gemma2", {}),
        ("granite", {}),
        ("mixtral", {}),
    ],
)
def test_the_trainer_learns_what_it_learns_without(name, settings, rows_of_logits, tmp_path):
    """With label smoothing the Trainer takes the labels away and asks for logits, which it gets."""
    own, model = build(name), build(name)
    want = losses(trainer_of(own, tmp_path, **settings))
    trainer = trainer_of(model, tmp_path, **settings)
    patch(model)
    rows_of_logits.clear()
    assert torch.allclose(losses(trainer), want, atol=2e-4)
    assert torch.allclose(weights_of(model), weights_of(own), atol=1e-3)
    assert (max(rows_of_logits) == 1) == ("label_smoothing_factor" not in settings)


@pytest.mark.parametrize("first", ["patch", "trainer"])
def test_mixed_precision_of_accelerate(first, tmp_path):
    """accelerate wraps the forward in `train`. Where it is asked to take its wrapper away, it takes all that it wraps."""
    own, model = build(), build()
    want = losses(trainer_of(own, tmp_path, bf16=True))
    if first == "patch":
        handle = patch(model)
        trainer = trainer_of(model, tmp_path, bf16=True)
    else:
        trainer = trainer_of(model, tmp_path, bf16=True)
        handle = patch(model)
    assert torch.allclose(losses(trainer), want, rtol=2e-2)
    assert model(input_ids=IDS, labels=IDS).logits is None
    inner = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert inner(input_ids=IDS, labels=IDS).logits.shape == (2, 7, V)
    handle.undo()
    assert inner(input_ids=IDS, labels=IDS).logits.shape == (2, 7, V)


def test_an_undone_patch_passes_on_under_a_wrapper(tmp_path):
    model = build()
    handle = patch(model)
    losses(trainer_of(model, tmp_path, bf16=True))  # leaves accelerate's wrapper around the patch
    handle.undo()
    assert model(input_ids=IDS, labels=IDS).logits.shape == (2, 7, V)
    with patched(model):
        assert model(input_ids=IDS, labels=IDS).logits is None


def test_evaluation_by_the_trainer(tmp_path):
    """Without logits in evaluation too: what compute_metrics is given are log-probabilities of the labels."""
    seen = []
    model = build()
    want = trainer_of(model, tmp_path).evaluate()["eval_loss"]
    with patch(model):
        assert trainer_of(model, tmp_path).evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
        predicted = trainer_of(model, tmp_path, lambda found: seen.append(found) or {}).evaluate()["eval_loss"]
    assert predicted == pytest.approx(want, rel=1e-5)
    (found,) = seen
    assert found.predictions.shape == found.label_ids.shape
    kept = found.label_ids[:, 1:] != -100
    assert -found.predictions[:, 1:][kept].mean() == pytest.approx(want, rel=1e-4)


def test_recomputed_layers():
    """Gradient checkpointing, which runs the layers again in the backward."""
    model = build()
    model(input_ids=IDS, labels=IDS).loss.backward()
    want = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers call it by another name
        model.gradient_checkpointing_enable()
        with patch(model):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert torch.allclose(model.model.embed_tokens.weight.grad, want, rtol=1e-4, atol=1e-6)


def test_generation_and_calls_without_labels_are_the_models_own():
    model = build().eval()
    own, want = model(input_ids=IDS), model.generate(IDS, max_new_tokens=4, do_sample=False)
    with patch(model):
        assert torch.equal(model(input_ids=IDS).logits, own.logits)
        assert torch.allclose(model(IDS, logits_to_keep=1).logits, own.logits[:, -1:], atol=1e-5)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), want)


def test_the_output_has_what_was_asked_for():
    model = build()
    own = model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    with patch(model, entropy=True, temperature=0.7):
        out = model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    assert set(out) == {"loss", "log_probs", "entropy", "hidden_states"}
    assert torch.equal(out.hidden_states[-1], own.hidden_states[-1])
    log_p = (own.logits / 0.7).log_softmax(-1)[:, :-1]
    assert torch.allclose(out.log_probs[:, 1:], log_p.gather(-1, IDS[:, 1:, None])[..., 0], atol=1e-5)
    assert torch.allclose(out.entropy[:, 1:], -(log_p.exp() * log_p).sum(-1), atol=1e-5)
    assert not out.log_probs[:, 0].any()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("count", [None, 11, torch.tensor(11), torch.tensor([11])])
def test_gradients_are_those_of_the_models_own_loss(count, shifted):
    model = build()
    labels = IDS.where(torch.arange(7) > 1, -100)
    given = {"labels": labels} | ({} if count is None else {"num_items_in_batch": count})
    if shifted:
        given["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    (own := model(input_ids=IDS, **given)).loss.backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with patch(model):
        (out := model(input_ids=IDS, **given)).loss.backward()
    assert torch.allclose(out.loss, own.loss.reshape(()), rtol=1e-5)
    assert not out.log_probs.requires_grad  # constants
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, want[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), 5])
def test_a_rank_without_labels(count):
    model = build()
    with patch(model):
        out = model(input_ids=IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=count)
        out.loss.backward()
        assert out.loss == 0
        assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
        with pytest.raises(ValueError, match="denominator must be positive"):
            model(input_ids=IDS, labels=IDS, num_items_in_batch=0)


def test_three_products():
    """The gradients are computed with the loss: the backward multiplies nothing by the head."""
    model, products = build(), []
    with patch(model):
        loss = model(input_ids=IDS, labels=IDS).loss

        class Counted(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if any(getattr(x, "shape", None) in ((V, 16), (16, V)) for x in args) and "mm" in function.__name__:
                    products.append(function)
                return function(*args, **kwargs or {})

        with Counted():
            loss.backward()
    assert not products


def test_a_copy_of_the_model_has_weights_of_its_own():
    """As reference models and averages of weights are made."""
    model = build()
    with patch(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
            other.model.norm.weight.add_(0.5)
        out = other(input_ids=IDS, labels=IDS)
        assert out.logits is None
        out.loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert other.lm_head.weight.grad.any()
    own = other(input_ids=IDS, labels=IDS)  # undone with the model
    assert own.logits.shape == (2, 7, V)
    assert torch.allclose(out.loss, own.loss, atol=1e-5)
    assert not torch.allclose(own.loss, model(input_ids=IDS, labels=IDS).loss, atol=1e-2)


@pytest.mark.parametrize("before", [True, False])
def test_lora_around_the_model(before):
    """Patched under PEFT's wrapper, or through it."""
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = build()
    handle = patch(model) if before else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that newer transformers call otherwise
        wrapper = peft.get_peft_model(model, config)
    handle = handle or patch(wrapper)
    wrapper(input_ids=IDS, labels=IDS).loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in wrapper.named_parameters() if parameter.requires_grad}
    handle.undo()
    wrapper.zero_grad()
    out = wrapper(input_ids=IDS, labels=IDS)
    assert out.logits.shape == (2, 7, V)
    out.loss.backward()
    assert any("lm_head" in name for name in got)
    for name, parameter in wrapper.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(got[name], parameter.grad, rtol=1e-4, atol=1e-6), name


def test_a_backbone_that_is_compiled():
    """torch.compile of the whole model compiles nothing: its forward is the patch, which calls what is not to be traced."""
    model = build()
    want = model(input_ids=IDS, labels=IDS).loss
    compiled = []
    model.model.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    with patch(model):
        assert torch.allclose(model(input_ids=IDS, labels=IDS).loss, want, atol=1e-6)
    assert len(compiled) == 1


def test_other_functions_take_a_patched_model():
    model = build()
    want = token_logprobs(model, IDS).logprobs
    policy_loss = functools.partial(causal_lm_policy_loss, objective=CISPO())
    loss = policy_loss(model, IDS, None, want.detach(), torch.tensor([1.0, -1.0])).loss
    with patch(model):
        assert torch.equal(token_logprobs(model, IDS).logprobs, want)
        assert torch.equal(policy_loss(model, IDS, None, want.detach(), torch.tensor([1.0, -1.0])).loss, loss)
        assert model(input_ids=IDS, labels=IDS).logits is None  # patched as before
        again = "LlamaForCausalLM is patched already; leave that context, or undo"
        with pytest.raises(RuntimeError, match=again):
            patch(model)
        with pytest.raises(RuntimeError, match=again), patched(model):
            pass
    with patched(model), pytest.raises(RuntimeError, match=again):
        patch(model)


def test_undoing_gives_the_very_forward_back():
    model = build()
    handle = patch(model)
    assert "forward" in vars(model)
    handle.undo()
    handle.undo()
    assert "forward" not in vars(model)
    model.forward = functools.partial(type(model).forward, model)
    own = model.forward
    with pytest.raises(ZeroDivisionError), patch(model):
        raise ZeroDivisionError
    assert model.forward is own


def test_what_cannot_be_patched_is_refused_before_anything_is_changed():
    model = build()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="output embeddings"):
        patch(model)
    assert "forward" not in vars(model)
    with pytest.raises(TypeError, match="model must be a transformers model"):
        patch(torch.nn.Linear(2, 2))
