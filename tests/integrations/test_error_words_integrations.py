"""Every error of the integrations with transformers and TRL, and of LMHead.from_model, keeps its type and its words; see
`test_error_words`."""

# ruff: noqa: E402 (imports behind importorskip)

import contextlib
import re
import types
import warnings

import pytest
import torch
from raising import never, said

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from fastpg import GSPO, KLCov, LMHead, Support
from fastpg.integrations.transformers import causal_lm_policy_loss, patched, token_logprobs

V, IDS = 61, torch.ones(2, 4, dtype=torch.int64)
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(model_class=transformers.LlamaForCausalLM, head=None, **changes):
    model = model_class(transformers.LlamaConfig(**SIZES | changes)).eval()
    if head is not None:
        model.lm_head = head
    return model


def idle(model):
    """The model, whose backbone may not run."""

    def refuse(*_):
        raise AssertionError("the model ran before the error")

    model.base_model.register_forward_pre_hook(refuse)
    return model


# ---- what is no head

OwnForward = type("OwnForward", (torch.nn.Linear,), {"forward": lambda layer, x: x})
Quantised = type("Quantised", (torch.Tensor,), {})
REPLACED, QUANTISED = torch.nn.Linear(16, V), torch.nn.Linear(16, V)
REPLACED.forward = lambda x: x
QUANTISED.weight = torch.nn.Parameter(torch.ones(V, 16).as_subclass(Quantised))


def adapted(config=peft.LoraConfig, target=("lm_head",), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(llama(), config(r=2, target_modules=list(target), **options)).eval()


def two_adapters():
    model = adapted(init_lora_weights=False)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model


def merged_and_disabled():
    model = adapted(init_lora_weights=False)
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    return model


def adapter_in_units():
    """As FSDP1 wraps every trained layer of an adapter, by PEFT's fsdp_auto_wrap_policy."""
    model = adapted()
    model.get_output_embeddings().lora_A["default"]._fsdp_wrapped_module = None
    return model


HEADS = {
    "none": (
        lambda: llama().model,
        "ValueError: LlamaModel has no output embeddings; pass LMHead(weight, ...) instead of LMHead.from_model(model)",
    ),
    "own-forward": (
        lambda: llama(head=OwnForward(16, V)),
        "ValueError: the output embeddings are MODULE.OwnForward, whose forward is not that of torch.nn.Linear; compute the "
        "logits in full, or pass LMHead(weight, ...) if they are hidden @ weight.T + bias",
    ),
    "sequential": (
        lambda: llama(head=torch.nn.Sequential(torch.nn.Linear(16, V))),
        "ValueError: the output embeddings are torch.nn.modules.container.Sequential, whose forward is not that of "
        "torch.nn.Linear; compute the logits in full, or pass LMHead(weight, ...) if they are hidden @ weight.T + bias",
    ),
    "replaced": (
        lambda: llama(head=REPLACED),
        "ValueError: the output embeddings are torch.nn.modules.linear.Linear, whose forward is not that of torch.nn.Linear; "
        "compute the logits in full, or pass LMHead(weight, ...) if they are hidden @ weight.T + bias",
    ),
    "quantised": (
        lambda: llama(head=QUANTISED),
        "ValueError: the output embeddings hold a weight of type MODULE.Quantised; a plain tensor is wanted",
    ),
    "loha": (
        lambda: adapted(peft.LoHaConfig),
        "ValueError: the output embeddings carry a peft.tuners.loha.layer.Linear; of PEFT's layers only LoRA's Linear is "
        "understood",
    ),
    "two-adapters": (
        two_adapters,
        "ValueError: the output embeddings have 2 active LoRA adapters, ['default', 'other']; one is wanted",
    ),
    "merged": (merged_and_disabled, "ValueError: the output embeddings' LoRA is merged and disabled at once; unmerge it first"),
    "dora": (
        lambda: adapted(use_dora=True),
        "ValueError: the output embeddings' LoRA adapter 'default' is a variant such as DoRA, which is no low-rank update of "
        "the weight",
    ),
    "lora-bias": (
        lambda: adapted(lora_bias=True),
        "ValueError: the output embeddings' LoRA adapter 'default' has a bias (lora_bias=True)",
    ),
    "units": (
        adapter_in_units,
        "ValueError: the output embeddings' LoRA adapter 'default' has units of FSDP1 (FullyShardedDataParallel) of its own; "
        "leave its layers out of auto_wrap_policy, or use FSDP2 (fully_shard)",
    ),
    "dropout": (
        lambda: adapted(lora_dropout=0.5).train(),
        "ValueError: the output embeddings' LoRA adapter 'default' has dropout 0.5 in training mode; set it to 0, or call "
        "model.eval()",
    ),
}
NO_MODELS = {
    "layer": (
        lambda: torch.nn.Linear(3, 3),
        "TypeError: model must be a transformers model or a wrapper around one; got Linear",
    ),
    "encoder": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, d_model=8, num_layers=1)),
        "ValueError: T5ForConditionalGeneration has an encoder; a decoder-only model is wanted",
    ),
}


