"""The loss of ready log-probabilities by one kernel, which computes its gradient too: for named objectives of single tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..tiles.backend import tiles_of
from ..tiles.structures import DeviceLoss, TokenTerms
from .objectives import device_loss


def kernel_loss(logprobs: torch.Tensor, objective: object, kl: object | None, backend: str) -> DeviceLoss | None:
    """The loss as device functions; None where PyTorch computes it.

    A compiler makes one kernel of PyTorch's operations, and the transforms of torch.func look into them.
    """
    if backend != "triton" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if isinstance(logprobs, FakeTensor):
        return None
    return device_loss(objective, kl, show_lost=False)


def loss_on_device(
    logprobs: torch.Tensor,  # (...)
    mask: torch.Tensor | None,  # (...)
    terms: TokenTerms,  # (...), masked tokens included
    loss: DeviceLoss,
    plain: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss (), the log-probabilities (...) detached, 0 where masked, and the metrics (`limits.SUMMARY`).

    plain: the loss as a function of logprobs in PyTorch, which is differentiated where a second derivative is asked for.
    """
    flat = TokenTerms(*(x if x is None or x.dim() == 0 else _flat(x.detach()) for x in terms))
    value, kept, metrics = _LogprobsLoss.apply(logprobs, None if mask is None else _flat(mask), flat, loss, plain)
    return value, kept if logprobs.dim() == 1 else kept.view(logprobs.shape), metrics


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 1 and x.is_contiguous() else x.contiguous().view(-1)


class _LogprobsLoss(torch.autograd.Function):
    """(loss (), log-probabilities (N,), metrics). Only the loss is differentiable."""

    @staticmethod
    def forward(ctx, logprobs, mask, terms, loss, plain):
        found = tiles_of("triton").policy_loss(_flat(logprobs), mask, terms, loss)
        ctx.save_for_backward(logprobs, found.gradient)
        ctx.plain = plain
        ctx.mark_non_differentiable(found.logprobs, found.metrics)
        ctx.set_materialize_grads(False)
        return found.loss, found.logprobs, found.metrics

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 5
        logprobs, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            (grad,) = torch.autograd.grad(ctx.plain(logprobs), logprobs, grad_loss, create_graph=True)
        else:
            grad = (gradient * grad_loss).view(logprobs.shape).to(logprobs.dtype)
        return grad, *(None,) * 4
