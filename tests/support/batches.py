"""One batch of ragged sequences for `policy_loss`, as rows and as packs, and the oracle's results for it."""

import functools

import pytest
import torch
from objectives import JUMPS, OBJECTIVES, REDUCTIONS

from fastpg import policy_loss, reference

F32, F64 = torch.float32, torch.float64
EPS = {F32: 2.0**-23, F64: 2.0**-52}
LAYOUTS = ["rows", "pack-with-masked", "pack"]
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

# Ragged sequences: full, one hole, one token, none, and two more. In a pack, tokens of one sequence are not neighbours.
MASK = torch.tensor([[c == "x" for c in row] for row in ("xxxxx", "x.xx.", "..x..", ".....", "xxxx.", "...xx")])
ROWS = torch.arange(6)[:, None].expand(6, 5)
ORDER = torch.randperm(30, generator=torch.Generator().manual_seed(1))
KEPT = ORDER[MASK.reshape(-1)[ORDER]]


def batch(dtype=F64, per_sequence=False, spread=1.0):
    """Arguments of policy_loss for (6, 5) tokens. Ratios of tokens and sequences are on both sides of every bound.

    spread: what log ratios are multiplied by; with 3, ratios go from 0.01 to 70.
    """
    means = torch.tensor([0.5, -0.4, 0.05, 0.0, -0.3, 0.35], dtype=F64)[:, None]
    noise = torch.linspace(-0.9, 0.9, 30, dtype=F64)[torch.randperm(30)].reshape(6, 5)
    d = means + noise - torch.where(MASK, noise, 0).sum(1, keepdim=True) / MASK.sum(1, keepdim=True).clamp(min=1)
    logprobs = -3 * torch.rand(6, 5, dtype=dtype) - 0.01
    old = logprobs - spread * d.to(dtype)
    ratios = (logprobs.double() - old.double()).exp()[MASK]
    assert (ratios[:, None] / JUMPS - 1).abs().min() > 1e-3
    advantages = torch.tensor([1.5, -0.8, 0.6, 2.0, -1.2, 0.9]) if per_sequence else torch.randn(6, 5)
    return {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages.to(dtype), "mask": MASK}


def penalties(dtype=F64):
    return {"ref_logprobs": -3 * torch.rand(6, 5, dtype=dtype), "rollout_weights": 2 * torch.rand(6, 5, dtype=dtype)}


def lay_out(inputs, layout):
    """The same tokens as rows (B, T), as a shuffled pack with the masked ones, or as a shuffled pack of the kept ones alone."""
    if layout == "rows":
        return dict(inputs)
    order = ORDER if layout == "pack-with-masked" else KEPT
    given = {k: x.reshape(-1)[order] if x.shape == MASK.shape else x for k, x in inputs.items()}
    return given | {"sequence_ids": ROWS.reshape(-1)[order]}


def as_rows(x, layout):
    """Undoes `lay_out`; 0 for tokens that were left out."""
    if layout == "rows":
        return x
    order = ORDER if layout == "pack-with-masked" else KEPT
    return torch.zeros(30, dtype=x.dtype).index_put((order,), x).reshape(6, 5)


def loss_and_gradient(logprobs, *arguments, **named):
    logprobs = logprobs.detach().clone().requires_grad_()
    output = policy_loss(logprobs, *arguments, **named)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output, gradient


def result_as_rows(inputs, layout, **options):
    output, gradient = loss_and_gradient(**lay_out(inputs, layout), **options)
    return output.loss, as_rows(gradient, layout)


def oracle_of(inputs, objective, **options):
    """(loss, gradient, sum of |terms|) of the float64 oracle."""
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    if "sequence_ids" in wide and wide["advantages"].shape != wide["logprobs"].shape:
        wide["advantages"] = wide["advantages"][wide["sequence_ids"]]
    logprobs = wide.pop("logprobs").detach().requires_grad_()
    absolute = functools.wraps(objective)(lambda *arguments: objective(*arguments).abs())
    loss = reference.policy_loss(logprobs, objective=objective, **wide, **options)
    if options.get("kl"):
        options["kl"] = (-options["kl"][0], *options["kl"][1:])
    scale = -reference.policy_loss(logprobs.detach(), objective=absolute, **wide, **options)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], scale.item()


def assert_same(actual, wanted, tolerance=1e-12):
    """Losses, and gradients (rows) with errors measured on the largest."""
    torch.testing.assert_close(actual[0], wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual[1], wanted[1], rtol=tolerance, atol=tolerance * wanted[1].abs().max().item())
