"""GRPOTrainer and RLOOTrainer of TRL, a few steps on a tiny model, with fastpg's head and with TRL's own: the same numbers."""

# ruff: noqa: E402 (imports behind importorskip)

import contextlib
import inspect
import re
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

pytest.importorskip("trl.trainer.utils", reason="needs the extra [trl]")
peft = pytest.importorskip("peft")

import datasets
import trl
import trl.trainer.utils as trl_utils
from ranks import run_on_ranks
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from fastpg import linear_logprobs
from fastpg.integrations import trl as fastpg_trl
from fastpg.integrations.trl import build_trainer, use_fastpg

# Of trl 1.16 under transformers 5.23, and of peft's prompt tuning.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

VOCAB, STEPS = 61, 4
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def tiny_model(model_class=Qwen3ForCausalLM, config_class=Qwen3Config, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "head_dim": 16, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
        "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    model = model_class(config_class(**{**settings, **changes}))
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 3  # completions end at different lengths
    return model


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def reward(completion_ids, **_):
    return [sum(ids) % 7 / 3 + len(ids) / 5 for ids in completion_ids]


@pytest.fixture
def make(tokenizer, tmp_path):
    """A trainer on `model`, with settings of its config; `build` is the class, or what is called in its stead."""

    def make(trainer_class=GRPOTrainer, model=None, build=None, peft_config=None, **settings):
        config = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[trainer_class]
        options = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
            "disable_tqdm": True, "logging_steps": 1, "seed": 3, "max_steps": STEPS, "per_device_train_batch_size": 4,
            "num_generations": 4, "steps_per_generation": 2, "num_iterations": 2, "max_completion_length": 6, "beta": 0.0,
            "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
        }  # fmt: skip
        return (build or trainer_class)(
            model=tiny_model() if model is None else model,
            reward_funcs=reward,
            args=config(**{**options, **settings}),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w3 w4 w5", "w6 w7", "w8", "w9 w10 w11 w12"]}),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of each call of linear_logprobs by the integration."""
    made = []

    def counted(*args, **kwargs):
        made.append(kwargs)
        return linear_logprobs(*args, **kwargs)

    monkeypatch.setattr(fastpg_trl, "linear_logprobs", counted)
    return made


def run(trainer):
    """(what was logged at each step, the parameters at the end)"""
    trainer.train()
    clocks = ("runtime", "per_second", "step_time", "flos")
    logs = [{k: v for k, v in entry.items() if not any(c in k for c in clocks)} for entry in trainer.state.log_history]
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(ours, theirs, tolerance=1e-5):
    assert len(ours[0]) == len(theirs[0]) > STEPS
    for our_log, their_log in zip(ours[0], theirs[0], strict=True):
        assert our_log == pytest.approx(their_log, abs=tolerance, rel=tolerance, nan_ok=True)
    assert ours[1].keys() == theirs[1].keys()
    for name, parameter in ours[1].items():
        assert torch.allclose(parameter, theirs[1][name], rtol=tolerance, atol=tolerance), name


def heads_inputs(trainer):
    """The sequence length of each call of the model's lm_head."""
    lengths = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    return lengths


SETTINGS = [
    *({"loss_type": x, "importance_sampling_level": "sequence" if x == "luspo" else "token"} for x in LOSSES),
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "cispo", "epsilon_high": 1.05, "gradient_accumulation_steps": 2},
    {"loss_type": "dapo", "temperature": 0.7, "delta": 1.5},
    {"loss_type": "dapo", "top_entropy_quantile": 0.4},
    {"loss_type": "dapo", "entropy_coef": 0.1, "top_entropy_quantile": 0.6},
    {"loss_type": "grpo", "use_adaptive_entropy": True, "entropy_target": 3.0},
    {"loss_type": "grpo", "off_policy_mask_threshold": 0.01},
    {"loss_type": "cispo", "cast_lm_head_to_fp32": True},
]


