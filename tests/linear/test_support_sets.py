"""`Support` as a container: from masks, lists and what samplers return, and back."""

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from operations import counted

import fastpg
from fastpg import Support, linear_logprobs

V = 9
SETS = [[3, 1], [0], None, [8, 2, 5], [], [7, 6, 5, 4, 3, 2, 1, 0]]
MASK = torch.zeros(6, V, dtype=torch.bool)
for n, ids in enumerate(SETS):
    MASK[n, slice(None) if ids is None else ids] = True


def lists_of(support: Support) -> list:
    """The sets as sorted lists; None for the whole vocabulary."""
    rows = [sorted(ids) for ids in (x.tolist() for x in support.ids[support.offsets[0] :].split(support.sizes().tolist()))]
    return [None if whole else ids for ids, whole in zip(rows, support.whole.tolist(), strict=True)]


def whole(count: int) -> torch.Tensor:
    return torch.ones(count, V, dtype=torch.bool)


def test_masks_and_lists_are_the_same_sets():
    by_lists, by_mask = Support.from_lists(SETS), Support.from_mask(MASK)
    for support in (by_lists, by_mask):
        assert torch.equal(support.mask(V), MASK)
        assert support.sizes().tolist() == [2, 1, 0, 3, 0, 8]
        assert support.whole.tolist() == [False, False, True, False, False, False]
        assert support.offsets.tolist() == [0, 2, 3, 3, 6, 6, 14]
        assert support.ids.dtype == torch.int32
    assert by_mask.ids.tolist() == [1, 3, 0, 2, 5, 8, *range(8)]  # ascending in each set
    assert by_lists.ids.tolist() == [x for ids in SETS for x in ids or []]  # as they were given
    assert torch.equal(Support.from_mask(by_lists.mask(V)).ids, by_mask.ids)
    assert torch.equal(Support.from_mask(MASK.view(2, 3, V)).offsets, by_mask.offsets)
    assert fastpg.Support is Support


def test_lists_of_other_kinds_and_of_none():
    kinds = [torch.tensor(SETS[0]), tuple(SETS[1]), None, np.array(SETS[3]), torch.tensor([]), torch.tensor(SETS[5]).int()]
    assert torch.equal(Support.from_lists(kinds).mask(V), MASK)
    empty = Support.from_lists([])
    assert (len(empty.ids), empty.offsets.tolist(), empty.mask(V).shape) == (0, [0], (0, V))
    assert Support.from_mask(torch.zeros(0, V, dtype=torch.bool)).offsets.tolist() == [0]
    assert torch.equal(Support.from_lists([None, None]).mask(V), whole(2))
    assert torch.equal(Support(*Support.from_lists([[0], [1]])[:2]).mask(2), torch.eye(2).bool())  # without `whole`


@pytest.mark.parametrize(
    "make", [Support.from_lists, lambda sets: Support.from_sampler([sets], torch.ones(1, len(sets)).bool())]
)
def test_lists_are_joined_in_one_step(make):
    """As many operations for many sets as for few."""
    with counted() as few:
        make(SETS)
    with counted() as many:
        support = make(SETS * 50)
    assert many.total == few.total
    assert support.ids.dtype == torch.int32
    assert torch.equal(support.ids, make(SETS).ids.repeat(50))


def test_on_another_device():
    support = Support.from_lists(SETS).to("meta")
    assert {x.device.type for x in support} == {"meta"}
    assert Support(support.ids, support.offsets).to("meta").whole is None
    assert Support.from_lists(SETS, device="meta").ids.device.type == "meta"


def test_sets_in_the_middle_of_ids():
    """offsets need not begin at 0, nor end at the last id."""
    support = Support(torch.tensor([99, 99, 3, 1, 0, 99]), torch.tensor([2, 4, 5]))
    assert torch.equal(support.mask(V), MASK[:2])
    assert support.sizes().tolist() == [2, 1]
    assert lists_of(support.with_tokens(torch.tensor([1, 8]))._replace(whole=torch.zeros(2).bool())) == [[1, 3], [0, 8]]
    hidden, weight, tokens = torch.randn(2, 4), torch.randn(V, 4), torch.tensor([1, 0])
    for check in (True, False):
        a, b = (linear_logprobs(hidden, weight, tokens, support=s, check=check) for s in (support, Support.from_mask(MASK[:2])))
        assert torch.equal(a.logprobs, b.logprobs)


def test_with_tokens():
    support = Support.from_lists(SETS)
    tokens = torch.tensor([[1, 5, 7], [-100, 4, 8]])  # there, missing, whole, not a token, an empty set, missing
    found = support.with_tokens(tokens)
    assert lists_of(found) == [[1, 3], [0, 5], None, [2, 5, 8], [4], list(range(9))]
    assert torch.equal(found.whole, support.whole)
    assert (found.ids.dtype, found.offsets.tolist()) == (torch.int32, [0, 2, 4, 4, 7, 8, 17])
    for a, b in zip(found.with_tokens(tokens.int()), found, strict=True):  # what is there is not added again
        assert torch.equal(a, b)
    assert lists_of(support) == [[1, 3], [0], None, [2, 5, 8], [], list(range(8))]  # as it was
    hidden, weight = torch.randn(2, 3, 4), torch.randn(V, 4)
    out = linear_logprobs(hidden, weight, tokens, support=found)
    assert (out.logprobs[0] < 0).all()
    assert out.logprobs[1, 1] == 0
    with pytest.raises(ValueError, match="support leaves out the sampled token 5 at position 1"):
        linear_logprobs(hidden, weight, tokens, support=support, mask=torch.tensor([[True, True, True], [True, False, True]]))


