"""Structures that schedules and tile ops hand to one another: tensors and numbers that belong together, passed whole."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Head(NamedTuple):
    """A head as schedules and tile ops see it. Its logits are softcap(logit_scale * (x . w + z . b + bias)).

    w and b are rows of the weight and of LoRA's B. z = scale * A x, r numbers per token in the accumulation dtype, is computed
    before (see `lora`).
    """

    weight: torch.Tensor  # (V, H)
    lora_weight: torch.Tensor | None  # (V, r): B
    bias: torch.Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float


def lora_rank(head: Head) -> int:
    """r, or 0 without LoRA. A function, since Dynamo of torch 2.9 cannot trace properties of a NamedTuple."""
    return 0 if head.lora_weight is None else head.lora_weight.shape[1]


class TokenInputs(NamedTuple):
    """What decides which tokens of a call count, (...) each."""

    tokens: torch.Tensor
    mask: torch.Tensor | None  # bool
    temperature: torch.Tensor | None  # (...) or (); None where it is a number, which has been checked
    advantages: torch.Tensor | None  # None: no token is skipped
    rollout_weights: torch.Tensor | None
    old_logprobs: torch.Tensor | None
    weight: torch.Tensor | None  # (), what all tokens weigh, where it may not be finite
    indices: torch.Tensor | None  # (K,) int64: the places that are computed, chosen before; None: `keep` chooses
    vocab: int | None  # None: ids are not looked at


class Keep(NamedTuple):
    """Which tokens count, and how many."""

    keep: torch.Tensor  # (...) bool
    computed: torch.Tensor | None  # (...) bool: without those that add exactly 0 to the loss; None where it is the same
    # (6,) int64: tokens that count, computed ones, ids out of range, temperatures out of range. Of given indices, those that
    # are out of range, not ascending or not of a token that counts; and the tokens that they leave out and the loss needs
    numbers: torch.Tensor


class Chunk(NamedTuple):
    """C rows of a call, ready to be multiplied. Padding rows are zeros with token -1 and temperature 1."""

    hidden: torch.Tensor  # (C, H) in the operand dtype
    lora_hidden: torch.Tensor | None  # (C, r) in the accumulation dtype
    tokens: torch.Tensor  # (C,) int64
    temperature: torch.Tensor | None  # (C, 1) in the accumulation dtype; None is 1
    places: torch.Tensor | None = None  # int64, the rows of hidden that these are, padding left out; None: consecutive ones
    # (C, ceil(V / 8)) uint8: bit v % 8 of byte v // 8 says whether column v belongs to the row's softmax; None: all do
    allowed: torch.Tensor | None = None


class TileShape(NamedTuple):
    rows: int  # tokens; the planned length of a chunk is a multiple of this
    columns: int  # vocabulary entries
    padding: int  # chunks of a forward pass are padded to a multiple of this many rows
    longest: int  # most rows of a chunk of the two-pass schedule: longer chunks gain nothing


class Asked(NamedTuple):
    """What a forward returns of each row beside its log-probability."""

    entropy: bool = False
    logsumexp: bool = False
    argmax: bool = False
    mean: bool = False  # of the logits
    squares: bool = False  # the sum of squared probabilities
    rank: bool = False  # needs argmax
    top_k: int = 0


def largest_kept(asked: Asked) -> int:
    """How many of a row's largest logits a forward keeps."""
    return max(asked.top_k, int(asked.argmax))


def is_further(asked: Asked) -> bool:
    """Whether anything is asked for that the log-probability and the entropy do not need."""
    return largest_kept(asked) > 0 or asked.mean or asked.squares or asked.rank


def beyond_entropy(asked: Asked) -> bool:
    """Whether a caller gets more of a row than its log-probability and its entropy."""
    return is_further(asked) or asked.logsumexp


class FurtherPartials(NamedTuple):
    """Further partial statistics of each row over some columns, None where not asked for. `finish_further` completes them."""

    values: torch.Tensor | None = None  # (C, k): the largest logits, in descending order
    ids: torch.Tensor | None = None  # (C, k) int64: their columns; of equal logits the first one comes first
    sum: torch.Tensor | None = None  # (C,): sum z_v
    squares: torch.Tensor | None = None  # (C,): log sum q_v^2 over v != y, with q_v = exp(z_v - m) / s; 0 where s = 0
    above: torch.Tensor | None = None  # (C,) int64: how many columns v != y have z_v > z_y


class Partials(NamedTuple):
    """The partial statistics of each row over some columns, (C,) each in the accumulation dtype.

    m = max z_v, s = sum exp(z_v - m) and q = sum exp(z_v - m) (z_v - m) over the columns v != y, with q None unless an entropy
    is wanted; and z_y.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor | None
    target: torch.Tensor  # NaN for a token that is not among the columns
    further: FurtherPartials = FurtherPartials()


class Entries(NamedTuple):
    """The tokens of the sets of K rows that are on this rank, M in all, row by row."""

    row: torch.Tensor  # (M,) int64, ascending: the number of the row
    column: torch.Tensor  # (M,) int64: the token, counted from this rank's first column
    sizes: torch.Tensor  # (K,) int64: how many tokens each row's set has, those of other ranks included
    z: torch.Tensor | None = None  # (M,) in the accumulation dtype: their logits, once these are known
    slope: torch.Tensor | None = None  # (M,): the softcap's slope there, where there is a softcap


class SetPartials(NamedTuple):
    """The partial statistics of rows over their sets, and the logits of the entries."""

    partials: Partials
    z: torch.Tensor  # (M,), as in Entries
    slope: torch.Tensor | None  # (M,)


class RowStatistics(NamedTuple):
    """The statistics of each row over all columns, (C,) each in the accumulation dtype. `finish_rows` defines them."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    t: torch.Tensor
    logsumexp: torch.Tensor
    others_entropy: torch.Tensor | None

    def select(self, rows: slice) -> RowStatistics:
        return RowStatistics(*(None if x is None else x[rows] for x in self))