def test_every_loss_type_is_tested():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert set(re.findall(r'"(\w+)"', " ".join(re.findall(r"self\.loss_type (?:==|in) (.*):", source)))) == set(LOSSES)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{v}" for v in s.values()))
def test_grpo_is_trls(make, calls, monkeypatch, settings):
    theirs = run(make(**settings))
    assert not calls
    trainer = make(**settings)
    use_fastpg(trainer, workspace=2**22, backend="torch")
    monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    lengths = heads_inputs(trainer)
    ours = run(trainer)
    assert_same(ours, theirs)
    assert any(abs(log["loss"]) > 1e-3 for log in ours[0][:STEPS])
    assert len(calls) >= STEPS
    assert all(c["workspace"] == 2**22 and c["backend"] == "torch" and c["entropy"] for c in calls)
    assert set(lengths) == {1}  # one position: generation. Never a completion's logits


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"beta": 0.1}], ids=str)
def test_rloo_is_trls(make, calls, tmp_path, settings):
    models = [saved_and_loaded(tmp_path), saved_and_loaded(tmp_path)]
    theirs = run(make(RLOOTrainer, models[0], **settings))
    trainer = make(RLOOTrainer, models[1], **settings)
    assert len(use_fastpg(trainer).models) == (2 if "beta" in settings else 1)
    assert_same(run(trainer), theirs)
    assert len(calls) >= 2 * STEPS - 2


def saved_and_loaded(tmp_path):
    """TRL loads the reference model from where the policy was loaded."""
    tiny_model().save_pretrained(tmp_path / "policy")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "policy")


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"beta": 0.2, "use_bias_correction_kl": True}], ids=str)
def test_kl_to_a_reference_model(make, calls, tmp_path, settings):
    theirs = run(make(model=saved_and_loaded(tmp_path), **settings))
    trainer = make(model=saved_and_loaded(tmp_path), **settings)
    assert use_fastpg(trainer).models == [trainer.model, trainer.ref_model]
    lengths = heads_inputs(trainer)
    ours = run(trainer)
    assert_same(ours, theirs)
    assert max(log["kl"] for log in ours[0][:STEPS]) > 1e-3
    assert {c["entropy"] for c in calls} == {True, False}  # TRL asks for no entropy of its reference model
    assert set(lengths) == {1}


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(**LORA, init_lora_weights=False),
    "lora and the whole head": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize(
    ("trainer_class", "adapter"),
    [(GRPOTrainer, "lora"), (RLOOTrainer, "lora"), (GRPOTrainer, "lora and the whole head"), (GRPOTrainer, "prompt")],
)
def test_adapters_beside_the_head(make, calls, trainer_class, adapter):
    settings = {"peft_config": ADAPTERS[adapter](), "beta": 0.1}
    theirs = run(make(trainer_class, **settings))
    trainer = make(trainer_class, **settings)
    use_fastpg(trainer)
    ours = run(trainer)
    assert_same(ours, theirs)
    assert len(calls) >= 2 * STEPS - 2  # the reference is the model without its adapter


def answer_from_full_logits(trainer):
    """The contract written out: TRL's fused forward, from logits."""
    model = trainer.model.get_base_model()
    below = model.forward

    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        output = below(*args, **kwargs)
        if not fused_lm_head:
            return output
        logps = (output.logits[:, :-1].float() / trainer.temperature).log_softmax(-1)
        mask = labels[:, 1:] != -100
        picked = logps.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        entropy = -(logps.exp() * logps).sum(-1)
        return trl_utils.FusedCausalLMOutput(log_probs=torch.where(mask, picked, 0), entropy=torch.where(mask, entropy, 0))

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_lora_on_the_lm_head(make, calls, trainer_class):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    settings = {"peft_config": config, "beta": 0.1, "temperature": 0.8}
    with pytest.raises(ValueError, match="lm_head"):
        make(trainer_class, **settings)

    def build(**kwargs):
        return build_trainer(trainer_class, **kwargs)

    full, heads = make(trainer_class, build=build, **settings)
    with pytest.warns(UserWarning, match="adapter on the lm_head is ignored"):
        heads.undo()
    answer_from_full_logits(full)
    theirs = run(full)
    calls.clear()
    trainer, _ = make(trainer_class, build=build, **settings)
    assert "get_output_embeddings" not in vars(trainer.model.get_base_model())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    ours = run(trainer)
    assert_same(ours, theirs)
    assert len(calls) >= 2 * STEPS - 2
    moved = {name for name, p in ours[1].items() if not torch.equal(p, before[name])}
    assert any("lm_head.lora_A" in name for name in moved)
    assert any("lm_head.lora_B" in name for name in moved)
    assert all("lora_" in name for name in moved)


# One call of the model


