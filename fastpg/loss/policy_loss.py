"""From token log-probabilities to a loss: the last steps of every schedule, and `policy_loss` on ready log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import validation
from .metrics import Metrics, Step
from .objectives import KLPenalty, Objective, ObjectiveFunction
from .reductions import Reduction, check_reduction, token_weights
from .sequences import Sequences, check_id_values, check_sequence_ids, sequences_of


class PolicyLossOutput(NamedTuple):
    """loss (): to be minimised. logprobs (...): detached, 0 where masked. metrics: `Metrics`, computed when looked at."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    metrics: Metrics


class TokenTerms(NamedTuple):
    """The constants of each token, all of one shape, detached, in the dtype of the loss.

    Masked tokens are out before anything is computed. Either only tokens that count are here (masked is None), or all are, with
    zeros where `masked` is True.
    """

    masked: torch.Tensor | None  # bool
    old_logprobs: torch.Tensor | None  # None: on-policy, old = logp
    advantages: torch.Tensor
    weights: torch.Tensor  # weight_n / D of the reduction; NaN where old_logprobs is not finite
    rollout_weights: torch.Tensor | None
    ref_logprobs: torch.Tensor | None

    def select(self, rows: torch.Tensor | slice) -> TokenTerms:
        return TokenTerms(*(None if x is None else x[rows] for x in self))

    def old(self, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.detach() if self.old_logprobs is None else self.old_logprobs

    def kept(self, values: torch.Tensor) -> torch.Tensor:
        """values, 0 at masked positions."""
        return values if self.masked is None else values.masked_fill(self.masked, 0)


def token_terms(
    select: Callable[[torch.Tensor], torch.Tensor],
    masked: torch.Tensor | None,
    weights: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    rollout_weights: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    dtype: torch.dtype,
) -> TokenTerms:
    """Made of checked arguments (...), and of the reduction's weights, to which `select` has been applied already.

    `select` drops the masked tokens or replaces them by zeros. They must never reach an exp: 0 * inf would be NaN, in forward
    and backward.
    """

    def constant(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else select(x.detach()).to(dtype)

    old = constant(old_logprobs)
    if old is not None:
        # old - old is NaN where old is not finite, else 0. A ratio of 0 or inf is never meant, and a clip would hide it.
        weights = weights + (old - old)
    return TokenTerms(masked, old, constant(advantages), weights, constant(rollout_weights), constant(ref_logprobs))


def per_token(advantages: torch.Tensor, shape: torch.Size, sequences: Sequences | None) -> torch.Tensor:
    """Advantages (...) from those of that shape, or from one per sequence."""
    if advantages.shape == shape:
        return advantages
    if sequences.ids is None:
        return advantages[:, None].expand(shape)
    # no advantage means no sequence: every token is masked
    return advantages[sequences.ids] if len(advantages) else advantages.new_zeros(shape)


def token_losses(logprobs: torch.Tensor, terms: TokenTerms, objective: ObjectiveFunction, kl: KLPenalty | None) -> torch.Tensor:
    """-weight_n / D * (rollout_n l_n - coef k_n) of each token; their sum is the loss. logprobs are 0 at masked positions."""
    old = terms.old(logprobs)
    values = objective(logprobs, old, terms.advantages)
    if not isinstance(values, torch.Tensor) or values.shape != logprobs.shape:
        given = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"objective must return one value per token, shape {tuple(logprobs.shape)}; got {given}")
    if not values.is_floating_point() or (logprobs.requires_grad and not values.requires_grad):
        raise ValueError(
            f"objective must return values that are differentiable in logprobs; got {values.dtype} without a gradient"
        )
    if terms.rollout_weights is not None:
        values = values * terms.rollout_weights
    if kl is not None:
        values = values - kl.coef * kl(logprobs, old, terms.ref_logprobs)
    return -terms.kept(values) * terms.weights


def policy_loss(
    logprobs: torch.Tensor,  # (...)
    old_logprobs: torch.Tensor | None,  # (...)
    advantages: torch.Tensor,  # (...), or one per sequence
    *,
    objective: Objective | ObjectiveFunction,
    mask: torch.Tensor | None = None,  # (...)
    sequence_ids: torch.Tensor | None = None,  # (N,)
    reduction: Reduction = "token-mean",
    denominator: float | torch.Tensor | None = None,
    kl: KLPenalty | None = None,
    ref_logprobs: torch.Tensor | None = None,  # (...)
    rollout_weights: torch.Tensor | None = None,  # (...)
) -> PolicyLossOutput:
    """loss = -sum_n weight_n (rollout_n l_n - coef k_n) / D over tokens with mask, from ready log-probabilities.

    Args:
        logprobs: (...) floating; the gradient flows through them. Computed in fp32 (float64 for float64).
        old_logprobs: (...) log-probabilities under the policy that sampled. None: on-policy, the ratio is exactly 1. Constants.
            NaN or an infinity at a kept position makes the loss NaN: a ratio of 0 or inf is never meant. Numbers > 0, which no
            log-probability can be, are computed as given.
        advantages: (...) per token, or one per sequence: (B,) with (B, T) logprobs, (S,) with sequence_ids
            (S = N is read as per token). Constants.
        objective: Reinforce(), ImportanceWeighted(...), CISPO(...), PPOClip(...), GSPO(...), SAPO(...), or a function of
            (logprobs, old_logprobs, advantages) whose value per token is maximised.
        mask: (...) bool, True where a token counts. Values at masked positions never reach the arithmetic.
        sequence_ids: (N,) int, the sequence of each token of packed (N,) logprobs, numbered from 0. Tokens of a sequence need
            not be neighbours. With (B, T) logprobs the rows are the sequences.
        reduction: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum" or "sum" (`reductions` has the table); the seq-
            forms need (B, T) or sequence_ids.
        denominator: a number or 0-d tensor that replaces the count D. Under gradient accumulation or data parallelism pass the
            global count, and sum the losses. Must be positive; for a count that may be 0 pass count.clamp(min=1).
        kl, ref_logprobs: a KLPenalty against the reference policy's log-probabilities (...); both or neither.
        rollout_weights: (...) constant factors of l (not of the KL term), such as truncated importance weights for a sampler
            whose log-probabilities differ from the trainer's.

    Returns PolicyLossOutput(loss, logprobs, metrics). Without any token the loss is 0 and differentiable.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit.
    """
    if not isinstance(logprobs, torch.Tensor) or not logprobs.is_floating_point():
        raise TypeError(f"logprobs must be a floating-point tensor; got {validation.kind(logprobs)}")
    validation.check_mask(mask, "logprobs", logprobs)
    check_sequence_ids(sequence_ids, "logprobs", logprobs)
    validation.check_policy_inputs(
        "logprobs",
        logprobs,
        old_logprobs,
        advantages,
        objective,
        kl,
        ref_logprobs,
        rollout_weights,
        packed_sequences=sequence_ids is not None,
    )
    check_reduction(reduction, logprobs.shape, denominator, sequence_ids)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    every = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    if sequence_ids is not None and not torch.compiler.is_compiling():
        check_id_values(sequence_ids, every, id_limit(advantages, logprobs))
    sequences = sequences_of(every, sequence_ids)
    function = with_sequences(objective, sequences, logprobs)
    masked = None if mask is None else ~mask

    def select(x: torch.Tensor) -> torch.Tensor:
        return x.clone() if masked is None else x.masked_fill(masked, 0)

    terms = token_terms(
        select, masked, token_weights(every, reduction, denominator, dtype, sequences), old_logprobs,
        per_token(advantages, logprobs.shape, sequences), rollout_weights, ref_logprobs, dtype,
    )  # fmt: skip
    kept = select(logprobs).to(dtype)
    loss = token_losses(kept, terms, function, kl).sum()
    step = step_of(kept.detach(), terms, objective, sequences)
    return PolicyLossOutput(loss, kept.detach().clone(), Metrics({}, step))


def step_of(
    logprobs: torch.Tensor,
    terms: TokenTerms,
    objective: object,
    sequences: Sequences | None = None,
    *,
    eligible: torch.Tensor | None = None,
    recomputed: torch.Tensor | None = None,
    entropies: torch.Tensor | None = None,
) -> Step:
    """Copies for `Metrics`. logprobs are detached, and those of the tokens in `terms`."""
    mask = None if terms.masked is None else ~terms.masked
    if sequences is not None and mask is not None:
        sequences = Sequences(mask, sequences.ids)
    logprobs, old = torch.stack([logprobs, terms.old(logprobs)])
    named = objective if isinstance(objective, Objective) else None
    # (written out, as Dynamo of torch 2.9 cannot return a tuple made by `_replace`)
    return Step(logprobs, old, mask, named, sequences, eligible, recomputed, entropies)


def id_limit(advantages: torch.Tensor, tokens: torch.Tensor) -> int:
    """Sequence ids must be below it: the number of tokens, or of advantages if there is one per sequence."""
    return len(tokens) if advantages.shape == tokens.shape else min(len(advantages), len(tokens))


def with_sequences(
    objective: Objective | ObjectiveFunction, sequences: Sequences | None, logprobs: torch.Tensor
) -> ObjectiveFunction:
    """The objective as a function of (logprobs, old_logprobs, advantages) alone."""
    if not (isinstance(objective, Objective) and objective.needs_sequences):
        return objective
    if sequences is None:
        raise ValueError(
            f"objective={objective} has one ratio for a sequence and needs sequences: logprobs of shape (B, T), or packed (N,) "
            f"with sequence_ids=; got shape {tuple(logprobs.shape)}"
        )
    return lambda logprobs, old_logprobs, advantages: objective(logprobs, old_logprobs, advantages, sequences)
