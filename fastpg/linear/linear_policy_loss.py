"""Policy-gradient losses from hidden states and the lm_head: the one-pass schedule, for any token-level objective."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, overload

import torch

from .. import validation
from ..distributed.agreement import Facts, one_outcome
from ..lm_head import LMHead
from ..loss.metrics import Metrics, Summary
from ..loss.mismatch import Mismatch, RolloutCorrection, decoupled_weights
from ..loss.objectives import CISPO, KLPenalty, Objective, ObjectiveFunction, device_loss
from ..loss.policy_loss import (
    PolicyLossOutput,
    id_limit,
    per_token,
    refuse_in_one_pass,
    step_of,
    token_losses,
    token_terms,
)
from ..loss.reductions import Reduction, check_reduction, inverse_denominator, token_weights
from ..loss.sequences import check_id_values, check_sequence_ids, sequences_of
from ..tiles.products import accumulation_dtype
from ..tiles.structures import Asked, TokenTerms, Wanted, beyond_entropy
from .call import (
    Counted,
    Inputs,
    counted,
    differentiable,
    head_of,
    prepare,
    skips_silenced,
    wanted_of,
    with_inputs,
    without_autocast,
)
from .first_product import Options
from .kept import Kept, kept
from .options import CallOptions, ModuleOptions, PolicyLossOptions, PolicyLossStatistics
from .outputs import TokenStatistics, asked_of, check_top_k, token_statistics
from .row_losses import Call, OnePassLoss, Result, over_sets, result_of
from .rows import Rows, rows_of
from .support import Support, agreed_sets
from .workspace import Plan, plan_policy_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def linear_policy_loss(
    hidden: torch.Tensor, head: torch.Tensor | LMHead, tokens: torch.Tensor, old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor, *, objective: Objective | ObjectiveFunction, **options: Unpack[PolicyLossOptions],
) -> PolicyLossOutput: ...  # fmt: skip


@overload
def linear_policy_loss(
    hidden: torch.Tensor, head: torch.Tensor | LMHead, tokens: torch.Tensor, old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor, *, objective: Objective | ObjectiveFunction, outputs: Sequence[str], top_k: int = 0,
    **options: Unpack[PolicyLossOptions],
) -> PolicyLossStatistics: ...  # fmt: skip


@overload
def linear_policy_loss(
    hidden: torch.Tensor, head: torch.Tensor | LMHead, tokens: torch.Tensor, old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor, *, objective: Objective | ObjectiveFunction, top_k: int, **options: Unpack[PolicyLossOptions],
) -> PolicyLossStatistics: ...  # fmt: skip


def linear_policy_loss(
    hidden: torch.Tensor,  # (..., H)
    head: torch.Tensor | LMHead,  # (V, H), or an LMHead
    tokens: torch.Tensor,  # (...)
    old_logprobs: torch.Tensor | None,  # (...)
    advantages: torch.Tensor,  # (...), or one per sequence
    *,
    objective: Objective | ObjectiveFunction,
    mask: torch.Tensor | Kept | None = None,  # (...)
    support: Support | None = None,
    sequence_ids: torch.Tensor | None = None,  # (N,)
    temperature: float | torch.Tensor = 1.0,  # number or (...)
    reduction: Reduction = "token-mean",
    denominator: float | torch.Tensor | None = None,
    kl: KLPenalty | None = None,
    ref_logprobs: torch.Tensor | None = None,  # (...)
    rollout_weights: torch.Tensor | None = None,  # (...)
    rollout_logprobs: torch.Tensor | None = None,  # (...)
    rollout_correction: RolloutCorrection | None = None,
    entropy: bool = False,
    outputs: Sequence[str] = (),
    top_k: int = 0,
    entropy_coef: float = 0.0,
    skip_zero_weight: bool = True,
    skip_silenced: bool | None = None,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> PolicyLossOutput | PolicyLossStatistics:
    """loss = -sum_n weight_n (rollout_n l_n - coef k_n) / D without the logits; the same sweep computes its gradients.

        z    = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        logp = z[token] - logsumexp_v z_v          r = exp(logp - old_logprobs)          l = objective(logp, old, advantages)

    weight_n and D belong to the reduction, rollout_n is the token's rollout weight, and k_n its KL estimate.

    The loss and both gradients cost three matrix products, the least that an exact gradient can cost. They cost two if one of
    hidden and weight is frozen, and one under no_grad. The sum over the vocabulary is anchored by old_logprobs (`anchored`),
    which may be arbitrarily wrong: rows where it is too far off are recomputed and counted in metrics["recomputed_tokens"].

    Args:
        hidden, head, tokens, mask, support, temperature, backend: as in `linear_logprobs`. A `Kept` of the mask and the
            advantages leaves out what skip_zero_weight does. With a support, old_logprobs, rollout weights and ref_logprobs
            are wanted over the same sets.
        old_logprobs, advantages, sequence_ids, reduction, denominator, kl, ref_logprobs, rollout_weights: as in `policy_loss`.
        rollout_logprobs, rollout_correction: as in `policy_loss`, beside old_logprobs, which anchor the sweep. Tokens to which
            the correction gives the weight 0 cost no work, as with rollout_weights. So a `Kept` of the mask and the advantages
            fits; one of these and the same weights, `kept(mask, advantages, correction(...))`, leaves those tokens out too.
            To see that every token is scored the host waits once more (with check=False, or unscored="zero", it does not).
        objective: Reinforce(), ImportanceWeighted(), CISPO(...), PPOClip(...), SAPO(...), DPPOTV(...), DPPOKL(...),
            IcePop(...), or a function of (logprobs, old_logprobs, advantages) whose value per token is maximised. It must be
            elementwise and deterministic: it is called on chunks for the gradients and on all tokens for the loss. Gradients
            reach hidden, weight and bias only, not tensors it closes over. Objectives that need other tokens need two passes:
            those of whole sequences (GSPO, VESPO) and those of the batch (ClipCov, KLCov).
        entropy: also report metrics["entropy"], the mean entropy in nats.
        entropy_coef: must be 0. An entropy bonus takes two passes, `linear_logprobs` and `policy_loss`.
        outputs, top_k: statistics of each token's distribution, as in `linear_logprobs`, and out of the same sweep; here none
            of them is differentiable. The result is then a `PolicyLossStatistics`. A token that costs no work has none: its
            numbers are NaN, and -1 for ids and ranks. With log_sum_sq_probs also rows are recomputed whose old_logprobs are
            off by more than about 40; with check=False they have NaN there.
        skip_zero_weight: tokens whose advantage (times rollout weight) is exactly 0 cost no work, where a built-in objective
            is used without a KL penalty. They count in the denominators. Their log-probability is reported as NaN, metrics are
            means over the other tokens, and metrics["skipped_tokens"] counts them.
        skip_silenced: tokens whose gradient turns out to be 0 after product 1 (a clip, a cap on the ratio) leave products 2 and
            3, and metrics["silenced_tokens"] counts them. True: the host waits for their number in every chunk. None: True
            with backend="torch" on a CPU, where reads are free, and False elsewhere, so that the device never waits for the
            host. Then True is worth it, by an estimate, from 2 % of silenced tokens for a large head (V H = 6e8), and from 15 %
            for a small one (3e7). Where all are silenced both products are left out.
        workspace: bytes of transient memory, which decide how many tokens form a chunk. The default is 256 MiB on a CPU and
            1 GiB on accelerators, or the need of one tile of rows where that is more (V = 262144 in fp32: 270 MiB); or that of
            one chunk of all tokens, where the call then takes at most 1.1 times the memory, its gradients included. On top
            come the gradients, and one fp32 copy of dW where it is not fp32 and several chunks or recomputed rows are summed.
            Backward scales the gradients in place; under retain_graph it makes a copy of them.
        check: True checks values, and the host waits for the device twice: at the start, for the number of rows to compute, and
            at the end, while the products run, for the number of rows to recompute (float16 has none of these). False reads
            nothing, computes every row and skips no zero weight (for torch.compile and CUDA graphs). A row whose sum overflows
            then makes the loss and the gradients NaN. (On a CPU, where reads are free, values may be read anyway.)

    Returns PolicyLossOutput: the loss (), differentiable once in hidden, weight and bias; logprobs (...) detached; metrics.
    With outputs or top_k it is a PolicyLossStatistics: these three, and the statistics.

    Gradients are computed before backward, except for float16. Backward scales them by the incoming gradient in fp32. Double
    backward raises. Under non-reentrant checkpointing the products run again.

    float16 inputs, also those that autocast makes, take the two-pass schedule, whose probabilities do not underflow. It costs
    four products. Gradients are computed in backward with the incoming factor inside, so that a gradient scaler's factor keeps
    them in float16's range. Until then the inputs and six numbers per row are kept. retain_graph, several backwards,
    weight_grad and checkpointing behave as in `linear_logprobs`.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit, for unknown or repeated
    names in outputs, for a top_k out of range, and for a workspace too small for one tile.
    """
    given = LossInputs(
        old_logprobs, advantages, objective, kl, ref_logprobs, rollout_weights, sequence_ids, reduction, denominator,
        rollout_logprobs, rollout_correction,
    )  # fmt: skip
    agreed = Facts()
    with one_outcome(head, agreed):
        asked = asked_of(entropy, outputs, top_k)
        inputs = prepare(hidden, head, tokens, mask, temperature, backend, check)
        _check_loss(given, inputs, asked, entropy_coef)
        wanted, skips = wanted_of(inputs), skips_silenced(skip_silenced, inputs)
        given, mismatch = _whole(given, inputs)
        that_count = counted(inputs, *_judged(given, inputs, skip_zero_weight), support=support)
        weights = _weights(given, inputs, that_count, id_limit(advantages, tokens))
        plan = _planned(given, inputs, that_count, asked, wanted, support, workspace, agreed)
    with without_autocast(inputs.hidden.device):
        plan = plan._replace(sweep_rows=agreed.chunk or plan.sweep_rows)
        options = _options(given, inputs, wanted, asked, plan, skips)
        call = _call(given, inputs, rows_of(inputs, that_count), weights, options)
        if support is None and plan.sweeps:
            result = result_of(OnePassLoss.apply(*differentiable(call), with_inputs(call)))
        else:
            result = over_sets(support, agreed.vocab_size, call, inputs)
    result = _shown(result, inputs, weights)
    that_count.check()
    output = _report(result, call, objective, that_count, mismatch)
    return _with_statistics(output, result, call, that_count, outputs) if len(outputs) or top_k else output


class LossInputs(NamedTuple):
    """The arguments that `policy_loss` has too."""

    old_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    objective: Objective | ObjectiveFunction
    kl: KLPenalty | None
    ref_logprobs: torch.Tensor | None
    rollout_weights: torch.Tensor | None
    sequence_ids: torch.Tensor | None
    reduction: Reduction
    denominator: float | torch.Tensor | None
    rollout_logprobs: torch.Tensor | None
    rollout_correction: RolloutCorrection | None


def _check_loss(given: LossInputs, inputs: Inputs, asked: Asked, entropy_coef: float) -> None:
    check_top_k(asked.top_k, inputs.head)
    tokens, ids = inputs.tokens, given.sequence_ids
    check_sequence_ids(ids, "tokens", tokens)
    validation.check_policy_inputs("tokens", tokens, *given[:6], packed_sequences=ids is not None)
    validation.check_rollout("tokens", tokens, given.old_logprobs, *given[9:], given.rollout_weights)
    refuse_in_one_pass(given.objective, entropy_coef, given.old_logprobs, given.rollout_logprobs)
    check_reduction(given.reduction, tokens.shape, given.denominator, ids, check=inputs.host_reads)


def _whole(given: LossInputs, inputs: Inputs) -> tuple[LossInputs, Mismatch | None]:
    """With advantages and rollout weights of all tokens (...), before any is left out; and the mismatch of a decoupled loss."""
    tokens, mask, ids = inputs.tokens, inputs.mask, given.sequence_ids
    given = given._replace(advantages=per_token(given.advantages.detach(), tokens.shape, ids))
    if given.rollout_logprobs is None:
        return given, None
    keep = tokens != validation.IGNORED_TOKEN
    if mask is not None:
        keep = keep & (mask.mask if isinstance(mask, Kept) else mask)
    weights, mismatch = decoupled_weights(given.old_logprobs, *given[9:], None, keep, ids, check=inputs.host_reads)
    return given._replace(rollout_weights=weights), mismatch


def _skips(given: LossInputs, inputs: Inputs, skip_zero_weight: bool) -> bool:
    """Whether tokens that add exactly 0 to the loss are left out."""
    add_nothing = given.kl is None and getattr(given.objective, "zero_at_zero_advantage", False)
    if not isinstance(inputs.mask, Kept):
        return skip_zero_weight and add_nothing
    if inputs.mask.skips and not (skip_zero_weight and add_nothing):
        of_what = f"objective={given.objective}" if given.kl is None else f"kl={given.kl}"
        raise ValueError(
            "mask=kept(mask, advantages) leaves out tokens whose advantage is 0, which are wanted with "
            f"{of_what if skip_zero_weight else 'skip_zero_weight=False'}: pass kept(mask)"
        )
    return inputs.mask.skips


def kept_of(tokens: torch.Tensor, sequence_ids: torch.Tensor | None, skip_zero_weight: bool, *factors: object) -> Kept:
    """The rows that a call computes, known before the model runs. factors: the first 6 of `LossInputs`; raises their errors."""
    check_sequence_ids(sequence_ids, "tokens", tokens)
    validation.check_policy_inputs("tokens", tokens, *factors, packed_sequences=sequence_ids is not None)
    old_logprobs, advantages, objective, kl, _, rollout_weights = factors
    keep = tokens != validation.IGNORED_TOKEN
    if not skip_zero_weight or kl is not None or not getattr(objective, "zero_at_zero_advantage", False):
        return kept(keep)
    advantages = per_token(advantages, tokens.shape, sequence_ids)
    if old_logprobs is not None:  # a token with NaN or inf makes the loss NaN, whatever its advantage
        advantages = torch.where(old_logprobs.isfinite(), advantages, torch.nan)
    return kept(keep, advantages, rollout_weights)


def _judged(given: LossInputs, inputs: Inputs, skip_zero_weight: bool) -> tuple[torch.Tensor | None, ...]:
    """What decides which tokens are skipped; nothing where none is, or where the host reads nothing.

    Advantages, rollout weights and old log-probabilities (...) in the dtype of the loss; and what all tokens weigh, ().
    """
    if not _skips(given, inputs, skip_zero_weight) or not (inputs.host_reads or isinstance(inputs.mask, Kept)):
        return ()
    dtype, device = accumulation_dtype(inputs.hidden.dtype), inputs.tokens.device  # the loss's own
    factors = given.advantages, given.rollout_weights, given.old_logprobs
    weight = None if given.denominator is None else inverse_denominator(given.denominator, dtype, device)
    return *(None if x is None else x.detach().to(dtype) for x in factors), weight


def _weights(given: LossInputs, inputs: Inputs, that_count: Counted, id_limit: int) -> torch.Tensor:
    """weight_n / D, () or (...). Sequence ids must be below id_limit."""
    if given.sequence_ids is not None and inputs.host_reads:
        check_id_values(given.sequence_ids, that_count.keep, id_limit)
    sequences = sequences_of(that_count.keep, given.sequence_ids)
    dtype = accumulation_dtype(inputs.hidden.dtype)  # the loss's own
    weights = token_weights(that_count.numbers[0], given.reduction, given.denominator, dtype, sequences)
    if isinstance(inputs.mask, Kept) and not inputs.host_reads:  # nobody raises for rows that do not fit: the loss becomes NaN
        weights = torch.where((that_count.numbers[4:] != 0).any(), torch.nan, weights)
    return weights


def _planned(
    given: LossInputs, inputs: Inputs, that_count: Counted, asked: Asked, wanted: Wanted, support: Support | None,
    workspace: int | None, agreed: Facts,
) -> Plan:  # fmt: skip
    """The plan of a call, as far as this rank knows it; `agreed` learns what the ranks compare."""
    head, rows = head_of(inputs.head), inputs.tokens.numel() if that_count.rows is None else that_count.rows
    plan = plan_policy_loss(
        head, rows, asked=asked, wanted=wanted, wide_weight=inputs.head.weight_grad is not None, workspace=workspace,
        backend=inputs.backend,
    )  # fmt: skip
    agreed.describe(
        inputs, that_count.computed, entropy=asked.entropy, further=asked[1:], old_logprobs=given.old_logprobs,
        chunk=plan.sweep_rows, sets=agreed_sets(support, that_count.computed, inputs.head),
    )  # fmt: skip
    return plan


def _options(given: LossInputs, inputs: Inputs, wanted: Wanted, asked: Asked, plan: Plan, skip_silenced: bool) -> Options:
    group, loss = inputs.head.group, None
    # where more is asked for, PyTorch completes the rows, and so it computes their losses too
    if inputs.backend == "triton" and group is None and not beyond_entropy(asked):
        loss = device_loss(given.objective, given.kl, show_lost=not inputs.host_reads)
    wide_weight = inputs.head.weight_grad is not None
    first_column = 0 if group is None else inputs.head.vocab_start
    return Options(
        wanted, asked, plan, inputs.host_reads, skip_silenced, inputs.backend, loss, wide_weight, group, first_column
    )


def _call(given: LossInputs, inputs: Inputs, rows: Rows, weights: torch.Tensor, options: Options) -> Call:
    losses, terms = partial(token_losses, objective=given.objective, kl=given.kl), _terms(given, rows, weights, options)
    return Call(rows, head_of(inputs.head), terms, losses, options, inputs.head.weight_grad)


def _terms(given: LossInputs, rows: Rows, weights: torch.Tensor, options: Options) -> TokenTerms:
    """On kernels the inputs of masked rows stay what they are: nothing of them reaches a result."""
    by_kernels = options.device_loss is not None and options.plan.sweeps
    return token_terms(
        rows.read if by_kernels else rows.of, rows.masked, weights, given.old_logprobs, given.advantages,
        given.rollout_weights, given.ref_logprobs, weights.dtype,
    )  # fmt: skip


def _shown(result: Result, inputs: Inputs, weights: torch.Tensor) -> Result:
    """The result. A weight of NaN shows where there is no row too."""
    if isinstance(inputs.mask, Kept) and not inputs.host_reads:
        return Result(result.loss + (weights - weights).sum(), *result[1:])
    return result


def _report(result: Result, call: Call, objective: object, that_count: Counted, mismatch: Mismatch | None) -> PolicyLossOutput:
    numbers, (logprobs, entropy, *_) = that_count.numbers, result.rows.statistics
    if result.summary is not None:
        step = Summary(result.summary, call.options.asked.entropy, numbers, objective, result.again)
    else:
        step = step_of(logprobs, call.terms, objective, entropies=entropy, numbers=numbers, again=result.again)
    return PolicyLossOutput(result.loss, _reported(logprobs, call.rows, that_count), Metrics({}, step, mismatch))


def _with_statistics(
    output: PolicyLossOutput, result: Result, call: Call, that_count: Counted, outputs: Sequence[str]
) -> PolicyLossStatistics:
    """With the statistics of the tokens (...), NaN where a token that counts was not computed."""
    keep, computed = that_count.keep, that_count.computed
    found = token_statistics(result.rows, call.rows, keep.shape, call.options.first_column, outputs)
    if computed is not keep:

        def marked(x: torch.Tensor | None) -> torch.Tensor | None:
            if x is None or not x.is_floating_point():
                return x
            return x.masked_fill((keep & ~computed).view(*keep.shape, *(1,) * (x.dim() - keep.dim())), torch.nan)

        found = TokenStatistics(*map(marked, found))
    return PolicyLossStatistics(*output, TokenStatistics(output.logprobs, *found[1:]))


def _reported(logprobs: torch.Tensor, rows: Rows, that_count: Counted) -> torch.Tensor:
    """The rows' log-probabilities (K,) as (...): 0 where masked, NaN where a token that counts was not computed."""
    keep = that_count.keep
    if rows.indices is None:
        return logprobs if keep.dim() == 1 else logprobs.reshape(keep.shape)
    others = logprobs.new_zeros(keep.numel())
    if that_count.computed is not keep:
        others.masked_fill_(keep.reshape(-1), torch.nan)
    return others.index_copy_(0, rows.indices, logprobs).reshape(keep.shape)


