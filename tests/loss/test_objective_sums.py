"""Reductions of `policy_loss`: rows and packs, orders and parts of a batch that must not matter."""

import pytest
import torch
from batches import (
    F32,
    F64,
    LAYOUTS,
    assert_same,
    batch,
    every_layout,
    every_objective,
    every_reduction,
    lay_out,
    loss_and_gradient,
    penalties,
    result_as_rows,
)
from objectives import NAN, OBJECTIVES

from fastpg import CISPO, KLPenalty, Reinforce, policy_loss


@pytest.mark.parametrize("objective", [Reinforce(), CISPO()], ids=["reinforce", "cispo"])
def test_advantage_per_sequence_is_never_taken_for_one_per_token(objective):
    """B = T, the one shape where both readings fit."""
    logprobs, old, advantages = -torch.rand(3, 3), -torch.rand(3, 3), torch.tensor([1.0, -2.0, 4.0])
    actual = loss_and_gradient(logprobs, old, advantages, objective=objective)
    wanted = loss_and_gradient(logprobs, old, advantages[:, None].repeat(1, 3), objective=objective)
    assert torch.equal(actual[0].loss, wanted[0].loss)
    assert torch.equal(actual[1], wanted[1])


def random_options(dtype=F64, per_sequence=True):
    inputs = batch(dtype, per_sequence) | penalties(dtype)
    return inputs, {"kl": KLPenalty(0.1, importance_weighted=True)}


@pytest.mark.parametrize("per_sequence", [False, True], ids=["per-token", "per-sequence"])
@every_reduction
@every_objective
def test_rows_and_both_packs_are_equal(name, reduction, per_sequence):
    """Masking equals deleting, and a pack in any order equals (B, T)."""
    inputs, options = random_options(per_sequence=per_sequence)
    options |= {"objective": OBJECTIVES[name][0], "reduction": reduction}
    wanted = result_as_rows(inputs, "rows", **options)
    for layout in LAYOUTS[1:]:
        assert_same(result_as_rows(inputs, layout, **options), wanted)
    rows, pack = (policy_loss(**lay_out(inputs, x), **options) for x in ("rows", "pack"))
    for key, value in rows.metrics.items():
        torch.testing.assert_close(pack.metrics[key], value, rtol=1e-12, atol=1e-15)


@every_reduction
@every_objective
def test_permuting_sequences_or_the_pack_permutes_the_gradient(name, reduction):
    inputs, options = random_options()
    options |= {"objective": OBJECTIVES[name][0], "reduction": reduction}
    wanted = result_as_rows(inputs, "rows", **options)
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    output, gradient = loss_and_gradient(**{k: x[order] for k, x in inputs.items()}, **options)
    assert_same((output.loss, gradient[order.argsort()]), wanted)

    pack = lay_out(inputs, "pack")
    output, gradient = loss_and_gradient(**pack, **options)
    shuffle = torch.randperm(15)
    other = {k: x if k == "advantages" else x[shuffle] for k, x in pack.items()}
    assert_same((lambda o, g: (o.loss, g))(*loss_and_gradient(**other, **options)), (output.loss, gradient[shuffle]))
    # sequences numbered in another way, with gaps and an unused number that has a NaN for its advantage
    numbers = torch.tensor([7, 2, 9, 0, 5, 3])
    advantages = torch.full((10,), NAN, dtype=F64).index_put((numbers,), inputs["advantages"])
    renumbered = pack | {"sequence_ids": numbers[pack["sequence_ids"]].int(), "advantages": advantages}
    assert_same((lambda o, g: (o.loss, g))(*loss_and_gradient(**renumbered, **options)), (output.loss, gradient))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@every_layout
@every_reduction
@every_objective
def test_micro_batches_of_sequences_with_the_global_denominator_sum_to_the_whole(name, reduction, layout, as_tensor):
    """The last part is the sequence without a token."""
    inputs, options = random_options()
    count = {"token-mean": 15, "sum": 1}.get(reduction, 5)
    options |= {"objective": OBJECTIVES[name][0], "reduction": reduction}
    whole = result_as_rows(inputs, "rows", **options)
    loss, total = torch.zeros((), dtype=F64), torch.zeros(6, 5, dtype=F64)
    for rows in ([0, 2], [1, 4, 5], [3]):
        part = {k: x[rows] for k, x in inputs.items()}
        if layout != "rows":
            keep = part["mask"] if layout == "pack" else torch.ones_like(part["mask"])
            ids = torch.arange(len(rows))[:, None].expand_as(keep)
            part = {k: x[keep] if x.dim() == 2 else x for k, x in (part | {"sequence_ids": ids}).items()}
        output, gradient = loss_and_gradient(**part, **options, denominator=torch.tensor(count) if as_tensor else count)
        loss = loss + output.loss
        if layout != "rows":
            gradient = torch.zeros(len(rows), 5, dtype=F64).masked_scatter(keep, gradient)
        total[rows] = gradient
    assert_same((loss, total), whole)


@pytest.mark.parametrize("per_sequence", [False, True], ids=["per-token", "per-sequence"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "users-function"])
def test_zero_advantages_give_exactly_zero(name, per_sequence):
    inputs = batch(F32, per_sequence)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    for layout in LAYOUTS:
        output, gradient = loss_and_gradient(**lay_out(inputs, layout), objective=OBJECTIVES[name][0])
        assert output.loss == 0
        assert (gradient == 0).all()
