"""Policy-gradient losses of hidden states and the lm_head in one sweep: the one-pass schedule, any token-level objective."""

from __future__ import annotations

from functools import partial

import torch

from . import buffers, ops, validation
from .agreement import one_outcome
from .lm_head import LMHead, Projection, projection_of
from .losses import PolicyLossOutput, TokenTerms, id_limit, per_token, step_of, token_losses, token_terms
from .metrics import Metrics
from .objectives import CISPO, KLPenalty, Objective, ObjectiveFunction
from .one_pass_schedule import Options, TokenLosses, chunk_length, loss_gradient, one_pass, smallest_workspace
from .products import accumulation_dtype
from .reductions import Reduction, check_reduction, token_weights
from .rows import Gradients, Rows, Wanted, rows_of
from .sequences import check_id_values, check_sequence_ids, sequences_of
from .two_pass import needs_gradient, prepare, row_logprobs
from .two_pass_schedule import chunk_rows


def linear_policy_loss(
    hidden: torch.Tensor,  # (..., H)
    head: torch.Tensor | LMHead,  # (V, H), or an LMHead
    tokens: torch.Tensor,  # (...)
    old_logprobs: torch.Tensor | None,  # (...)
    advantages: torch.Tensor,  # (...), or one per sequence
    *,
    objective: Objective | ObjectiveFunction,
    mask: torch.Tensor | None = None,  # (...)
    sequence_ids: torch.Tensor | None = None,  # (N,)
    temperature: float | torch.Tensor = 1.0,  # number or (...)
    reduction: Reduction = "token-mean",
    denominator: float | torch.Tensor | None = None,
    kl: KLPenalty | None = None,
    ref_logprobs: torch.Tensor | None = None,  # (...)
    rollout_weights: torch.Tensor | None = None,  # (...)
    entropy: bool = False,
    skip_zero_weight: bool = True,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> PolicyLossOutput:
    """loss = -sum_n weight_n (rollout_n l_n - coef k_n) / D without the logits, its gradients computed in the same sweep.

        z    = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        logp = z[token] - logsumexp_v z_v          r = exp(logp - old_logprobs)          l = objective(logp, old, advantages)

    Three matrix products for the loss and both gradients, the least an exact gradient can cost; two if one of hidden and
    weight is frozen, one under no_grad. The sum over the vocabulary is anchored by old_logprobs (`one_pass_schedule`), which
    may be arbitrarily wrong: rows where it is too far off are recomputed and counted in metrics["recomputed_tokens"].

    Args:
        hidden, head, tokens, mask, temperature, backend: as in `linear_logprobs`.
        old_logprobs, advantages, sequence_ids, reduction, denominator, kl, ref_logprobs, rollout_weights: as in `policy_loss`.
        objective: Reinforce(), ImportanceWeighted(), CISPO(...), PPOClip(...), SAPO(...), or a function of (logprobs,
            old_logprobs, advantages) whose value per token is maximised. It must be elementwise and deterministic: it is called
            on chunks for the gradients and on all tokens for the loss. Gradients reach hidden, weight and bias only, not
            tensors it closes over. Ratios of whole sequences (GSPO) need two passes.
        entropy: also report metrics["entropy"], the mean entropy in nats. For an entropy bonus use `linear_logprobs`, whose
            entropies are differentiable.
        skip_zero_weight: tokens with advantage (times rollout weight) exactly 0 cost no work where a built-in objective is
            used without a KL penalty. They count in the denominators; their log-probability is reported as NaN, metrics are
            means over the other tokens, and metrics["skipped_tokens"] counts them.
        workspace: bytes of transient memory, which decide how many tokens form a chunk; default 256 MiB on a CPU, 1 GiB on
            accelerators, or what one tile of rows needs where that is more (V = 262144 in fp32: 270 MiB). On top come the
            gradients, and, where several chunks or recomputed rows are summed, one fp32 copy of dW where it is not fp32.
            Backward scales the gradients in place; under retain_graph it makes a copy of them.
        check: True checks values and reads the host twice: for the rows to compute, and for rows to recompute, of which float16
            has none. False reads nothing, computes every row and skips no zero weight (for torch.compile and CUDA graphs); a
            row whose sum overflows then makes the loss and the gradients NaN. (On a CPU, where reads are free, values may be
            read anyway.)

    Returns PolicyLossOutput: the loss (), differentiable once in hidden, weight and bias; logprobs (...) detached; metrics.

    Gradients exist before backward, but for float16; backward scales them by the incoming gradient in fp32. Double backward
    raises. Under non-reentrant checkpointing the products run again.

    float16 inputs, also those that autocast makes, take the two-pass schedule, whose probabilities do not underflow: four
    products. Their gradients are computed in backward with the incoming factor inside, so that a gradient scaler's factor
    keeps them in float16's range. Kept till then are the inputs and six numbers per row. retain_graph, several backwards,
    weight_grad and checkpointing behave as those of `linear_logprobs`.

    Raises TypeError or ValueError, naming the argument, for dtypes, shapes and devices that do not fit, and for a workspace
    too small for one tile.
    """
    with one_outcome(head) as facts:
        hidden, head, keep, backend = prepare(hidden, head, tokens, mask, temperature, backend, check)
        check_sequence_ids(sequence_ids, "tokens", tokens)
        validation.check_policy_inputs(
            "tokens", tokens, old_logprobs, advantages, objective, kl, ref_logprobs, rollout_weights, sequence_ids is not None
        )
        _check_objective(objective)
        check_reduction(reduction, tokens.shape, denominator, sequence_ids)
        if sequence_ids is not None and check:
            check_id_values(sequence_ids, keep, id_limit(advantages, tokens))
        fuses = backend == "triton" and head.group is None and _is_plain_cispo(objective, kl, old_logprobs)
        options = Options(
            _wanted(hidden, head), entropy, validation.workspace_bytes(workspace, hidden.device), check, backend,
            objective.ratio_bounds if fuses else None, head.weight_grad is not None, head.group,
        )  # fmt: skip
        projection = projection_of(head)
        if workspace is None and hidden.dtype != torch.float16:  # a default is no reason to refuse a large vocabulary
            options = options._replace(workspace=max(options.workspace, smallest_workspace(projection, options)))
        chunk = _check_workspace(projection, tokens.numel(), options)
        sequences = sequences_of(keep, sequence_ids)
        advantages = per_token(advantages.detach(), tokens.shape, sequences)
        computed = keep
        if check and skip_zero_weight and kl is None and getattr(objective, "zero_at_zero_advantage", False):
            computed = keep & _has_weight(advantages, rollout_weights, old_logprobs, denominator)
        facts.describe(
            hidden, head, tokens, computed, temperature, backend=backend, entropy=entropy, check=check,
            old_logprobs=old_logprobs, chunk=chunk,
        )  # fmt: skip

    with torch.autocast(hidden.device.type, enabled=False):
        rows, dtype = rows_of(hidden, tokens, computed, temperature, check, head), accumulation_dtype(hidden.dtype)
        weights = token_weights(keep, reduction, denominator, dtype, sequences)
        weights = weights.reshape(-1) if rows.indices is None else rows.of(weights)
        terms = token_terms(rows.of, rows.masked, weights, old_logprobs, advantages, rollout_weights, ref_logprobs, dtype)
        losses = partial(token_losses, objective=objective, kl=kl)
        if hidden.dtype == torch.float16:
            loss, logprobs, entropies, recomputed = _two_passes(rows, head, terms, losses, options)
        else:
            loss, logprobs, entropies, recomputed = _LinearPolicyLoss.apply(
                *rows[:2], *projection[:3], *rows[2:], *terms[1:], losses, head.weight_grad, *projection[3:],
                *options._replace(length=facts.chunk),
            )  # fmt: skip
    step = step_of(logprobs, terms, objective)._replace(
        eligible=None if computed is keep else keep, recomputed=recomputed, entropies=entropies if entropy else None
    )
    return PolicyLossOutput(loss, _reported(logprobs, rows, keep, computed), Metrics({}, step))


def _has_weight(
    advantages: torch.Tensor,
    rollout_weights: torch.Tensor | None,
    old_logprobs: torch.Tensor | None,
    denominator: float | torch.Tensor | None,
) -> torch.Tensor:
    """(...) bool: whether a token may add to the loss; also where a value that is not finite would make it NaN."""
    weight = advantages if rollout_weights is None else advantages * rollout_weights.detach()
    # times 0: NaN where a value is not finite, and NaN differs from everything
    others = 0 if old_logprobs is None else old_logprobs.detach() * 0
    if isinstance(denominator, torch.Tensor):
        others = others + 0 / denominator.detach()
    return weight != others


def _reported(logprobs: torch.Tensor, rows: Rows, keep: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """(...) from those of the rows (K,): 0 where masked, NaN where a token that counts was not computed."""
    if rows.indices is None:
        return logprobs.reshape(keep.shape)
    others = logprobs.new_zeros(keep.numel())
    if computed is not keep:
        others.masked_fill_(keep.reshape(-1), torch.nan)
    return others.index_copy_(0, rows.indices, logprobs).reshape(keep.shape)


def linear_cispo_loss(
    hidden: torch.Tensor,  # (..., H)
    head: torch.Tensor | LMHead,  # (V, H), or an LMHead
    tokens: torch.Tensor,  # (...)
    old_logprobs: torch.Tensor | None,  # (...)
    advantages: torch.Tensor,  # (...), or one per sequence
    *,
    ratio_max: float | None = 5.0,
    ratio_min: float | None = None,
    mask: torch.Tensor | None = None,  # (...)
    sequence_ids: torch.Tensor | None = None,  # (N,)
    temperature: float | torch.Tensor = 1.0,  # number or (...)
    reduction: Reduction = "token-mean",
    denominator: float | torch.Tensor | None = None,
    kl: KLPenalty | None = None,
    ref_logprobs: torch.Tensor | None = None,  # (...)
    rollout_weights: torch.Tensor | None = None,  # (...)
    entropy: bool = False,
    skip_zero_weight: bool = True,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> PolicyLossOutput:
    """`linear_policy_loss` with objective=CISPO(ratio_max, ratio_min): l = sg(clip(r, ratio_min, ratio_max)) A logp.

    The bounds are on the ratio r itself (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5, with ratio_max = 1 + eps_high).
    """
    return linear_policy_loss(
        hidden,
        head,
        tokens,
        old_logprobs,
        advantages,
        objective=CISPO(ratio_max, ratio_min),
        mask=mask,
        sequence_ids=sequence_ids,
        temperature=temperature,
        reduction=reduction,
        denominator=denominator,
        kl=kl,
        ref_logprobs=ref_logprobs,
        rollout_weights=rollout_weights,
        entropy=entropy,
        skip_zero_weight=skip_zero_weight,
        workspace=workspace,
        backend=backend,
        check=check,
    )


class LinearPolicyLoss(torch.nn.Module):
    """`linear_policy_loss` with its options held: a module without parameters. See there for the arguments."""

    def __init__(
        self,
        *,
        objective: Objective | ObjectiveFunction,
        temperature: float = 1.0,
        reduction: Reduction = "token-mean",
        kl: KLPenalty | None = None,
        entropy: bool = False,
        skip_zero_weight: bool = True,
        workspace: int | None = None,
        backend: str | None = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        self.options = {
            "objective": objective,
            "temperature": temperature,
            "reduction": reduction,
            "kl": kl,
            "entropy": entropy,
            "skip_zero_weight": skip_zero_weight,
            "workspace": workspace,
            "backend": backend,
            "check": check,
        }

    def forward(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor | LMHead,
        tokens: torch.Tensor,
        old_logprobs: torch.Tensor | None,
        advantages: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        denominator: float | torch.Tensor | None = None,
        ref_logprobs: torch.Tensor | None = None,
        rollout_weights: torch.Tensor | None = None,
    ) -> PolicyLossOutput:
        return linear_policy_loss(
            hidden, head, tokens, old_logprobs, advantages,
            mask=mask, sequence_ids=sequence_ids, denominator=denominator, ref_logprobs=ref_logprobs,
            rollout_weights=rollout_weights, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _wanted(hidden: torch.Tensor, head: LMHead) -> Wanted:
    grad = needs_gradient(hidden, head)
    a, b = (None, None) if head.lora is None else head.lora[:2]

    def needs(x: torch.Tensor | None) -> bool:
        return grad and x is not None and x.requires_grad

    of_lora = head.lora is not None and (needs(hidden) or needs(a))
    return Wanted(needs(hidden), of_lora, needs(head.weight), needs(b), needs(head.bias))


def _check_objective(objective: object) -> None:
    if isinstance(objective, Objective) and objective.needs_sequences:
        raise ValueError(
            f"objective={objective} has one ratio for a sequence, which the one-pass loss does not know before its last token; "
            "use linear_logprobs and policy_loss"
        )


def _is_plain_cispo(objective: object, kl: KLPenalty | None, old_logprobs: torch.Tensor | None) -> bool:
    """Whether the kernel that completes the rows can also compute the loss."""
    return type(objective) is CISPO and kl is None and old_logprobs is not None


def _check_workspace(head: Projection, count: int, options: Options) -> int:
    """Rows of a chunk. Raises before any work where the workspace is too small for the sweep, or for the two passes of flagged
    rows."""
    rows = chunk_rows(ops.tiles_of(options.backend), head, options.workspace, options.entropy)
    return rows if head.weight.dtype == torch.float16 else chunk_length(head, count, options)


def _two_passes(
    rows: Rows, head: LMHead, terms: TokenTerms, losses: TokenLosses, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_LinearPolicyLoss` returns, for float16: its E would underflow, and so would gradients that are rounded before the
    incoming factor of a gradient scaler is known. They are computed in backward, with that factor inside."""
    logprobs, entropies = row_logprobs(rows, head, options.entropy, options.workspace, options.backend)
    logprobs = terms.kept(logprobs)
    loss = _TokenLoss.apply(logprobs, losses, *terms)
    if options.entropy:
        entropies = terms.kept(entropies.detach())
    return loss, logprobs.detach(), entropies, rows.tokens.new_zeros(())


class _TokenLoss(torch.autograd.Function):
    """The loss () of log-probabilities (K,). Gradients reach them alone, and not what an objective closes over."""

    @staticmethod
    def forward(ctx, logprobs, losses, *terms):
        terms = TokenTerms(*terms)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(loss_gradient(losses, logprobs, terms))
        return losses(logprobs.detach(), terms).sum()

    @staticmethod
    def backward(ctx, grad_loss):
        _refuse_double_backward()
        (g,) = ctx.saved_tensors
        return g * grad_loss, *(None,) * (len(ctx.needs_input_grad) - 1)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the one-pass loss has no second derivative: its gradients are computed in the forward. Use linear_logprobs "
            "and policy_loss without create_graph, or full logits (fastpg.reference)"
        )


def _scaled(gradient: torch.Tensor, grad_loss: torch.Tensor) -> torch.Tensor:
    """gradient * grad_loss: in place where this backward is the last, as without retain_graph; a copy otherwise.

    The factor stays in fp32: rounded to bf16 it would be an error of up to 2^-9 that all of dX and dW have in common.
    """
    factor = grad_loss.to(accumulation_dtype(gradient.dtype))
    if torch.compiler.is_compiling():
        return (gradient.to(factor.dtype) * factor).to(gradient.dtype)
    out = gradient
    if _graph_is_kept():
        out = buffers.empty(gradient.shape, gradient.dtype, gradient.device)
    if gradient.device.type != "cpu":
        # A GPU casts a 0-d factor to the gradient's dtype first; with a dimension it counts in type promotion. A CPU takes a
        # 0-d factor as it is, and would widen the whole gradient for one with a dimension.
        factor = factor.reshape((1,) * gradient.dim())
    return torch.mul(gradient, factor, out=out)


def _graph_is_kept() -> bool:
    """Whether the saved tensors may be read by another backward. torch's own donated buffers ask the same (`_aot_autograd`)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class _LinearPolicyLoss(torch.autograd.Function):
    """(loss (), logprobs (K,), entropies (K,) or (0,), recomputed ()) of the rows that `rows.Rows` describes.

    Only the loss is differentiable; its gradients are computed here, where they are wanted, and scaled in backward.
    """

    @staticmethod
    def forward(ctx, hidden, lora_hidden, weight, lora_weight, bias, *arguments):
        first = len(Rows._fields) - 2
        second = first + len(TokenTerms._fields) - 1
        rows = Rows(hidden, lora_hidden, *arguments[:first])
        terms = TokenTerms(rows.masked, *arguments[first:second])  # Dynamo refuses a tensor that is passed twice
        losses, weight_grad, softcap, logit_scale, *options = arguments[second:]
        head, options = Projection(weight, lora_weight, bias, softcap, logit_scale), Options(*options)
        result = one_pass(rows, head, terms, losses, options)
        loss = result.losses.sum()
        ctx.save_for_backward(*result.gradients)
        ctx.wanted, ctx.weight_grad = options.wanted, weight_grad
        ctx.mark_non_differentiable(result.logprobs, result.entropy, result.recomputed)
        ctx.set_materialize_grads(False)
        return loss, result.logprobs, result.entropy, result.recomputed

    @staticmethod
    def backward(ctx, grad_loss, *_):
        _refuse_double_backward()
        found, wanted = Gradients(*ctx.saved_tensors), ctx.wanted
        if wanted.weight and ctx.weight_grad is not None:
            ctx.weight_grad.addcmul_(found.weight, grad_loss.to(found.weight.dtype))
            wanted = wanted._replace(weight=False)
        gradients = (_scaled(g, grad_loss) if w else None for g, w in zip(found, wanted, strict=True))
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(found))