@overload
def linear_cispo_loss(
    hidden: torch.Tensor, head: torch.Tensor | LMHead, tokens: torch.Tensor, old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor, *, ratio_max: float | None = 5.0, ratio_min: float | None = None,
    **options: Unpack[PolicyLossOptions],
) -> PolicyLossOutput: ...  # fmt: skip


@overload
def linear_cispo_loss(
    hidden: torch.Tensor, head: torch.Tensor | LMHead, tokens: torch.Tensor, old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor, *, ratio_max: float | None = 5.0, ratio_min: float | None = None, outputs: Sequence[str],
    top_k: int = 0, **options: Unpack[PolicyLossOptions],
) -> PolicyLossStatistics: ...  # fmt: skip


@overload
def linear_cispo_loss(
    hidden: torch.Tensor, head: torch.Tensor | LMHead, tokens: torch.Tensor, old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor, *, ratio_max: float | None = 5.0, ratio_min: float | None = None, top_k: int,
    **options: Unpack[PolicyLossOptions],
) -> PolicyLossStatistics: ...  # fmt: skip


def linear_cispo_loss(
    hidden: torch.Tensor,  # (..., H)
    head: torch.Tensor | LMHead,  # (V, H), or an LMHead
    tokens: torch.Tensor,  # (...)
    old_logprobs: torch.Tensor | None,  # (...)
    advantages: torch.Tensor,  # (...), or one per sequence
    *,
    ratio_max: float | None = 5.0,
    ratio_min: float | None = None,
    outputs: Sequence[str] = (),
    top_k: int = 0,
    **options: Unpack[PolicyLossOptions],
) -> PolicyLossOutput | PolicyLossStatistics:
    """`linear_policy_loss` with objective=CISPO(ratio_max, ratio_min): l = sg(clip(r, ratio_min, ratio_max)) A logp.

    The bounds are on the ratio r itself (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5, with ratio_max = 1 + eps_high).

    Args:
        hidden, head, tokens, old_logprobs, advantages: as in `linear_policy_loss`.
        ratio_max, ratio_min: as in `CISPO`; None: no bound.
        outputs, top_k, options: mask, support, sequence_ids, temperature, reduction, denominator, kl, ref_logprobs,
            rollout_weights, rollout_logprobs, rollout_correction, entropy, entropy_coef, skip_zero_weight, skip_silenced,
            workspace, backend, check: as in `linear_policy_loss`, with its defaults.
    """
    objective = CISPO(ratio_max, ratio_min)
    return linear_policy_loss(
        hidden, head, tokens, old_logprobs, advantages, objective=objective, outputs=outputs, top_k=top_k, **options
    )


