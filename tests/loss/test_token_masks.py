"""Which tokens a source leaves out: off-policy sequences, and tokens of low entropy."""

import math
import statistics

import pytest
import torch
from batches import F32, F64, MASK, as_rows, batch, every_layout, lay_out, loss_and_gradient
from objectives import INF, NAN
from raising import said

from fastpg import CISPO, linear_policy_loss, off_policy_sequence_mask, policy_loss, reference, top_entropy_mask

# ---- off-policy sequences


def by_loops(inputs, threshold):
    """Row by row, in Python; False where masked."""
    a = inputs["advantages"]
    a = a[:, None].expand(6, 5) if a.dim() == 1 else a
    keep = torch.zeros(6, 5, dtype=torch.bool)
    for b in range(6):
        places = [t for t in range(5) if MASK[b, t]]
        divergence = statistics.fmean((inputs["old_logprobs"] - inputs["logprobs"])[b, places].tolist()) if places else 0.0
        for t in places:
            keep[b, t] = not (a[b, t] < 0 and divergence > threshold)
    return keep


@pytest.mark.parametrize("per_sequence", [False, True], ids=["per-token", "per-sequence"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
@every_layout
def test_off_policy_sequences_equal_loops_and_the_oracle(layout, dtype, per_sequence):
    """The means of d are 0.5, -0.4, 0.05, none, -0.3, 0.35: two rows have become less likely."""
    inputs = batch(dtype, per_sequence)
    for threshold in (0.0, 0.2, 0.35, 1.0):
        wanted = by_loops(inputs, threshold)
        given = lay_out(inputs, layout)
        keep = off_policy_sequence_mask(**given, threshold=threshold)
        assert keep.dtype == torch.bool
        assert torch.equal(as_rows(keep.double(), layout).bool(), wanted)
        a = inputs["advantages"] if not per_sequence else inputs["advantages"][:, None].expand(6, 5)
        rows = torch.arange(6)[:, None].expand(6, 5)[MASK]
        kept = inputs["logprobs"][MASK], inputs["old_logprobs"][MASK], a[MASK], threshold, rows
        assert torch.equal(reference.off_policy_sequence_mask(*kept), wanted[MASK])
        assert threshold > 0.4 or (MASK & ~wanted).any()
    assert torch.equal(wanted, MASK)


def test_off_policy_by_hand():
    """KL 0.5 and 0.1 a token; the mean and not the sum is compared, and a positive advantage stays."""
    logprobs = torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [-2.0, -2.0]])
    old = torch.tensor([[-1.0, -2.0], [-1.9, -1.9], [-1.0, -2.0]])
    a = torch.tensor([-1.0, -1.0, 1.0])
    assert off_policy_sequence_mask(logprobs, old, a, 0.15).tolist() == [[False] * 2, [True] * 2, [True] * 2]
    assert off_policy_sequence_mask(logprobs, old, a, 0.5).all()  # not above it
    per_token = torch.tensor([[-1.0, 0.0], [-1.0, -1.0], [1.0, -1.0]])
    keep = off_policy_sequence_mask(logprobs, old, per_token, 0.15)
    assert keep.tolist() == [[False, True], [True, True], [True, False]]


@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages", "sequence_ids"])
@pytest.mark.parametrize("layout", ["rows", "pack-with-masked"])
def test_masked_garbage_moves_no_token(where, layout):
    clean = lay_out(batch(F32), layout)
    wanted = off_policy_sequence_mask(**clean, threshold=0.2)
    for garbage in ([-1, 99] if where == "sequence_ids" else [NAN, INF, -INF]) if where in clean else []:
        dirty = clean | {where: clean[where].masked_fill(~clean["mask"], garbage)}
        assert torch.equal(off_policy_sequence_mask(**dirty, threshold=0.2), wanted)


@pytest.mark.parametrize("where", ["logprobs", "old_logprobs"])
def test_nan_leaves_nothing_out_so_that_the_loss_shows_it(where):
    """Of a sequence that is off-policy without it."""
    inputs = batch(per_sequence=True)
    assert not off_policy_sequence_mask(**inputs, threshold=0.2)[4].any()
    inputs[where][4, 1] = NAN
    keep = off_policy_sequence_mask(**inputs, threshold=0.2)
    assert keep[4].tolist() == MASK[4].tolist()
    assert policy_loss(**inputs | {"mask": keep}, objective=CISPO()).loss.isnan()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3)])