def stub(model, ref_model=None, **args):
    """What use_fastpg reads of a trainer."""
    accelerator = types.SimpleNamespace(autocast=contextlib.nullcontext, state=types.SimpleNamespace())
    return types.SimpleNamespace(model=model, ref_model=ref_model, args=types.SimpleNamespace(**args), accelerator=accelerator)


ARCHITECTURES = {
    "softcap": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 4.0, "tie_word_embeddings": True}),
    "logit_scale": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
    "bias": (PhiForCausalLM, PhiConfig, {"num_key_value_heads": 2}),
    "experts": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True},
    ),
}


@pytest.mark.parametrize("labels", ["labels", "shift_labels", "no labels"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_call(architecture, labels):
    model_class, config_class, changes = ARCHITECTURES[architecture]
    model = tiny_model(model_class, config_class, **changes)
    if architecture == "bias":
        nn.init.normal_(model.lm_head.bias)
    trl_utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.randint(2, VOCAB, (2, 9))
    targets = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    if labels == "no labels":
        targets = torch.full_like(ids, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "fused_lm_head": True}
    inputs |= {"labels": targets} if labels != "shift_labels" else {"shift_labels": targets, "num_items_in_batch": 5}
    results = []
    for fastpg in (False, True):
        with use_fastpg(stub(model)) if fastpg else contextlib.nullcontext():
            out = model(**inputs)
            (out.loss + (out.log_probs * out.entropy).sum()).backward()
            results.append((out, {name: p.grad for name, p in model.named_parameters()}))
            model.zero_grad()
    (theirs, their_gradients), (ours, our_gradients) = results
    assert type(ours) is type(theirs)
    assert ours.keys() == theirs.keys()
    assert ("aux_loss" in ours) == (architecture == "experts")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)
    for name, gradient in our_gradients.items():
        scale = float(their_gradients[name].abs().max())
        assert float((gradient - their_gradients[name]).abs().max()) <= 1e-5 * scale + 1e-7, name


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(cast, autocast):
    model = tiny_model()
    if not autocast:
        model = model.bfloat16()
    if cast:
        model.lm_head.float()
    trl_utils.add_fused_lm_head(model, cast_lm_head_to_fp32=cast, outputs=("log_probs", "entropy"))
    ids = torch.randint(2, VOCAB, (2, 9))
    trainer = stub(model)
    if cast:  # as TRL does, so that the model's own forward works
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = model(ids, labels=ids, fused_lm_head=True)
        use_fastpg(trainer)
        ours = model(ids, labels=ids, fused_lm_head=True)
    assert ours.log_probs.dtype == theirs.log_probs.dtype == torch.float32
    tolerance = 1e-5 if cast else 0.1  # TRL rounds its logits to bf16
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=0, atol=tolerance)


class Casting(nn.Linear):
    def forward(self, hidden):
        return nn.functional.linear(hidden.float(), self.weight.float())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("asks", ["nobody", "the trainer", "the head", "both"])
def test_who_asks_for_a_float32_head(asks, autocast):
    """TRL's setting, which gives the layer a forward of its own, or a head that casts by itself: float32 under autocast too."""
    model = tiny_model()
    if asks in ("the head", "both"):
        head = Casting(32, VOCAB, bias=False)
        head.load_state_dict(model.lm_head.state_dict())
        model.lm_head = head
    model = model if autocast else model.bfloat16()
    fused(model, cast_lm_head_to_fp32=asks in ("the trainer", "both"), outputs=("log_probs", "entropy"))
    if asks == "the trainer":
        model.lm_head.float()
        model.lm_head.forward = lambda x, layer=model.lm_head: nn.functional.linear(x.float(), layer.weight.float())
    states, ids = [], torch.randint(2, VOCAB, (2, 9))
    model.base_model.register_forward_hook(lambda module, args, result: states.append(result[0].detach()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), use_fastpg(stub(model)):
        out = model(ids, labels=ids, fused_lm_head=True)
    logits = states[-1][:, :-1].double() @ model.lm_head.weight.double().T
    want = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    error = float((out.log_probs - want).detach().abs().max())
    assert (error < 2e-5) == (asks != "nobody" or not autocast)  # without autocast the products of bf16 operands are exact
    (-out.log_probs.sum()).backward()
    logits = logits.detach().requires_grad_()
    logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().neg().backward()
    gradient = logits.grad.flatten(0, 1).T @ states[-1][:, :-1].flatten(0, 1).double()
    found = model.lm_head.weight.grad
    rounded = asks == "nobody" or found.dtype == torch.bfloat16
    assert float((found - gradient).norm() / gradient.norm()) < (1e-2 if rounded else 1e-5)


def test_calls_go_through_the_models_own_call(make, calls):
    """Where the hooks of DDP and FSDP are."""
    trainer = make()
    use_fastpg(trainer)
    calls.clear()  # one was made to check the head
    fused = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: fused.append(1) if kwargs.get("fused_lm_head") else None, with_kwargs=True
    )
    trainer.train()
    assert len(fused) == len(calls) > 0