def enter(model):
    with patched(model):
        pass


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@pytest.mark.parametrize(("make", "words"), (HEADS | NO_MODELS).values(), ids=HEADS | NO_MODELS)
def test_models_that_are_not_understood(make, words):
    """Some layers are asked whether they cast, with a few rows; the model is not run."""
    model, words = make(), words.replace("MODULE", __name__)
    calls = [
        lambda: token_logprobs(idle(model), IDS),
        lambda: enter(model),
        lambda: causal_lm_policy_loss(model, IDS, None, None, IDS.float(), objective=never),
    ]
    if isinstance(model, torch.nn.Linear):
        calls[0] = lambda: token_logprobs(model, IDS)
    elif "encoder" not in words:
        calls.append(lambda: LMHead.from_model(model))
    for call in calls:
        assert said(call, before_work=False) == words


def test_models_that_do_more_than_their_configuration_says():
    def scaled(own, **inputs):
        out = own(**inputs)
        out.logits = out.logits * 1.1
        return out

    for forward, words in (
        (
            scaled,
            "LlamaForCausalLM does something else to its logits than softcap=None, logit_scale=1.0, as read from its "
            "configuration; compute its logits in full",
        ),
        (
            lambda own, **inputs: own(**inputs) and own(**inputs),
            "LlamaForCausalLM must call its output embeddings once, with hidden states (B, T, H) alone",
        ),
        (lambda own, **inputs: IDS, "LlamaForCausalLM.forward does not call its output embeddings"),
        (
            lambda own, **inputs: own(**inputs).to_tuple(),
            "LlamaForCausalLM must return a ModelOutput, with logits of the shape that its lm_head returns",
        ),
    ):
        model = llama()
        model.forward = lambda own=model.forward, forward=forward, **inputs: forward(own, **inputs)
        assert said(lambda model=model: token_logprobs(model, IDS), before_work=False) == f"ValueError: {words}"


# ---- arguments

ONES = torch.ones(2, 4)
NOT_SCORED = torch.tensor([[torch.nan, -1, -1, -1], [torch.nan, -1, torch.nan, -1]])  # what nothing predicts need not be


def support(position, ids, count=8):
    """The whole vocabulary everywhere but there: all tokens are 1, and that of position 0 is not predicted."""
    return {"support": Support.from_lists([ids if n == position else None for n in range(count)])}


