"""Log-probabilities and policy losses of transformers causal language models, straight from token ids.

The model runs its own forward, but for its lm_head: headless.py says how.

All tensors have the shape of input_ids, (B, T). Each value stands at the token it belongs to: logprobs[b, t] is the
log-probability of input_ids[b, t] given the tokens before it. Masks, advantages and old log-probabilities are read in the same
way, so there is nothing to shift. For the (B, T - 1) of other code drop the first column. [:, -C:] are the last C tokens, as in
TRL and verl. A token is kept if it has a prediction and is asked for:

    keep[b, t] = t > 0, attention_mask and completion_mask at t, attention_mask at t - 1, position[t] = position[t - 1] + 1
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .. import validation
from ..linear.kept import kept
from ..linear.linear_logprobs import linear_logprobs
from ..linear.linear_policy_loss import kept_of, linear_policy_loss
from ..linear.support import Support, predicting
from ..lm_head import LMHead
from ..loss.mismatch import Mismatch, RolloutCorrection, decoupled_weights
from ..loss.objectives import KLPenalty, Objective, ObjectiveFunction, Reinforce
from ..loss.policy_loss import PolicyLossOutput, refuse_in_one_pass
from ..loss.reductions import Reduction, mean_of_kept
from .headless import Compute, Headless, HeadlessOutput, place, router_coefficient, run_headless, until_backward
from .peft import causal_lm, check_labels_are_ours
from .placed import Placed
from .token_layout import Batch, advantages_at_states, all_to_states, mask_and_targets, on_device_of, to_states, to_tokens


class CausalLMLogprobs(NamedTuple):
    """The results of `token_logprobs`.

    logprobs: (B, T) log-probability of each token, 0 where mask is False.
    entropy: (B, T) entropy of the distribution that predicts each token, 0 where mask is False; or None.
    mask: (B, T) bool, True for tokens that have a prediction and were asked for.
    aux_loss: () the router's load-balancing loss as the model computes it, not yet multiplied by its coefficient. None unless
        asked for by output_router_logits=True, as an argument or in the configuration.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    mask: torch.Tensor
    aux_loss: torch.Tensor | None


def token_logprobs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # (B, T)
    attention_mask: torch.Tensor | None = None,  # (B, T)
    *,
    completion_mask: torch.Tensor | None = None,  # (B, T)
    support: Support | None = None,
    position_ids: torch.Tensor | None = None,  # (B, T) or (1, T)
    temperature: float | torch.Tensor = 1.0,  # number or (B, T)
    entropy: bool = False,
    fp32_head: bool = False,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
    **model_inputs: Any,
) -> CausalLMLogprobs:
    """log p(input_ids[b, t] | input_ids[b, :t]) for each token, differentiable in all parameters, without the logits.

    Args:
        model: a transformers causal language model, which PEFT, DDP or FSDP may wrap. It is called once, in its current mode:
            in training mode its dropout is on.
        input_ids: (B, T) int64.
        attention_mask: (B, T), 0 for padding on either side. None: nothing is padded.
        completion_mask: (B, T) bool, True for the tokens that are wanted. None: all.
        support: a `Support` of B T sets: set b T + t is what input_ids[b, t] was sampled from. Other tokens' may be anything.
        position_ids: None: with an attention_mask those of transformers' `generate`, which count the tokens that are not
            padding. Where a row's positions do not go up by one, a new packed sequence begins. Its first token has no
            prediction. The model's attention must keep the sequences apart. That of transformers does so only without an
            attention_mask. Positions of another shape, such as M-RoPE's (3, B, T), are passed on and start no sequence. They
            are refused beside PEFT's virtual tokens (prompt tuning), where the model counts positions itself.
        temperature, entropy, workspace, backend, check: as in `linear_logprobs`. temperature (B, T) stands at the token that
            was sampled with it. check=False also leaves out the comparison of the model's softcap and scale.
        fp32_head: multiply by the lm_head in float32 under autocast and in a 16-bit model, as in `LMHead`. A head that
            casts in its own forward sets it.
        model_inputs: further arguments of the model, such as pixel_values or output_router_logits.

    Raises TypeError or ValueError for models and arguments that do not fit, those of `LMHead.from_model` included.
    """
    batch = Batch(input_ids, attention_mask, completion_mask, position_ids, check, fp32_head)
    mask, tokens = mask_and_targets(batch)
    support = predicting(support, tokens, check)
    rows = kept(tokens != validation.IGNORED_TOKEN) if check else None  # the host waits before the model runs
    temperature = to_states(input_ids, "temperature", temperature)

    def compute(hidden: torch.Tensor, head: LMHead, arguments: dict[str, Any]) -> dict[str, Any]:
        there = functools.partial(on_device_of, like=hidden)
        out = linear_logprobs(
            hidden, until_backward(head, arguments), there(tokens), mask=there(rows), support=there(support),
            temperature=there(temperature), entropy=entropy, workspace=workspace, backend=backend, check=check,
        )  # fmt: skip
        return {"log_probs": to_tokens(out.logprobs), "entropy": to_tokens(out.entropy)}

    out = run_headless(model, compute, batch, model_inputs)
    return CausalLMLogprobs(out.log_probs, out.entropy, mask, out.aux_loss)


