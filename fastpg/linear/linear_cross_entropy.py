"""The cross entropy of supervised fine-tuning, from hidden states and the lm_head: torch's arguments, without the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from ..lm_head import LMHead, as_head
from ..loss.objectives import Reinforce
from ..loss.reductions import check_denominator, inverse_denominator
from ..validation import IGNORED_TOKEN, check_plain, is_nonnegative_number, kind
from .linear_logprobs import linear_logprobs
from .linear_policy_loss import linear_policy_loss

CrossEntropyReduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: torch.Tensor,  # (..., H)
    head: torch.Tensor | LMHead,  # (V, H), or an LMHead
    labels: torch.Tensor,  # (...)
    *,
    weight: torch.Tensor | None = None,  # (V,)
    ignore_index: int = IGNORED_TOKEN,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: CrossEntropyReduction = "mean",
    denominator: float | torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,  # number or (...)
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy` of the logits of a linear layer that are never built, plus a z-loss.

        z      = softcap(logit_scale * (hidden @ head.weight.T + bias)) / temperature       lse = logsumexp_v z_v
        loss_n = (1 - s) (lse - z[label]) + s (lse - mean_v z_v) + c lse^2       s: label_smoothing, c: z_loss

    The mean is over the labels that count; or it is their sum over `denominator`, the global count under gradient accumulation.
    With class weights w, loss_n is multiplied by w[label], z-loss included, and the mean divides by the sum of these w[label].

    Args:
        hidden, head, temperature, workspace, backend, check: as in `linear_logprobs`.
        labels: (...) int64 or int32 in [0, V), already shifted: hidden[..., t, :] predicts labels[..., t].
        weight: (V,) floating, the weight of each class, as in torch. A label whose class weighs 0 costs no work, as if it were
            ignored. Not beside label_smoothing, whose terms torch weights one by one, nor beside head.group.
        ignore_index: the label that does not count, as in torch; -100 never counts.
        label_smoothing: in [0, 1), the weight of the uniform distribution (Szegedy et al., arXiv 1512.00567, section 7).
        z_loss: >= 0, the factor of lse^2, which keeps logits near 0 (PaLM, arXiv 2204.02311, section 5).
        reduction: "mean", "sum" or "none".
        denominator: a number or 0-d tensor > 0 that replaces the count of labels, or the sum of their weights, in the mean.

    Returns the loss: () or, with "none", (...) with 0 at ignored labels; float32, or float64 for float64 inputs. Where no label
    counts, the mean is 0 and differentiable (torch's is NaN).

    A mean or sum without smoothing and z-loss takes one pass, three products, and its gradients are computed in the forward
    (`linear_policy_loss` on-policy, with advantages of 1 or the weights). Anything else takes two passes, four products.

    Raises TypeError or ValueError, naming the argument, before any work.
    """
    _check(labels, ignore_index, label_smoothing, z_loss, reduction, denominator, check)
    if weight is not None:
        _check_weight(weight, head, labels, label_smoothing)
    options = {"temperature": temperature, "workspace": workspace, "backend": backend, "check": check}
    # (a label to be ignored may be outside the vocabulary)
    labels = labels if ignore_index == IGNORED_TOKEN else labels.masked_fill(labels == ignore_index, IGNORED_TOKEN)
    factors = None
    if weight is not None:
        labels, factors = _weighted(labels, weight)
        if reduction == "mean" and denominator is None:
            total = torch.where((labels != IGNORED_TOKEN).any(), factors.sum(), 1)
            reduction, factors = "sum", factors / total
    if reduction != "none" and not label_smoothing and not z_loss:
        factors = torch.ones_like(labels, dtype=torch.float32) if factors is None else factors
        reduction = "token-mean" if reduction == "mean" else "sum"
        with _labels_named():
            return linear_policy_loss(
                hidden, head, labels, None, factors, objective=Reinforce(), reduction=reduction, denominator=denominator,
                skip_zero_weight=False, **options,
            ).loss  # fmt: skip
    outputs = ("logsumexp",) * bool(z_loss or label_smoothing) + ("mean_logits",) * bool(label_smoothing)
    with _labels_named():
        found = linear_logprobs(hidden, head, labels, outputs=outputs, **options)
    losses = -found.logprobs
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (found.logsumexp - found.mean_logits)
    if z_loss:
        losses = losses + z_loss * found.logsumexp.square()
    if factors is not None:
        losses = losses * factors.to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = (labels != IGNORED_TOKEN).sum().clamp(min=1) if denominator is None else denominator
    return losses.sum() * inverse_denominator(count, losses.dtype, losses.device)


def _weighted(labels: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, ignored where their class weighs 0, and what each of them weighs (...): 0 where ignored."""
    inside = labels.clamp(0, weight.shape[0] - 1).long()  # a label outside the vocabulary is an error of its own
    factors = weight.to(torch.promote_types(weight.dtype, torch.float32))[inside]
    labels = labels.masked_fill((factors == 0) & (inside == labels), IGNORED_TOKEN)
    return labels, factors.masked_fill(labels == IGNORED_TOKEN, 0)


@contextmanager
def _labels_named() -> Iterator[None]:
    """The functions called here have their labels as `tokens`: their errors name the argument that was given."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not str(error).startswith("tokens "):
            raise
        words = "labels" + str(error).removeprefix("tokens").replace("predicts tokens[", "predicts labels[")
        raise type(error)(words) from None


def _check(
    labels: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    denominator: float | torch.Tensor | None,
    check: bool,
) -> None:
    """What `linear_logprobs` does not check."""
    if not isinstance(labels, torch.Tensor) or labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be an int64 or int32 tensor; got {kind(labels)}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int; got {ignore_index!r}")
    if not is_nonnegative_number(label_smoothing) or label_smoothing >= 1:
        raise ValueError(f"label_smoothing must be a number in [0, 1); got {label_smoothing!r}")
    if not is_nonnegative_number(z_loss):
        raise ValueError(f"z_loss must be a number >= 0; got {z_loss!r}")
    if reduction not in get_args(CrossEntropyReduction):
        raise ValueError(f'reduction must be "mean", "sum" or "none"; got {reduction!r}')
    if denominator is not None and reduction != "mean":
        raise ValueError(f'denominator replaces the count in reduction="mean"; got reduction={reduction!r}')
    check_denominator(denominator, check=check)


def _check_weight(weight: torch.Tensor, head: torch.Tensor | LMHead, labels: torch.Tensor, label_smoothing: float) -> None:
    """Class weights, of which `linear_logprobs` knows nothing."""
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight must be a floating-point tensor (V,), the weight of each class, or None; got {kind(weight)}")
    check_plain("weight", weight)
    if label_smoothing:
        raise ValueError(
            f"weight cannot be given with label_smoothing={label_smoothing}: torch weights every term of the smoothing by its "
            "class, a sum over the vocabulary that is not computed here; leave one of them out"
        )
    head = as_head(head)
    if head.group is not None:
        raise ValueError(
            'weight cannot be given with head.group; use reduction="none" and multiply the losses by the weights of their '
            "labels"
        )
    if weight.shape != (head.vocab_size,):
        raise ValueError(
            f"weight must be (V,) = ({head.vocab_size},), a number for each class; got shape {tuple(weight.shape)}"
        )
    if weight.device != labels.device:
        raise ValueError(f"weight is on {weight.device} but labels is on {labels.device}")
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: none is computed for it; pass weight.detach()")