class Further(NamedTuple):
    """Further statistics of each row over all columns, None where not asked for. `finish_further` defines them."""

    argmax: torch.Tensor | None = None  # (C,) int64
    mean_logits: torch.Tensor | None = None  # (C,)
    log_sum_sq_probs: torch.Tensor | None = None  # (C,)
    rank: torch.Tensor | None = None  # (C,) int64
    top_logprobs: torch.Tensor | None = None  # (C, k)
    top_ids: torch.Tensor | None = None  # (C, k) int64


class RowResults(NamedTuple):
    """All that a forward finds out about each row."""

    statistics: RowStatistics
    further: Further = Further()


class Incoming(NamedTuple):
    """Incoming gradients of the rows' results, (C,) each."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    logsumexp: torch.Tensor | None = None
    sum_logits: torch.Tensor | None = None  # of sum_v z_v, over the columns of all ranks

    def select(self, rows: slice) -> Incoming:
        return Incoming(*(None if x is None else x[rows] for x in self))


class Target(NamedTuple):
    """The logit of each row's own token, (C,) each."""

    logit: torch.Tensor  # z_y; NaN for a token that is not among the columns
    slope: torch.Tensor | None  # the softcap's slope there; None without a softcap, where it is 1


class RowSums(NamedTuple):
    """Anchored sums of rows, (C,) each: S, Q, and the rounding error R of each row of E."""

    total: torch.Tensor  # S = sum_v E_v
    weighted: torch.Tensor | None  # Q = sum_v E_v log E_v; None unless an entropy is wanted
    residual: torch.Tensor | None  # R, of each stored row: its exact sum less that of its rounded entries; None: not rounded
    further: FurtherPartials = FurtherPartials()  # with sum E_v^2 as squares


class LossRows(NamedTuple):
    """Rows with their losses, (C,) each."""

    logprobs: torch.Tensor
    losses: torch.Tensor
    entropy: torch.Tensor | None
    factor: torch.Tensor | None  # u; None where no gradient is wanted
    state: torch.Tensor  # int8: 0: S and u are in range, 1: u is not, 2: S is not
    residual: torch.Tensor | None  # as in RowSums


class TokenTerms(NamedTuple):
    """The constants of each token, all of one shape, detached, in the dtype of the loss.

    Masked tokens are out before anything is computed. Either only tokens that count are here (masked is None), or all are, with
    zeros where `masked` is True.
    """

    masked: torch.Tensor | None  # bool
    old_logprobs: torch.Tensor | None  # None: on-policy, old = logp
    advantages: torch.Tensor
    weights: torch.Tensor  # weight_n / D of the reduction; () where all tokens share it
    rollout_weights: torch.Tensor | None
    ref_logprobs: torch.Tensor | None

    def select(self, rows: torch.Tensor | slice) -> TokenTerms:
        return TokenTerms(*(x if x is None or x.dim() == 0 else x[rows] for x in self))

    def old(self, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.detach() if self.old_logprobs is None else self.old_logprobs

    def kept(self, values: torch.Tensor) -> torch.Tensor:
        """values, 0 at masked positions."""
        return values if self.masked is None else values.masked_fill(self.masked, 0)


class Numbers(NamedTuple):
    """The numbers of an objective, in the order of its device function's parameters."""

    first: float | None = None
    second: float | None = None
    third: float | None = None
    fourth: float | None = None


class DeviceLoss(NamedTuple):
    """A loss whose formulas the GPU kernels can compute: the names of device functions in `fastpg.kernels.objectives`."""

    objective: str
    numbers: Numbers
    kl: str | None
    kl_coef: float
    kl_is_weighted: bool
    kl_max_log_ratio: float | None
    show_lost: bool  # a row whose sums have left their range becomes NaN
    ratio_min: float | None  # `ratio_bounds` of the objective, for the clip_fraction metric
    ratio_max: float | None


class LossSums(NamedTuple):
    """Where a chunk leaves the sums of its rows, of which `loss_summary` makes the loss and the metrics."""

    values: torch.Tensor  # of the whole call
    first: int  # the chunk's place among them


class LossSummary(NamedTuple):
    """The loss of a call, and its metrics over the rows that count."""

    loss: torch.Tensor  # ()
    metrics: torch.Tensor  # (8,): `fastpg.kernels.limits.SUMMARY`


class LogprobsLoss(NamedTuple):
    """The loss of ready log-probabilities (N,), with its gradient."""

    logprobs: torch.Tensor  # (N,) fp32: 0 where masked
    gradient: torch.Tensor  # (N,) fp32: dloss/dlogp
    loss: torch.Tensor  # ()
    metrics: torch.Tensor  # as in LossSummary


class ReadyLogits(NamedTuple):
    """Ready logits (N, V), which the caller holds, and the tokens, temperatures and mask of their rows."""

    logits: torch.Tensor
    tokens: torch.Tensor  # (N,) int64
    temperature: torch.Tensor | None  # (N, 1) in the accumulation dtype; None is 1
    keep: torch.Tensor  # (N,) bool
    allowed: torch.Tensor | None = None  # (N, ceil(V / 8)) uint8, as in Chunk


class Wanted(NamedTuple):
    """The gradients that a call computes: True where it does."""

    hidden: bool
    lora_hidden: bool
    weight: bool
    lora_weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients, each in its input's shape and dtype; None where not wanted."""

    hidden: torch.Tensor | None
    lora_hidden: torch.Tensor | None
    weight: torch.Tensor | None
    lora_weight: torch.Tensor | None
    bias: torch.Tensor | None
