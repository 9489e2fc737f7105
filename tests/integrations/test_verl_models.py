"""`use_fastpg` beside verl's own fused forwards, its FSDP engine and its Megatron processor, in processes of their own."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from frameworks import installed, of_verl
from ranks import results_of, run_jobs, run_on_ranks

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(not installed("verl", "tensordict", "omegaconf"), reason="make frameworks installs verl"),
    pytest.mark.xdist_group("verl"),
]

IMPORTED_BY_FUNCTIONS = ("megatron.core.tensor_parallel", "transformers.models.llama.modeling_llama")
V, T = 61, 0.7
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
SIGHT = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def llama(tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype)


def padded():
    """Inputs as verl's engine gives them without remove_padding, and weights that are 0 where its loss mask is."""
    ids = torch.randint(1, V, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    weights = torch.randn(2, 7, generator=torch.Generator().manual_seed(2)) * mask
    weights[:, 0] = weights[0, 4] = weights[1, 6] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, weights


def packed():
    """Two sequences in a row, with the labels that the engine has moved."""
    ids = torch.randint(1, V, (1, 9), generator=torch.Generator().manual_seed(3))
    weights = torch.randn(1, 9, generator=torch.Generator().manual_seed(4))
    weights[0, 3] = weights[0, 8] = 0
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    return {"input_ids": ids, "attention_mask": None, "position_ids": positions, "shift_labels": ids.roll(-1, 1)}, weights


def step(model, call, inputs, weights, **more):
    """What a call returns, the loss of a step on it, and the gradients of the parameters by name."""
    out = call(**inputs, **({"temperature": T} | more), return_dict=True)
    logprobs, entropy = (x.view(weights.shape).float() for x in (out.log_probs, out.entropy))
    loss = (weights * logprobs).sum() + 0.3 * (weights * entropy).sum()
    loss.backward()
    found = {"log_probs": logprobs.detach(), "entropy": entropy.detach(), "loss": loss.detach()}
    return found | {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def placed(model):
    """The model, as verl builds it with external_lib and use_fused_kernels=True, and its unchanged copy."""
    other, forward = copy.deepcopy(model), type(model).forward
    of_verl("verl.utils.import_utils").import_external_libs("fastpg.integrations.verl_fused")
    patch = of_verl("verl.models.transformers.monkey_patch").apply_monkey_patch
    patch(model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="torch")
    assert type(model).forward is forward  # verl's own would be placed here
    return model, other


def on_logits(model):
    """The model's own logits and plain autograd, as a call of verl's."""

    def call(input_ids, temperature, return_dict, shift_labels, **inputs):
        logits = model(input_ids=input_ids, **inputs).logits.float() / temperature
        logp, counts = logits.log_softmax(-1), shift_labels != -100
        found = logp.gather(-1, shift_labels.clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(log_probs=found * counts, entropy=-(logp.exp() * logp).sum(-1) * counts)

    return call


# ---- what is done in the process that has verl: ours and what it is compared with


def of_dense(rank, tied, dtype, batch):
    model, other = placed(llama(tied, dtype))
    forward = of_verl("verl.models.transformers.dense_common").forward_with_torch_backend
    return step(model, model, *batch()), step(other, lambda **given: forward(other, **given), *batch())


def of_vision(rank):
    """verl's forwards of this family were written for a transformers whose output has another name."""
    family = transformers.models.qwen3_vl.modeling_qwen3_vl
    if not hasattr(family, "Qwen3VLCausalLMOutputWithPast"):
        family.Qwen3VLCausalLMOutputWithPast = transformers.modeling_outputs.CausalLMOutputWithPast
    theirs = of_verl("verl.models.transformers.qwen3_vl")
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4}
    tokens = {f"{name}_token_id": 50 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    text = SIZES | {"head_dim": 8, "rope_parameters": rope}
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, vision_config=SIGHT, **tokens)
    )
    type(model).forward = theirs.forward_with_normal_backend  # as verl's patch leaves these classes
    other = copy.deepcopy(model)
    of_verl("fastpg.integrations.verl").use_fastpg(model)
    ids = torch.randint(1, 49, (1, 10), generator=torch.Generator().manual_seed(1))
    ids[0, 2], ids[0, 3:7] = tokens["vision_start_token_id"], tokens["image_token_id"]
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    inputs = {
        "input_ids": ids, "attention_mask": None, "position_ids": torch.arange(10).expand(4, 1, 10), "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]), "shift_labels": ids.roll(-1, 1),
    }  # fmt: skip
    weights = torch.randn(1, 10, generator=torch.Generator().manual_seed(3))
    forward = theirs.forward_with_torch_backend
    return step(model, model, inputs, weights), step(other, lambda **given: forward(other, **given), inputs, weights)


def of_temperatures(rank, temperature):
    (inputs, weights), (model, other) = packed(), placed(llama())
    more = {"temperature": temperature}
    given = {"temperature": temperature[..., None] if temperature.dim() else temperature}
    return step(model, model, inputs, weights, **more), step(other, on_logits(other), inputs, weights, **given)


def of_ignored_labels(rank):
    (inputs, weights), (model, other) = packed(), placed(llama())
    inputs["shift_labels"] = inputs["shift_labels"].masked_fill(torch.arange(9) % 4 == 3, -100)
    return step(model, model, inputs, weights), step(other, on_logits(other), inputs, weights)


def of_softcap(rank):
    """verl's own forward multiplies by lm_head.weight alone; the model caps its logits, and so does a server that samples."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager")
    (inputs, weights), (model, other) = packed(), placed(transformers.Gemma2ForCausalLM(config))
    return step(model, model, inputs, weights), step(other, on_logits(other), inputs, weights)


def of_lora(rank):
    """PEFT's wrapper goes around the model after verl has placed the forward."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    (inputs, weights), models = packed(), []
    for model in placed(llama()):
        torch.manual_seed(5)
        models.append(peft.get_peft_model(model, config))
    ours, other = models
    found = step(ours, ours, inputs, weights), step(other, on_logits(other), inputs, weights)
    assert any("lm_head.lora_B" in name for name in found[0])
    return found


def of_engine(rank, remove_padding):
    """verl's FSDP engine: its inputs of the model, and what it makes of the model's output; beside itself, unfused."""
    engine_class = of_verl("verl.workers.engine.fsdp.transformer_impl").FSDPEngineWithLMHead
    tools, functional = of_verl("verl.utils.tensordict_utils"), of_verl("verl.utils.torch_functional")
    lengths, found = (5, 7), []
    ids = [torch.randint(1, V, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    tensors = {"input_ids": ids, "position_ids": [torch.arange(n) for n in lengths]}
    tensors = {name: torch.nested.as_nested_tensor(x, layout=torch.jagged) for name, x in tensors.items()}
    weights = torch.randn(12, generator=torch.Generator().manual_seed(1))
    weights[4] = weights[11] = 0  # nothing follows the last token of a sequence
    for model, fused in zip(placed(llama()), (True, False), strict=True):
        settings = {
            "temperature": T,
            "use_remove_padding": remove_padding,
            "use_fused_kernels": fused,
            "calculate_entropy": True,
        }
        batch = tools.get_tensordict(tensors, settings)
        engine = object.__new__(engine_class)
        engine.pad_to_length, engine.use_ulysses_sp, engine.module = False, False, model
        engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
        engine.compute_entropy_from_logits = functional.entropy_from_logits
        inputs, arguments = engine.prepare_model_inputs(batch)
        out = engine.prepare_model_outputs(model(**inputs, use_cache=False), arguments, batch, None)
        flat = SimpleNamespace(**{name: out[name].values() for name in ("log_probs", "entropy")})
        values = step(model, lambda flat=flat, **_: flat, {}, weights)
        values["log_probs"] = values["log_probs"] * (weights != 0)
        found.append(values)
    return found


def of_megatron(rank):
    """verl's processor of hidden states on two ranks: its region sums their gradients of hidden. Beside full logits."""
    from megatron.core import parallel_state

    torch.cuda.current_device = lambda: "cpu"  # where its regions put what they gather
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    of_verl("verl.models.mcore.model_forward_fused")  # imported before, as by verl's workers, and after
    of_verl("fastpg.integrations.verl").replace_fused_kernels()
    processor = of_verl("verl.models.mcore.model_forward_fused").fused_output_processor
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((8, 1, 16), (62, 16)))
    labels, weights = torch.randint(0, 62, (1, 8), generator=generator), torch.randn(8, generator=generator)
    part = hidden.chunk(2)[rank].clone().requires_grad_()
    layer = SimpleNamespace(weight=weight.chunk(2)[rank].clone().requires_grad_())
    config = SimpleNamespace(sequence_parallel=True, config_logger_dir="")
    out = processor(
        hidden_states=part, output_layer=layer, output_weight=None, labels=labels, config=config,
        context=SimpleNamespace(temperature=T),
    )  # fmt: skip
    (weights * out.log_probs + 0.3 * weights * out.entropy).sum().backward()
    whole, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = ((whole @ head.T)[:, 0] / T).log_softmax(-1)
    want, entropy = logp.gather(1, labels.T)[:, 0], -(logp.exp() * logp).sum(1)
    (weights * want + 0.3 * weights * entropy).sum().backward()
    parallel_state.destroy_model_parallel()
    ours = {"log_probs": out.log_probs, "entropy": out.entropy, "hidden": part.grad, "weight": layer.weight.grad}
    theirs = {"log_probs": want, "entropy": entropy, "hidden": whole.grad.chunk(2)[rank], "weight": head.grad.chunk(2)[rank]}
    return tuple({name: x.detach() for name, x in found.items()} for found in (ours, theirs))


def of_fsdp(rank):
    """The model in verl's FSDP2, which makes a unit of an untied lm_head; ranks have the same batch. Beside one process."""
    from torch.distributed.device_mesh import init_device_mesh

    (inputs, weights), (model, other) = packed(), placed(llama())
    tools = of_verl("verl.utils.fsdp_utils")
    tools.apply_fsdp2(model, {"mesh": init_device_mesh("cpu", (2,)), "reshard_after_forward": True}, {})
    ours = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in step(model, model, inputs, weights).items()}
    return ours, step(other, on_logits(other), inputs, weights)


# ---- the comparisons

OF_ONE = {
    "padded": (of_dense, False, torch.float32, padded),
    "packed": (of_dense, False, torch.float32, packed),
    "tied": (of_dense, True, torch.float32, padded),
    "tied bf16": (of_dense, True, torch.bfloat16, packed),
    "bf16": (of_dense, False, torch.bfloat16, padded),
    "vision": (of_vision,),
    "temperature 0-d": (of_temperatures, torch.tensor(1.3)),
    "temperature per token": (of_temperatures, torch.linspace(0.5, 1.5, 9)[None]),
    "ignored labels": (of_ignored_labels,),
    "softcap": (of_softcap,),
    "LoRA": (of_lora,),
    "engine": (of_engine, True),
    "engine padded": (of_engine, False),
}
OF_TWO = {"FSDP2": (of_fsdp,), "Megatron": (of_megatron,)}


def on_one(rank):
    return run_jobs(OF_ONE, rank)


def on_two(rank):
    return run_jobs(OF_TWO, rank)


@pytest.fixture(scope="module")
def of_one():
    return run_on_ranks(on_one, 1, timeout=180)


@pytest.fixture(scope="module")
def of_two():
    return run_on_ranks(on_two, 2, timeout=180)


def assert_equal(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        scale = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(
            ours[name], want, rtol=0, atol=tolerance * scale, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("name", OF_ONE)
def test_is_verls(of_one, name):
    """verl rounds logits and entropies of 16-bit models to their dtype, and fastpg does not."""
    ((ours, theirs),) = results_of(of_one, name)
    assert_equal(ours, theirs, 4e-2 if "bf16" in name else 5e-6)


@pytest.mark.parametrize("name", OF_TWO)
def test_is_verls_on_two_ranks(of_two, name):
    if name == "Megatron" and not installed("megatron-core"):
        pytest.skip("make frameworks installs megatron-core")
    for ours, theirs in results_of(of_two, name):
        assert_equal(ours, theirs, 5e-6)