def causal_lm_policy_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # (B, T)
    attention_mask: torch.Tensor | None,  # (B, T)
    old_logprobs: torch.Tensor | None,  # (B, T)
    advantages: torch.Tensor,  # (B, T), or one per sequence
    *,
    objective: Objective | ObjectiveFunction,
    completion_mask: torch.Tensor | None = None,  # (B, T)
    support: Support | None = None,
    position_ids: torch.Tensor | None = None,  # (B, T) or (1, T)
    sequence_ids: torch.Tensor | None = None,  # (B, T)
    temperature: float | torch.Tensor = 1.0,  # number or (B, T)
    reduction: Reduction = "token-mean",
    denominator: float | torch.Tensor | None = None,
    kl: KLPenalty | None = None,
    ref_logprobs: torch.Tensor | None = None,  # (B, T)
    rollout_weights: torch.Tensor | None = None,  # (B, T)
    rollout_logprobs: torch.Tensor | None = None,  # (B, T)
    rollout_correction: RolloutCorrection | None = None,
    entropy: bool = False,
    entropy_coef: float = 0.0,
    add_aux_loss: bool = False,
    skip_zero_weight: bool = True,
    skip_silenced: bool | None = None,
    fp32_head: bool = False,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
    **model_inputs: Any,
) -> PolicyLossOutput:
    """`linear_policy_loss` for a model and token ids: one forward of the model, one pass over the vocabulary.

    Args:
        model, input_ids, attention_mask, completion_mask, support, position_ids, temperature, fp32_head, model_inputs: as in
            `token_logprobs`.
        old_logprobs, ref_logprobs, rollout_weights, rollout_logprobs: (B, T), in the layout of `token_logprobs`; read where
            tokens are kept. rollout_correction is called before the model runs, in this layout; with sequence_ids on (B T,).
        advantages: (B, T), or one per sequence: (B,), or (S,) with sequence_ids.
        sequence_ids: (B, T) int, for packed rows: the sequence of each token, numbered from 0. None: the rows are the sequences
            of per-sequence advantages and of the "seq-" reductions.
        add_aux_loss: add router_aux_loss_coef * aux_loss to the loss, as transformers does when it is given labels. It is not
            divided by `denominator`: under gradient accumulation each micro-batch adds its own. metrics["aux_loss"] is the
            model's own aux_loss, 0 / 0 for an attention_mask without a single 1. So where no token is to count, keep the
            attention_mask and pass a completion_mask of False.
        The others: as in `linear_policy_loss`. What it refuses takes `token_logprobs` and `policy_loss`.

    Returns PolicyLossOutput: the loss (), logprobs (B, T) detached, metrics.
    """
    refuse_in_one_pass(objective, entropy_coef, old_logprobs, rollout_logprobs)
    batch, packed = Batch(input_ids, attention_mask, completion_mask, position_ids, check, fp32_head), sequence_ids is not None
    counts, tokens = mask_and_targets(batch)
    support = predicting(support, tokens, check)
    temperature, ids, old, ref_logprobs = all_to_states(input_ids, packed, {
        "temperature": temperature, "sequence_ids": sequence_ids, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
    })  # fmt: skip
    rollout = old_logprobs, rollout_logprobs, rollout_correction, rollout_weights
    validation.check_rollout("input_ids", input_ids, *rollout)
    weights, mismatch = decoupled_weights(*rollout, counts, sequence_ids, check=check)
    (weights,), targets = all_to_states(input_ids, packed, {"rollout_weights": weights}), tokens.flatten() if packed else tokens
    advantages = advantages_at_states(input_ids, packed, advantages)
    rows = kept_of(targets, ids, skip_zero_weight, old, advantages, objective, kl, ref_logprobs, weights) if check else None
    if add_aux_loss:
        coefficient, model_inputs = router_coefficient(causal_lm(model)), {**model_inputs, "output_router_logits": True}

    def compute(hidden: torch.Tensor, head: LMHead, arguments: dict[str, Any]) -> dict[str, Any]:
        states, there = hidden.flatten(0, 1) if packed else hidden, functools.partial(on_device_of, like=hidden)
        head = until_backward(head, arguments, one_pass=head.weight.dtype != torch.float16)
        out = linear_policy_loss(
            states, head, there(targets), there(old), there(advantages), objective=objective, mask=there(rows), check=check,
            support=there(support), sequence_ids=there(ids), temperature=there(temperature), reduction=reduction, kl=kl,
            denominator=denominator, ref_logprobs=there(ref_logprobs), rollout_weights=there(weights), entropy=entropy,
            skip_zero_weight=skip_zero_weight, skip_silenced=skip_silenced, workspace=workspace, backend=backend,
        )  # fmt: skip
        return {"policy": _at_tokens(out, input_ids, there(mismatch))}

    out = run_headless(model, compute, batch, model_inputs)
    return _plus_aux_loss(out, coefficient) if add_aux_loss else out.policy


