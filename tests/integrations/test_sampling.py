"""recorded_support: what transformers' `generate` has kept, against its own scores and against the model's logits."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from raising import said

import fastpg
from fastpg import CISPO, Support
from fastpg.integrations.sampling import recorded_support
from fastpg.integrations.transformers import causal_lm_policy_loss, token_logprobs

V, PAD, STOP = 61, 0, 2
PROMPTS = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, 10], [PAD, 11, 12, 13]])
PADDING = (PROMPTS != PAD).long()
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": STOP,
}  # fmt: skip
WARPERS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7, "top_k": 0, "temperature": 1.3},
    "min-p": {"min_p": 0.1, "top_k": 0},
    "typical": {"typical_p": 0.6, "top_k": 0},
    "all at once": {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 0.8},
    "none": {"top_k": 0},
    "a suppressed token": {"top_k": 0, "suppress_tokens": [9]},
    "several sequences of a prompt": {"top_k": 5, "num_return_sequences": 3},
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).double().eval()


def sample(model, **options):
    """(sequences, scores (B, steps, V), the recorded support)."""
    options = {"attention_mask": PADDING, "do_sample": True, "max_new_tokens": 7} | options
    with recorded_support(model) as kept:
        out = model.generate(PROMPTS, return_dict_in_generate=True, output_scores=True, **options)
    return out.sequences, torch.stack(out.scores, 1), kept.support(out.sequences)


def attention_of(sequences):
    """The prompts' padding is left out, and what follows a stop token."""
    sampled = sequences[:, PROMPTS.shape[1] :]
    going_on = (sampled == STOP).cumsum(1) - (sampled == STOP).long() == 0
    return torch.cat([PADDING.repeat_interleave(len(sequences) // len(PROMPTS), 0), going_on.long()], 1)


def of_completions(sequences):
    mask = attention_of(sequences).bool()
    mask[:, : PROMPTS.shape[1]] = False
    return mask


@pytest.mark.parametrize("options", WARPERS.values(), ids=WARPERS)
def test_the_sets_are_the_scores_that_are_left(model, options):
    sequences, scores, support = sample(model, **options)
    first = PROMPTS.shape[1]
    mask = support.mask(V).view(*sequences.shape, V)
    assert mask[:, :first].all()
    assert torch.equal(mask[:, first:], scores > -torch.inf)
    assert support.ids.dtype == torch.int32


def test_top_k_is_that_of_the_models_own_logits(model):
    sequences, _, support = sample(model, top_k=4)
    attention = attention_of(sequences)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(sequences, attention_mask=attention, position_ids=positions).logits
    best = torch.zeros(*sequences.shape, V, dtype=torch.bool)
    best[:, 1:].scatter_(2, logits[:, :-1].topk(4).indices, True)
    counted = of_completions(sequences)
    assert counted.sum() > 10
    assert torch.equal(support.mask(V).view_as(best)[counted], best[counted])
    assert support.sizes().max() == 4


@pytest.mark.parametrize("options", WARPERS.values(), ids=WARPERS)
def test_a_policys_ratio_to_itself_is_one(model, options):
    sequences, scores, support = sample(model, **options)
    attention, counted = attention_of(sequences), of_completions(sequences)
    old = torch.zeros(sequences.shape, dtype=torch.float64)
    sampled = sequences[:, PROMPTS.shape[1] :, None]
    old[:, PROMPTS.shape[1] :] = scores.double().log_softmax(-1).gather(-1, sampled)[..., 0]  # what the sampler reports
    given = {"completion_mask": counted, "temperature": options.get("temperature", 1.0)}

    new = token_logprobs(model, sequences, attention, support=support, **given)
    assert torch.equal(new.mask, counted)
    ratio = (new.logprobs - old).exp()[counted]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)  # scores are in single precision
    out = causal_lm_policy_loss(
        model, sequences, attention, old, torch.ones(len(sequences)), objective=CISPO(), support=support, **given
    )
    metrics = out.metrics.to_dict()
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)

    without = (token_logprobs(model, sequences, attention, **given).logprobs - old).exp()[counted]
    if support.ids.numel():
        assert without.mean() < 0.999
    else:  # the whole vocabulary was kept
        torch.testing.assert_close(without, ratio, rtol=0, atol=1e-12)


def test_padding_after_the_end_has_positions_of_its_own(model):
    """Of a row that ended early: one set a position, and those of the other rows stay where they are."""
    with torch.no_grad():
        model.lm_head.weight[STOP] *= 3
    torch.manual_seed(4)
    sequences, scores, support = sample(model, top_k=3, max_new_tokens=12)
    lengths = of_completions(sequences).sum(1)
    assert lengths.min() < lengths.max()
    assert len(support.offsets) == sequences.numel() + 1
    assert torch.equal(support.mask(V).view(*sequences.shape, V)[:, PROMPTS.shape[1] :], scores > -torch.inf)
    given = {"completion_mask": of_completions(sequences), "support": support}
    assert token_logprobs(model, sequences, attention_of(sequences), **given).logprobs.isfinite().all()
    given["completion_mask"] = torch.ones_like(sequences, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"support leaves out the sampled token {PAD} at position"):
        token_logprobs(model, sequences, **given)


def test_columns_may_be_cut_off(model):
    with recorded_support(model) as kept:
        sequences = model.generate(PROMPTS, attention_mask=PADDING, do_sample=True, top_k=3, max_new_tokens=7)
    whole, part = kept.support(sequences), kept.support(sequences[:, :6])
    masks = [x.mask(V).view(len(PROMPTS), -1, V) for x in (whole, part)]
    assert torch.equal(masks[0][:, :6], masks[1])
    assert not masks[1][:, 4:].all()


def test_greedy_decoding_keeps_the_whole_vocabulary(model):
    sequences, _, support = sample(model, do_sample=False, top_k=5, top_p=0.5)
    assert support.whole.all()
    assert len(support.ids) == 0
    assert len(support.whole) == sequences.numel()


def test_a_processor_of_the_user_is_recorded_with_the_warpers(model):
    class Odd(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, ::2] = -torch.inf
            return scores

    _, scores, support = sample(model, top_k=4, logits_processor=transformers.LogitsProcessorList([Odd()]))
    assert (support.ids % 2 == 1).all()
    assert len(support.ids) == 4 * scores.shape[0] * scores.shape[1]


def test_embeddings_as_prompts_have_no_positions(model):
    embeddings = model.get_input_embeddings()(PROMPTS)
    with recorded_support(model) as kept:
        sequences = model.generate(inputs_embeds=embeddings, attention_mask=PADDING, do_sample=True, top_k=3, max_new_tokens=5)
    support = kept.support(sequences)
    assert sequences.shape[1] <= 5
    assert (support.sizes() == 3).all()
    assert len(support.offsets) == sequences.numel() + 1


def test_sampling_is_the_same_with_and_without(model):
    options = {"attention_mask": PADDING, "do_sample": True, "top_p": 0.8, "max_new_tokens": 6}
    torch.manual_seed(3)
    plain = model.generate(PROMPTS, **options)
    torch.manual_seed(3)
    with recorded_support(model):
        recorded = model.generate(PROMPTS, **options)
    assert torch.equal(plain, recorded)


def test_the_last_call_counts(model):
    options = {"attention_mask": PADDING, "do_sample": True, "max_new_tokens": 6, "eos_token_id": V + 1}
    with recorded_support(model) as kept:
        first = model.generate(PROMPTS, top_k=2, **options)
        of_first = kept.support(first)
        second = model.generate(PROMPTS, top_k=3, **options)
        assert kept.support(second).sizes().max() == 3
        with pytest.raises(ValueError, match=r"differ from what it sampled at position \(0, \d\)"):
            kept.support(first)
        with pytest.raises(ValueError, match=r"differ from what it sampled at position \(0, 1\)"):
            kept.support(second.flip(0))
        joined = Support.cat([of_first, kept.support(second)])
        with pytest.raises(RuntimeError, match="only once"):
            model.generate(PROMPTS, top_k=3, stopping_criteria=[fail], **options)
        with pytest.raises(RuntimeError, match="nothing is recorded"):
            kept.support(second)
    both = torch.cat([first, second])
    mask = torch.ones_like(both, dtype=torch.bool)
    mask[:, : PROMPTS.shape[1]] = False
    attention = torch.cat([torch.cat([PADDING, torch.ones(3, 6, dtype=torch.int64)], 1)] * 2)
    assert token_logprobs(model, both, attention, completion_mask=mask, support=joined).logprobs.isfinite().all()


def fail(input_ids, scores, **_):
    raise RuntimeError("only once")


def test_the_model_is_as_before(model):
    before = dict(vars(model))
    with pytest.raises(KeyError), recorded_support(model):
        raise KeyError
    assert vars(model) == before
    model.generate = own = model.generate  # an attribute of the instance, as some wrapper's
    with recorded_support(model):
        assert model.generate is not own
        words = "RuntimeError: this LlamaForCausalLM is being recorded already; leave that context before"
        assert said(lambda: recorded_support(model).__enter__()) == words
    assert vars(model)["generate"] is own
    assert "_get_logits_processor" not in vars(model)
    again = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with recorded_support(again):
        pass
    gone = weakref.ref(again)
    del again
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit:DeprecationWarning")  # peft's, torch's own
def test_through_the_wrappers(model):
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for wrapper in (lora, torch.compile(model)):
        with recorded_support(wrapper) as kept:
            sequences = wrapper.generate(input_ids=PROMPTS, attention_mask=PADDING, do_sample=True, top_k=3, max_new_tokens=3)
        assert kept.support(sequences).sizes().max() == 3


def test_what_is_recorded_is_small(model):
    """No step leaves a tensor of the vocabulary's size."""
    with recorded_support(model) as kept:
        model.generate(PROMPTS, attention_mask=PADDING, do_sample=True, top_k=3, max_new_tokens=7)
    for step in kept._found.steps:
        held = sum(x.untyped_storage().nbytes() for x in step)
        assert held <= 3 * 3 * 4 + 4 * 8 + 3  # ids, offsets and a flag


ONE_MORE = {"attention_mask": PADDING, "max_new_tokens": 1}
OTHER_MODES = {
    "beams": ({"num_beams": 2}, "num_beams=2 is beam sample"),
    "beam search": ({"num_beams": 2, "do_sample": False}, "num_beams=2 is beam search"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2 is assisted generation"),
}


@pytest.mark.parametrize(("options", "words"), OTHER_MODES.values(), ids=OTHER_MODES)
def test_other_decoding(model, options, words):
    with recorded_support(model) as kept:
        assert said(lambda: model.generate(PROMPTS, **ONE_MORE | {"do_sample": True} | options)) == (
            f"ValueError: recorded_support wants generate to take one token for each row and step; {words}, which reorders "
            "rows or takes several tokens: leave it out"
        )
        assert said(lambda: kept.support(PROMPTS)).startswith("RuntimeError: nothing is recorded")


def test_assistants_and_loops_that_are_not_generates(model):
    with recorded_support(model) as kept:
        words = said(lambda: model.generate(PROMPTS[1:2], do_sample=True, max_new_tokens=2, assistant_model=model))
        assert "assistant_model=LlamaForCausalLM is assisted generation" in words
        words = "ValueError: recorded_support knows generate's own loop alone; leave custom_generate='some/repository' out"
        assert said(lambda: model.generate(PROMPTS, custom_generate="some/repository")) == words
        words = "ValueError: recorded_support knows generate's own loop alone; leave cache_implementation='paged' out"
        assert said(lambda: model.generate(PROMPTS, cache_implementation="paged")) == words
        words = "RuntimeError: recorded_support records generate, and not generate_batch, whose rows come and go"
        assert said(lambda: model._get_logits_processor(model.generation_config)) == words
        processors = model.generate(PROMPTS, attention_mask=PADDING, do_sample=True, max_new_tokens=2)
        assert kept.support(processors) is not None


def test_error_words(model):
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, d_model=8, num_layers=1))
    for no_model, words in (
        (torch.nn.Linear(2, 2), "TypeError: model must be a transformers model or a wrapper around one; got Linear"),
        (t5, "ValueError: T5ForConditionalGeneration has an encoder; a decoder-only model is wanted"),
        (model.model, "TypeError: model must have transformers' generate; LlamaModel has none"),
    ):
        assert said(lambda no_model=no_model: recorded_support(no_model).__enter__()) == words
    with recorded_support(model) as kept:
        words = "RuntimeError: nothing is recorded: within recorded_support(model), call the model's generate before"
        assert said(lambda: kept.support(PROMPTS)) == words
        model.generate(PROMPTS, attention_mask=PADDING, do_sample=True, max_new_tokens=2, eos_token_id=V + 1)
    wanted = "sequences must be those of the last call of generate, (3, 6), of which the first 4 tokens are prompts"
    for sequences, words in (
        ([[1]], "TypeError: sequences must be an integer tensor (B, T); got list ()"),
        (torch.ones(3, 4), "TypeError: sequences must be an integer tensor (B, T); got torch.float32 (3, 4)"),
        (PROMPTS[:2], f"ValueError: {wanted}; got (2, 4)"),
        (PROMPTS[:, :3], f"ValueError: {wanted}; got (3, 3)"),
        (torch.ones(3, 7, dtype=torch.int64), f"ValueError: {wanted}; got (3, 7)"),
    ):
        assert said(lambda sequences=sequences: kept.support(sequences)) == words


