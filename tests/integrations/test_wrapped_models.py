"""Models that are wrapped, compiled, split across devices or gathered by hooks: against the models' own logits."""

import functools
import types

import pytest
import torch
import transformers
from partitioned import gather, partition, replace_deepspeed

from fastpg import CISPO, LMHead, linear_cispo_loss, linear_logprobs, linear_policy_loss
from fastpg.integrations.transformers import causal_lm_policy_loss, patched, token_logprobs

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

V = 61
IDS = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def llama(**changes):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).eval()
    return model.double()


def own_logprobs(model):
    logits = model(input_ids=IDS).logits
    return torch.log_softmax(logits[:, :-1], -1).gather(-1, IDS[:, 1:, None])[..., 0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model):
    """Log-probabilities and gradients of both schedules are those of the model's own logits."""
    want = own_logprobs(model)
    got = token_logprobs(model, IDS).logprobs
    assert torch.allclose(got[:, 1:], want, atol=1e-9)
    weights = torch.rand_like(want)
    old = want.detach() - 0.1
    ratio = (want.detach() - old).exp()
    advantages = torch.randn_like(IDS, dtype=torch.float64)
    of_loss = causal_lm_policy_loss(model, IDS, None, torch.nn.functional.pad(old, (1, 0)), advantages, objective=CISPO())
    full = -(ratio * advantages[:, 1:] * want).mean()
    found = [
        (gradients(model, (weights * got[:, 1:]).sum()), gradients(model, (weights * own_logprobs(model)).sum())),
        (gradients(model, of_loss.loss), gradients(model, full)),
    ]
    for ours, theirs in found:
        assert ours.keys() == theirs.keys()
        assert ours
        for name, gradient in theirs.items():
            assert torch.allclose(ours[name], gradient, atol=1e-9), name


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_trainable_tokens(tied):
    model = llama(tie_word_embeddings=tied)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 58, 60], init_lora_weights=False)
    model = peft.get_peft_model(model, config).double().eval()
    for name, p in model.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(p)
    check(model)
    with model.disable_adapter():
        assert torch.allclose(token_logprobs(model, IDS).logprobs[:, 1:], own_logprobs(model), atol=1e-9)