OF_BOTH = {
    "ids-flat": ({"input_ids": IDS[0]}, "TypeError: input_ids and labels must be integer tensors (B, T); got torch.int64 (4,)"),
    "ids-float": (
        {"input_ids": ONES},
        "TypeError: input_ids and labels must be integer tensors (B, T); got torch.float32 (2, 4)",
    ),
    "ids-list": ({"input_ids": [[1, 2]]}, "TypeError: input_ids and labels must be integer tensors (B, T); got list ()"),
    "attention-mask": (
        {"attention_mask": IDS[:1]},
        "ValueError: attention_mask must be (B, T) = (2, 4), 0 for padding; got (1, 4)",
    ),
    "completion-mask-int": (
        {"completion_mask": IDS},
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.int64 (use mask.bool())",
    ),
    "completion-mask-shape": (
        {"completion_mask": IDS[:, :3].bool()},
        "ValueError: mask must have the shape of input_ids, (2, 4); got (2, 3)",
    ),
    "completion-mask-device": (
        {"completion_mask": IDS.bool().to("meta")},
        "ValueError: mask is on meta but input_ids is on cpu",
    ),
    "position-ids": ({"position_ids": IDS[:, :3]}, "ValueError: position_ids must be (B, T) = (2, 4) or (1, T); got (2, 3)"),
    "second-sequence": (
        {"attention_mask": IDS, "position_ids": torch.tensor([[0, 1, 0, 1]])},
        "ValueError: position_ids begin a second sequence in a row; with an attention_mask it sees the first: leave the mask "
        "out",
    ),
    "temperature": (
        {"temperature": torch.ones(2)},
        "ValueError: temperature must have the shape of input_ids, (2, 4); got (2,)",
    ),
    "labels": ({"labels": IDS}, "ValueError: ['labels'] cannot be handed on: the model is run once, on all of input_ids"),
    "two-refused": (
        {"return_dict": True, "logits_to_keep": 1},
        "ValueError: ['logits_to_keep', 'return_dict'] cannot be handed on: the model is run once, on all of input_ids",
    ),
    "support-mask": (
        {"support": torch.ones(2, 4, V).bool()},
        "TypeError: support must be a fastpg.Support, which Support.from_mask, from_lists and from_sampler make; got "
        "torch.bool",
    ),
    "support-count": (
        support(2, None, count=6),
        "ValueError: support must have a set for each of the 8 tokens, offsets (9,); got offsets (7,)",
    ),
    # positions are the tokens' own, not those of the states that predict them
    "support-without-the-token": (
        support(2, [3, 4]),
        "ValueError: support leaves out the sampled token 1 at position 2, which then has no probability: "
        "support.with_tokens(tokens) adds it",
    ),
    "support-empty": (
        support(7, []),
        "ValueError: support has an empty set for the token at position 7, which counts: mask it, or set support.whole there",
    ),
    "support-twice": (support(5, [1, 3, 3]), "ValueError: support has the id 3 twice in the set of position 5"),
    "ids, temperature": (
        {"input_ids": ONES, "temperature": torch.ones(2)},
        "TypeError: input_ids and labels must be integer tensors (B, T); got torch.float32 (2, 4)",
    ),
    "temperature, labels": (
        {"temperature": torch.ones(2), "labels": IDS},
        "ValueError: temperature must have the shape of input_ids, (2, 4); got (2,)",
    ),
}
OF_LOSS = {
    "gspo": (
        {"objective": GSPO(0.1, 0.2)},
        "ValueError: objective=GSPO(eps_low=0.1, eps_high=0.2) has one ratio for a sequence, which the one-pass loss does not "
        "know before its last token; use linear_logprobs and policy_loss",
    ),
    "kl-cov": (
        {"objective": KLCov()},
        "ValueError: objective=KLCov(coef=1.0, fraction=0.0002) compares the tokens of the batch, which the one-pass loss "
        "computes chunk by chunk; use linear_logprobs and policy_loss",
    ),
    "entropy-coef": (
        {"entropy_coef": 0.01},
        "ValueError: entropy_coef must be 0 in the one-pass loss; got 0.01: the term -entropy_coef H has the gradient "
        "entropy_coef p_v (log p_v + H) in a row's logits, which is not the row's exponentials times one number, all that one "
        "pass has of it; use linear_logprobs(..., entropy=True) and policy_loss(..., entropies=, entropy_coef=)",
    ),
    "old": ({"old_logprobs": ONES[:, :3]}, "ValueError: old_logprobs must have the shape of input_ids, (2, 4); got (2, 3)"),
    "ref": ({"ref_logprobs": ONES[0]}, "ValueError: ref_logprobs must have the shape of input_ids, (2, 4); got (4,)"),
    "rollout": ({"rollout_weights": ONES[0]}, "ValueError: rollout_weights must have the shape of input_ids, (2, 4); got (4,)"),
    "rollout-logprobs": (
        {"rollout_logprobs": ONES[:, :3], "old_logprobs": ONES},
        "ValueError: rollout_logprobs must have the shape of input_ids, (2, 4); got (2, 3)",
    ),
    "rollout-twice": (
        {"rollout_logprobs": ONES, "rollout_weights": ONES, "old_logprobs": ONES},
        "ValueError: rollout_logprobs and rollout_weights were both given: weights are made of rollout_logprobs; pass one of "
        "them, and further factors inside rollout_correction",
    ),
    "rollout-without-old": (
        {"rollout_logprobs": ONES},
        "ValueError: old_logprobs must be given with rollout_logprobs in the one-pass loss: without them the weights are made "
        "of the current log-probabilities, which are not known before the sweep; pass old_logprobs, or use linear_logprobs and "
        "policy_loss",
    ),
    "rollout-not-scored": (  # the place of the token in input_ids
        {"rollout_logprobs": NOT_SCORED, "old_logprobs": ONES},
        "ValueError: rollout_logprobs must be finite where a token counts; got nan at (1, 2), a token that the engine did not "
        "score: mask it, or give it the weight 0 by rollout_correction=functools.partial(fastpg.rollout.truncated_weights, "
        'high=None, unscored="zero")',
    ),
    "sequence-ids": ({"sequence_ids": IDS[0]}, "ValueError: sequence_ids must have the shape of input_ids, (2, 4); got (4,)"),
    "aux-loss": (
        {"add_aux_loss": True},
        "ValueError: LlamaForCausalLM has no router_aux_loss_coef: there is no router loss to add",
    ),
}
# said by the loss, which the model's own forward calls in the place of its lm_head: the backbone has run
IN_THE_FORWARD = {
    "advantages": (
        {"advantages": torch.ones(3)},
        "ValueError: advantages must be per token (2, 4) or per sequence (2,); got shape (3,)",
    ),
    "reduction": (
        {"reduction": "mean"},
        "ValueError: reduction must be one of token-mean, seq-mean-token-mean, seq-mean-token-sum, sum; got 'mean'",
    ),
    "temperature": ({"temperature": 0}, "ValueError: temperature must be a positive number; got 0"),
    "backend": ({"backend": "cuda"}, 'ValueError: backend must be "torch", "triton" or None; got \'cuda\''),
    "workspace": ({"workspace": 0}, "ValueError: workspace must be a positive number of bytes; got 0"),
}


