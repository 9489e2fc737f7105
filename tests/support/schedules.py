"""Every schedule on every backend, as functions of a problem, and the marks that run a test on each of them.

The kernels run on a GPU where there is one, and in Triton's interpreter elsewhere.
"""

import pytest
import torch
from problems import Result

from fastpg import KLPenalty, linear_logprobs, linear_policy_loss, policy_loss
from fastpg.crosscheck.cases import Inputs, Settings

DTYPES = [torch.float32, torch.bfloat16]
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def two_pass(problem: Inputs, objective, reduction: str = "sum", kl: KLPenalty | None = None, **options) -> Result:
    x = problem.leaves()
    logprobs = linear_logprobs(x.hidden, x.head, x.tokens, mask=x.mask, temperature=x.temperature, **options).logprobs
    out = policy_loss(
        logprobs, x.old_logprobs, x.advantages, objective=objective, mask=x.mask, reduction=reduction, kl=kl,
        ref_logprobs=x.ref_logprobs, rollout_weights=x.rollout_weights,
    )  # fmt: skip
    return Result.of(x, Settings(objective, reduction, kl), out.logprobs, out.loss)


def one_pass(problem: Inputs, objective, reduction: str = "sum", kl: KLPenalty | None = None, **options) -> Result:
    x = problem.leaves()
    out = linear_policy_loss(
        x.hidden, x.head, x.tokens, x.old_logprobs, x.advantages, objective=objective, mask=x.mask, temperature=x.temperature,
        reduction=reduction, kl=kl, ref_logprobs=x.ref_logprobs, rollout_weights=x.rollout_weights, **options,
    )  # fmt: skip
    return Result.of(x, Settings(objective, reduction, kl), out.logprobs, out.loss, out.metrics)


def two_pass_triton(problem: Inputs, *arguments, **options) -> Result:
    return two_pass(problem.to(KERNEL_DEVICE), *arguments, backend="triton", **options)


def one_pass_triton(problem: Inputs, *arguments, **options) -> Result:
    return one_pass(problem.to(KERNEL_DEVICE), *arguments, backend="triton", **options)


# Tests that stay on the CPU reach the kernels through the interpreter, which is only there where there is no GPU.
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"] if KERNEL_DEVICE == "cpu" else ["torch"])
TORCH, TRITON = [two_pass, one_pass], [two_pass_triton, one_pass_triton]
TORCH_SCHEDULES = pytest.mark.parametrize("schedule", TORCH, ids=lambda f: f.__name__)
SCHEDULES = pytest.mark.parametrize("schedule", TORCH + TRITON, ids=lambda f: f.__name__)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# names what a test calls `one_pass`
ONE_PASS = pytest.mark.parametrize("one_pass", [one_pass, one_pass_triton], ids=["torch", "triton"])