def test_a_model_that_accelerate_has_placed():
    """Its hooks (those of device_map="auto") wrap every layer's forward."""
    model = accelerate.dispatch_model(llama(), {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert "_hf_hook" in vars(model.lm_head)
    check(model)
    assert LMHead.from_model(model).weight is model.lm_head.weight


def test_a_forward_of_its_own_under_accelerates_hooks_is_refused():
    model = llama()
    model.lm_head.forward = types.MethodType(lambda self, x: 2 * (x @ self.weight.T), model.lm_head)
    model = accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    with pytest.raises(ValueError, match="whose forward is not that of"):
        LMHead.from_model(model)


def test_the_forward_of_another_layer_is_refused():
    model = llama()
    model.lm_head.forward = torch.nn.Linear(16, V).forward
    with pytest.raises(ValueError, match="whose forward is not that of"):
        LMHead.from_model(model)


def test_an_offloaded_head_is_named():
    model = accelerate.cpu_offload(llama(), execution_device="cpu")
    assert model.lm_head.weight.is_meta
    with pytest.raises(ValueError, match="offloaded by accelerate; give lm_head a device in device_map"):
        token_logprobs(model, IDS)


def test_a_compiled_model():
    model = llama()
    compiled = torch.compile(model, backend="eager")
    check(compiled)
    assert LMHead.from_model(compiled).weight is model.lm_head.weight


def test_labels_that_are_shifted_already():
    model = llama()
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    with patched(model):
        out, same = model(input_ids=IDS, shift_labels=shifted), model(input_ids=IDS, labels=IDS)
    assert torch.equal(out.loss, same.loss)
    assert torch.equal(out.log_probs[:, :-1], same.log_probs[:, 1:])
    assert not out.log_probs[:, -1].any()
    own = model(input_ids=IDS, labels=IDS, shift_labels=shifted).loss  # which transformers computes in float32
    assert torch.allclose(out.loss, own.double(), rtol=1e-5)


def test_segment_numbers_are_no_attention_mask():
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
    for use in (
        lambda: token_logprobs(llama(), IDS, segments),
        lambda: causal_lm_policy_loss(llama(), IDS, segments, None, torch.ones(2), objective=CISPO()),
    ):
        with pytest.raises(ValueError, match="attention_mask must hold 0 and 1; other numbers"):
            use()


def test_a_linear_layer_is_a_head():
    layer = torch.nn.Linear(16, 40)
    hidden, tokens = torch.randn(8, 16), torch.randint(0, 40, (8,))
    want = torch.log_softmax(layer(hidden), -1).gather(-1, tokens[:, None])[:, 0]
    for head in (layer, LMHead(layer), LMHead(layer.weight, layer.bias)):
        got = linear_logprobs(hidden, head, tokens).logprobs
        assert torch.allclose(got, want, atol=1e-5)
    got.sum().backward()
    assert layer.bias.grad is not None
    with pytest.raises(ValueError, match=r"head\.bias was given beside a Linear layer"):
        LMHead(layer, torch.zeros(40))
    with pytest.raises(TypeError, match=r"got 'ppo': pass an instance, such as fastpg.CISPO\(ratio_max=5.0\)"):
        linear_policy_loss(hidden, layer, tokens, None, torch.ones(8), objective="ppo")


def test_from_model_sees_through_a_wrapper():
    model = llama()
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert LMHead.from_model(wrapper).weight is model.lm_head.weight
    with pytest.raises(TypeError, match="from_model wants a transformers model, which may be wrapped; got Linear"):
        LMHead.from_model(torch.nn.Linear(2, 2))


def test_a_head_that_is_gathered_for_its_forward(monkeypatch):
    """test_deepspeed.py trains with DeepSpeed itself."""
    model, registered = llama(), replace_deepspeed(monkeypatch)
    want, whole = own_logprobs(model), llama().requires_grad_(False)
    whole.load_state_dict(model.state_dict())
    partition(model.lm_head)
    got = token_logprobs(model, IDS).logprobs[:, 1:]
    assert torch.allclose(got, want, atol=1e-9)
    with pytest.raises(ValueError, match="partitioned by DeepSpeed's ZeRO-3"):
        LMHead.from_model(model)
    for parameter in model.parameters():
        parameter.grad = None
    [(holder, parameter)] = registered
    assert holder is model
    assert parameter is model.lm_head.weight
    gather(model.lm_head.weight)  # DeepSpeed does before the model's backward, since the weight was registered with it
    got.sum().backward()
    whole.requires_grad_()
    own_logprobs(whole).sum().backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-9)


@pytest.mark.parametrize("architecture", ["GraniteMoe", "MiniCPM3"])
def test_architectures(architecture, monkeypatch):
    """One takes use_cache among its keyword arguments, one scales hidden states where others scale logits."""
    if not hasattr(transformers, f"{architecture}Config"):
        pytest.skip(f"this transformers has no {architecture}")
    more = {
        "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
        "MiniCPM3": {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
    }[architecture]
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    built, init = [], transformers.cache_utils.Cache.__init__

    @functools.wraps(init)
    def spy(self, *args, **kwargs):
        built.append(type(self))
        init(self, *args, **kwargs)

    with torch.no_grad():
        want = own_logprobs(model)
        monkeypatch.setattr(transformers.cache_utils.Cache, "__init__", spy)
        assert torch.allclose(token_logprobs(model, IDS).logprobs[:, 1:], want, atol=1e-4)
    assert not built


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch looks at it
@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="Dynamo of torch 2.9 cannot break the graph of the loss")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning")
def test_a_loss_that_checks_is_compiled_with_graph_breaks():
    """So are selected log-probabilities, in test_support, and with `--full` log-probabilities."""
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    tokens, old, advantages = torch.randint(0, 40, (8,)), torch.full((8,), -4.0), torch.randn(8)

    def step():
        return linear_cispo_loss(hidden, weight, tokens, old, advantages).loss

    torch._dynamo.reset()
    got, want = torch.compile(step, backend="eager")(), step()
    assert torch.equal(got, want)
    got.backward()
    assert hidden.grad.isfinite().all()
    torch._dynamo.reset()
