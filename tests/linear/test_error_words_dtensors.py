"""Errors of arguments that are DTensors, word by word; see `test_error_words`. Heads are in `test_error_words_calls`."""

import inspect

import pytest
import torch
import torch.distributed as dist
from raising import ACCEPTED, LINEAR, call, module_loss, of_shape, said

from fastpg import kept, linear_cross_entropy, masked_mean, policy_loss, rollout, selective_logprobs

FUNCTIONS = [*LINEAR, linear_cross_entropy, policy_loss, selective_logprobs, masked_mean, kept]
FUNCTIONS += [rollout.truncated_weights, rollout.masked_weights, rollout.icepop, rollout.within_band, rollout.token_veto]
FUNCTIONS += [rollout.mismatch_metrics]
TOKENS, ONES = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.ones(2, 3)
BESIDE = {  # every argument that is refused, as a plain tensor that fits
    **{"tokens": TOKENS, "labels": TOKENS, "mask": ONES.bool(), "temperature": ONES, "denominator": torch.tensor(3.0)},
    **dict.fromkeys(("old_logprobs", "advantages", "ref_logprobs", "rollout_weights", "logprobs", "values"), ONES),
    "rollout_logprobs": ONES,
    "logits": torch.ones(2, 3, 7),
    "weight": torch.ones(7),
}


@pytest.fixture
def mesh():
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def arguments(function):
    return ACCEPTED.get(function) or set(inspect.signature(function).parameters)


def error(function, changes):
    if function in ACCEPTED:
        return said(lambda: call(function, changes))
    given = of_shape(labels=TOKENS, mask=ONES.bool(), rollout_logprobs=ONES, low=0.5, high=2.0) | changes
    return said(lambda: function(**{name: x for name, x in given.items() if name in arguments(function)}))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_stands_beside_hidden_is_no_dtensor(function, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    names = arguments(function) & BESIDE.keys()
    assert len(names) > 1
    for name in names:
        value = distribute_tensor(BESIDE[name], mesh, [Replicate()])
        assert error(function, {name: value}) == (
            f"TypeError: {name} must be a plain tensor; got a DTensor with placements (Replicate(),): pass its .full_tensor(), "
            "or its .to_local() where the call is for this rank's tokens alone"
        )


@pytest.mark.parametrize("function", [*LINEAR, policy_loss])
def test_sequence_ids_are_no_dtensor(function, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    if "sequence_ids" in arguments(function):
        ids = distribute_tensor(torch.zeros(6, dtype=torch.long), mesh, [Shard(0)])
        assert error(function, {"shape": (6,), "sequence_ids": ids}) == (
            "TypeError: sequence_ids must be a plain tensor; got a DTensor with placements (Shard(dim=0),): pass its "
            ".full_tensor(), or its .to_local() where the call is for this rank's tokens alone"
        )


@pytest.mark.parametrize("function", [*LINEAR, linear_cross_entropy])
def test_hidden_states_that_are_not_replicated(function, mesh):
    from torch.distributed.tensor import DTensor, Partial, Shard

    for placement in (Shard(0), Shard(1), Partial()):
        hidden = DTensor.from_local(torch.ones(2, 3, 4), mesh, [placement])
        assert error(function, {"hidden": hidden}) == (
            "ValueError: hidden must be a plain tensor or a DTensor that is replicated; got placements "
            f"({placement!r},): pass hidden.full_tensor() with all tokens, or hidden.to_local() with this rank's own"
        )


def test_the_functions_have_these_arguments():
    """So that no test above is empty."""
    assert {"tokens", "mask", "temperature", "old_logprobs", "advantages", "denominator"} <= arguments(module_loss)
    assert arguments(linear_cross_entropy) & BESIDE.keys() == {"labels", "weight", "temperature", "denominator"}
