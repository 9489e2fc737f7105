"""Sets of tokens with whole models: fastpg.integrations.transformers against the models' own logits, -inf outside of sets."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers
from sampled_sets import MIXED, random_sets
from torch.utils._python_dispatch import TorchDispatchMode

from fastpg import CISPO, PPOClip, Reinforce, Support
from fastpg.integrations.transformers import causal_lm_policy_loss, token_logprobs

V, B, T = 61, 3, 9
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma3 text, softcap": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "phi, bias": lambda: transformers.PhiConfig(**SIZES),
}
MODELS = pytest.mark.parametrize("name", CONFIGS)
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "packed"])


def build(name: str = "llama") -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: what is 0 or 1 would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@dataclass
class Batch:
    """Three padded rows, or one row of three sequences; the tokens that a sampler drew, and its sets."""

    ids: torch.Tensor
    positions: torch.Tensor
    completion: torch.Tensor  # tokens with a set
    sequence_ids: torch.Tensor
    attention_mask: torch.Tensor | None

    @classmethod
    def of(cls, layout: str) -> Batch:
        ids, mask = torch.randint(3, V, (B, T)), torch.ones(B, T, dtype=torch.int64)
        mask[1, 6:] = 0
        mask[2, :2] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        completion = (positions > 1) & (mask == 1) & (torch.rand(B, T) < 0.9)
        sequences = torch.arange(B)[:, None].expand(B, T)
        if layout == "padded":
            return cls(ids, positions, completion, sequences, mask)
        there = mask.bool()
        return cls(ids[there][None], positions[there][None], completion[there][None], sequences[there][None], None)

    def __post_init__(self) -> None:
        flat = self.completion.flatten()
        self.members = random_sets(self.ids.flatten(), V, MIXED)
        garbage = [[], [5, 5], [-3, V], None]
        sets = [row.nonzero()[:, 0] for row in self.members]
        self.support = Support.from_lists([x if k else garbage[n % 4] for n, (x, k) in enumerate(zip(sets, flat, strict=True))])

    def inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of both functions."""
        found = {"input_ids": self.ids, "attention_mask": self.attention_mask, "completion_mask": self.completion}
        return found | ({"position_ids": self.positions} if self.attention_mask is None else {}) | {"support": self.support}

    def wanted(self, model: torch.nn.Module, T: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities, entropies), (B, T), of the model's own logits, -inf outside of each token's set."""
        inputs = {"input_ids": self.ids, "attention_mask": self.attention_mask, "position_ids": self.positions}
        logits = model(**inputs, use_cache=False).logits  # with a cache, transformers does not see that sequences are packed
        members = self.members.view(*self.ids.shape, V)[:, 1:]
        logp = torch.where(members, logits[:, :-1] / T, -torch.inf).log_softmax(-1)
        own = logp.gather(-1, self.ids[:, 1:, None])[..., 0]
        entropy = -(logp.exp() * torch.where(members, logp, 0)).sum(-1)
        return torch.nn.functional.pad(torch.stack([own, entropy]), (1, 0)).unbind()


def same_gradients(model: torch.nn.Module, got: torch.Tensor, want: torch.Tensor) -> None:
    parameters = dict(model.named_parameters())
    found, full = (torch.autograd.grad(loss, list(parameters.values())) for loss in (got, want))
    scale = max(g.abs().max() for g in full)
    for name, a, b in zip(parameters, found, full, strict=True):
        assert (a - b).abs().max() <= 1e-6 * scale, name  # the norms of transformers are fp32 in float64 models


@MODELS
@LAYOUTS
@pytest.mark.parametrize("check", [True, False])
def test_token_logprobs(name, layout, check):
    """What stands at other tokens' places is not read, whatever it is."""
    model, batch = build(name), Batch.of(layout)
    out = token_logprobs(model, **batch.inputs(), temperature=0.7, entropy=True, check=check)
    logprobs, entropies = batch.wanted(model, 0.7)
    assert torch.equal(out.mask, batch.completion)
    keep = batch.completion
    assert (out.logprobs - logprobs)[keep].abs().max() < 1e-9
    assert (out.entropy - entropies)[keep].abs().max() < 1e-9
    assert not out.logprobs[~keep].any()
    certain = keep & (batch.members.sum(1) == 1).view(keep.shape)
    assert certain.any()
    assert not out.logprobs[certain].any()
    a, b = torch.randn(2, *keep.shape, dtype=torch.float64)
    same_gradients(model, (a * out.logprobs + b * out.entropy).sum(), (a * logprobs + b * entropies)[keep].sum())


