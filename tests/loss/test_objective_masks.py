"""What `policy_loss` must not see, masked tokens above all, and what it must not hide."""

import itertools

import pytest
import torch
from batches import (
    F32,
    LAYOUTS,
    MASK,
    batch,
    every_objective,
    every_reduction,
    lay_out,
    loss_and_gradient,
    oracle_of,
    penalties,
)
from objectives import INF, NAN, OBJECTIVES, OF_SEQUENCES, REDUCTIONS

from fastpg import CISPO, ImportanceWeighted, KLPenalty, policy_loss

TOKEN_LEVEL = [name for name in OBJECTIVES if name not in OF_SEQUENCES]


@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages", "ref_logprobs", "rollout_weights", "sequence_ids"])
@pytest.mark.parametrize("layout", ["rows", "pack-with-masked"])
@every_reduction
@every_objective
def test_masked_garbage_changes_no_bit(name, reduction, layout, where):
    options = {"objective": OBJECTIVES[name][0], "reduction": reduction, "kl": KLPenalty(0.1, importance_weighted=True)}
    clean = lay_out(batch(F32) | penalties(F32), layout)
    masked = ~clean["mask"]
    bad = [-1, 30, 10**12, -(2**63)] if where == "sequence_ids" else [NAN, INF, -INF]
    wanted, wanted_gradient = loss_and_gradient(**clean, **options)
    for garbage in bad if where in clean else []:
        actual, gradient = loss_and_gradient(**clean | {where: clean[where].masked_fill(masked, garbage)}, **options)
        assert actual.loss.isfinite()
        assert torch.equal(actual.loss, wanted.loss), garbage
        assert torch.equal(actual.logprobs, wanted.logprobs), garbage
        assert torch.equal(gradient, wanted_gradient), garbage
        assert (gradient[masked] == 0).all()
        for key, value in wanted.metrics.items():
            assert torch.equal(actual.metrics[key], value), key


def test_masked_garbage_with_advantages_per_sequence():
    """The advantage of a sequence without tokens, for example of a group in which everything failed."""
    logprobs, old, advantages, _ = batch(per_sequence=True).values()
    wanted = loss_and_gradient(logprobs, old, advantages, objective=CISPO(), mask=MASK)
    advantages[3] = NAN
    actual = loss_and_gradient(logprobs, old, advantages, objective=CISPO(), mask=MASK)
    assert torch.equal(actual[0].loss, wanted[0].loss)
    assert torch.equal(actual[1], wanted[1])


def test_masked_garbage_on_policy():
    logprobs, _, advantages, _ = batch().values()
    wanted = loss_and_gradient(logprobs, None, advantages, objective=ImportanceWeighted(), mask=MASK)
    dirty = logprobs.detach().masked_fill(~MASK, -INF)
    actual = loss_and_gradient(dirty, None, advantages, objective=ImportanceWeighted(), mask=MASK)
    assert torch.equal(actual[0].loss, wanted[0].loss)
    assert torch.equal(actual[1], wanted[1])


def test_users_function_never_sees_masked_garbage():
    """So that it may mix tokens: a mean over its arguments, an assertion on them."""
    seen = []

    def spy(*arguments):
        seen.extend(arguments)
        return arguments[0]

    inputs = batch()
    mask = inputs.pop("mask")
    policy_loss(**{name: x.masked_fill(~mask, NAN) for name, x in inputs.items()}, objective=spy, mask=mask)
    assert len(seen) == 3
    assert all(t.isfinite().all() for t in seen)


def test_users_function_may_be_singular_where_masked():
    """Whatever stands in for a masked token, a user's function may be infinite there, in value or in slope."""

    def singular(logprobs, old_logprobs, advantages):
        return advantages * ((-logprobs).log() + (-logprobs).sqrt() + 1 / (logprobs - old_logprobs) + 1 / advantages)

    inputs = batch()
    output, gradient = loss_and_gradient(**inputs, objective=singular)
    wanted, wanted_gradient, _ = oracle_of(inputs, singular)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-13, atol=0)


@pytest.mark.parametrize("reduction", ["token-mean", "sum"])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_masking_equals_deletion(name, reduction):
    """Packed tokens without numbers of sequences. With them: test_objective_sums."""
    logprobs, old, advantages, _ = batch().values()
    options = {"objective": OBJECTIVES[name][0], "reduction": reduction}
    masked, gradient = loss_and_gradient(logprobs, old, advantages, mask=MASK, **options)
    deleted, wanted = loss_and_gradient(logprobs[MASK], old[MASK], advantages[MASK], **options)
    torch.testing.assert_close(masked.loss, deleted.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient[MASK], wanted, rtol=1e-13, atol=0)
    for key, value in deleted.metrics.items():
        torch.testing.assert_close(masked.metrics[key], value, rtol=1e-13, atol=0)


