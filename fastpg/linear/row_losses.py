"""The loss of the rows of a call, differentiable once: which schedule the rows take, and how their gradients are scaled."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..distributed import vocab_parallel
from ..lm_head import LMHead
from ..tiles import gradient_rows, large_pages
from ..tiles.backend import tiles_of
from ..tiles.operator import is_opaque
from ..tiles.products import accumulation_dtype
from ..tiles.structures import Further, Gradients, Head, RowResults, RowStatistics, TokenTerms, beyond_entropy
from .anchored import kept_results, one_pass
from .call import Inputs, differentiable, with_inputs
from .first_product import Options, TokenLosses, loss_gradient
from .linear_logprobs import How, rows_results
from .rows import Rows
from .support import RowSets, Support, sets_of


class Call(NamedTuple):
    """One call: its rows, its head and its loss, and how they are computed."""

    rows: Rows
    head: Head
    terms: TokenTerms
    losses: TokenLosses
    options: Options
    weight_grad: torch.Tensor | None


class Result(NamedTuple):
    """The results of a call of K rows. Only the loss is differentiable."""

    loss: torch.Tensor  # ()
    rows: RowResults  # (K, ...)
    summary: torch.Tensor | None = None  # metrics, where kernels have computed the loss of all rows
    again: torch.Tensor | None = None  # (3,): as in `OnePass`


def over_sets(support: Support | None, vocab_size: int | None, call: Call, inputs: Inputs) -> Result:
    """The results of a call whose rows have a softmax over a set of their own each; None: over the whole vocabulary.

    Rows of large sets take the schedule of the call. Those of small sets are gathered, and the loss of their log-probabilities
    is differentiated; where a set is the token alone the log-probability is 0.
    """
    options, terms, head = call.options, call.terms, inputs.head
    asked = options.asked
    sets = sets_of(support, call.rows, inputs, vocab_size, skips=not beyond_entropy(asked))
    if sets is None:
        return loss_of(call, head)
    if sets.others is None:
        result = loss_of(call._replace(rows=sets.large), head)
        return result._replace(rows=sets.together(_over_their_sets(sets, result.rows, call), None))
    large = small = again = None
    logprobs = torch.zeros_like(terms.advantages)
    if sets.small is not None:
        small = rows_results(sets.small, head, asked, _how(options), sets.entries)
        logprobs = sets.placed([(small.statistics.logprobs, sets.at_small)])
    loss = _TokenLoss.apply(logprobs[sets.others], call.losses, terms.select(sets.others))
    if sets.large is not None:
        result = loss_of(call._replace(rows=sets.large, terms=terms.select(sets.at_large)), head)
        loss, again, large = loss + result.loss, result.again, _over_their_sets(sets, result.rows, call)
    if large is None and small is None:
        return Result(loss, RowResults(RowStatistics(logprobs, logprobs if asked.entropy else None, None, None, None)))
    return Result(loss, detached(sets.together(large, small)), None, again)


def _over_their_sets(sets: RowSets, found: RowResults, call: Call) -> RowResults:
    mean, weight = call.options.asked.mean, call.head.weight
    return sets.over_their_sets(found, vocab_parallel.all_columns(weight, call.options.group) if mean else 0)


def loss_of(call: Call, head: LMHead) -> Result:
    """The results of a call by the schedule of its plan."""
    if not call.options.plan.sweeps:
        return _two_passes(call, head)
    return result_of(OnePassLoss.apply(*differentiable(call), with_inputs(call)))


def result_of(outputs: tuple[torch.Tensor | None, ...]) -> Result:
    """From the outputs of `OnePassLoss`."""
    loss, summary, again, logprobs, entropy, *others = outputs
    logsumexp, *further = others or (None,)
    return Result(loss, RowResults(RowStatistics(logprobs, entropy, None, logsumexp, None), Further(*further)), summary, again)


def detached(found: RowResults) -> RowResults:
    statistics, further = ([None if x is None else x.detach() for x in part] for part in found)
    return RowResults(RowStatistics(*statistics), Further(*further))


def _how(options: Options) -> How:
    return How(options.plan.two_pass_rows, options.backend, options.skip_silenced)


def _two_passes(call: Call, head: LMHead) -> Result:
    """The loss of float16 inputs. In one pass their E would underflow, and so would gradients that are rounded before the
    factor of a gradient scaler is known. Here they are computed in backward, with that factor inside."""
    options, terms, rows = call.options, call.terms, call.rows
    found = kept_results(rows_results(rows, head, options.asked, _how(options)), terms)
    loss = _TokenLoss.apply(found.statistics.logprobs, call.losses, terms)
    return Result(loss, detached(found))


class _TokenLoss(torch.autograd.Function):
    """The loss () of log-probabilities (K,). Gradients reach these alone, not tensors that an objective closes over."""

    @staticmethod
    def forward(ctx, logprobs, losses, terms):
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(loss_gradient(losses, logprobs, terms))
        return losses(logprobs.detach(), terms).sum()

    @staticmethod
    def backward(ctx, grad_loss):
        _refuse_double_backward()
        (g,) = ctx.saved_tensors
        return g * grad_loss, None, None


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the one-pass loss has no second derivative: its gradients are computed in the forward. Use linear_logprobs "
            "and policy_loss without create_graph, or full logits (fastpg.reference)"
        )


def _scaled(gradients: Gradients, grad_loss: torch.Tensor, backend: str) -> Gradients:
    """gradients * grad_loss: in place where this backward is the last, as without retain_graph; copies otherwise.

    The factor stays in fp32: rounded to bf16 it would give all of dX and dW one common error of up to 2^-9.
    """
    found = [g for g in gradients if g is not None]
    factor = grad_loss.to(accumulation_dtype(found[0].dtype))
    if is_opaque(factor):  # a compiled program cannot tell whether it is the last backward
        return Gradients(*(None if g is None else (g.to(factor.dtype) * factor).to(g.dtype) for g in gradients))
    if _graph_is_kept():
        gradients = Gradients(*(None if g is None else _copy_times(g, factor) for g in gradients))
    else:
        tiles_of(backend).scale_(found, factor)
    return gradients


def _copy_times(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    out = large_pages.empty(gradient.shape, gradient.dtype, gradient.device)
    return gradient_rows.times(gradient, factor, out)


def _graph_is_kept() -> bool:
    """Whether another backward may read the saved tensors. torch asks the same for its donated buffers (`_aot_autograd`)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class OnePassLoss(torch.autograd.Function):
    """The loss, the summary and `again` of a `Result`, then log-probabilities, entropies, and what else is asked of its rows.

    Only the loss is differentiable. Its gradients, where they are wanted, are computed in forward and scaled in backward.
    """

    @staticmethod
    def forward(ctx, hidden, lora_hidden, weight, lora_weight, bias, call):
        call = with_inputs(call, hidden, lora_hidden, weight, lora_weight, bias)
        result = one_pass(call.rows, call.head, call.terms, call.losses, call.options)
        ctx.save_for_backward(*result.gradients)
        ctx.weight_grad, ctx.backend = call.weight_grad, call.options.backend
        statistics, further = result.rows
        others = result.summary, result.again, *statistics[:2]
        if beyond_entropy(call.options.asked):
            others = *others, statistics.logsumexp, *further
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        ctx.set_materialize_grads(False)
        return result.loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):
        _refuse_double_backward()
        found = Gradients(*ctx.saved_tensors)
        if grad_loss is None:  # the loss went through a function whose backward returns None
            grad_loss = next(g for g in found if g is not None).new_zeros(())
        if found.weight is not None and ctx.weight_grad is not None:
            ctx.weight_grad.addcmul_(found.weight, grad_loss.to(found.weight.dtype))
            found = Gradients(*found[:2], None, *found[3:])
            if not any(g is not None for g in found):
                return (None,) * 6
        return *_scaled(found, grad_loss, ctx.backend), None