def gradients_on_ranks(rank):
    """Errors of the gradients, relative to the largest one, against those of one process that averages both ranks' losses."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def backward(model, rank):
        ids = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(rank))
        model(ids, labels=ids, fused_lm_head=True).loss.backward()

    def gradients(model):
        return {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}

    alone = fused(tiny_model())
    for r in range(dist.get_world_size()):
        backward(alone, r)
    expected = {n: g / dist.get_world_size() for n, g in gradients(alone).items()}
    errors = []
    for sharded in ([], ["model.layers.0", ""], ["lm_head", ""]):
        model = fused(tiny_model())
        use_fastpg(stub(model))
        for name in sharded:
            fully_shard(model.get_submodule(name), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        backward(model if sharded else DistributedDataParallel(model), rank)
        errors.append(max(float((g - expected[n]).abs().max() / expected[n].abs().max()) for n, g in gradients(model).items()))
    return errors


def test_ddp_and_fsdp2():
    """Also where the head is sharded on its own, and reaches the call as a DTensor: TRL 1.16 then leaves its gradient local."""
    assert max(max(errors) for errors in run_on_ranks(gradients_on_ranks, 2)) < 1e-5


# The way back


def test_undo_restores_everything(make, calls):
    trainer = make()
    untouched, signature = dict(vars(trainer.model)), inspect.signature(trainer.model.forward)
    heads = use_fastpg(trainer)
    assert heads.models == [trainer.model]
    assert trainer.model.forward is not untouched["forward"]
    assert inspect.signature(trainer.model.forward) == signature  # generate validates its arguments against it
    with pytest.raises(ValueError, match="has fastpg's head already"):
        use_fastpg(trainer)
    heads.undo()
    heads.undo()
    assert not heads.models
    assert vars(trainer.model) == untouched
    with use_fastpg(trainer):
        assert vars(trainer.model) != untouched
    assert vars(trainer.model) == untouched
    used = len(calls)  # two checks against the model's own logits
    assert_same(run(trainer), run(make()), tolerance=0)
    assert len(calls) == used


def test_undo_under_a_wrapper(make, calls):
    """accelerate wraps the policy's forward when mixed-precision training starts, and the reference's before."""
    trainer = make(bf16=True)
    heads = use_fastpg(trainer)
    trainer.train()
    used = len(calls)
    assert used > STEPS
    ids = torch.randint(2, VOCAB, (2, 5))
    heads.undo()
    assert trainer.model(ids, labels=ids, fused_lm_head=True).log_probs is not None
    assert len(calls) == used
    use_fastpg(trainer)
    used = len(calls)
    trainer.model(ids, labels=ids, fused_lm_head=True)
    assert len(calls) == used + 1


def test_mixed_precision_reference(make, calls, tmp_path):
    trainer = make(model=saved_and_loaded(tmp_path), bf16=True, beta=0.1)
    assert len(use_fastpg(trainer).models) == 2
    trainer.train()
    assert {c["entropy"] for c in calls} == {True, False}
    assert all(abs(log["kl"]) < 1 for log in trainer.state.log_history[:STEPS])


def test_the_check_draws_no_random_numbers(calls):
    model = fused(tiny_model(attention_dropout=0.5)).train()
    state = torch.get_rng_state()
    use_fastpg(stub(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(calls) == 1
    assert model.training


# What is refused


def refused(trainer, error, match):
    before = dict(vars(trainer.model))
    with pytest.raises(error, match=match):
        use_fastpg(trainer)
    assert vars(trainer.model) == before


def fused(model, **options):
    trl_utils.add_fused_lm_head(model, **options)
    return model


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


def test_import_fastpg_imports_no_trl(tmp_path):
    program = "import sys, fastpg; assert not {'trl', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
