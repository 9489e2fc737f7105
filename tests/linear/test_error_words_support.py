"""Errors of `support=` and of `Support`, word by word and before any work; see `test_error_words`."""

from types import SimpleNamespace

import pytest
import torch
from raising import LINEAR, V, call, of_shape, said

from fastpg import Support, kept, linear_cispo_loss, linear_logprobs, selective_logprobs

FUNCTIONS = pytest.mark.parametrize("function", [*LINEAR, selective_logprobs], ids=lambda f: f.__name__)
SETS = [[0, 1], [1], None, [5, 3], [4], [6, 5]]  # of the tokens 0 to 5, in two rows


def changed(**sets: object) -> Support:
    """The sets with some replaced: _3=[...] for that of position 3."""
    return Support.from_lists([sets.get(f"_{n}", ids) for n, ids in enumerate(SETS)])


GOOD = Support.from_lists(SETS)
VALUES = {
    "ids above": (changed(_3=[3, V]), "ValueError: support.ids must be in [0, 7); got 7 in the set of position 3"),
    "ids below": (changed(_0=[0, -1]), "ValueError: support.ids must be in [0, 7); got -1 in the set of position 0"),
    "ids of 64 bits": (
        Support(GOOD.ids.long() + 2**32 * (GOOD.ids == 6), *GOOD[1:]),
        "ValueError: support.ids must be in [0, 7); got 4294967302 in the set of position 5",
    ),
    "twice": (changed(_4=[4, 2, 3, 2]), "ValueError: support has the id 2 twice in the set of position 4"),
    "the token twice": (changed(_4=[4, 4]), "ValueError: support has the id 4 twice in the set of position 4"),
    "empty": (
        changed(_3=[]),
        "ValueError: support has an empty set for the token at position 3, which counts: mask it, or set support.whole there",
    ),
    "without the token": (
        changed(_3=[5, 4]),
        "ValueError: support leaves out the sampled token 3 at position 3, which then has no probability: "
        "support.with_tokens(tokens) adds it",
    ),
    "descending": (
        GOOD._replace(offsets=torch.tensor([0, 2, 3, 3, 2, 6, 8])),
        "ValueError: support.offsets must ascend, from 0 or more to at most the number of ids, 8",
    ),
    "from below": (
        GOOD._replace(offsets=GOOD.offsets - 1),
        "ValueError: support.offsets must ascend, from 0 or more to at most the number of ids, 8",
    ),
    "too far": (
        GOOD._replace(offsets=GOOD.offsets + 1),
        "ValueError: support.offsets must ascend, from 0 or more to at most the number of ids, 8",
    ),
}
TYPES = {
    "a mask": (
        torch.ones(2, 3, V).bool(),
        "TypeError: support must be a fastpg.Support, which Support.from_mask, from_lists and from_sampler make; got "
        "torch.bool",
    ),
    "lists": (
        SETS,
        "TypeError: support must be a fastpg.Support, which Support.from_mask, from_lists and from_sampler make; got list",
    ),
    "ids as a list": (
        GOOD._replace(ids=GOOD.ids.tolist()),
        "TypeError: support.ids must be an int32 or int64 tensor of one dimension; got list",
    ),
    "ids as floats": (
        GOOD._replace(ids=GOOD.ids.float()),
        "TypeError: support.ids must be an int32 or int64 tensor of one dimension; got torch.float32",
    ),
    "offsets of 16 bits": (
        GOOD._replace(offsets=GOOD.offsets.short()),
        "TypeError: support.offsets must be an int32 or int64 tensor of one dimension; got torch.int16",
    ),
    "another N": (
        Support.from_lists(SETS[:5]),
        "ValueError: support must have a set for each of the 6 tokens, offsets (7,); got offsets (6,)",
    ),
    "whole as ints": (
        GOOD._replace(whole=GOOD.whole.int()),
        "TypeError: support.whole must be a bool tensor (6,), or None; got torch.int32",
    ),
    "whole of another N": (
        GOOD._replace(whole=GOOD.whole[:5]),
        "TypeError: support.whole must be a bool tensor (6,), or None; got torch.bool",
    ),
    "another device": (GOOD.to("meta"), "ValueError: support.ids is on meta but tokens is on cpu"),
    "whole on another device": (
        GOOD._replace(whole=GOOD.whole.to("meta")),
        "ValueError: support.whole is on meta but tokens is on cpu",
    ),
}


