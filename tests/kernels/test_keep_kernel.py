"""Which tokens count: the kernel and the PyTorch tile op against a loop in Python."""

import math

import pytest
import torch

from fastpg.tiles import torch_tiles, triton_tiles
from fastpg.tiles.structures import TokenInputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 50


@pytest.fixture(params=["torch", "triton"])
def keep(request):
    return {"torch": torch_tiles, "triton": triton_tiles}[request.param].keep


def judged(given):
    """(keep, computed, numbers), token by token. Every field is flat or None."""
    kept, computed, numbers = [], [], [0] * 6

    def at(values, n, otherwise):
        return otherwise if values is None else values.flatten()[n].item()

    for n, token in enumerate(given.tokens.flatten().tolist()):
        counts = token != -100 and bool(at(given.mask, n, True))
        factor = (torch.tensor(at(given.advantages, n, 1.0)) * at(given.rollout_weights, n, 1.0)).item()
        skipped = factor == 0 and math.isfinite(at(given.old_logprobs, n, 0.0)) and math.isfinite(at(given.weight, 0, 1.0))
        temperature = at(given.temperature, n if given.temperature is not None and given.temperature.dim() else 0, 1.0)
        kept.append(counts)
        computed.append(counts and not (skipped and given.advantages is not None))
        numbers[2] += counts and given.vocab is not None and not 0 <= token < given.vocab
        numbers[3] += counts and not (temperature > 0 and math.isfinite(temperature))
    numbers[:2] = sum(kept), sum(computed)
    if given.indices is not None:
        before, rows = -1, given.indices.tolist()
        numbers[1] = len(rows)
        for row in rows:
            numbers[4] += not (0 <= row < len(kept) and kept[row] and row > before)
            before = row
        listed = [row for row in rows if 0 <= row < len(kept)]
        numbers[5] = sum(computed) - sum(computed[row] for row in listed)
    return kept, computed, numbers


def check(keep, given):
    found = keep(TokenInputs(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in given)))
    kept, computed, numbers = judged(given)
    assert found.keep.shape == given.tokens.shape
    assert found.keep.dtype == torch.bool
    assert found.keep.flatten().tolist() == kept
    assert (found.computed is None) == (given.advantages is None)
    assert (found.keep if found.computed is None else found.computed).flatten().tolist() == computed
    assert found.numbers.dtype == torch.int64
    assert found.numbers.tolist() == numbers
    return numbers


def batch(count):
    """Ids out of range, temperatures that are no positive numbers, factors of 0, NaN and infinities, in any mixture."""
    pick = lambda *values: torch.tensor(values)[torch.randint(len(values), (count,))]  # noqa: E731
    return TokenInputs(
        pick(-100, 0, 3, VOCAB - 1, VOCAB, -1, 7, 2**31 + 5), torch.rand(count) < 0.8,
        pick(1.0, 0.5, 0.0, -1.0, math.inf, math.nan), pick(0.0, -0.0, 1.0, -2.0, math.nan, math.inf, 1e-30),
        pick(0.0, 1.0, 1e-30, math.nan),
        pick(0.0, -1.0, math.nan, -math.inf, math.inf), torch.tensor(0.5), None, VOCAB,
    )  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_every_mixture(keep, count):
    numbers = check(keep, batch(count))
    assert count < 100 or all(numbers[:4])


@pytest.mark.parametrize(
    "left_out", ["mask", "temperature", "advantages", "rollout_weights", "old_logprobs", "weight", "vocab"]
)
def test_what_is_not_given_is_not_looked_at(keep, left_out):
    check(keep, batch(700)._replace(**{left_out: None}))


@pytest.mark.parametrize("weight", [math.inf, math.nan, 0.0])
def test_a_weight_that_is_not_finite_skips_nothing(keep, weight):
    numbers = check(keep, batch(300)._replace(weight=torch.tensor(weight)))
    assert (numbers[0] == numbers[1]) == (weight != 0)


ROWS = {
    "needed": lambda kept, computed: computed.nonzero()[:, 0],
    "kept": lambda kept, computed: kept.nonzero()[:, 0],
    "none": lambda kept, computed: torch.zeros(0, dtype=torch.int64),
    "one missing": lambda kept, computed: computed.nonzero()[1:, 0],
    "masked ones too": lambda kept, computed: torch.arange(len(kept)),
    "backwards": lambda kept, computed: computed.nonzero()[:, 0].flip(0),
    "one twice": lambda kept, computed: torch.cat([computed.nonzero()[:1, 0], computed.nonzero()[:-1, 0]]),
    "out of range": lambda kept, computed: torch.cat([torch.tensor([-1]), computed.nonzero()[:-1, 0] + 40]),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("skips", [False, True])
def test_given_rows(keep, rows, skips):
    given = batch(4200)
    if not skips:
        given = given._replace(advantages=None)
    kept, computed, _ = judged(given)
    check(keep, given._replace(indices=rows(torch.tensor(kept), torch.tensor(computed))))


def is_vector(x):
    return isinstance(x, torch.Tensor) and x.dim() > 0


def test_strided_and_expanded_arguments(keep):
    given = batch(60)
    strided = [torch.stack([x, torch.zeros_like(x)], 1)[:, 0] if is_vector(x) else x for x in given]
    check(keep, TokenInputs(*strided))
    of_sequences = torch.tensor([0.0, 2.0, torch.nan])[:, None].expand(3, 20)
    shaped = [x.view(20, 3).T if is_vector(x) else x for x in given]
    check(keep, TokenInputs(*shaped)._replace(advantages=of_sequences))
    check(keep, TokenInputs(*shaped)._replace(temperature=torch.tensor(0.0)))
    check(keep, TokenInputs(*shaped)._replace(temperature=torch.tensor(2.0)))