@pytest.mark.parametrize(("changes", "words"), (OF_BOTH | OF_LOSS).values(), ids=OF_BOTH | OF_LOSS)
def test_arguments_that_do_not_fit(changes, words):
    model = idle(llama())
    of_loss = {"attention_mask": None, "old_logprobs": None, "advantages": torch.ones(2), "objective": never}
    assert said(lambda: causal_lm_policy_loss(model, **{"input_ids": IDS} | of_loss | changes)) == words
    if words in [case[1] for case in OF_BOTH.values()]:
        assert said(lambda: token_logprobs(model, **{"input_ids": IDS} | changes)) == words


def test_ids_of_a_support_outside_of_the_models_vocabulary():
    """The token's own position is named; the model has run, as its head alone knows how many tokens there are."""
    given = {"attention_mask": None, "old_logprobs": None, "advantages": torch.ones(2), "objective": never}
    for position in (1, 6):
        words = f"ValueError: support.ids must be in [0, 61); got 61 in the set of position {position}"
        sets = support(position, [1, V])
        assert said(lambda sets=sets: causal_lm_policy_loss(llama(), IDS, **given | sets), before_work=False) == words
        assert said(lambda sets=sets: token_logprobs(llama(), IDS, **sets), before_work=False) == words
    for position in (0, 4):  # the first tokens of rows, which nothing predicts
        assert token_logprobs(llama(), IDS, **support(position, [V, V])).logprobs.isfinite().all()


@pytest.mark.parametrize(("changes", "words"), IN_THE_FORWARD.values(), ids=IN_THE_FORWARD)
def test_arguments_that_the_loss_refuses(changes, words):
    given = {"attention_mask": None, "old_logprobs": None, "advantages": torch.ones(2), "objective": never}
    assert said(lambda: causal_lm_policy_loss(llama(), IDS, **given | changes), before_work=False) == words


def test_patched_models():
    model = llama()
    again = "RuntimeError: this LlamaForCausalLM is patched already; leave that context, or undo() that patch, before"
    with patched(model):
        assert said(lambda: enter(model)) == again
        assert said(lambda: token_logprobs(model, IDS)) == again
        words = "ValueError: logits_to_keep is not understood; pass labels (B, T), -100 where unwanted"
        for refused in ({"logits_to_keep": 1}, {"logits_to_keep": IDS[0]}):
            assert said(lambda refused=refused: model(input_ids=IDS, **refused)) == words
        for labels, words in (
            (IDS[0], "TypeError: input_ids and labels must be integer tensors (B, T); got torch.int64 (4,)"),
            (IDS + V, "ValueError: tokens must be in [0, 61) or -100; got 62 at position (0, 0)"),
        ):
            assert said(lambda labels=labels: model(input_ids=IDS, labels=labels), before_work=False) == words