def _plus_aux_loss(out: HeadlessOutput, coefficient: float) -> PolicyLossOutput:
    loss, logprobs, metrics = out.policy
    loss = loss + coefficient * out.aux_loss.to(loss.device)
    return PolicyLossOutput(loss, logprobs, metrics | {"aux_loss": out.aux_loss.detach()})


class Patch:
    """What `patch` did to a model. `undo()`, or the end of a `with` statement, takes it back."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed

    def undo(self) -> None:
        """Gives the model its own forward back. Further calls do nothing."""
        self._placed.undo()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch(
    model: torch.nn.Module,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    fp32_head: bool = False,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> Patch:
    """Makes calls of the model with labels compute their loss without the logits, until `undo()`. For any architecture.

        patch(model)  # where others have a function for each architecture, such as Liger's apply_liger_kernel_to_llama
        trainer = transformers.Trainer(model, ...)

    With labels, or shift_labels, the model returns a `HeadlessOutput`, in training and in evaluation: loss and log_probs as
    `patched` gives them, no logits, no last_hidden_state. The gradients of the loss are computed in the same pass over the
    vocabulary (three matrix products), so log_probs and entropy are constants here; `patched` takes two passes (four products),
    and they have gradients. Calls without labels run the model's own forward, with logits, so that `generate` works.

    Only this instance is changed. What wraps it before or after (PEFT, DDP, FSDP, accelerate's mixed precision) runs as always.
    A copy of the model (copy.deepcopy) is patched too, with its own weights, and undone with it. `token_logprobs` and
    `causal_lm_policy_loss` take a patched model.

    Arguments, and errors raised, as of `patched`.
    """
    check_labels_are_ours(model)
    compute = _one_pass(temperature, entropy, {"workspace": workspace, "backend": backend, "check": check})
    return Patch(place(model, Headless(compute, check, fp32_head, lasting=True)))


@contextmanager
def patched(
    model: torch.nn.Module,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    fp32_head: bool = False,
    workspace: int | None = None,
    backend: str | None = None,
    check: bool = True,
) -> Iterator[torch.nn.Module]:
    """Within the context, calls of the model return a `HeadlessOutput`, with log-probabilities of labels and without logits.

        with patched(model):
            out = model(input_ids=ids, attention_mask=mask, labels=labels)  # loss, log_probs, entropy; logits is None

    It is for training loops that call the model themselves. Other losses can be written on log_probs.
    labels: (B, T) as in transformers: not shifted, -100 is ignored. log_probs and entropy stand at their label. shift_labels
        (B, T) take their place where they are given: each stands at the state that predicts it.
    loss: as in transformers: the mean of -log_probs over labels, or their sum divided by num_items_in_batch. Without a label it
        is 0, whatever num_items_in_batch is. router_aux_loss_coef * aux_loss is added where router logits are asked for. The
        aux_loss is transformers' own, 0 / 0 for an attention_mask without a single 1.
    Without labels the output has hidden states only, so `generate` does not work.

    With PEFT's prompt tuning each virtual token has a state, and log_probs begin with theirs, as the model's own logits do.

    Only the `forward` of this instance is patched. Hooks and wrappers (DDP, FSDP, PEFT) run as always, and all is restored
    when the context ends, also by an exception. Raises as `token_logprobs` does, and RuntimeError if the model is patched.
    """
    check_labels_are_ours(model)
    compute = _two_passes(temperature, entropy, {"workspace": workspace, "backend": backend, "check": check})
    placed = place(model, Headless(compute, check, fp32_head))
    try:
        yield model
    finally:
        placed.undo()


def _one_pass(temperature: float, entropy: bool, options: dict[str, Any]) -> Compute:
    """transformers' own loss of labels, with its gradients computed in the same pass."""

    def compute(hidden: torch.Tensor, head: LMHead, arguments: dict[str, Any]) -> dict[str, Any]:
        tokens, back, count = _labels_at_states(hidden, arguments, options["check"])
        head = until_backward(head, arguments, one_pass=head.weight.dtype != torch.float16)
        ones = torch.ones_like(tokens, dtype=torch.float32)
        if count is not None:  # 0 on a rank without labels, whose loss is 0
            count = torch.where((tokens != validation.IGNORED_TOKEN).any(), count, 1)
        found = linear_policy_loss(
            hidden, head, tokens, None, ones, objective=Reinforce(), denominator=count, temperature=temperature,
            outputs=("entropy",) * entropy, skip_zero_weight=False, **options,
        )  # fmt: skip
        of_rows = found.statistics.entropy if entropy else None
        return {"loss": found.loss, "log_probs": back(found.logprobs), "entropy": back(of_rows)}

    return compute


def _two_passes(temperature: float, entropy: bool, options: dict[str, Any]) -> Compute:
    """transformers' own loss of labels, as a function of log-probabilities that have gradients themselves."""

    def compute(hidden: torch.Tensor, head: LMHead, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["labels"] is None and arguments["shift_labels"] is None:
            return {}
        tokens, back, count = _labels_at_states(hidden, arguments, options["check"])
        head = until_backward(head, arguments)
        out = linear_logprobs(hidden, head, tokens, temperature=temperature, entropy=entropy, **options)
        loss = mean_of_kept(-out.logprobs, tokens != validation.IGNORED_TOKEN, count)
        return {"loss": loss, "log_probs": back(out.logprobs), "entropy": back(out.entropy)}

    return compute


def _labels_at_states(
    hidden: torch.Tensor, arguments: dict[str, Any], check: bool
) -> tuple[torch.Tensor, Callable[[torch.Tensor | None], torch.Tensor | None], Any]:
    """Labels at the states that predict them, a function that moves results to where the labels stood, num_items_in_batch."""
    count, shifted = arguments["num_items_in_batch"], arguments["shift_labels"]
    count = count.to(hidden.device).reshape(()) if isinstance(count, torch.Tensor) else count
    if shifted is None:
        tokens = mask_and_targets(Batch(arguments["labels"], None, None, None, check, False))[1]
        return tokens.to(hidden.device), to_tokens, count
    # already at the states that predict them, as under sequence parallelism
    shape = tuple(hidden.shape[:-1])
    if tuple(shifted.shape) != shape:
        of_peft = "; states of PEFT's virtual tokens come first, give them -100"
        raise ValueError(f"shift_labels must have one label a state, {shape}; got {tuple(shifted.shape)}{of_peft}")
    return shifted.to(hidden.device), lambda x: x, count


def _at_tokens(out: PolicyLossOutput, input_ids: torch.Tensor, mismatch: Mismatch | None) -> PolicyLossOutput:
    return PolicyLossOutput(out.loss, to_tokens(out.logprobs.view(input_ids.shape)), out.metrics.beside(mismatch))
