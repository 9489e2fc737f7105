"""NeMo-RL's fused log-probabilities. NeMo-RL cannot be installed by pip: the comparison is with its formula, written out."""

from __future__ import annotations

import sys
import types
from importlib import metadata
from typing import Any
from unittest import mock

import pytest
import torch
from full_logits import assert_gradient, assert_values, distribution, wide
from raising import said
from ranks import results_of, run_jobs, run_on_ranks

from fastpg.integrations.nemo_rl import from_parallel_hidden_states_to_logprobs, use_fastpg

V, H, S, B = 30, 16, 12, 3
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def problem(dtype, length=S, batch=B):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(length, batch, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    target = torch.randint(0, V, (batch, length), generator=generator)
    return hidden, weight, target, torch.randn(batch, length - 1, generator=generator)


def ours(hidden, weight, target, first=0, group=None, **options):
    """As NeMo-RL's GPTModel.forward calls it."""
    return from_parallel_hidden_states_to_logprobs(
        hidden, weight, None, target, vocab_start_index=first, vocab_end_index=first + len(weight), tp_group=group,
        cp_group=None, chunk_size=5, **options,
    )  # fmt: skip


def formula(hidden, weight, target):
    """Log-probabilities of target[:, 1:], by the states before them, and the largest logit."""
    logprobs, _, largest = distribution(hidden.transpose(0, 1)[:, :-1], weight, target[:, 1:])
    return logprobs, largest


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula(dtype):
    hidden, weight, target, factors = problem(dtype)
    leaves, full = [x.clone().requires_grad_() for x in (hidden, weight)], [wide(hidden), wide(weight)]
    logprobs, (want, largest) = ours(*leaves, target), formula(*full, target)
    assert_values(logprobs, want, largest, dtype, H)
    (logprobs * factors).sum().backward()
    (want * factors).sum().backward()
    for got, expected in zip(leaves, full, strict=True):
        assert_gradient(got.grad, expected.grad, dtype)


def test_targets_are_left_as_they_are():
    hidden, weight, target, _ = problem(torch.float32)
    before = target.clone()
    ours(hidden, weight, target)
    assert torch.equal(target, before)


def test_packed_sequences_are_one_row():
    """Sequences of 7 and 5 tokens: within each as if it were alone, which is what NeMo-RL's wrapper cuts out."""
    hidden, weight, target, _ = problem(torch.float64, batch=1)
    logprobs = ours(hidden, weight, target)
    for part in (slice(0, 7), slice(7, 12)):
        alone = ours(hidden[part], weight, target[:, part])
        assert torch.allclose(logprobs[:, part][:, : alone.shape[1]], alone, rtol=1e-12)


def test_ignored_targets_have_no_gradient():
    hidden, weight, target, factors = problem(torch.float64)
    target[1, 4:] = -100  # padding
    leaves, full = [x.clone().requires_grad_() for x in (hidden, weight)], [wide(hidden), wide(weight)]
    logprobs, kept = ours(*leaves, target), target[:, 1:] >= 0
    assert not logprobs[~kept].any()
    (logprobs * factors).sum().backward()
    (formula(*full, target)[0] * factors)[kept].sum().backward()
    assert not leaves[0].grad[4:, 1].any()
    for got, expected in zip(leaves, full, strict=True):
        assert_gradient(got.grad, expected.grad, torch.float64)


def test_inference_only_has_no_gradient():
    hidden, weight, target, _ = problem(torch.float32)
    weight.requires_grad_()
    out = ours(hidden, weight, target, inference_only=True)
    assert not out.requires_grad
    assert torch.equal(out, ours(hidden, weight, target).detach())
    with torch.no_grad():
        assert not ours(hidden, weight, target).requires_grad


# ---- two ranks, of tensor parallelism with sequence parallelism


def shard(rank, dtype, inference_only=False):
    """(log-probabilities, gradients) on a rank, which has half of the positions and unequal halves of the vocabulary."""
    hidden, weight, target, factors = problem(dtype)
    positions, rows = (slice(0, S // 2), slice(S // 2, S))[rank], (slice(0, 17), slice(17, V))[rank]
    leaves = [hidden[positions].clone().requires_grad_(), weight[rows].clone().requires_grad_()]
    group = None if dtype == torch.float64 else torch.distributed.group.WORLD
    logprobs = ours(*leaves, target, rows.start, group, inference_only=inference_only)
    if inference_only:
        return logprobs, logprobs.requires_grad
    (logprobs * factors).sum().backward()  # the same loss on every rank, as NeMo-RL has it
    return logprobs.detach(), *(x.grad for x in leaves)


def without_sequence_parallelism(rank):
    hidden, weight, target, _ = problem(torch.float32)
    rows = (slice(0, 17), slice(17, V))[rank]
    world = torch.distributed.group.WORLD
    options = {"vocab_start_index": 0, "vocab_end_index": V, "tp_group": None, "cp_group": world}
    return (
        said(lambda: ours(hidden, weight[rows], target, rows.start, world)),
        said(lambda: from_parallel_hidden_states_to_logprobs(hidden, weight, None, target, **options)),
    )


def of_a_rank(rank):
    jobs = {dtype: (shard, dtype) for dtype in DTYPES}
    jobs |= {"inference": (shard, torch.float32, True), "refused": (without_sequence_parallelism,)}
    return run_jobs(jobs, rank)


@pytest.fixture(scope="module")
def ranks():
    return run_on_ranks(of_a_rank, 2)


@pytest.mark.xdist_group("nemo-rl ranks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ranks_have_the_results_and_gradients_of_one(ranks, dtype):
    """A shard's gradient is whole: nothing is left to add up or to divide."""
    hidden, weight, target, factors = problem(dtype)
    full = [wide(hidden), wide(weight)]
    want, largest = formula(*full, target)
    (want * factors).sum().backward()
    found = results_of(ranks, dtype)
    for logprobs, _, _ in found:
        assert_values(logprobs, want, largest, dtype, H)
    for i, expected in enumerate(full):
        assert_gradient(torch.cat([of_rank[1 + i] for of_rank in found]), expected.grad, dtype)


@pytest.mark.xdist_group("nemo-rl ranks")
def test_inference_on_two_ranks(ranks):
    want, largest = formula(*problem(torch.float32)[:3])
    for logprobs, requires_grad in results_of(ranks, "inference"):
        assert_values(logprobs, want, largest, torch.float32, H)
        assert not requires_grad


@pytest.mark.xdist_group("nemo-rl ranks")
def test_what_several_ranks_refuse(ranks):
    for whole_sequence, context in results_of(ranks, "refused"):
        assert whole_sequence == (
            "ValueError: tensor_parallel_hidden_states must be (S / ranks, B, H) and target (B, S) on 2 ranks; got (12, 3, 16) "
            "and (3, 12). Several ranks need policy.megatron_cfg.sequence_parallel=true"
        )
        assert context == "ValueError: cp_group must have one rank: context parallelism is not served; got 2"


# ---- set-up

POLICY: dict[str, Any] = {
    "megatron_cfg": {"enabled": True, "use_fused_linear_logprobs": True, "context_parallel_size": 1},
    "generation": {"temperature": 1.0, "top_k": None, "top_p": 1.0},
}


def policy(**changes):
    return {part: values | {k: v for k, v in changes.items() if k in values} for part, values in POLICY.items()}


def test_a_range_of_another_size():
    hidden, weight, target, _ = problem(torch.float32)
    call = lambda: from_parallel_hidden_states_to_logprobs(  # noqa: E731
        hidden, weight, None, target, vocab_start_index=0, vocab_end_index=29, tp_group=None
    )
    words = "vocab_start_index and vocab_end_index must enclose the 30 rows of output_weight_layer; got 0 and 29"
    assert said(call) == f"ValueError: {words}"


@pytest.mark.parametrize(
    ("changes", "words"),
    {
        "temperature": ({"temperature": 0.7}, "policy.generation.temperature must be 1 with fused log-probabilities; got 0.7."),
        "top_k": ({"top_k": 20}, "policy.generation.top_k must be None with fused log-probabilities; got 20."),
        "top_p": ({"top_p": 0.9}, "policy.generation.top_p must be 1 with fused log-probabilities; got 0.9."),
        "context": (
            {"context_parallel_size": 2},
            "policy.megatron_cfg.context_parallel_size must be 1 with fused log-probabilities; got 2",
        ),
        "off": ({"use_fused_linear_logprobs": False}, "policy.megatron_cfg must have enabled and use_fused_linear_logprobs"),
        "no megatron": ({"enabled": False}, "policy.megatron_cfg must have enabled and use_fused_linear_logprobs"),
    }.values(),
)
def test_settings_that_are_refused(changes, words):
    assert said(lambda: use_fastpg(policy(**changes))).startswith(f"ValueError: {words}")


def test_nemo_rl_is_absent(monkeypatch):
    monkeypatch.setattr(metadata, "version", mock.Mock(side_effect=metadata.PackageNotFoundError))
    assert said(lambda: use_fastpg(POLICY)) == (
        "ImportError: nemo-rl is not installed; this adapter was tested with nemo-rl 0.6.0 to 0.7.0"
    )


def installed(monkeypatch, **names):
    monkeypatch.setattr(metadata, "version", lambda _: "0.7.0")
    utils = types.ModuleType("nemo_rl.distributed.model_utils")
    vars(utils).update(names)
    package = types.ModuleType("nemo_rl.distributed")
    package.model_utils = utils
    monkeypatch.setitem(sys.modules, "nemo_rl", types.ModuleType("nemo_rl"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    return utils


def theirs(
    tensor_parallel_hidden_states, output_weight_layer, runtime_gather_output, target, vocab_start_index, vocab_end_index,
    tp_group, inference_only=False, cp_group=None, chunk_size=None,
):  # fmt: skip
    """The signature of NeMo-RL's function, in 0.7.0 and in its main branch."""


def of_release_0_6(tensor_parallel_hidden_states, output_weight_layer, output_weight, runtime_gather_output, *others):
    """The beginning of that of 0.6.0."""


@pytest.mark.parametrize("name", ["use_fused_linear_logprobs", "use_linear_ce_fusion_loss"])
def test_its_function_is_replaced(monkeypatch, name):
    utils = installed(monkeypatch, from_parallel_hidden_states_to_logprobs=theirs)
    for _ in range(2):
        use_fastpg({"megatron_cfg": {"enabled": True, name: True}})
        assert utils.from_parallel_hidden_states_to_logprobs is from_parallel_hidden_states_to_logprobs


@pytest.mark.parametrize("names", [{}, {"from_parallel_hidden_states_to_logprobs": of_release_0_6}])
def test_a_nemo_rl_without_the_function(monkeypatch, names):
    installed(monkeypatch, **names)
    assert said(lambda: use_fastpg(POLICY)) == (
        "ImportError: nemo_rl.distributed.model_utils must have from_parallel_hidden_states_to_logprobs("
        "tensor_parallel_hidden_states, output_weight_layer, runtime_gather_output, target, vocab_start_index, "
        "vocab_end_index, tp_group, inference_only, cp_group, chunk_size); the installed nemo-rl has not. Release 0.7.0 and "
        "the main branch of August 2026 have"
    )