@FUNCTIONS
@pytest.mark.parametrize(("support", "words"), (TYPES | VALUES).values(), ids=TYPES | VALUES)
def test_supports_that_do_not_fit(function, support, words):
    assert said(lambda: call(function, {"support": support})) == words


@FUNCTIONS
@pytest.mark.parametrize(("support", "words"), TYPES.values(), ids=TYPES)
def test_types_and_shapes_are_looked_at_without_checks_too(function, support, words):
    assert said(lambda: call(function, {"support": support, "check": False})) == words


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_masked_positions_are_not_looked_at(name, backend):
    """But offsets, which say where all others are."""
    support, words = VALUES[name]
    mask = torch.tensor([[False, True, True], [False, False, False]])
    if "offsets" in words:
        assert said(lambda: call(linear_logprobs, {"support": support, "mask": mask, "backend": backend})) == words
        return
    for given in ({"mask": mask}, {"mask": kept(mask)}, {"tokens": torch.where(mask, of_shape()["tokens"], -100)}):
        out = call(linear_logprobs, {"support": support, "backend": backend} | given)
        assert (out.logprobs != 0).tolist() == [[False, False, True], [False] * 3]  # position 1 is certain


def test_the_first_problem_of_the_first_kind_is_named():
    """An empty set before ids outside the vocabulary, those before repeated ones, and a missing token last."""
    mended = {"_1": [2], "_3": [3, 3], "_4": [4, 9, 8], "_5": []}
    for name, words in (
        ("_5", "ValueError: support has an empty set for the token at position 5"),
        ("_4", "ValueError: support.ids must be in [0, 7); got 9 in the set of position 4"),
        ("_3", "ValueError: support has the id 3 twice in the set of position 3"),
        ("_1", "ValueError: support leaves out the sampled token 1 at position 1"),
    ):
        support = changed(**mended)
        assert said(lambda support=support: call(linear_logprobs, {"support": support})).startswith(words)
        mended.pop(name)


def test_other_arguments_come_first():
    """What is wrong with the tokens is not said of their sets."""
    tokens = torch.tensor([[0, 1, 2], [3, 4, 7]])
    words = said(lambda: call(selective_logprobs, {"support": GOOD, "tokens": tokens}))
    assert words == "ValueError: tokens must be in [0, 7) or -100; got 7 at position (1, 2)"
    words = said(lambda: call(linear_logprobs, {"support": changed(_0=[9]), "temperature": 0}))
    assert words == "ValueError: temperature must be a positive number; got 0"


def test_tokens_of_advantage_zero_count():
    """They are not computed, but their sets are looked at, as their ids are."""
    for rows in (None, kept(torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3))):
        given = {"support": changed(_3=[5]), "mask": rows, "advantages": torch.zeros(2, 3)}
        words = said(lambda given=given: call(linear_cispo_loss, given))
        assert words.startswith("ValueError: support leaves out the sampled token 3 at position 3"), words


# ---- making a support