class LinearPolicyLoss(torch.nn.Module):
    """`linear_policy_loss` as a module that holds its options and has no parameters.

        LinearPolicyLoss(objective=..., **LossOptions)(hidden, head, tokens, old_logprobs, advantages, **CallOptions)

    See `linear_policy_loss` for the arguments: temperature (a number or 0-d tensor here), reduction, kl, rollout_correction,
    entropy, entropy_coef, outputs, top_k, skip_zero_weight, skip_silenced, workspace, backend and check are held; mask,
    support, sequence_ids, denominator, ref_logprobs, rollout_weights and rollout_logprobs are given to each call.
    """

    def __init__(self, *, objective: Objective | ObjectiveFunction, **options: Unpack[ModuleOptions]) -> None:
        super().__init__()
        unknown = options.keys() - ModuleOptions.__annotations__.keys()
        if unknown:
            known = [*ModuleOptions.__annotations__]
            raise TypeError(f"LinearPolicyLoss got unexpected arguments {sorted(unknown)}; its options are {known}")
        self.options = {"objective": objective, **options}

    def forward(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor | LMHead,
        tokens: torch.Tensor,
        old_logprobs: torch.Tensor | None,
        advantages: torch.Tensor,
        **batch: Unpack[CallOptions],
    ) -> PolicyLossOutput | PolicyLossStatistics:
        """`linear_policy_loss` with the options that the module holds."""
        return linear_policy_loss(hidden, head, tokens, old_logprobs, advantages, **batch, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
