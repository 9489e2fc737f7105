"""From token log-probabilities to a loss: the last steps of every schedule, and `policy_loss` on ready log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from .. import validation
from ..tiles.backend import choose_backend
from ..tiles.structures import TokenTerms
from .metrics import Metrics, Step, Summary
from .mismatch import RolloutCorrection, decoupled_weights
from .objectives import KLPenalty, Objective, ObjectiveFunction
from .on_device import kernel_loss, loss_on_device
from .reductions import Reduction, check_reduction, mean_of_kept, token_weights
from .sequences import Sequences, check_id_values, check_sequence_ids, sequences_of


class PolicyLossOutput(NamedTuple):
    """loss (): to be minimised. logprobs (...): detached, 0 where masked. metrics: `Metrics`, computed when looked at."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    metrics: Metrics


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
    """Made of checked arguments (...) and the reduction's weights.

    `select` drops the masked tokens or replaces them by zeros. They must never reach an exp: 0 * inf would be NaN, in forward
    and backward.
    """

    def constant(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else select(x.detach()).to(dtype)

    if weights.dim():
        weights = select(weights)
    return TokenTerms(
        masked, constant(old_logprobs), constant(advantages), weights, constant(rollout_weights), constant(ref_logprobs)
    )


def per_token(advantages: torch.Tensor, shape: torch.Size, sequence_ids: torch.Tensor | None) -> torch.Tensor:
    """Advantages (...) from those of that shape, or from one per sequence. Ids of masked tokens may be anything."""
    if advantages.shape == shape:
        return advantages
    if sequence_ids is None:
        return advantages[:, None].expand(shape)
    if not len(advantages):  # no sequence: every token is masked
        return advantages.new_zeros(shape)
    return advantages[sequence_ids.long().clamp(0, len(advantages) - 1)]


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
    weights = terms.weights
    if terms.old_logprobs is not None:
        # old - old is NaN where old is not finite, else 0. A ratio of 0 or inf is never meant, and a clip would hide it.
        weights = weights + (old - old)
    return terms.kept(-values * weights)


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
    rollout_logprobs: torch.Tensor | None = None,  # (...)
    rollout_correction: RolloutCorrection | None = None,
    entropies: torch.Tensor | None = None,  # (...)
    entropy_coef: float = 0.0,
    backend: str | None = None,
    check: bool = True,
) -> PolicyLossOutput:
    """loss = -sum_n weight_n (rollout_n l_n - coef k_n + entropy_coef H_n) / D over tokens with mask, from log-probabilities.

    Args:
        logprobs: (...) floating; the gradient flows through them. Computed in fp32 (float64 for float64).
        old_logprobs: (...) log-probabilities under the policy that sampled. None: on-policy, the ratio is exactly 1. Constants.
            NaN or an infinity at a kept position makes the loss NaN: a ratio of 0 or inf is never meant. Numbers > 0, which no
            log-probability can be, are computed as given.
        advantages: (...) per token, or one per sequence: (B,) with (B, T) logprobs, (S,) with sequence_ids
            (S = N is read as per token). Constants.
        objective: Reinforce(), ImportanceWeighted(...), CISPO(...), PPOClip(...), GSPO(...), SAPO(...), DPPOTV(...),
            DPPOKL(...), IcePop(...), VESPO(...), ClipCov(...), KLCov(...), or a function of (logprobs, old_logprobs,
            advantages) whose value per token is maximised.
        mask: (...) bool, True where a token counts. Values at masked positions never reach the arithmetic.
        sequence_ids: (N,) int, the sequence of each token of packed (N,) logprobs, numbered from 0. Tokens of a sequence need
            not be neighbours. With (B, T) logprobs the rows are the sequences.
        reduction: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum" or "sum" (`reductions` has the table); the seq-
            forms need (B, T) or sequence_ids.
        denominator: a number or 0-d tensor that replaces the count D. Under gradient accumulation or data parallelism pass the
            global count, and sum the losses. Must be positive; for a count that may be 0 pass count.clamp(min=1).
        kl, ref_logprobs: a KLPenalty against the reference policy's log-probabilities (...); both or neither.
        rollout_weights: (...) constant factors of l (not of the KL term), such as those of `fastpg.rollout` for a sampler whose
            log-probabilities differ from the trainer's.
        rollout_logprobs: (...) log-probabilities under the policy that sampled, where old_logprobs are those of another, the
            proximal policy (decoupled objectives: Hilton et al., arXiv 2110.00641; AReaL). l is multiplied by constant weights
            that are made of the two; so there may be no rollout_weights. With old_logprobs=None the proximal policy is the
            current one, and the weights are made of detached logprobs. metrics gain those of `rollout.mismatch_metrics`.
        rollout_correction: how weights are made: a function of (old_logprobs, rollout_logprobs, mask=, sequence_ids=), such as
            functools.partial(fastpg.rollout.truncated_weights, high=2.0), called once with whole tensors and without a
            gradient. It returns weights, or a bool mask (False is the weight 0). None: exp(old_logprobs - rollout_logprobs),
            its exponent clamped to [-20, 20]. Then NaN or an infinity where a token counts, for a token that the engine did not
            score, is an error (with check=False the loss is NaN); unscored="zero" of those functions gives it the weight 0.
        entropies, entropy_coef: (...) entropies H of the policy, differentiable, such as `linear_logprobs(..., entropy=True)`
            returns, and the factor of the entropy bonus. H has the weights of the policy term, without rollout weights. (TRL,
            SkyRL and OpenRLHF take the mean over all tokens instead: subtract entropy_coef * masked_mean(entropies, mask).)
            They also report metrics["entropy"], the mean of H, and metrics["entropy_loss"], what the bonus adds to the loss.
        backend: "torch" or "triton"; None: as in `linear_logprobs`. On Triton one kernel computes the loss and the gradient
            of a named objective of single tokens. Anything else is computed in PyTorch in any case.
        check: True checks the values of sequence_ids, of a denominator tensor and of rollout_logprobs, for which the host
            waits. False does not where they are on a GPU (for CUDA graphs). They are never read under torch.compile.

    Returns PolicyLossOutput(loss, logprobs, metrics). Without any token the loss is 0 and differentiable.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit.
    """
    if not isinstance(logprobs, torch.Tensor) or not logprobs.is_floating_point():
        raise TypeError(f"logprobs must be a floating-point tensor; got {validation.kind(logprobs)}")
    validation.check_mask(mask, "logprobs", logprobs)
    backend = choose_backend(backend, logprobs, "logprobs")
    check_sequence_ids(sequence_ids, "logprobs", logprobs)
    validation.check_policy_inputs(
        "logprobs", logprobs, old_logprobs, advantages, objective, kl, ref_logprobs, rollout_weights,
        packed_sequences=sequence_ids is not None,
    )  # fmt: skip
    validation.check_rollout("logprobs", logprobs, old_logprobs, rollout_logprobs, rollout_correction, rollout_weights)
    _check_entropies(entropies, entropy_coef, logprobs)
    check_reduction(reduction, logprobs.shape, denominator, sequence_ids, check=check)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    every = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    if sequence_ids is not None and not torch.compiler.is_compiling() and (check or sequence_ids.device.type == "cpu"):
        check_id_values(sequence_ids, every, id_limit(advantages, logprobs))
    sequences = sequences_of(every, sequence_ids)
    function = with_others(objective, sequences, every, logprobs)
    rollout_weights, mismatch = decoupled_weights(
        logprobs if old_logprobs is None else old_logprobs, rollout_logprobs, rollout_correction, rollout_weights, every,
        sequence_ids, check=check and not torch.compiler.is_compiling(),
    )  # fmt: skip
    count = every.sum()
    weights = token_weights(count, reduction, denominator, dtype, sequences)
    raw = TokenTerms(
        None, old_logprobs, per_token(advantages, logprobs.shape, sequence_ids), weights, rollout_weights, ref_logprobs
    )  # fmt: skip
    plain = partial(_plain_loss, mask=mask, raw=raw, function=function, kl=kl, dtype=dtype)
    on_device = kernel_loss(logprobs, objective, kl, backend)
    step: Step | Summary
    if on_device is not None:
        loss, kept, summary = loss_on_device(logprobs, mask, raw, on_device, lambda x: plain(x)[0])
        step = Summary(summary, False, count.expand(2), objective)
    else:
        loss, kept, terms = plain(logprobs)
        step, kept = step_of(kept.detach(), terms, objective, sequences), kept.detach().clone()
    loss, of_entropies = _with_entropy_bonus(loss, entropies, entropy_coef, every, weights)
    return PolicyLossOutput(loss, kept, Metrics(of_entropies, step, mismatch))