# ---- TRL


@pytest.fixture
def trl():
    return pytest.importorskip("trl.trainer.utils", reason="needs the extra [trl]")


def trainer_of(model, ref_model=None, **args):
    """What use_fastpg reads of a trainer."""
    accelerator = types.SimpleNamespace(autocast=contextlib.nullcontext)
    return types.SimpleNamespace(model=model, ref_model=ref_model, args=types.SimpleNamespace(**args), accelerator=accelerator)


def fused(utils, model=None, **options):
    model = llama() if model is None else model
    utils.add_fused_lm_head(model, **options)
    return model


def test_trainers_that_do_not_fit(trl):
    from fastpg.integrations.trl import build_trainer, use_fastpg

    for trainer, words in (
        (llama(), "TypeError: use_fastpg wants a trainer of TRL's; got LlamaForCausalLM"),
        (
            trainer_of(llama()),
            "ValueError: SimpleNamespace's models have no fused lm_head of TRL's; use_fastpg wants a trainer that has, such as "
            "SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer or RLOOTrainer",
        ),
        (
            trainer_of(fused(trl), use_liger_kernel=True),
            "ValueError: use_liger_kernel=True patches the model when training starts, and would drop fastpg's head; use one",
        ),
    ):
        assert said(lambda trainer=trainer: use_fastpg(trainer)) == words
    words = "TypeError: build_trainer wants the model itself, loaded before; got str"
    assert said(lambda: build_trainer(types.SimpleNamespace, "Qwen/Qwen3-0.6B")) == words


def test_models_of_trainers_that_do_not_fit(trl):
    from fastpg.integrations.trl import use_fastpg

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.3
            return output

    class Alone(transformers.LlamaForCausalLM):
        base_model = property(lambda self: self)

    words = "ValueError: Alone has no backbone of its own (base_model), whose hidden states fastpg needs"
    assert said(lambda: use_fastpg(trainer_of(fused(trl, llama(Alone))))) == words
    # the reference is looked at before the policy's logits are compared
    layer = (
        "ValueError: the output embeddings are torch.nn.modules.container.Sequential, whose forward is not that of "
        "torch.nn.Linear; compute the logits in full, or pass LMHead(weight, ...) if they are hidden @ weight.T + bias"
    )
    replaced = fused(trl, llama(head=torch.nn.Sequential(torch.nn.Linear(16, V))))
    assert said(lambda: use_fastpg(trainer_of(replaced)), before_work=False) == layer
    assert said(lambda: use_fastpg(trainer_of(fused(trl), replaced)), before_work=False) == layer
    difference = said(lambda: use_fastpg(trainer_of(fused(trl, llama(Scaled, initializer_range=0.3)))), before_work=False)
    assert re.sub(r"by \d\S*;", "by SOME;", difference) == (
        "ValueError: Scaled's own logits are not those of LMHead.from_model on its hidden states: log-probabilities differ by "
        "SOME; the model does something between them that fastpg does not know"
    )
    trainer = trainer_of(fused(trl))
    with use_fastpg(trainer):
        words = "ValueError: the trainer's model has fastpg's head already; undo that one before placing another"
        assert said(lambda: use_fastpg(trainer)) == words
        words = "ValueError: the trainer's ref_model has fastpg's head already; undo that one before placing another"
        assert said(lambda: use_fastpg(trainer_of(fused(trl), trainer.model))) == words


def test_a_trl_without_the_contract(trl, monkeypatch):
    import trl as package

    from fastpg.integrations.trl import use_fastpg

    needed = (
        "ImportError: fastpg.integrations.trl needs trl >= 1.16, the first whose trainers call the model with "
        "fused_lm_head=True"
    )
    model = llama()
    program = "def make(temperature):\n    def forward(*_, **__):\n        return temperature\n    return forward"
    module = {"__name__": "trl.trainer.utils"}  # another version's, whose forward closes over less
    exec(program, module)
    model.forward = module["make"](1.0)
    assert (
        said(lambda: use_fastpg(trainer_of(model)))
        == f"{needed}; the installed version's fused forward has no 'cast_lm_head_to_fp32'"
    )
    monkeypatch.setattr(package, "__version__", "1.7.0")
    monkeypatch.delattr(trl, "FusedCausalLMOutput")
    assert said(lambda: use_fastpg(None)) == f"{needed}; found trl 1.7.0"
