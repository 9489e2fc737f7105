"""Every schedule on every backend, as functions of a problem, and the marks that run a test on each of them.

The kernels run on a GPU where there is one, and in Triton's interpreter elsewhere.
"""

from dataclasses import replace

import pytest
import torch
from problems import Problem, Result, oracle, random_problem

from fastpg import KLPenalty, linear_logprobs, linear_policy_loss, policy_loss, reference

DTYPES = [torch.float32, torch.bfloat16]


def two_pass(problem: Problem, objective, reduction: str = "sum", kl: KLPenalty | None = None, **options) -> Result:
    leaves = problem.leaves()
    logprobs = linear_logprobs(
        leaves.hidden, leaves.head, leaves.tokens, mask=leaves.mask, temperature=leaves.temperature, **options
    ).logprobs
    out = policy_loss(
        logprobs, leaves.old_logprobs, leaves.advantages, objective=objective, mask=leaves.mask, reduction=reduction,
        kl=kl, ref_logprobs=leaves.ref_logprobs, rollout_weights=leaves.rollout_weights,
    )  # fmt: skip
    return Result.of(leaves, out.logprobs, out.loss)


def one_pass(problem: Problem, objective, reduction: str = "sum", kl: KLPenalty | None = None, **options) -> Result:
    leaves = problem.leaves()
    out = linear_policy_loss(
        leaves.hidden, leaves.head, leaves.tokens, leaves.old_logprobs, leaves.advantages, objective=objective,
        mask=leaves.mask, temperature=leaves.temperature, reduction=reduction,
        kl=kl, ref_logprobs=leaves.ref_logprobs, rollout_weights=leaves.rollout_weights, **options,
    )  # fmt: skip
    return Result.of(leaves, out.logprobs, out.loss, out.metrics)


KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def two_pass_triton(problem: Problem, *arguments, **options) -> Result:
    return two_pass(problem.to(KERNEL_DEVICE), *arguments, backend="triton", **options)


def one_pass_triton(problem: Problem, *arguments, **options) -> Result:
    return one_pass(problem.to(KERNEL_DEVICE), *arguments, backend="triton", **options)


# Tests that stay on the CPU reach the kernels through the interpreter, which is only there where there is no GPU.
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"] if KERNEL_DEVICE == "cpu" else ["torch"])
TORCH, TRITON = [two_pass, one_pass], [two_pass_triton, one_pass_triton]
TORCH_SCHEDULES = pytest.mark.parametrize("schedule", TORCH, ids=lambda f: f.__name__)
SCHEDULES = pytest.mark.parametrize("schedule", TORCH + TRITON, ids=lambda f: f.__name__)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# names what a test calls `one_pass`
ONE_PASS = pytest.mark.parametrize("one_pass", [one_pass, one_pass_triton], ids=["torch", "triton"])


def logprobs_of(problem: Problem) -> torch.Tensor:
    return oracle(problem, reference.reinforce)[0].logprobs


def moderate_problem(rows: int, dtype: torch.dtype) -> Problem:
    """log ratios and log(ref / pi) of order 1, rollout weights around 1."""
    problem = random_problem(rows, 1000, dtype)
    want, _ = oracle(problem, reference.reinforce)
    old, ref = (want.logprobs - torch.randn(rows) for _ in range(2))
    return replace(problem, old_logprobs=old.float(), ref_logprobs=ref.float(), rollout_weights=torch.rand(rows) + 0.5)


def coefficient_conditioning(problem: Problem, logprobs: torch.Tensor, objective, kl) -> torch.Tensor:
    """(|c| + |dc/dlogp|) / |c|, c by float64 autograd at logp and its slope by a central difference."""

    def coefficient(logprobs):
        x = logprobs.clone().requires_grad_()
        loss = reference.policy_loss(
            x, problem.old_logprobs.double(), problem.advantages.double(), objective=objective, reduction="sum", kl=kl,
            ref_logprobs=problem.ref_logprobs.double(), rollout_weights=problem.rollout_weights.double(),
        )  # fmt: skip
        return torch.autograd.grad(loss, x)[0]

    step = 1e-6
    slope = (coefficient(logprobs + step) - coefficient(logprobs - step)) / (2 * step)
    return 1 + slope.abs() / coefficient(logprobs).abs()