def _check_entropies(entropies: torch.Tensor | None, coef: float, logprobs: torch.Tensor) -> None:
    if not validation.is_nonnegative_number(coef):
        raise ValueError(f"entropy_coef must be a number >= 0; got {coef!r}")
    wanted = "those of linear_logprobs(..., entropy=True)"
    if entropies is None:
        if coef:
            raise ValueError(f"entropy_coef={coef} was given without entropies; an entropy bonus needs {wanted}")
        return
    validation.check_plain("entropies", entropies)
    if not isinstance(entropies, torch.Tensor) or not entropies.is_floating_point():
        raise TypeError(f"entropies must be a floating-point tensor or None; got {validation.kind(entropies)}")
    if entropies.shape != logprobs.shape:
        raise ValueError(f"entropies must have the shape of logprobs, {tuple(logprobs.shape)}; got {tuple(entropies.shape)}")
    if entropies.device != logprobs.device:
        raise ValueError(f"entropies is on {entropies.device} but logprobs is on {logprobs.device}")
    if coef and torch.is_grad_enabled() and logprobs.requires_grad and not entropies.requires_grad:
        raise ValueError(
            f"entropies must be differentiable where entropy_coef={coef}, or the bonus would change nothing; pass {wanted}, "
            "undetached"
        )


