"""lm_heads whose own forward casts to float32: recognised by what they compute, used in float32, and left as they were."""

from __future__ import annotations

import gc
import types
import warnings
import weakref
from itertools import product

import pytest
import torch
import transformers
from ranks import run_on_ranks
from torch import nn
from torch.nn import functional as F

import fastpg
from fastpg import CISPO, LMHead
from fastpg.casting_heads import casts_to_fp32
from fastpg.integrations.transformers import causal_lm_policy_loss, patched, token_logprobs

V, H = 61, 16
f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32


class Casted(nn.Linear):
    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class Guarded(nn.Linear):
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x) if x.dtype == self.weight.dtype == f32 else self.wide(x)

    def wide(self, x):
        return torch.matmul(x.to(f32), self.weight.t().to(f32)) + (0 if self.bias is None else self.bias.to(f32))


class OfItsOwn(nn.Module):
    """No subclass of torch.nn.Linear, and no bias at all."""

    def __init__(self, size: int, vocab: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, size) / size**0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bth,vh->btv", hidden_states.float(), self.weight.float())


def on_the_instance(size: int, vocab: int, bias: bool = False) -> nn.Linear:
    """As TRL does it: a function that closes over the layer."""
    layer = nn.Linear(size, vocab, bias=bias)

    def forward(hidden_states):
        return F.linear(hidden_states.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())

    layer.forward = forward
    return layer


