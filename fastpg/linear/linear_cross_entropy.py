"""The cross entropy of supervised fine-tuning, from hidden states and the lm_head: torch's arguments, without the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from ..lm_head import LMHead
from ..loss.objectives import Reinforce
from ..loss.reductions import check_denominator, inverse_denominator
from ..validation import IGNORED_TOKEN, is_nonnegative_number, kind
from .linear_logprobs import linear_logprobs
from .linear_policy_loss import linear_policy_loss

CrossEntropyReduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: torch.Tensor,  # (..., H)
    head: torch.Tensor | LMHead,  # (V, H), or an LMHead
    labels: torch.Tensor,  # (...)
    *,
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

        z      = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature            lse = logsumexp_v z_v
        loss_n = (1 - s) (lse - z[label]) + s (lse - mean_v z_v) + c lse^2       s: label_smoothing, c: z_loss

    The mean is over the labels that count; or it is their sum over `denominator`, the global count under gradient accumulation.

    Args:
        hidden, head, temperature, workspace, backend, check: as in `linear_logprobs`.
        labels: (...) int64 or int32 in [0, V), already shifted: hidden[..., t, :] predicts labels[..., t].
        ignore_index: the label that does not count, as in torch; -100 never counts.
        label_smoothing: in [0, 1), the weight of the uniform distribution (Szegedy et al., arXiv 1512.00567, section 7).
        z_loss: >= 0, the factor of lse^2, which keeps logits near 0 (PaLM, arXiv 2204.02311, section 5).
        reduction: "mean", "sum" or "none".
        denominator: a number or 0-d tensor > 0 that replaces the count of labels in the mean.

    Returns the loss: () or, with "none", (...) with 0 at ignored labels; float32, or float64 for float64 inputs. Where no label
    counts, the mean is 0 and differentiable (torch's is NaN).

    A mean or sum without smoothing and z-loss takes one pass, three products, and its gradients are computed in the forward
    (`linear_policy_loss` on-policy, with advantages of 1). Anything else takes two passes, four products.

    Raises TypeError or ValueError, naming the argument, before any work.
    """
    _check(labels, ignore_index, label_smoothing, z_loss, reduction, denominator, check)
    options = {"temperature": temperature, "workspace": workspace, "backend": backend, "check": check}
    # (a label to be ignored may be outside the vocabulary)
    labels = labels if ignore_index == IGNORED_TOKEN else labels.masked_fill(labels == ignore_index, IGNORED_TOKEN)
    if reduction != "none" and not label_smoothing and not z_loss:
        ones = torch.ones_like(labels, dtype=torch.float32)
        reduction = "token-mean" if reduction == "mean" else "sum"
        with _labels_named():
            return linear_policy_loss(
                hidden, head, labels, None, ones, objective=Reinforce(), reduction=reduction, denominator=denominator,
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
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = (labels != IGNORED_TOKEN).sum().clamp(min=1) if denominator is None else denominator
    return losses.sum() * inverse_denominator(count, losses.dtype, losses.device)


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