MASK = torch.tensor([[True, True, False], [False, True, False]])
MAKING = {
    "mask, dtype": (
        lambda: Support.from_mask(torch.ones(2, 3)),
        "TypeError: mask must be a bool tensor (..., V), True where a token was kept; got torch.float32",
    ),
    "mask, list": (
        lambda: Support.from_mask([[True]]),
        "TypeError: mask must be a bool tensor (..., V), True where a token was kept; got list",
    ),
    "mask, 0-d": (
        lambda: Support.from_mask(torch.tensor(True)),
        "TypeError: mask must be a bool tensor (..., V), True where a token was kept; got torch.bool",
    ),
    "lists, floats": (
        lambda: Support.from_lists([[1], [0.5]]),
        "TypeError: sets[1] must be a list of token ids, or None; got torch.float32 (1,)",
    ),
    "lists, bools": (
        lambda: Support.from_lists([[True, False]]),
        "TypeError: sets[0] must be a list of token ids, or None; got torch.bool (2,)",
    ),
    "lists, nested": (
        lambda: Support.from_lists([[[1, 2], [3, 4]]]),
        "TypeError: sets[0] must be a list of token ids, or None; got torch.int64 (2, 2)",
    ),
    "lists, strings": (
        lambda: Support.from_lists([None, ["a"]]),
        "TypeError: sets[1] must be a list of token ids, or None; got list",
    ),
    "lists, a number": (
        lambda: Support.from_lists([3]),
        "TypeError: sets[0] must be a list of token ids, or None; got int",
    ),
    "lists, 64 bits": (
        lambda: Support.from_lists([[1, 2**32 + 1]]),
        "ValueError: sets[0] must have ids of 32 bits; got 4294967297",
    ),
    "lists, one too large": (
        lambda: Support.from_lists([[1], None, [2, -(2**31) - 1]]),
        "ValueError: sets[2] must have ids of 32 bits; got -2147483649",
    ),
    "lists, one of bools": (
        lambda: Support.from_lists([[1], (True,)]),
        "TypeError: sets[1] must be a list of token ids, or None; got torch.bool (1,)",
    ),
    "sampler, one of floats": (
        lambda: Support.from_sampler([[[1], [1]], [[2.0]]], MASK),
        "TypeError: outputs[1][0] must be a list of token ids, or None; got torch.float32 (1,)",
    ),
    "sampler, token_ids too large": (
        lambda: Support.from_sampler([{"token_ids": [1, 2**31], "offsets": [0, 1, 2]}, [[1]]], MASK),
        "ValueError: outputs[0].token_ids must have ids of 32 bits; got 2147483648",
    ),
    "sampler, mask": (
        lambda: Support.from_sampler([], MASK.int()),
        "TypeError: mask must be a bool tensor (B, T) or (N,), True at sampled tokens; got torch.int32",
    ),
    "sampler, mask of 3 dimensions": (
        lambda: Support.from_sampler([], MASK[None]),
        "TypeError: mask must be a bool tensor (B, T) or (N,), True at sampled tokens; got torch.bool",
    ),
    "sampler, rows": (
        lambda: Support.from_sampler([[[0], [1]]], MASK),
        "ValueError: outputs must have one entry for each of the 2 rows of mask; got 1",
    ),
    "sampler, too few sets": (
        lambda: Support.from_sampler([[[0], [1]], []], MASK),
        "ValueError: row 1 of mask has 1 sampled tokens, but outputs have sets of 0",
    ),
    "sampler, too many sets": (
        lambda: Support.from_sampler([[[0], [1], [2]], [[1]]], MASK),
        "ValueError: row 0 of mask has 2 sampled tokens, but outputs have sets of 3",
    ),
    "sampler, packed": (
        lambda: Support.from_sampler([[[0], [1]]], MASK.flatten()),
        "ValueError: mask has 3 sampled tokens, but outputs have sets of 2",
    ),
    "sampler, packed with None": (
        lambda: Support.from_sampler([[[0], [1]], None], MASK.flatten()),
        "ValueError: outputs of packed sequences must have sets for all of them or for none: a length of None is unknown",
    ),
    "sampler, offsets": (
        lambda: Support.from_sampler([[[0], [1]], {"token_ids": [1, 2], "offsets": [0, 1]}], MASK),
        "ValueError: outputs[1].offsets must ascend from 0 to the number of its token_ids, 2; got [0, 1]",
    ),
    "sampler, offsets that descend": (
        lambda: Support.from_sampler([SimpleNamespace(token_ids=[1, 2], offsets=[0, 2, 1, 2]), [[1]]], MASK),
        "ValueError: outputs[0].offsets must ascend from 0 to the number of its token_ids, 2; got [0, 2, 1, 2]",
    ),
    "sampler, no offsets": (
        lambda: Support.from_sampler([SimpleNamespace(token_ids=[], offsets=[]), [[1]]], MASK),
        "ValueError: outputs[0].offsets must ascend from 0 to the number of its token_ids, 0; got []",
    ),
    "sampler, no sets": (
        lambda: Support.from_sampler([{"token_ids": [1]}, [[1]]], MASK),
        "TypeError: outputs[0] must have token_ids and offsets, as vLLM's SamplingMask, or be a list of lists of ids; got dict",
    ),
    "sampler, a number": (
        lambda: Support.from_sampler([3, [[1]]], MASK),
        "TypeError: outputs[0] must have token_ids and offsets, as vLLM's SamplingMask, or be a list of lists of ids; got int",
    ),
    "sampler, a list of ids": (
        lambda: Support.from_sampler([[0, 1], [[1]]], MASK),
        "TypeError: outputs[0] must have token_ids and offsets, as vLLM's SamplingMask, or be a list of lists of ids; got list "
        "of int",
    ),
    "with_tokens": (
        lambda: GOOD.with_tokens(torch.arange(5)),
        "ValueError: support must have a set for each of the 5 tokens, offsets (6,); got offsets (7,)",
    ),
}


@pytest.mark.parametrize(("make", "words"), MAKING.values(), ids=MAKING)
def test_what_no_support_can_be_made_of(make, words):
    assert said(make) == words
