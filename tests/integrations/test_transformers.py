"""fastpg.integrations.transformers and LMHead.from_model, on tiny random models: against the models' own logits."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import run_on_ranks
from torch.distributed.fsdp import fully_shard

import fastpg
from fastpg import CISPO, GSPO, LMHead
from fastpg.integrations.transformers import causal_lm_policy_loss, patch, patched, token_logprobs

peft = pytest.importorskip("peft")

V = 61
IDS = torch.ones(2, 4, dtype=torch.int64)
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
HEADS = SIZES | {"head_dim": 8}
GEMMA = HEADS | {"final_logit_softcapping": 3.0}
SIGHT = {f"num_{x}": 1 for x in ("hidden_layers", "attention_heads")} | {"image_size": 8, "patch_size": 4, "hidden_size": 8}
GPT2 = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
EXPERTS = {"router_aux_loss_coef": 0.3, "num_experts_per_tok": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3, tied": lambda: transformers.Qwen3Config(**HEADS, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gemma3 text": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "gemma3": lambda: transformers.Gemma3Config(text_config=HEADS, vision_config=SIGHT, mm_tokens_per_image=4),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=V, bos_token_id=1, eos_token_id=2, **GPT2),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    "qwen3 moe": lambda: transformers.Qwen3MoeConfig(**HEADS, **EXPERTS, num_experts=4, moe_intermediate_size=8),
    "phi, bias": lambda: transformers.PhiConfig(**SIZES),
}
MOE = ["mixtral", "qwen3 moe"]


def build(name: str, dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    make = transformers.AutoModelForCausalLM.from_config  # gives Gemma3ForConditionalGeneration for gemma3
    has_choice = int(transformers.__version__.split(".")[0]) >= 5  # of the experts' code; the other one has no float64
    options = {"experts_implementation": "eager"} if name in MOE and has_choice else {}
    model = make(CONFIGS[name](), dtype=dtype, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: what is 0 or 1 would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


class Batch(NamedTuple):
    ids: torch.Tensor
    mask: torch.Tensor  # attention_mask
    positions: torch.Tensor
    predicted: torch.Tensor  # which tokens have a prediction


def padded_batch(left: bool = True) -> Batch:
    """Three rows: without padding, with 3 padding tokens on the right, and with 2 on the left (or right)."""
    ids, mask = torch.randint(3, V, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    mask[2, slice(2) if left else slice(7, None)] = 0
    predicted = mask.bool()
    predicted[:, 0] = False
    predicted[2, 2] = not left
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), predicted)


def full_logprobs(model: torch.nn.Module, batch: Batch, temperature: Any = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies), (B, T), of the model's own logits."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
    logp = torch.log_softmax(logits[:, :-1] / temperature, -1)
    values = torch.stack([logp.gather(-1, batch.ids[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)])
    return torch.nn.functional.pad(values, (1, 0)).unbind()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(model: torch.nn.Module, got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-9) -> list[str]:
    """The gradients of two losses are the same for all parameters; names those that have one."""
    found, full = gradients(model, got), gradients(model, want)
    scale = max(g.abs().max() for g in full.values())
    assert found.keys() == full.keys()
    for name, gradient in full.items():
        assert (found[name] - gradient).abs().max() <= tolerance * scale, name
    return list(full)


TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_entropies_and_all_gradients(name, dtype):
    model, tolerance = build(name, dtype), TOLERANCE[dtype]
    left = name != "gemma2" or dtype != torch.float64  # transformers: eager attention to nothing is NaN in float64
    batch = padded_batch(left)
    out = token_logprobs(model, batch.ids, batch.mask, temperature=0.7, entropy=True)
    want, entropies = full_logprobs(model, batch, 0.7)
    assert torch.equal(out.mask, batch.predicted)
    assert out.logprobs.dtype == dtype
    for got, full in ((out.logprobs, want), (out.entropy, entropies)):
        assert (got - full)[out.mask].abs().max() <= tolerance
        assert (got[~out.mask] == 0).all()
    if left:  # what padding must not change
        alone = token_logprobs(model, batch.ids[2:, 2:], temperature=0.7)
        assert (alone.logprobs - out.logprobs[2:, 2:]).abs().max() <= 1e-4
    a, b = torch.randn(2, *batch.ids.shape, dtype=dtype)
    full = (a * want + b * entropies)[out.mask].sum()
    names = same_gradients(model, (a * out.logprobs + b * out.entropy).sum(), full, tolerance)
    assert any(model.get_parameter(name) is model.get_output_embeddings().weight for name in names)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3, tied", "gemma3 text", "phi, bias", "mixtral"])
def test_policy_loss_and_all_gradients(name, dtype):
    model, batch = build(name, dtype), padded_batch()
    completions = torch.arange(9).expand(3, 9) > 3
    kept = batch.predicted & completions
    old = (full_logprobs(model, batch)[0] - torch.randn(3, 9)).detach()
    advantages = torch.tensor([1.5, -0.5, 0.7])
    options = {"objective": CISPO(1.5), "completion_mask": completions, "reduction": "seq-mean-token-mean"}
    out = causal_lm_policy_loss(model, batch.ids, batch.mask, old.masked_fill(~kept, torch.nan), advantages, **options)
    logprobs, _ = full_logprobs(model, batch)
    ratio = (logprobs - old).exp().clamp(max=1.5).detach()
    terms = torch.where(kept, ratio * advantages[:, None].to(dtype) * logprobs, 0)
    want = -(terms.sum(1) / kept.sum(1)).mean()
    assert abs(out.loss - want) <= TOLERANCE[dtype]
    assert (out.logprobs - torch.where(kept, logprobs, 0)).abs().max() <= TOLERANCE[dtype]
    assert out.metrics["tokens"] == kept.sum()
    same_gradients(model, out.loss, want, TOLERANCE[dtype])


def test_what_stands_at_a_token_stands_at_it_everywhere():
    """Per-token temperatures, advantages, reference and rollout weights, against policy_loss of ready log-probabilities."""
    model, batch = build("llama"), padded_batch()
    options = {"completion_mask": torch.rand(3, 9) > 0.3, "temperature": torch.rand(3, 9, dtype=torch.float64) + 0.5}
    old, advantages, ref, rollout = torch.randn(4, 3, 9, dtype=torch.float64)
    ready = token_logprobs(model, batch.ids, batch.mask, **options)
    full, _ = full_logprobs(model, batch, options["temperature"][:, 1:, None])
    assert (ready.logprobs - full)[ready.mask].abs().max() < 1e-9
    others = {"objective": fastpg.PPOClip(), "kl": fastpg.KLPenalty(0.2), "ref_logprobs": ref, "rollout_weights": rollout}
    want = fastpg.policy_loss(ready.logprobs, old, advantages, mask=ready.mask, **others)
    got = causal_lm_policy_loss(model, batch.ids, batch.mask, old, advantages, **others, **options)
    assert abs(got.loss - want.loss) < 1e-9
    same_gradients(model, got.loss, want.loss)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3 moe"])
def test_packed_sequences_are_the_sequences_apart(name):
    model, lengths = build(name), [5, 3, 1, 4]
    ids, positions = torch.randint(3, V, (1, 13)), torch.cat([torch.arange(n) for n in lengths])[None]
    sequence_ids, parts = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None], ids[0].split(lengths)
    out = token_logprobs(model, ids, position_ids=positions, entropy=True)
    apart = [token_logprobs(model, part[None], entropy=True) for part in parts]
    assert torch.equal(out.mask, positions > 0)
    assert (out.logprobs - torch.cat([x.logprobs for x in apart], 1)).abs().max() < 1e-9
    assert (out.entropy - torch.cat([x.entropy for x in apart], 1)).abs().max() < 1e-9
    # sequences without a token are in no mean: 3 of 4
    old, advantages = torch.randn(1, 13), torch.randn(4)
    options = {"position_ids": positions, "sequence_ids": sequence_ids, "reduction": "seq-mean-token-mean"}
    got = causal_lm_policy_loss(model, ids, None, old, advantages, objective=CISPO(), **options)
    want = sum(
        causal_lm_policy_loss(model, part[None], None, o[None], a[None], objective=CISPO()).loss
        for part, o, a in zip(parts, old[0].split(lengths), advantages, strict=True)
    )
    assert abs(got.loss - want / 3) < 1e-9
    # the norms of transformers are fp32 in float64 models
    same_gradients(model, got.loss, want / 3, 1e-6)


@pytest.mark.parametrize("name", MOE)
def test_router_loss(name):
    model, batch = build(name), padded_batch()
    labels, asked = torch.where(batch.predicted, batch.ids, -100), {"output_router_logits": True}
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions, "labels": labels}
    own = model(**inputs, **asked)
    logprobs, _ = full_logprobs(model, batch)
    without = -logprobs[batch.predicted].mean()  # own.loss is fp32
    want = without + 0.3 * own.aux_loss
    assert abs(own.loss - want) < 1e-5
    assert torch.equal(token_logprobs(model, batch.ids, batch.mask, **asked).aux_loss, own.aux_loss)
    with patched(model):
        got = model(**inputs, **asked)
    assert len(got.router_logits) == 2
    inputs = (model, batch.ids, batch.mask, None, torch.ones(3))
    on_policy = causal_lm_policy_loss(*inputs, objective=fastpg.Reinforce(), add_aux_loss=True)
    assert abs(got.loss - want) < 1e-9
    assert abs(on_policy.loss - want) < 1e-9
    same_gradients(model, got.loss + 2 * on_policy.loss, 3 * want, 1e-6)  # as above
    assert torch.equal(on_policy.metrics["aux_loss"], own.aux_loss)
    assert abs(causal_lm_policy_loss(*inputs, objective=fastpg.Reinforce()).loss - without) < 1e-9


def adapted(target=("q_proj", "lm_head"), name: str = "llama", **options: Any) -> peft.PeftModel:
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=list(target), init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(build(name), config).eval()


def another_active(target=("q_proj",), active: Any = "other") -> peft.PeftModel:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=list(target), init_lora_weights=False))
    model.base_model.set_adapter(active)
    return model


def merged(disabled: bool = False) -> peft.PeftModel:
    model = adapted()
    model.merge_adapter()
    if disabled:
        model.base_model.disable_adapter_layers()
    return model


ADAPTED = {
    "backbone": lambda: adapted(["q_proj"]),
    "lm_head": adapted,
    "lm_head, softcap": lambda: adapted(name="gemma3 text"),
    "tied": lambda: adapted(name="qwen3, tied"),
    "lm_head with a bias": lambda: adapted(name="phi, bias"),
    "dropout in eval": lambda: adapted(lora_dropout=0.5),
    "merged": merged,
    "another adapter, not on the head": another_active,
    "another adapter": lambda: another_active(["lm_head"]),
    "modules_to_save": lambda: adapted(["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("case", ADAPTED)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapted_models(case):
    model, batch = ADAPTED[case](), padded_batch()
    if case == "modules_to_save":  # the copy that is trained differs from the original
        with torch.no_grad():
            model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    out = token_logprobs(model, batch.ids, batch.mask, entropy=True)
    want, entropies = full_logprobs(model, batch)
    assert (out.logprobs - want)[out.mask].abs().max() < 1e-9
    if case == "merged":
        return
    names = same_gradients(model, (out.logprobs + out.entropy).sum(), (want + entropies)[out.mask].sum())
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    with model.disable_adapter():
        base = token_logprobs(model, batch.ids, batch.mask).logprobs
        want, _ = full_logprobs(model, batch)
    assert (base - want)[out.mask].abs().max() < 1e-9
    assert (base - out.logprobs).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: another_active(["lm_head"], ["default", "other"]), "2 active LoRA adapters"),
        (lambda: adapted(use_dora=True), "DoRA"),
        (lambda: adapted(lora_bias=True), "lora_bias"),
        (lambda: adapted(lora_dropout=0.5).train(), "dropout 0.5 in training"),
        (lambda: peft.get_peft_model(build("llama"), peft.LoHaConfig(r=2, target_modules=["lm_head"])), "loha.layer.Linear"),
        (lambda: merged(disabled=True), "merged and disabled"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
def test_adapters_that_are_not_understood(make, said):
    model = make()
    for use in (LMHead.from_model, lambda m: token_logprobs(m, IDS)):
        with pytest.raises(ValueError, match=said):
            use(model)


def test_patched_models_answer_with_log_probabilities_of_labels():
    model, batch, rows = build("gemma3 text"), padded_batch(), []
    labels = torch.where(batch.mask.bool(), batch.ids, -100)
    inputs = {"attention_mask": batch.mask, "position_ids": batch.positions}
    own = model(input_ids=batch.ids, labels=labels, output_hidden_states=True, **inputs)
    hook = model.lm_head.register_forward_hook(lambda layer, x, out: rows.append(x[0].shape[:2]))
    with patched(model, entropy=True):
        out = model(batch.ids, labels=labels, output_hidden_states=True, **inputs)  # input_ids by position
        summed = model(input_ids=batch.ids, labels=labels, num_items_in_batch=torch.tensor(50), **inputs)
        bare = model(input_ids=batch.ids, **inputs)
    hook.remove()
    assert rows == [(1, 1)] * 3  # all that the lm_head multiplied
    assert out.logits is None
    assert torch.equal(out.last_hidden_state, own.hidden_states[-1])
    want, entropies = full_logprobs(model, batch)
    counted = labels != -100
    counted[:, 0] = False
    assert (out.log_probs - torch.where(counted, want, 0)).abs().max() < 1e-9
    assert (out.entropy - torch.where(counted, entropies, 0)).abs().max() < 1e-9
    loss = -want[counted].mean()
    assert abs(out.loss - loss) < 1e-9
    assert abs(own.loss - loss) < 1e-5  # it is fp32
    assert abs(summed.loss - loss * counted.sum() / 50) < 1e-9
    assert bare.loss is bare.log_probs is bare.logits is None
    same_gradients(model, out.loss, loss)


def assert_untouched(model: transformers.PreTrainedModel) -> None:
    assert "forward" not in vars(model)
    assert not {**model.lm_head._forward_hooks, **model.lm_head._forward_pre_hooks}
    assert model(input_ids=IDS).logits.shape == (2, 4, V)


def test_the_patch_is_undone_and_not_doubled():
    model, calls = build("llama"), []
    with patched(model) as same:
        assert same is model
        with pytest.raises(RuntimeError, match="patched already"), patched(model):
            pass
        with pytest.raises(RuntimeError, match="patched already"):
            token_logprobs(model, IDS)
        assert model(input_ids=IDS).logits is None  # the outer one is still there
    assert_untouched(model)
    with pytest.raises(ValueError, match="61"), patched(model):
        model(input_ids=IDS, labels=IDS + V)  # fails inside the model's forward
    assert_untouched(model)
    own = model.forward
    model.forward = wrapper = lambda **inputs: calls.append(1) or own(**inputs)
    token_logprobs(model, IDS)
    assert calls == [1]  # a forward that is there already is run
    assert vars(model)["forward"] is wrapper


def test_models_that_do_more_than_their_configuration_says():
    def scaled(own, **inputs):
        out = own(**inputs)
        out.logits = out.logits * 1.1
        return out

    for forward, said in (
        (scaled, "does something else"),
        (lambda own, **inputs: own(**inputs) and own(**inputs), "embeddings once"),
        (lambda own, **inputs: IDS, "does not call"),
        (lambda own, **inputs: own(**inputs).to_tuple(), "must return a ModelOutput"),
    ):
        model = build("llama")
        model.forward = partial(forward, model.forward)
        with pytest.raises(ValueError, match=said):
            token_logprobs(model, IDS)
    model = build("gemma3")  # this one applies no softcap, its text model on its own would
    model.config.text_config.final_logit_softcapping = 3.0
    with pytest.raises(ValueError, match=r"returns logits without the final_logit_softcapping=3\.0 of its text model"):
        token_logprobs(model, IDS)


def with_head(layer: torch.nn.Module) -> transformers.PreTrainedModel:
    model = build("llama", torch.float32)
    model.lm_head = layer
    return model


OwnForward, Quantised = type("OwnForward", (torch.nn.Linear,), {"forward": lambda layer, x: x}), type("Q", (torch.Tensor,), {})
REPLACED, QUANTISED = torch.nn.Linear(16, V), torch.nn.Linear(16, V)
REPLACED.forward = lambda x: x
QUANTISED.weight = torch.nn.Parameter(torch.ones(V, 16).as_subclass(Quantised))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: build("llama").model, "no output embeddings"),
        (lambda: with_head(OwnForward(16, V)), "OwnForward, whose forward"),
        (lambda: with_head(torch.nn.Sequential(torch.nn.Linear(16, V))), "Sequential, whose forward"),
        (lambda: with_head(REPLACED), "Linear, whose forward"),
        (lambda: with_head(QUANTISED), "hold a weight of type .*Q; a plain tensor is wanted"),
        (lambda: torch.nn.Linear(3, 3), "must be a transformers model"),
        (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, d_model=8)), "has an encoder"),
    ],
)  # fmt: skip
def test_models_that_are_not_understood(make, said):
    model = make()
    with pytest.raises((TypeError, ValueError), match=said):
        token_logprobs(model, IDS)
    with pytest.raises((TypeError, ValueError), match=said), patched(model):
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input_ids": IDS[0]}, r"input_ids and labels must be integer tensors \(B, T\)"),
        ({"attention_mask": IDS[:1]}, r"attention_mask must be \(B, T\)"),
        ({"completion_mask": IDS}, "mask must be a bool"),
        ({"position_ids": IDS[:, :3]}, "position_ids must be"),
        ({"attention_mask": IDS, "position_ids": torch.tensor([[0, 1, 0, 1]])}, "leave the mask out"),
        ({"temperature": torch.ones(2)}, "temperature must have the shape of input_ids"),
        ({"labels": IDS}, r"\['labels'\] cannot be handed on"),
        ({"old_logprobs": torch.zeros(2, 3)}, "old_logprobs must have the shape of input_ids"),
        ({"objective": GSPO(0.1, 0.1)}, "one-pass"),
        ({"add_aux_loss": True}, "no router_aux_loss_coef"),
    ],
)
def test_arguments_that_do_not_fit(options, said):
    model = build("llama")
    of_loss = {"attention_mask": None, "old_logprobs": None, "advantages": torch.ones(2), "objective": CISPO()}
    with pytest.raises((TypeError, ValueError), match=said):
        causal_lm_policy_loss(model, **{"input_ids": IDS} | of_loss | options)
    if not options.keys() & {"old_logprobs", "objective", "add_aux_loss"}:
        with pytest.raises((TypeError, ValueError), match=said):
            token_logprobs(model, **{"input_ids": IDS} | options)
    with pytest.raises(ValueError, match="not understood"), patched(model):
        model(input_ids=IDS, logits_to_keep=1)
    assert_untouched(model)


def test_silenced_tokens_are_asked_for():
    model, ids = build("llama"), torch.randint(3, V, (2, 6))
    old = token_logprobs(model, ids).logprobs.detach() - 1  # ratios of e: beyond the clip where the advantage is positive
    given = {"model": model, "input_ids": ids, "attention_mask": None, "old_logprobs": old}
    options = {"advantages": torch.tensor([1.0, -1.0]), "objective": fastpg.PPOClip()}
    saved = [causal_lm_policy_loss(**given, **options, skip_silenced=s).metrics["work_saved"] for s in (True, False)]
    assert saved[0] > 0.3
    assert saved[1] == 0


def wrapped_gradients(rank: int) -> dict[str, float]:
    """Largest difference of DDP's and FSDP's gradients from the mean over ranks of a plain model's."""

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        torch.manual_seed(rank)
        ids, old = torch.randint(3, V, (2, 6)), -3 * torch.rand(2, 6)
        with patched(model):
            nll = model(input_ids=ids, labels=ids).loss
        with patch(model):
            nll = nll + model(input_ids=ids, labels=ids).loss
        return nll + causal_lm_policy_loss(model, ids, None, old, torch.tensor([1.0, -2.0]), objective=CISPO()).loss

    errors = {}
    for name, wrapper in [*product(["llama", "qwen3, tied"], ["ddp", "fsdp"]), ("llama", "fsdp, the head a unit")]:
        torch.manual_seed(5)
        model = build(name)
        want = gradients(model, loss_of(model))
        for gradient in want.values():
            dist.all_reduce(gradient)
        model.zero_grad()
        units = [*model.model.layers, *([model.lm_head] if "head" in wrapper else []), model]
        sharded = [fully_shard(part) for part in units if "fsdp" in wrapper]
        wrapped = sharded[-1] if sharded else torch.nn.parallel.DistributedDataParallel(model)
        loss_of(wrapped).backward()
        found = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}
        errors[f"{name} {wrapper}"] = max((found[n] - want[n] / 2).abs().max().item() for n in want)
    return errors


def test_ddp_and_fsdp():
    for errors in run_on_ranks(wrapped_gradients, 2):
        assert len(errors) == 5
        assert all(error < 1e-9 for error in errors.values()), errors


@pytest.mark.xdist_group("smollm2")
def test_smollm2(smollm2):
    model, tokenizer = smollm2
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    texts = ["Paris is in France.", "One, two, three, four, five, six, seven"]
    ids, mask = tokenizer(texts, padding=True, return_tensors="pt").values()
    with torch.no_grad():
        out = token_logprobs(model, ids, mask, entropy=True)
        want, entropies = full_logprobs(model, Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), out.mask))
    assert out.mask.sum() == mask.sum() - 2
    assert (out.logprobs > -0.2).logical_and(out.mask).any()  # it can count
    assert (out.logprobs - want)[out.mask].abs().max() < 5e-5
    assert (out.entropy - entropies)[out.mask].abs().max() < 5e-5
