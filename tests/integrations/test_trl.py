"""GRPOTrainer and RLOOTrainer of TRL, a few steps on a tiny model, with fastpg's head and with TRL's own: the same numbers."""

# ruff: noqa: E402 (imports behind importorskip)

import contextlib
import inspect
import re
import types

import pytest
import torch
from torch import nn

pytest.importorskip("trl.trainer.utils", reason="needs the extra [trl]")
peft = pytest.importorskip("peft")

import trl.trainer.utils as trl_utils
from partitioned import gather, partition, replace_deepspeed
from ranks import run_on_ranks
from tiny_trl import STEPS, VOCAB, fused, stub, tiny_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOTrainer, RLOOTrainer
from trl_cases import GRPO_LOSSES

from fastpg.integrations.trl import build_trainer, use_fastpg

# Of trl 1.16 under transformers 5.23, and of peft's prompt tuning.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


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
    *({"loss_type": x, "importance_sampling_level": "sequence" if x == "luspo" else "token"} for x in GRPO_LOSSES),
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
    assert set(re.findall(r'"(\w+)"', " ".join(re.findall(r"self\.loss_type (?:==|in) (.*):", source)))) == set(GRPO_LOSSES)


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
    assert all(c["workspace"] == 2**22 and c["backend"] == "torch" and c["outputs"] == ["entropy"] for c in calls)
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
    assert {len(c["outputs"]) for c in calls} == {0, 1}  # TRL asks for no entropy of its reference model
    assert set(lengths) == {1}


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(**LORA, init_lora_weights=False),
    "lora and the whole head": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize(
    ("trainer_class", "adapter"),
    [
        (GRPOTrainer, "lora"),
        (RLOOTrainer, "lora"),
        (GRPOTrainer, "lora and the whole head"),
        (GRPOTrainer, "prompt"),
        (GRPOTrainer, "prefix"),
    ],
)
def test_adapters_beside_the_head(make, calls, trainer_class, adapter):
    # (under gradient checkpointing transformers drops the cache, in which prefix tuning has its virtual tokens)
    settings = {"peft_config": ADAPTERS[adapter](), "beta": 0.1, "gradient_checkpointing": adapter != "prefix"}
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


def step_under_fsdp1(rank):
    """Differences from TRL's own head in one process: of the reference's loss, and of parameters after a step."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    generators = [torch.Generator().manual_seed(r) for r in range(dist.get_world_size())]
    batches = [torch.randint(2, VOCAB, (2, 7), generator=generator) for generator in generators]

    def loss(model, *ids):
        return sum(model(x, labels=x, fused_lm_head=True).loss for x in ids) / len(ids)

    def step(model, *ids):
        loss(model, *ids).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    alone, before, found = fused(tiny_model()), tiny_model(), []
    own = loss(alone, batches[rank]).item()
    step(alone, *batches)
    for use_orig_params in (True, False):
        options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
        model, reference = fused(tiny_model()), FullyShardedDataParallel(fused(tiny_model()), **options)
        use_fastpg(stub(model, reference))  # TRL wraps the reference when the trainer is built, the policy when it trains
        with torch.no_grad():
            found.append(abs(loss(reference, batches[rank]).item() - own))
        wrapped = FullyShardedDataParallel(model, **options)
        step(wrapped, batches[rank])
        with torch.no_grad(), FullyShardedDataParallel.summon_full_params(wrapped):
            ends = [[*m.parameters()] for m in (wrapped, alone, before)]
            found += [max(float((p - q).abs().max()) for p, q in zip(*ends[:2], strict=True))]
            assert min(float((p - q).abs().max()) for p, q in zip(*ends[::2], strict=True)) > 1e-4
    return found


def test_fsdp1():
    for found in run_on_ranks(step_under_fsdp1, 2):
        assert len(found) == 4
        assert max(found) < 1e-5


def test_a_head_that_zero3_has_partitioned(calls, monkeypatch):
    """test_deepspeed.py trains with DeepSpeed itself, of which newer versions gather by themselves what a forward reads."""
    registered, ids = replace_deepspeed(monkeypatch), torch.randint(2, VOCAB, (2, 7))
    model, whole = fused(tiny_model()), fused(tiny_model())
    use_fastpg(stub(model))
    use_fastpg(stub(whole))
    weight = model.lm_head.weight
    partition(model.lm_head, in_its_forward=False)
    with torch.no_grad():
        model(ids, labels=ids, fused_lm_head=True)
    assert registered == [(model, weight)]
    loss = model(ids, labels=ids, fused_lm_head=True).loss
    assert weight.numel() == 0
    gather(weight)  # DeepSpeed does before the model's backward, since the weight was registered with it
    loss.backward()
    whole(ids, labels=ids, fused_lm_head=True).loss.backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


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
    assert {len(c["outputs"]) for c in calls} == {0, 1}
    assert all(abs(log["kl"]) < 1 for log in trainer.state.log_history[:STEPS])


def test_the_check_draws_no_random_numbers(calls):
    model = fused(tiny_model(attention_dropout=0.5)).train()
    state = torch.get_rng_state()
    use_fastpg(stub(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(calls) == 1
    assert model.training
