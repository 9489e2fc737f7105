"""`use_fastpg` beside SkyRL's own HFModelWrapper, and the fused log-probability beside SkyRL's, in processes of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from frameworks import installed, of_skyrl
from ranks import results_of, run_jobs, run_on_ranks

from fastpg.integrations import skyrl

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(not installed("skyrl", "loguru", "jaxtyping"), reason="make frameworks installs skyrl"),
    pytest.mark.xdist_group("skyrl"),
]

IMPORTED_BY_FUNCTIONS = ("megatron.core.tensor_parallel", "transformers.models.llama.modeling_llama")
V, T, ACTIONS = 61, 0.7, 5
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes)).to(dtype)


def gemma():
    torch.manual_seed(0)
    config = {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES | config))


def with_lora():
    import peft

    torch.manual_seed(5)
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))


def batch():
    """Prompts padded on the left, responses on the right, and weights that are 0 where SkyRL's loss mask is."""
    ids = torch.randint(1, V, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0] * 2 + [1] * 9, [1] * 8 + [0] * 3, [0] + [1] * 9 + [0]])
    weights = torch.randn(3, ACTIONS, generator=torch.Generator().manual_seed(2)) * mask[:, -ACTIONS:]
    return ids * mask, mask, weights


def step(wrapper, entropy=0.3, requires_grad=True, **changes):
    """The results of a step as SkyRL's policy worker takes it, and the gradients of the parameters by name."""
    ids, mask, weights = batch()
    given = {"temperature": T, "return_output": True, "compute_entropy": True, "entropy_requires_grad": requires_grad} | changes
    logprobs, out = wrapper(ids, ACTIONS, mask, **given)
    loss = (weights * logprobs.float()).sum()
    found = {"logprobs": (logprobs * (weights != 0)).detach().float()}
    if given["compute_entropy"]:
        of_actions = out["entropy"][:, -ACTIONS - 1 : -1] * (weights != 0)
        assert of_actions.requires_grad == requires_grad
        loss = loss + entropy * (weights * of_actions.float()).sum()
        found["entropy"] = of_actions.detach().float()
    loss.backward()
    return found | {name: p.grad.float() for name, p in wrapper.named_parameters() if p.grad is not None}


def wrapped(model, packed=False, ranks=1):
    wrapper_class = of_skyrl("workers.model_wrapper").HFModelWrapper
    return wrapper_class(model, remove_microbatch_padding=packed, use_flash_attention_2=packed, sequence_parallel_size=ranks)


# ---- what is done in the process that has SkyRL: ours and SkyRL's


def of_wrapper(rank, make, packed=False, **settings):
    other = wrapped(make(), packed)
    ours = copy.deepcopy(other)
    skyrl.use_fastpg(ours)
    return step(ours, **settings), step(other, **settings)


def of_the_reference(rank):
    """A reference worker's call: log-probabilities alone, of as many actions as a list of one says."""
    ids, mask, weights = batch()
    other = wrapped(llama())
    ours = copy.deepcopy(other)
    skyrl.use_fastpg(ours)
    with torch.no_grad():
        found = [{"logprobs": wrapper(ids, [ACTIONS], mask) * (weights != 0)} for wrapper in (ours, other)]
    return found


def of_sequence_parallelism(rank, packed):
    """Ranks share each sequence. A model without attention needs no kernels for that."""
    of_skyrl("distributed.ulysses.utils").set_ulysses_sequence_parallel_group(torch.distributed.group.WORLD)
    other = wrapped(llama(num_hidden_layers=0), packed, ranks=2)
    ours = copy.deepcopy(other)
    skyrl.use_fastpg(ours)
    return step(ours), step(other)