def _with_entropy_bonus(
    loss: torch.Tensor, entropies: torch.Tensor | None, coef: float, keep: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """loss - coef sum_n weight_n H_n / D, and the metrics of the entropies."""
    if entropies is None:
        return loss, {}
    # both factors are 0 where masked: 0 * inf would be NaN, in forward and backward
    kept = torch.where(keep, entropies, 0).to(weights.dtype)
    entropy_loss = -coef * (kept * torch.where(keep, weights, 0)).sum()
    mean = mean_of_kept(entropies.detach(), keep, None)
    return loss + entropy_loss, {"entropy": mean, "entropy_loss": entropy_loss.detach()}


def refuse_in_one_pass(
    objective: object, entropy_coef: float, old_logprobs: torch.Tensor | None, rollout_logprobs: torch.Tensor | None
) -> None:
    """What needs more of a row than its exponentials times one number, or other rows, before the gradient is known."""
    two_passes = "use linear_logprobs and policy_loss"
    if isinstance(objective, Objective) and objective.needs_sequences:
        raise ValueError(
            f"objective={objective} has one ratio for a sequence, which the one-pass loss does not know before its last "
            f"token; {two_passes}"
        )
    if isinstance(objective, Objective) and objective.needs_batch:
        raise ValueError(
            f"objective={objective} compares the tokens of the batch, which the one-pass loss computes chunk by chunk; "
            f"{two_passes}"
        )
    if not validation.is_nonnegative_number(entropy_coef) or entropy_coef:
        raise ValueError(
            f"entropy_coef must be 0 in the one-pass loss; got {entropy_coef!r}: the term -entropy_coef H has the gradient "
            "entropy_coef p_v (log p_v + H) in a row's logits, which is not the row's exponentials times one number, all that "
            "one pass has of it; use linear_logprobs(..., entropy=True) and policy_loss(..., entropies=, entropy_coef=)"
        )
    if rollout_logprobs is not None and old_logprobs is None:
        raise ValueError(
            "old_logprobs must be given with rollout_logprobs in the one-pass loss: without them the weights are made of the "
            f"current log-probabilities, which are not known before the sweep; pass old_logprobs, or {two_passes}"
        )


def _plain_loss(
    logprobs: torch.Tensor,
    mask: torch.Tensor | None,
    raw: TokenTerms,
    function: ObjectiveFunction,
    kl: KLPenalty | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, TokenTerms]:
    """The loss of log-probabilities (...) in PyTorch; those in `dtype`, 0 where masked; and the terms likewise."""
    masked = None if mask is None else ~mask

    def select(x: torch.Tensor) -> torch.Tensor:
        return x.clone() if masked is None else x.masked_fill(masked, 0)

    terms = token_terms(
        select, masked, raw.weights, raw.old_logprobs, raw.advantages, raw.rollout_weights, raw.ref_logprobs, dtype
    )  # fmt: skip
    kept = select(logprobs).to(dtype)
    return token_losses(kept, terms, function, kl).sum(), kept, terms


def step_of(
    logprobs: torch.Tensor,
    terms: TokenTerms,
    objective: object,
    sequences: Sequences | None = None,
    *,
    entropies: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None,
    again: torch.Tensor | None = None,
) -> Step:
    """Copies for `Metrics`. logprobs are detached, and those of the tokens in `terms`."""
    mask = None if terms.masked is None else ~terms.masked
    if sequences is not None and mask is not None:
        sequences = Sequences(mask, sequences.ids)
    logprobs, old = torch.stack([logprobs, terms.old(logprobs)])
    named = objective if isinstance(objective, Objective) else None
    # (written out, as Dynamo of torch 2.9 cannot return a tuple made by `_replace`)
    return Step(logprobs, old, mask, named, sequences, entropies, numbers, again)


def id_limit(advantages: torch.Tensor, tokens: torch.Tensor) -> int:
    """Sequence ids must be below it: the number of tokens, or of advantages if there is one per sequence."""
    return len(tokens) if advantages.shape == tokens.shape else min(len(advantages), len(tokens))


def with_others(
    objective: Objective | ObjectiveFunction, sequences: Sequences | None, mask: torch.Tensor, logprobs: torch.Tensor
) -> ObjectiveFunction:
    """The objective as a function of (logprobs, old_logprobs, advantages) alone."""
    if isinstance(objective, Objective) and objective.needs_batch:
        return lambda logprobs, old_logprobs, advantages: objective(logprobs, old_logprobs, advantages, mask)
    if not (isinstance(objective, Objective) and objective.needs_sequences):
        return objective
    if sequences is None:
        raise ValueError(
            f"objective={objective} has one ratio for a sequence and needs sequences: logprobs of shape (B, T), or packed (N,) "
            f"with sequence_ids=; got shape {tuple(logprobs.shape)}"
        )
    return lambda logprobs, old_logprobs, advantages: objective(logprobs, old_logprobs, advantages, sequences)