def test_masks_of_nothing(shape):
    bad, mask = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
    assert torch.equal(off_policy_sequence_mask(bad, bad, bad, 0.1, mask=mask), mask)
    assert torch.equal(top_entropy_mask(bad, 0.2, mask=mask), mask)
    assert top_entropy_mask(torch.empty(0), 0.2).shape == (0,)


def test_masks_of_one_token():
    one = torch.tensor([[-1.0]])
    assert off_policy_sequence_mask(one, one + 0.5, torch.tensor([-1.0]), 0.4).tolist() == [[False]]
    assert off_policy_sequence_mask(one, one + 0.5, torch.tensor([-1.0]), 0.6).tolist() == [[True]]
    for fraction in (0.0, 0.2, 1.0):
        assert top_entropy_mask(torch.tensor([0.0]), fraction).tolist() == [True]


def test_as_rollout_weights_and_as_mask():
    """What is left out adds 0 in both, and counts in D in the first alone."""
    inputs = batch(per_sequence=True)
    keep = off_policy_sequence_mask(**inputs, threshold=0.2)
    left = int(keep.sum())
    assert 0 < left < 15
    weighted, gradient = loss_and_gradient(**inputs, objective=CISPO(), rollout_weights=keep.double())
    masked, of_masked = loss_and_gradient(**inputs | {"mask": keep}, objective=CISPO())
    torch.testing.assert_close(gradient * 15, of_masked * left, rtol=1e-12, atol=0)
    torch.testing.assert_close(weighted.loss * 15, masked.loss * left, rtol=1e-12, atol=0)
    assert not gradient[~keep].any()


def test_tokens_that_scoring_leaves_out_cost_one_pass_nothing():
    hidden, weight, tokens = torch.randn(2, 5, 8), torch.randn(20, 8), torch.randint(0, 20, (2, 5))
    old, entropies = -torch.rand(2, 5) - 2, torch.rand(2, 5)
    weights = top_entropy_mask(entropies, 0.2).float()
    out = linear_policy_loss(hidden, weight, tokens, old, torch.ones(2, 5), objective=CISPO(), rollout_weights=weights)
    assert weights.sum() == 2
    assert out.metrics["skipped_tokens"] == 8


def test_no_value_is_read_by_the_host():
    logprobs, old, advantages, mask = (x.to("meta") for x in batch().values())
    assert off_policy_sequence_mask(logprobs, old, advantages, 0.1, mask=mask).shape == (6, 5)
    assert top_entropy_mask(logprobs, 0.2, mask=mask).shape == (6, 5)


def test_masks_are_constants():
    logprobs = -torch.rand(2, 3, requires_grad=True)
    keep = off_policy_sequence_mask(logprobs, logprobs, logprobs.detach(), 0.1)
    assert not keep.requires_grad
    assert not top_entropy_mask(logprobs, 0.5).requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own
def test_compiled():
    inputs = lay_out(batch(F32, per_sequence=True), "pack-with-masked")

    def masks(entropies):
        return off_policy_sequence_mask(**inputs, threshold=0.2), top_entropy_mask(entropies, 0.3, mask=inputs["mask"])

    entropies = torch.rand(30)
    torch._dynamo.reset()
    for got, want in zip(torch.compile(masks, fullgraph=True, backend="aot_eager")(entropies), masks(entropies), strict=True):
        assert torch.equal(got, want)


# ---- tokens of low entropy


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 1 / 3, 0.5, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32, F64], ids=["bf16", "fp32", "fp64"])
def test_the_tokens_of_largest_entropy(dtype, fraction):
    """floor(fraction (N - 1)) + 1 of N = 15 and all that equal the smallest of them; the oracle's quantile says the same."""
    entropies = (3 * torch.rand(6, 5)).to(dtype)
    entropies[0, 0] = entropies[4, 1]
    values = sorted(entropies[MASK].tolist(), reverse=True)
    smallest = values[math.floor(fraction * 14)]
    wanted = MASK & (entropies >= smallest)
    assert torch.equal(top_entropy_mask(entropies, fraction, mask=MASK), wanted)
    for garbage in (NAN, INF, -INF):
        assert torch.equal(top_entropy_mask(entropies.masked_fill(~MASK, garbage), fraction, mask=MASK), wanted)
    kept = entropies[MASK].double()
    assert torch.equal(reference.top_entropy_mask(kept, fraction), wanted[MASK])
    assert torch.equal(top_entropy_mask(entropies[MASK], fraction), wanted[MASK])