def of_fsdp(rank):
    """The lm_head is a unit of its own; both ranks have the batch of the one process beside them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    other = wrapped(llama())
    ours, mesh = copy.deepcopy(other), init_device_mesh("cpu", (2,))
    for part in (*ours.model.model.layers, ours.model.lm_head, ours.model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    skyrl.use_fastpg(ours)
    return {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in step(ours).items()}, step(other)


def of_megatron(rank, packed, dtype):
    """SkyRL's functions on two ranks that hold half of the rows each, in Megatron's region, before and after."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    tools, found = of_skyrl("distributed.megatron.model_utils"), []
    generator, group = torch.Generator().manual_seed(1), torch.distributed.group.WORLD
    length = 12 if packed else 10
    states, weight = torch.randn(length, 1, 16, generator=generator), torch.randn(62, 16, generator=generator).to(dtype)
    ids, weights = torch.randint(0, 62, (1, length), generator=generator), torch.randn(2, 9, generator=generator)
    weights = weights if packed else weights[:1]
    own = tools._fused_lm_head_logprob_apply
    for replaced in (False, True):
        tools._fused_lm_head_logprob_apply = own
        if replaced:
            skyrl.replace_fused_lm_head()
        part, rows = states.chunk(2)[rank].clone().requires_grad_(), weight.chunk(2)[rank].clone().requires_grad_()
        hidden = gather_from_sequence_parallel_region(part, group=group).transpose(0, 1)
        given = {"vocab_start_index": 31 * rank, "vocab_end_index": 31 * (rank + 1), "chunk_size": 4, "temperature": T}

        def call(packed=packed, given=given, hidden=hidden, rows=rows, inference_only=False):
            if packed:
                return tools.from_parallel_hidden_to_logprobs_packed_sequences(
                    hidden, rows, ids, torch.tensor([0, 4, 12]), 10, group=group, inference_only=inference_only, **given
                )
            return tools.from_parallel_hidden_to_logprobs(
                hidden, rows, ids, tp_group=group, inference_only=inference_only, **given
            )

        logprobs = call()
        assert not call(inference_only=True).requires_grad or not replaced
        (weights * logprobs).sum().backward()
        found.append({"logprobs": logprobs.detach(), "hidden": part.grad, "weight": rows.grad.float()})
    return found[1], found[0]


# ---- the comparisons

OF_ONE = {
    "padded": (of_wrapper, llama),
    "packed": (of_wrapper, llama, True),
    "tied": (of_wrapper, lambda: llama(tie_word_embeddings=True)),
    "bf16": (of_wrapper, lambda: llama(torch.bfloat16)),
    "tied bf16 packed": (of_wrapper, lambda: llama(torch.bfloat16, tie_word_embeddings=True), True),
    "softcap": (of_wrapper, gemma),
    "LoRA": (of_wrapper, with_lora, True),
    "reference": (of_the_reference,),
}
SETTINGS = {"entropy is logged": {"requires_grad": False, "entropy": 0.0}, "no entropy": {"compute_entropy": False}}
OF_TWO = {
    "sequence parallelism": (of_sequence_parallelism, False),
    "sequence parallelism, packed": (of_sequence_parallelism, True),
    "FSDP2": (of_fsdp,),
    "Megatron": (of_megatron, False, torch.float32),
    "Megatron bf16": (of_megatron, False, torch.bfloat16),
    "Megatron packed": (of_megatron, True, torch.float32),
}


def of_settings(rank, name):
    return of_wrapper(rank, llama, **SETTINGS[name])


def on_one(rank):
    return run_jobs(OF_ONE | {name: (of_settings, name) for name in SETTINGS}, rank)


def on_two(rank):
    if installed("megatron-core"):
        torch.cuda.current_device = lambda: "cpu"  # where its regions put what they gather
        return run_jobs(OF_TWO, rank)
    return run_jobs({name: job for name, job in OF_TWO.items() if "Megatron" not in name}, rank)


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


@pytest.mark.parametrize("name", [*OF_ONE, *SETTINGS])
def test_is_skyrls(of_one, name):
    """SkyRL rounds log-probabilities and entropies of a 16-bit model to its dtype, and fastpg does not."""
    ((ours, theirs),) = results_of(of_one, name)
    assert_equal(ours, theirs, 4e-2 if "bf16" in name else 5e-6)


@pytest.mark.parametrize("name", OF_TWO)
def test_is_skyrls_on_two_ranks(of_two, name):
    if "Megatron" in name and not installed("megatron-core"):
        pytest.skip("make frameworks installs megatron-core")
    for ours, theirs in results_of(of_two, name):
        assert_equal(ours, theirs, 4e-2 if "bf16" in name else 5e-6)
