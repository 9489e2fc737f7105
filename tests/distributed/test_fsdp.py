"""A transformers model that FSDP wraps, on two ranks, against one process and its own logits.

FSDP1 (FullyShardedDataParallel) keeps parameters flat, or, without use_orig_params, as views of memory that it frees. FSDP2
(fully_shard) is here with mixed precision; in float32 and float64 it is in `test_data_parallel` and `test_transformers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from ranks import run_on_ranks
from torch import nn
from torch.nn import functional as F

from fastpg import CISPO, LMHead, linear_cispo_loss, policy_loss
from fastpg.crosscheck.accuracy import WEIGHT_TOLERANCE
from fastpg.integrations.transformers import causal_lm_policy_loss, token_logprobs

pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("data-parallel ranks")

VOCAB, RANKS, STEPS = 51, 2, 3


class WithLoss(nn.Module):
    """A step whose loss is computed in the forward of what FSDP wraps, where its weights are whole."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.lm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, initializer_range=0.2, **sizes))

    def forward(self, head_of: Callable, ids: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        hidden = self.lm.model(ids).last_hidden_state[:, :-1]
        return linear_cispo_loss(hidden, head_of(self.lm), ids[:, 1:], old[:, 1:], advantages).loss


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, old log-probabilities and advantages of the rank's own sequences."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, VOCAB, (2, 8), generator=generator)
    return ids, -4 + torch.rand(2, 8, generator=generator), torch.randn(2, generator=generator)


def own_logprobs(lm: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = F.linear(lm.model(ids).last_hidden_state.float(), lm.lm_head.weight.float())[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def one_pass(lm: nn.Module, rank: int) -> torch.Tensor:
    ids, old, advantages = batch(rank)
    return causal_lm_policy_loss(lm, ids, None, old, advantages, objective=CISPO()).loss


def two_passes(lm: nn.Module, rank: int) -> torch.Tensor:
    return -token_logprobs(lm, batch(rank)[0]).logprobs.sum() / 14


def in_its_forward(module: WithLoss, rank: int) -> torch.Tensor:
    return module(LMHead.from_model, *batch(rank))


def full_cispo(lm: nn.Module, rank: int) -> torch.Tensor:
    ids, old, advantages = batch(rank)
    return policy_loss(own_logprobs(lm, ids), old[:, 1:], advantages, objective=CISPO()).loss


def full_nll(lm: nn.Module, rank: int) -> torch.Tensor:
    return -own_logprobs(lm, batch(rank)[0]).mean()


PATHS = {  # by name: the loss, what of WithLoss is wrapped, and the same from full logits
    "one pass": (one_pass, lambda module: module.lm, full_cispo),
    "two passes": (two_passes, lambda module: module.lm, full_nll),
    "linear_cispo_loss": (in_its_forward, lambda module: module, full_cispo),
}


def train(model: nn.Module, loss_of: Callable, ranks: Sequence[int]) -> list[float]:
    """The losses of three steps on the mean over these ranks' batches."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(STEPS):
        loss = sum(loss_of(model, rank) for rank in ranks) / len(ranks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def of_lm(model: nn.Module) -> dict[str, nn.Parameter]:
    """The language model's parameters, by its own names, whatever wraps it."""
    return {n.replace("_fsdp_wrapped_module.", "").removeprefix("lm."): p for n, p in model.named_parameters()}


UNITS = {"whole": lambda lm: [], "layers": lambda lm: [*lm.model.layers], "lm_head": lambda lm: [lm.lm_head]}


def fsdp1(module: WithLoss, part: nn.Module, units: str, use_orig_params: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    of_their_own = UNITS[units](module.lm)
    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda m: any(m is unit for unit in of_their_own))
    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(part, auto_wrap_policy=policy if of_their_own else None, **options)


def trained_by_fsdp1(rank: int) -> dict[tuple, tuple]:
    """By path, units and use_orig_params: the rank's losses, those of one process, how far parameters differ and have moved."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = {}
    for path, (loss_of, part, full) in PATHS.items():
        start, alone = of_lm(WithLoss().lm), WithLoss()
        want = train(alone.lm, full, range(RANKS))
        for units, use_orig_params in product(("whole", "layers"), (True, False)):
            module = WithLoss()
            wrapped = fsdp1(module, part(module), units, use_orig_params)
            losses = train(wrapped, loss_of, [rank])
            with torch.no_grad(), FullyShardedDataParallel.summon_full_params(wrapped):
                end = of_lm(wrapped)
                assert end.keys() == start.keys()
                off = max((end[n] - p).abs().max().item() for n, p in of_lm(alone.lm).items())
                moved = min((end[n] - p).abs().max().item() for n, p in start.items())
            found[path, units, use_orig_params] = losses, want, off, moved
    return found


def refused_by_fsdp1(rank: int) -> dict[tuple, tuple]:
    """By use_orig_params, units and call: the error, and whether the backbone ran before it."""
    found = {}
    for use_orig_params, (units, name) in product((True, False), REFUSED):
        module, ran = WithLoss(), []
        module.lm.model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        loss_of, part, _ = PATHS.get(name, PATHS["one pass"])
        wrapped = fsdp1(module, part(module), units, use_orig_params)
        try:
            if name in PATHS:
                loss_of(wrapped, rank)
            else:
                LMHead(module.lm.lm_head.weight) if name == "weight" else LMHead.from_model(wrapped)
            found[use_orig_params, units, name] = "no error", ran
        except ValueError as error:
            found[use_orig_params, units, name] = str(error), ran
    return found


def gradients_of_fsdp2(rank: int) -> dict[str, dict]:
    """In bf16, the lm_head a unit of its own. By path: the rank's loss, that of full logits on one process, and the errors of
    gradients relative to those of one process, by fastpg and from full logits."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy, found = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), {}
    for path in ("one pass", "two passes"):
        loss_of, _, full = PATHS[path]
        lm = WithLoss().lm
        for unit in (*lm.model.layers, lm.lm_head, lm):
            fully_shard(unit, mp_policy=policy)
        assert lm(batch(rank)[0]).logits.dtype == torch.bfloat16
        loss = loss_of(lm, rank)
        loss.backward()
        gradients = {name: p.grad.full_tensor() for name, p in of_lm(lm).items()}
        assert {x.dtype for x in gradients.values()} == {torch.float32}
        want, want_in_full = mean_gradients(loss_of), mean_gradients(full)
        errors, errors_in_full = (
            {name: ((x - other[name]).norm() / other[name].norm()).item() for name, x in gradients.items()}
            for other in (want, want_in_full)
        )
        loss_in_full = full(in_bf16(WithLoss().lm), rank).item()
        found[path] = {"loss": loss.item(), "in full": loss_in_full, "errors": errors, "errors in full": errors_in_full}
    return found


def in_bf16(lm: nn.Module) -> nn.Module:
    for p in lm.parameters():  # and no buffer, as under FSDP2
        p.data = p.data.bfloat16()
    return lm


def mean_gradients(loss_of: Callable) -> dict[str, torch.Tensor]:
    """In one process and bf16, averaged over the ranks' batches in float32."""
    means = {}
    for rank in range(RANKS):
        lm = in_bf16(WithLoss().lm)
        loss_of(lm, rank).backward()
        means = {name: means.get(name, 0) + p.grad.float() / RANKS for name, p in of_lm(lm).items()}
    return means


def test_fsdp1_trains_like_one_process():
    """Three steps by each path, on the losses of full logits."""
    ranks = run_on_ranks(trained_by_fsdp1, RANKS)
    assert len(ranks[0]) == 4 * len(PATHS)
    for case, (_, want, off, moved) in ranks[0].items():
        losses = torch.tensor([of_rank[case][0] for of_rank in ranks]).mean(0)
        assert losses.tolist() == pytest.approx(want, rel=1e-5, abs=1e-5), case
        assert off < 1e-5 < 1e-3 < moved, case


OF_ITS_OWN = (
    "the output embeddings are a unit of FSDP1 (FullyShardedDataParallel) of their own, which gathers their weight for the "
    "backward of their own output alone; leave them out of auto_wrap_policy, so that they belong to the unit around them, or "
    "use FSDP2 (fully_shard)"
)
OUTSIDE = (
    "head.weight is sharded by FSDP1 (FullyShardedDataParallel) outside the forward of the module that it wraps; pass the "
    "wrapped model to token_logprobs or causal_lm_policy_loss, or compute the loss in that forward"
)
REFUSED = {  # by units and call
    ("whole", "from_model"): OUTSIDE,
    ("whole", "weight"): OUTSIDE,
    ("lm_head", "weight"): OUTSIDE,
    ("lm_head", "from_model"): OF_ITS_OWN,
    ("lm_head", "one pass"): OF_ITS_OWN,
    ("lm_head", "two passes"): OF_ITS_OWN,
    ("lm_head", "linear_cispo_loss"): OF_ITS_OWN,
}


def test_what_fsdp1_cannot_do_is_said():
    for found in run_on_ranks(refused_by_fsdp1, RANKS):
        for (use_orig_params, units, name), (error, ran) in found.items():
            assert error == REFUSED[units, name], (use_orig_params, units, name)
            assert not ran or name == "linear_cispo_loss"  # which is computed in the forward
        assert len(found) == 2 * len(REFUSED)


def test_fsdp2_in_bf16_with_the_head_as_a_unit():
    """The losses are those of full logits in float32 from the same bf16 states. So is the lm_head's gradient, to the accuracy
    that is promised in bf16; the model's own backward in bf16 adds its rounding to the others, which one process has too."""
    tolerance = WEIGHT_TOLERANCE[torch.bfloat16]
    for of_rank in run_on_ranks(gradients_of_fsdp2, RANKS):
        assert of_rank.keys() == {"one pass", "two passes"}
        for found in of_rank.values():
            assert found["loss"] == pytest.approx(found["in full"], rel=1e-5)
            assert len(found["errors"]) == 21
            assert max(found["errors"].values()) < tolerance
            assert found["errors in full"]["lm_head.weight"] < tolerance