def test_shifted():
    support = Support.from_lists(SETS)
    ahead = support.shifted()
    assert lists_of(ahead) == [[0], None, [2, 5, 8], [], list(range(8)), None]
    assert ahead.ids.data_ptr() == support.ids.data_ptr()
    assert lists_of(ahead.shifted())[:3] == [None, [2, 5, 8], []]
    assert torch.equal(Support.from_mask(ahead.mask(V)).shifted().mask(V), ahead.shifted().mask(V))
    bare = Support(*Support.from_lists(SETS[3:])[:2]).shifted()
    assert bare.whole is None
    assert torch.equal(bare.mask(V), torch.cat([MASK[4:], torch.zeros(1, V, dtype=torch.bool)]))


# ---- what samplers return

ROWS = torch.tensor([[False, True, True, False], [True, False, False, True], [False, False, False, False]])
OF_ROWS = [[[3, 1], [0]], [[8, 2, 5], []], []]
PLACED = torch.ones(12, V, dtype=torch.bool)
for place, members in ((1, [3, 1]), (2, [0]), (4, [8, 2, 5])):
    PLACED[place] = torch.zeros(V, dtype=torch.bool).index_fill(0, torch.tensor(members), True)
Slots = namedtuple("Slots", "token_ids offsets")


def compressed(sets: list) -> dict:
    return {"token_ids": [x for ids in sets for x in ids], "offsets": np.cumsum([0, *map(len, sets)]).tolist()}


KINDS = {
    "lists": lambda sets: sets,
    "tuples": lambda sets: tuple(map(tuple, sets)),
    "arrays": lambda sets: [np.array(ids, dtype=np.int32) for ids in sets],
    "dictionary": compressed,
    "object": lambda sets: SimpleNamespace(**compressed(sets)),
    "slots": lambda sets: Slots(**compressed(sets)),
    "tensors": lambda sets: {name: torch.tensor(x, dtype=torch.int32) for name, x in compressed(sets).items()},
    "numpy": lambda sets: SimpleNamespace(**{name: np.array(x, dtype=np.int64) for name, x in compressed(sets).items()}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_sampler(kind):
    """vLLM's SamplingMask, and SGLang's lists; an empty list, and all that was not sampled, is the whole vocabulary."""
    outputs = [KINDS[kind](sets) for sets in OF_ROWS]
    assert torch.equal(Support.from_sampler(outputs, ROWS).mask(V), PLACED)
    packed = Support.from_sampler(outputs, ROWS.flatten())
    assert torch.equal(packed.mask(V), PLACED)
    assert packed.whole.sum() == 9


def test_from_sampler_without_sets():
    """None for a completion, and for a token of it."""
    expected = PLACED.clone()
    expected[4] = True
    assert torch.equal(Support.from_sampler([OF_ROWS[0], None, []], ROWS).mask(V), expected)
    assert torch.equal(Support.from_sampler([[[3, 1], None], OF_ROWS[1], None], ROWS).mask(V)[2], whole(1)[0])
    assert torch.equal(Support.from_sampler([None, None, None], ROWS).mask(V), whole(12))
    assert torch.equal(Support.from_sampler([None, None], ROWS.flatten()).mask(V), whole(12))
    assert torch.equal(Support.from_sampler([], ROWS[:0]).mask(V), whole(0))
    assert torch.equal(Support.from_sampler([], torch.zeros(3).bool()).mask(V), whole(3))


def test_the_readmes_path_from_a_sampler_to_log_probabilities():
    """Sampled sets, the sampled token left out by an engine that keeps few, states that predict the next token."""
    ids, completion = torch.tensor([[4, 3, 0, 6], [8, 7, 7, 2]]), ROWS[:2]
    support = Support.from_sampler(OF_ROWS[:2], completion).with_tokens(ids)
    hidden, weight = torch.randn(2, 4, 5), torch.randn(V, 5)
    ahead = torch.where(completion.roll(-1, 1), ids.roll(-1, 1), -100)
    ahead[:, -1] = -100
    out = linear_logprobs(hidden, weight, ahead, support=support.shifted())
    z = hidden @ weight.T
    assert out.logprobs[0, 1] == 0  # the set of token 2 is {0}
    torch.testing.assert_close(out.logprobs[0, 0], z[0, 0, 3] - z[0, 0, [3, 1]].logsumexp(0))
    torch.testing.assert_close(out.logprobs[1, 2], z[1, 2, 2] - z[1, 2].logsumexp(0))
    assert (out.logprobs != 0).sum() == 2