def test_top_entropy_by_hand():
    entropies = torch.tensor([0.1, 2.0, 0.5, 1.0, 0.5])
    assert top_entropy_mask(entropies, 0.0).tolist() == [False, True, False, False, False]
    assert top_entropy_mask(entropies, 0.25).tolist() == [False, True, False, True, False]
    assert top_entropy_mask(entropies, 0.5).tolist() == [False, True, True, True, True]  # two are equal
    assert top_entropy_mask(entropies, 1.0).all()


@pytest.mark.parametrize("count", [1, 3])
def test_nan_entropies_are_not_left_out(count):
    entropies = torch.rand(10)
    entropies[:count] = NAN
    keep = top_entropy_mask(entropies, 0.2)
    assert keep[:count].all()


# ---- words

ROWS = torch.zeros(2, 3)
GIVEN = {"logprobs": ROWS, "old_logprobs": ROWS, "advantages": torch.zeros(2), "threshold": 0.1}
BAD = {
    "logprobs": ({"logprobs": [0.0]}, "TypeError: logprobs must be a floating-point tensor; got list"),
    "old-none": (
        {"old_logprobs": None},
        "TypeError: old_logprobs must be a floating-point tensor; got None, the same policy, of which nothing is left out",
    ),
    "old-shape": (
        {"old_logprobs": torch.zeros(2)},
        "ValueError: old_logprobs must have the shape of logprobs, (2, 3); got (2,)",
    ),
    "advantages": (
        {"advantages": torch.zeros(3)},
        "ValueError: advantages must be per token (2, 3) or per sequence (2,); got shape (3,)",
    ),
    "mask": (
        {"mask": ROWS},
        "TypeError: mask must be a bool tensor, True where a token counts; got torch.float32 (use mask.bool())",
    ),
    "ids": (
        {"sequence_ids": torch.zeros(2, 3).long()},
        "ValueError: sequence_ids are for packed logprobs of shape (N,); logprobs has shape (2, 3), whose rows are the "
        "sequences: leave sequence_ids out",
    ),
    "ids-value": (
        {k: torch.zeros(4) for k in ("logprobs", "old_logprobs", "advantages")} | {"sequence_ids": torch.tensor([0, 1, 4, 0])},
        "ValueError: sequence_ids must be in [0, 4): number the sequences of a pack from 0; got 4 at position 2",
    ),
    "no-sequences": (
        {k: torch.zeros(4) for k in ("logprobs", "old_logprobs", "advantages")},
        "ValueError: off_policy_sequence_mask needs sequences: logprobs of shape (B, T), or packed (N,) with sequence_ids=; "
        "got shape (4,)",
    ),
    "threshold": ({"threshold": -0.1}, "ValueError: threshold must be a number >= 0, in nats a token; got -0.1"),
    "threshold-none": ({"threshold": None}, "ValueError: threshold must be a number >= 0, in nats a token; got None"),
}
BAD_ENTROPIES = {
    "list": ({"entropies": [1.0]}, "TypeError: entropies must be a floating-point tensor; got list"),
    "int": ({"entropies": ROWS.long()}, "TypeError: entropies must be a floating-point tensor; got torch.int64"),
    "mask": (
        {"mask": torch.ones(2).bool()},
        "ValueError: mask must have the shape of entropies, (2, 3); got (2,)",
    ),
    "fraction": ({"fraction": 1.5}, "ValueError: fraction must be in [0, 1], a share of the tokens that count; got 1.5"),
    "fraction-percent": ({"fraction": 20}, "ValueError: fraction must be in [0, 1], a share of the tokens that count; got 20"),
    "fraction-nan": ({"fraction": NAN}, "ValueError: fraction must be in [0, 1], a share of the tokens that count; got nan"),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_sequences_that_do_not_fit(changes, words):
    assert said(lambda: off_policy_sequence_mask(**GIVEN | changes)) == words


@pytest.mark.parametrize(("changes", "words"), BAD_ENTROPIES.values(), ids=BAD_ENTROPIES)
def test_entropies_that_do_not_fit(changes, words):
    assert said(lambda: top_entropy_mask(**{"entropies": ROWS, "fraction": 0.2} | changes)) == words