def as_a_method(size: int, vocab: int, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(size, vocab, bias=bias)
    layer.forward = types.MethodType(Casted.forward, layer)
    return layer


CASTING = [Casted, Guarded, OfItsOwn, on_the_instance, as_a_method]


@pytest.mark.parametrize("dtype", [bf16, f16, f32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", CASTING, ids=lambda f: f.__name__)
def test_recognised(make, bias, dtype):
    assert casts_to_fp32(make(H, V, bias=bias).to(dtype))


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_recognised_at_other_sizes(size):
    """Float32's rounding grows with H; a product rounded to bf16 or fp16 stands out at each."""
    for dtype in (bf16, f16):
        assert casts_to_fp32(Casted(size, 9000).to(dtype))
        for rounded in (bf16, f16):
            layer = Casted(size, 9000).to(dtype)
            layer.forward = lambda x, layer=layer, to=rounded: F.linear(x.float(), layer.weight.float()).to(to).float()
            assert not casts_to_fp32(layer)


def test_a_bias_that_bans_tokens():
    layer = Casted(H, V).bfloat16()
    with torch.no_grad():
        layer.bias[3] = -torch.inf
    assert casts_to_fp32(layer)


def refused(change) -> nn.Linear:
    """A layer whose forward is `change` of the layer, its input and the product in float32."""
    layer = nn.Linear(H, V, bias=False).bfloat16()
    layer.forward = lambda x: change(layer, x, F.linear(x.float(), layer.weight.float()))
    return layer


HELD = torch.randn(V, H)
NOT_CASTING = {
    "plain product in 16 bits": lambda layer, x, z: F.linear(x, layer.weight),
    "16 bits, widened": lambda layer, x, z: F.linear(x, layer.weight).float(),
    "narrowed again": lambda layer, x, z: z.to(x.dtype),
    "scaled": lambda layer, x, z: 1.0001 * z,
    "softcap": lambda layer, x, z: 30 * torch.tanh(z / 30),
    "a banned column": lambda layer, x, z: z.index_fill(-1, torch.tensor([V - 2]), -torch.inf),
    "columns of padding": lambda layer, x, z: z.masked_fill(torch.arange(z.shape[-1]) >= V - 3, -torch.inf),
    "one column scaled": lambda layer, x, z: torch.cat([z[..., :5], 1.01 * z[..., 5:6], z[..., 6:]], -1),
    "normalised": lambda layer, x, z: F.linear(F.normalize(x.float(), dim=-1), layer.weight.float()),
    "dropout": lambda layer, x, z: F.dropout(z, 0.5, training=True),
    "another weight": lambda layer, x, z: F.linear(x.float(), HELD),
    "float64": lambda layer, x, z: z.double(),
    "a tuple": lambda layer, x, z: (z,),
    "another shape": lambda layer, x, z: z[:, -1],
    "an error": lambda layer, x, z: z.no_such_thing,
    "the input": lambda layer, x, z: x,
}


@pytest.mark.parametrize("name", NOT_CASTING)
def test_everything_else_is_refused_as_before(name):
    model = llama(refused(NOT_CASTING[name]))
    with pytest.raises(ValueError, match=r"Linear, whose forward is not that of torch\.nn\.Linear; compute the logits"):
        LMHead.from_model(model, fp32_head=True)


def test_a_forward_that_reads_another_layers_weight():
    """A copy of a layer whose forward closes over the original: equal weights today, not after a step."""
    layer = on_the_instance(H, V)
    copy = nn.Linear(H, V, bias=False)
    copy.load_state_dict(layer.state_dict())
    copy.forward = layer.forward
    assert casts_to_fp32(layer)
    assert not casts_to_fp32(copy)


class Watched(Casted):
    """Counts, keeps its input, draws random numbers."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        torch.rand(3)
        return super().forward(x)


def test_asking_changes_nothing():
    layer, hooked = Watched(H, V).bfloat16(), []
    layer.register_forward_hook(lambda *_: hooked.append(1))
    layer.register_forward_pre_hook(lambda *_: hooked.append(1))
    layer.weight.grad = torch.ones_like(layer.weight)
    before, random = dict(vars(layer)), torch.get_rng_state()
    parameters = dict(layer.named_parameters())
    assert casts_to_fp32(layer)
    assert torch.equal(torch.get_rng_state(), random)
    assert vars(layer).keys() == before.keys()
    assert all(vars(layer)[name] is value for name, value in before.items())
    assert all(layer.get_parameter(name) is p for name, p in parameters.items())
    assert (layer.weight.grad == 1).all()
    assert (layer.calls, hooked) == (0, [])
    assert layer.weight.requires_grad


def test_each_layer_is_asked_once():
    calls = []

    class Counted(Casted):
        def forward(self, x):
            calls.append(len(self.weight))
            return super().forward(x)

    layer = Counted(H, V)
    model = llama(layer)
    for _ in range(3):
        assert LMHead.from_model(model).fp32_head
    assert calls == [16, V]  # on random weights, and on its own
    layer.forward = lambda x: F.linear(x.float(), layer.weight.float() * 2)
    with pytest.raises(ValueError, match="whose forward"):
        LMHead.from_model(model)
    del layer.forward
    assert LMHead.from_model(model).fp32_head
    assert calls == [16, V]
    layer.eval()  # a dropout would be known by it
    assert LMHead.from_model(model).fp32_head
    assert calls == [16, V] * 2
    assert casts_to_fp32(Counted(H, V))
    assert calls == [16, V] * 3


class Adapted(Casted):
    """Linear as long as what it holds besides is what it began with."""

    def __init__(self, size: int, vocab: int, kind: str) -> None:
        super().__init__(size, vocab, bias=False)
        if kind == "layer":
            self.more = nn.Linear(size, size, bias=False)
            nn.init.zeros_(self.more.weight)
        elif kind == "parameter":
            self.gain = nn.Parameter(torch.ones(()))
        elif kind == "buffer":
            self.register_buffer("gain", torch.ones(()))
        elif kind == "tensor":
            self.gain = torch.ones(())
        else:
            self.gain = 1.0

    def forward(self, x):
        x = x.float() + self.more(x.float()) if hasattr(self, "more") else x.float()
        return super().forward(x) * getattr(self, "gain", 1.0)


@pytest.mark.parametrize("kind", ["layer", "parameter", "buffer", "tensor"])
def test_what_training_may_change_is_refused(kind):
    assert not casts_to_fp32(Adapted(H, V, kind))


def test_a_number_that_changes_is_asked_again():
    layer = Adapted(H, V, "number")
    assert casts_to_fp32(layer)
    layer.gain = 2.0
    assert not casts_to_fp32(layer)
    layer.gain = 1.0
    assert casts_to_fp32(layer)


def test_layers_are_not_kept():
    layer = on_the_instance(H, V)
    assert casts_to_fp32(layer)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_weights_that_are_not_here():
    """On random weights alone: the class of a layer on the meta device, or whose weight ZeRO-3 has emptied."""
    assert casts_to_fp32(Casted(H, V, device="meta"))
    assert not casts_to_fp32(type("Plain", (nn.Linear,), {"forward": lambda layer, x: x @ layer.weight.T})(H, V, device="meta"))
    emptied = Casted(H, V, bias=False)
    emptied.weight.data = torch.empty(0)
    assert casts_to_fp32(emptied)


# ---- models


def llama(head: nn.Module | None = None, dtype: torch.dtype = f32, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V, "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.3,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
        if head is not None:
            head.weight.copy_(model.lm_head.weight)
            model.lm_head = head
    return model.to(dtype)


def gemma(head: nn.Module | None = None, dtype: torch.dtype = f32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V, "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "final_logit_softcapping": 5.0, "pad_token_id": 0,
    }  # fmt: skip
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, tie_word_embeddings=False))
    if head is not None:
        with torch.no_grad():
            head.weight.copy_(model.lm_head.weight)
        model.lm_head = head
    return model.to(dtype).eval()


IDS = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
CONTEXTS = pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
WAYS = ["token_logprobs", "patched", "causal_lm_policy_loss"]


def asked(way: str, model: nn.Module, autocast: bool, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probabilities (B, T - 1), their gradient with respect to the lm_head's weight, the states that reached the head)."""
    states = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, x: states.append(x[0].detach()))
    with torch.autocast("cpu", bf16, enabled=autocast):
        if way == "token_logprobs":
            logprobs = token_logprobs(model, IDS, **options).logprobs
            loss = -logprobs.sum()
        elif way == "patched":
            with patched(model, **options):
                out = model(input_ids=IDS, labels=IDS, num_items_in_batch=1)
            logprobs, loss = out.log_probs, out.loss
        else:
            out = causal_lm_policy_loss(
                model, IDS, None, None, torch.ones(2), objective=fastpg.Reinforce(), reduction="sum", **options
            )
            logprobs, loss = out.logprobs, out.loss
    hook.remove()
    model.zero_grad()
    loss.backward()
    return logprobs[:, 1:].detach(), model.get_output_embeddings().weight.grad, states[0]


def wanted(model: nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from the states that reached the head, in float64."""
    layer = model.get_output_embeddings()
    weight, bias = layer.weight.detach().double().requires_grad_(), getattr(layer, "bias", None)
    logits, cap = states.double() @ weight.T, getattr(model.config, "final_logit_softcapping", None)
    logits = logits if bias is None else logits + bias.detach().double()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    return logprobs.detach(), torch.autograd.grad(-logprobs.sum(), weight)[0]


def states_of(model: nn.Module, autocast: bool) -> torch.Tensor:
    states = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, x: states.append(x[0].detach()))
    with torch.no_grad(), torch.autocast("cpu", bf16, enabled=autocast):
        model(input_ids=IDS)
    hook.remove()
    return states[0]


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("head", [None, *CASTING], ids=lambda f: "fp32_head=True" if f is None else f.__name__)
@pytest.mark.parametrize("way", WAYS)
@CONTEXTS
def test_models(autocast, way, head, make, dtype):
    """An argument asks for float32, or a head that casts does; in 16-bit models and under autocast too."""
    model = make(None if head is None else head(H, V, bias=True), dtype)
    options = {"fp32_head": True} if head is None else {}
    logprobs, gradient, states = asked(way, model, autocast, **options)
    want, want_gradient = wanted(model, states)
    assert (logprobs - want).abs().max() < 5e-5
    rounding = 1e-5 if dtype == f32 else 4e-3
    assert (gradient.double() - want_gradient).norm() < rounding * want_gradient.norm()
    assert LMHead.from_model(model).fp32_head == (head is not None)


@pytest.mark.parametrize("way", WAYS)
def test_autocast_wins_where_nobody_asks(way):
    """The float32 master weights of ordinary training: bf16 products, to the bit."""
    model = llama()
    logprobs, gradient, states = asked(way, model, True)
    weight = model.lm_head.weight.detach().bfloat16().requires_grad_()
    out = fastpg.linear_policy_loss(
        states[:, :-1].bfloat16(), weight, IDS[:, 1:], None, torch.ones(2), objective=fastpg.Reinforce(), reduction="sum"
    )
    plain = fastpg.linear_logprobs(states[:, :-1].bfloat16(), weight, IDS[:, 1:]).logprobs
    assert torch.equal(logprobs, out.logprobs if way == "causal_lm_policy_loss" else plain)
    assert gradient.dtype == f32
    assert torch.equal(gradient, gradient.bfloat16().float())
    assert (logprobs - wanted(model, states)[0]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@CONTEXTS
def test_lora_on_a_head_that_casts(autocast):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["lm_head"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(Casted(H, V, bias=False)), config).eval()
    head = LMHead.from_model(model)
    assert head.fp32_head
    assert head.lora is not None
    states = states_of(model, autocast).double()
    with torch.autocast("cpu", bf16, enabled=autocast):
        got = token_logprobs(model, IDS).logprobs[:, 1:]
    a, b, scale = head.lora
    logits = states @ head.weight.double().T + scale * (states @ a.double().T) @ b.double().T
    want = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    assert (got - want).abs().max() < 5e-5


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
def test_bf16_lora_beside_an_fp32_head():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)).eval()
    layer = model.get_output_embeddings()
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()
    with pytest.raises(TypeError, match=r"head\.lora's A"):
        LMHead.from_model(model)
    head = LMHead.from_model(model, fp32_head=True)
    assert fastpg.linear_logprobs(torch.randn(3, H).bfloat16(), head, IDS[0, :3]).logprobs.isfinite().all()


# ---- ranks


def on_ranks(rank: int, ranks: int) -> dict[str, float]:
    """Errors of log-probabilities and gradients of a sharded model whose head casts, against float64; also where ranks have no
    row of the weight."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, errors = init_device_mesh("cpu", (ranks,)), {}
    for dtype, units in product((f32, bf16), (("",), ("lm_head", ""))):
        model, whole = (llama(Casted(H, V, bias=False), dtype) for _ in range(2))
        name = f"{dtype} {units}"
        for unit in units:
            fully_shard(model.get_submodule(unit), mesh=mesh)
        head = LMHead.from_model(model)  # sharded: asked without a collective
        assert head.fp32_head
        with torch.autocast("cpu", bf16):
            logprobs = token_logprobs(model, IDS).logprobs
        logprobs.sum().backward()
        want, gradient = wanted(whole, states_of(whole, True))
        errors[f"{name}, logprobs"] = (logprobs[:, 1:] - want).abs().max().item()
        found = model.lm_head.weight.grad.full_tensor().double()
        errors[f"{name}, dW"] = ((found + gradient).norm() / gradient.norm()).item()
    few = nn.Linear(H, 1, bias=False)
    few.__class__ = Casted
    fully_shard(few, mesh=mesh)
    assert casts_to_fp32(few)
    dist.barrier()
    return errors


@pytest.mark.xdist_group("data-parallel ranks")
def test_fsdp():
    for errors in run_on_ranks(on_ranks, 2, 2):
        assert len(errors) == 8
        for name, error in errors.items():  # a gradient of a 16-bit weight is rounded to it
            assert error < (4e-3 if "bfloat16" in name and "dW" in name else 5e-5), errors


def test_objectives_take_it_too():
    """linear_policy_loss of a model with ratios, a bf16 model's head asked to be float32."""
    model = llama(dtype=bf16)
    options = {"objective": CISPO(), "fp32_head": True}
    old = torch.full((2, 7), -4.0)
    out = causal_lm_policy_loss(model, IDS, None, old, torch.tensor([1.0, -1.0]), **options)
    states = states_of(model, False)
    want, _ = wanted(model, states)
    assert (out.logprobs[:, 1:] - want).abs().max() < 5e-5