@every_reduction
@every_objective
def test_padding_on_either_side_does_not_matter(name, reduction):
    """For the sequence reductions too: more columns, and a whole empty sequence, change nothing."""
    logprobs, old, advantages, _ = batch().values()
    options = {"objective": OBJECTIVES[name][0], "reduction": reduction}
    plain, wanted = loss_and_gradient(logprobs, old, advantages, mask=MASK, **options)

    def pad(x, value):
        return torch.nn.functional.pad(x, (2, 3, 1, 0), value=value)

    padded, gradient = loss_and_gradient(
        pad(logprobs, 0.0), pad(old, 9.0), pad(advantages, 5.0), mask=pad(MASK, False), **options
    )
    torch.testing.assert_close(padded.loss, plain.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, pad(wanted, 0.0), rtol=1e-13, atol=0)


@every_objective
def test_inputs_are_left_alone(name):
    inputs = batch()
    copies = {name: x.clone() for name, x in inputs.items()}
    loss_and_gradient(**inputs, objective=OBJECTIVES[name][0])
    for key, x in inputs.items():
        assert torch.equal(x, copies[key]), key


def test_no_value_is_read_by_the_host():
    """Tensors without data have no values to read; on a GPU a read would be a synchronisation."""
    logprobs, old, advantages, mask = (x.to("meta") for x in batch().values())
    for reduction in REDUCTIONS:
        output = policy_loss(logprobs, old, advantages, objective=CISPO(), mask=mask, reduction=reduction)
        assert output.loss.shape == ()


# ---- what must be noticed


@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages"])
@every_reduction
@every_objective
def test_nan_at_a_kept_token_gives_a_nan_loss(name, reduction, where):
    inputs = batch()
    inputs[where][2, 2] = NAN
    assert policy_loss(**inputs, objective=OBJECTIVES[name][0], reduction=reduction).loss.isnan()


@pytest.mark.parametrize("old", [INF, -INF, NAN], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("advantage", [1.0, 0.0], ids=["", "zero-advantage"])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_infinite_old_logprob_gives_a_nan_loss(name, advantage, old):
    """A ratio of 0 or infinity is never meant. Reinforce does not read the old one, a bound would hide it: all the same."""
    logprobs, olds = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, old])
    output = policy_loss(logprobs, olds, torch.tensor([1.0, advantage]), objective=OBJECTIVES[name][0])
    assert output.loss.isnan()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@every_objective
def test_old_logprobs_that_are_not_finite_at_a_kept_token_give_a_nan_loss(name, bad):
    inputs = batch(F32, per_sequence=True)
    inputs["old_logprobs"][4, 1] = bad
    for layout, reduction in itertools.product(LAYOUTS, REDUCTIONS):
        assert policy_loss(**lay_out(inputs, layout), objective=OBJECTIVES[name][0], reduction=reduction).loss.isnan()


# ---- no tokens


EMPTY = {"no-sequence": (0, 4), "no-position": (3, 0), "all-masked": (2, 3)}


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@every_reduction
@every_objective
def test_no_tokens_is_a_differentiable_zero(name, reduction, shape, on_policy):
    logprobs = torch.full(shape, NAN)
    output, gradient = loss_and_gradient(
        logprobs,
        None if on_policy else logprobs,
        logprobs,
        objective=OBJECTIVES[name][0],
        mask=torch.zeros(shape, dtype=torch.bool),
        reduction=reduction,
    )
    assert output.loss.item() == 0
    assert torch.equal(gradient, torch.zeros(shape))
    assert torch.equal(output.logprobs, torch.zeros(shape))
    assert {k: v.item() for k, v in output.metrics.items()} == {
        "ratio_mean": 0,
        "ratio_max": 0,
        "clip_fraction": 0,
        "ess": 1,
        "kl_k1": 0,
        "kl_k3": 0,
        "tokens": 0,
        "skipped_tokens": 0,
        "recomputed_tokens": 0,
        "repeated_products": 0,
        "silenced_tokens": 0,
        "work_saved": 0,
    }


def test_no_tokens_at_all():
    output, gradient = loss_and_gradient(torch.empty(0), torch.empty(0), torch.empty(0), objective=CISPO())
    assert output.loss.item() == 0
    assert gradient.shape == (0,)


def check_no_tokens(objective, tokens, sequences):
    bad = torch.full((tokens,), NAN)
    given = {"old_logprobs": bad, "advantages": torch.full((sequences,), NAN), "sequence_ids": torch.full((tokens,), 99)}
    for reduction in REDUCTIONS:
        mask = torch.zeros(tokens, dtype=torch.bool)
        output, gradient = loss_and_gradient(bad, **given, objective=objective, reduction=reduction, mask=mask)
        assert output.loss.item() == 0
        assert torch.equal(gradient, torch.zeros(tokens))
        assert output.metrics["tokens"] == output.metrics["clip_fraction"] == 0


@pytest.mark.parametrize(("tokens", "sequences"), [(4, 2), (4, 4), (0, 2), (0, 0)], ids=lambda n: str(n))
@every_objective
def test_a_pack_without_tokens_is_a_differentiable_zero(name, tokens, sequences):
    """All masked, whatever the ids are; and a pack of length 0."""
    check_no_tokens(OBJECTIVES[name][0], tokens, sequences)


@pytest.mark.parametrize("name", ["cispo", "gspo"])
def test_a_pack_of_no_sequences_is_a_differentiable_zero(name):
    """A rank whose share of the batch is padding alone: no advantages, and every token masked."""
    check_no_tokens(OBJECTIVES[name][0], 4, 0)