@MODELS
@LAYOUTS
@pytest.mark.parametrize("check", [True, False])
def test_policy_loss(name, layout, check):
    model, batch = build(name), Batch.of(layout)
    keep, (logprobs, _) = batch.completion, batch.wanted(model)
    old, advantages = (logprobs - 0.5 * torch.randn(keep.shape)).detach(), torch.tensor([1.5, -0.5, 0.7])
    options = batch.inputs() | {"old_logprobs": old.masked_fill(~keep, torch.nan), "advantages": advantages, "check": check}
    options |= {"sequence_ids": batch.sequence_ids} if layout == "packed" else {}
    out = causal_lm_policy_loss(model, **options, objective=CISPO(1.5), reduction="seq-mean-token-mean")
    ratio = (logprobs - old).exp().clamp(max=1.5).detach()
    terms = torch.where(keep, ratio * advantages[batch.sequence_ids].double() * logprobs, 0)
    sequences = [batch.sequence_ids == n for n in range(B)]
    want = -sum(terms[s].sum() / (keep & s).sum() for s in sequences) / B
    assert abs(out.loss - want) < 1e-9
    assert (out.logprobs - torch.where(keep, logprobs, 0)).abs().max() < 1e-9
    assert out.metrics["recomputed_tokens"] == 0
    same_gradients(model, out.loss, want)


@pytest.mark.parametrize("function", [token_logprobs, causal_lm_policy_loss], ids=lambda f: f.__name__)
def test_sets_are_checked_once(function):
    """That is a sort of all ids. It is done before the model runs, whose head then compares the largest id alone."""
    model, batch, sorts = build(), Batch.of("padded"), []
    ids = batch.support.ids.numel()

    class Sorts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "sort" and args[0].numel() == ids:
                sorts.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    given = batch.inputs()
    if function is causal_lm_policy_loss:
        given |= {"old_logprobs": None, "advantages": torch.ones(B), "objective": CISPO()}
    with Sorts(), torch.no_grad():
        function(model, **given)
    assert sorts == [ids]


@LAYOUTS
def test_the_ratio_of_a_policy_to_itself_is_one(layout):
    """What token_logprobs finds are the old log-probabilities of the loss; over the whole vocabulary they are not."""
    model, batch = build(), Batch.of(layout)
    old, given = token_logprobs(model, **batch.inputs()).logprobs.detach(), batch.inputs()
    given |= {"old_logprobs": old, "advantages": torch.randn(batch.ids.shape), "objective": PPOClip()}
    assert causal_lm_policy_loss(model, **given).metrics["ratio_mean"].item() == pytest.approx(1, abs=1e-6)
    assert causal_lm_policy_loss(model, **given | {"support": None}).metrics["ratio_mean"] < 0.9


@pytest.mark.parametrize("kind", ["vLLM", "SGLang"])
def test_from_the_samplers_output_to_the_loss(kind):
    """A set is put where its token is; the functions shift it. A completion without sets has the whole vocabulary."""
    model, batch = build(), Batch.of("padded")
    outputs = []
    for row in range(B):
        sets = [batch.members[T * row + t].nonzero()[:, 0].tolist() for t in batch.completion[row].nonzero()[:, 0].tolist()]
        sets = [[] if len(ids) == V else ids for ids in sets]
        offsets = torch.tensor([0, *map(len, sets)]).cumsum(0).tolist()
        outputs.append(sets if kind == "SGLang" else {"token_ids": [x for ids in sets for x in ids], "offsets": offsets})
    outputs[1] = None
    support = Support.from_sampler(outputs, batch.completion)
    out = token_logprobs(model, **batch.inputs() | {"support": support.with_tokens(batch.ids)})
    batch.members[T : 2 * T] = True
    assert torch.equal(support.mask(V)[batch.completion.flatten()], batch.members[batch.completion.flatten()])
    assert (out.logprobs - batch.wanted(model)[0])[batch.completion].abs().max() < 1e-9


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, of transformers
def test_adapters_and_narrow_models():
    """LoRA on the lm_head; and a float16 loss, which takes two passes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model, batch = peft.get_peft_model(build(), config).eval(), Batch.of("padded")
    out = token_logprobs(model, **batch.inputs())
    logprobs, _ = batch.wanted(model)
    assert (out.logprobs - logprobs)[batch.completion].abs().max() < 1e-9
    trained = [p for p in model.parameters() if p.requires_grad]
    a, b = (torch.autograd.grad(x[batch.completion].sum(), trained) for x in (out.logprobs, logprobs))
    assert all((x - y).abs().max() < 1e-6 * y.abs().max() for x, y in zip(a, b, strict=True))
    narrow = build().half()
    given = batch.inputs() | {"old_logprobs": None, "advantages": torch.ones(B)}
    loss = causal_lm_policy_loss(narrow, **given, objective=Reinforce()).loss
    assert abs(loss + batch.wanted(narrow)[0][batch.completion].float().mean()) < 2e-2
    loss.backward()
    assert narrow.lm_head.weight.grad.isfinite().all()