# ---- Support.cat and Support.select


def some_support():
    sets = [[3, 1], None, [], [5], [0, 2, 4], None]
    return Support.from_lists(sets), [None if x is None else set(x) for x in sets]


def sets_of(support):
    ids, edges = support.ids.tolist(), support.offsets.tolist()
    whole = [False] * (len(edges) - 1) if support.whole is None else support.whole.tolist()
    return [None if w else set(ids[a:b]) for w, a, b in zip(whole, edges[:-1], edges[1:], strict=True)]


def test_select_and_cat():
    support, sets = some_support()
    order = [4, 0, 0, 5, 2]
    found = support.select(torch.tensor(order))
    assert sets_of(found) == [sets[i] for i in order]
    assert len(found.ids) == found.offsets[-1] == 7
    matrix = support.select(torch.arange(6).view(2, 3)[[1]])  # the second row of (2, 3)
    assert sets_of(matrix) == sets[3:]
    assert sets_of(support.select(torch.empty(0, dtype=torch.int64))) == []
    plain = Support(support.ids, support.offsets)
    assert plain.select(torch.tensor([1, 0])).whole is None
    assert sets_of(Support.cat([support, support.shifted(), plain])) == [*sets, *sets[1:], None, *sets_of(plain)]
    assert Support.cat([plain, plain]).whole is None
    assert sets_of(support.shifted().select(torch.tensor([3, 0]))) == [sets[4], sets[1]]
    with pytest.raises(TypeError, match=r"positions must be an int32 or int64 tensor; got torch\.bool"):
        support.select(torch.ones(6, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"supports must be a sequence of at least one fastpg\.Support; got list"):
        Support.cat([])
    with pytest.raises(IndexError):
        support.select(torch.tensor([6]))


def test_a_mini_batch_with_selected_sets_is_that_part_of_the_batch():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 5, 8, dtype=torch.float64), torch.randn(V, 8, dtype=torch.float64)
    tokens, rows = torch.randint(0, V, (4, 5)), torch.tensor([3, 1])
    allowed = torch.rand(4, 5, V) < 0.3
    support = Support.from_mask(allowed.scatter(2, tokens[..., None], True))
    part = support.select(torch.arange(20).view(4, 5)[rows])
    whole = fastpg.linear_logprobs(hidden, weight, tokens, support=support).logprobs
    torch.testing.assert_close(fastpg.linear_logprobs(hidden[rows], weight, tokens[rows], support=part).logprobs, whole[rows])
