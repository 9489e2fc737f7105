"""Log-probabilities and policy losses of transformers causal language models, straight from token ids.

The model runs its own forward, so that position ids, images, routers, autocast and the hooks of FSDP, DDP and PEFT work as
always. Only its lm_head is replaced, by two hooks. One takes all hidden states and gives the layer a single row of them. The
other returns a row of known numbers, the probe, in place of the logits. The model then applies its own softcap and scale to the
probe. The result must agree with the softcap and scale that `LMHead.from_model` read from the configuration. A model that does
anything else is refused rather than trained on other logits.

All tensors have the shape of input_ids, (B, T). Each value stands at the token it belongs to: logprobs[b, t] is the
log-probability of input_ids[b, t] given the tokens before it. Masks, advantages and old log-probabilities are read in the same
way, so there is nothing to shift. For the (B, T - 1) of other code drop the first column. [:, -C:] are the last C tokens, as in
TRL and verl. A token is kept if it has a prediction and is asked for:

    keep[b, t] = t > 0, attention_mask and completion_mask at t, attention_mask at t - 1, position[t] = position[t - 1] + 1
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .. import validation
from ..linear.kept import Kept, kept
from ..linear.linear_logprobs import linear_logprobs
from ..linear.linear_policy_loss import kept_of, linear_policy_loss
from ..linear.support import Support, predicting
from ..lm_head import LMHead, is_elsewhere, other_logits
from ..loss.mismatch import Mismatch, RolloutCorrection, decoupled_weights
from ..loss.objectives import KLPenalty, Objective, ObjectiveFunction
from ..loss.policy_loss import PolicyLossOutput, refuse_in_one_pass
from ..loss.reductions import Reduction, mean_of_kept
from .deepspeed import gather_for_backward
from .peft import causal_lm, check_labels_are_ours, shortcuts, states_before

# (hidden states (B, T, H), the head, arguments of the loss such as `labels`) -> fields of a HeadlessOutput
_Compute = Callable[[torch.Tensor, LMHead, dict[str, Any]], dict[str, Any]]

_SCALED_BEFORE_THE_HEAD = ("minicpm3",)  # models that divide hidden states, and not logits, by config.logits_scaling
_OURS = "_fastpg_patched"  # attribute that marks a forward which replaces a model's own
_REFUSED = {"labels", "num_items_in_batch", "logits_to_keep", "past_key_values", "inputs_embeds", "return_dict"}


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


@dataclass
class HeadlessOutput(ModelOutput):
    """The output of a model under `patched`. logits are always None.

    loss: () if there are labels. log_probs, entropy: (B, T) for each label, 0 where it is -100.
    policy: for `causal_lm_policy_loss`. last_hidden_state: (B, T, H), the input of the lm_head. The others are the model's own.
    """

    loss: torch.Tensor | None = None
    logits: None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    policy: PolicyLossOutput | None = None
    last_hidden_state: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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
    batch = _Batch(input_ids, attention_mask, completion_mask, position_ids, check, fp32_head)
    mask, tokens = _targets(batch)
    support = predicting(support, tokens, check)
    rows = kept(tokens != validation.IGNORED_TOKEN) if check else None  # the host waits before the model runs
    temperature = _ahead(input_ids, "temperature", temperature)

    def compute(hidden: torch.Tensor, head: LMHead, arguments: dict[str, Any]) -> dict[str, Any]:
        out = linear_logprobs(
            hidden, _until_backward(head, arguments), tokens.to(hidden.device), mask=_on(rows, hidden),
            support=_on(support, hidden), temperature=_on(temperature, hidden), entropy=entropy, workspace=workspace,
            backend=backend, check=check,
        )  # fmt: skip
        return {"log_probs": _back(out.logprobs), "entropy": _back(out.entropy)}

    out = _run(model, compute, batch, model_inputs)
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
    batch, packed = _Batch(input_ids, attention_mask, completion_mask, position_ids, check, fp32_head), sequence_ids is not None
    counts, tokens = _targets(batch)
    support = predicting(support, tokens, check)
    temperature, ids, old, ref_logprobs = _at_states(input_ids, packed, {
        "temperature": temperature, "sequence_ids": sequence_ids, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
    })  # fmt: skip
    rollout = old_logprobs, rollout_logprobs, rollout_correction, rollout_weights
    validation.check_rollout("input_ids", input_ids, *rollout)
    weights, mismatch = decoupled_weights(*rollout, counts, sequence_ids, check=check)
    (weights,), targets = _at_states(input_ids, packed, {"rollout_weights": weights}), tokens.flatten() if packed else tokens
    if getattr(advantages, "shape", None) == input_ids.shape:
        (advantages,) = _at_states(input_ids, packed, {"advantages": advantages})
    rows = kept_of(targets, ids, skip_zero_weight, old, advantages, objective, kl, ref_logprobs, weights) if check else None
    if add_aux_loss:
        coefficient, model_inputs = _router_coefficient(causal_lm(model)), {**model_inputs, "output_router_logits": True}

    def compute(hidden: torch.Tensor, head: LMHead, arguments: dict[str, Any]) -> dict[str, Any]:
        states, there = hidden.flatten(0, 1) if packed else hidden, functools.partial(_on, like=hidden)
        head = _until_backward(head, arguments, one_pass=head.weight.dtype != torch.float16)
        out = linear_policy_loss(
            states, head, there(targets), there(old), there(advantages), objective=objective, mask=there(rows),
            support=there(support), sequence_ids=there(ids), temperature=there(temperature), reduction=reduction,
            denominator=denominator, kl=kl, ref_logprobs=there(ref_logprobs), rollout_weights=there(weights),
            entropy=entropy, skip_zero_weight=skip_zero_weight, workspace=workspace, backend=backend, check=check,
        )  # fmt: skip
        return {"policy": _at_tokens(out, input_ids, there(mismatch))}

    out = _run(model, compute, batch, model_inputs)
    return _plus_aux_loss(out, coefficient) if add_aux_loss else out.policy


def _plus_aux_loss(out: HeadlessOutput, coefficient: float) -> PolicyLossOutput:
    loss, logprobs, metrics = out.policy
    loss = loss + coefficient * out.aux_loss.to(loss.device)
    return PolicyLossOutput(loss, logprobs, metrics | {"aux_loss": out.aux_loss.detach()})


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

    It is for trainers that call the model themselves. Other losses can be written on log_probs.
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

    def compute(hidden: torch.Tensor, head: LMHead, arguments: dict[str, Any]) -> dict[str, Any]:
        labels, shifted = arguments["labels"], arguments["shift_labels"]
        if labels is None and shifted is None:
            return {}
        if shifted is None:
            tokens = _targets(_Batch(labels, None, None, None, check, fp32_head))[1]
        else:  # already at the states that predict them, as under sequence parallelism
            tokens, shape = shifted, tuple(hidden.shape[:-1])
            if tuple(shifted.shape) != shape:
                of_peft = "; states of PEFT's virtual tokens come first, give them -100"
                raise ValueError(f"shift_labels must have one label a state, {shape}; got {tuple(shifted.shape)}{of_peft}")
        tokens, back = tokens.to(hidden.device), _back if shifted is None else lambda x: x
        out = linear_logprobs(
            hidden, _until_backward(head, arguments), tokens, temperature=temperature, entropy=entropy, workspace=workspace,
            backend=backend, check=check,
        )  # fmt: skip
        count = arguments["num_items_in_batch"]  # 0 on a rank without labels
        count = count.to(hidden.device) if isinstance(count, torch.Tensor) else count
        loss = mean_of_kept(-out.logprobs, tokens != validation.IGNORED_TOKEN, count)
        return {"loss": loss, "log_probs": back(out.logprobs), "entropy": back(out.entropy)}

    check_labels_are_ours(model)
    with _intercepted(model, compute, check, fp32_head):
        yield model


@contextmanager
def _intercepted(model: torch.nn.Module, compute: _Compute, check: bool, fp32_head: bool) -> Iterator[None]:
    """Within the context, the forward of the causal language model is replaced, on the instance."""
    lm = causal_lm(model)
    original = lm.forward
    holders = [lm, *shortcuts(model, lm)]
    replaced = [vars(holder).get("forward") for holder in holders]
    if hasattr(original, _OURS):
        raise RuntimeError(f"this {type(lm).__name__} is patched already; leave that context before")
    if not is_elsewhere(lm.get_output_embeddings()):
        LMHead.from_model(lm, fp32_head=fp32_head)  # for its errors; it is built anew where the weights are whole

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> HeadlessOutput:
        return _headless_forward(lm, fp32_head, original, compute, check, args, kwargs)

    forward = torch.compiler.disable(forward)  # a compiled model would trace hooks that every call has anew
    setattr(forward, _OURS, True)
    for holder in holders:
        holder.forward = forward
    try:
        yield
    finally:
        for holder, before in zip(holders, replaced, strict=True):
            del holder.forward
            if before is not None:
                holder.forward = before


def _headless_forward(
    lm: PreTrainedModel,
    fp32_head: bool,
    original: Callable,
    compute: _Compute,
    check: bool,
    args: tuple,
    kwargs: dict[str, Any],
) -> HeadlessOutput:
    """Runs the model's own forward, with `compute` in place of its lm_head.

    The head is read inside the layer's own call, where FSDP and ZeRO-3 have gathered its weight.
    """
    arguments, inputs = _loss_arguments(original, args, kwargs)
    layer = lm.get_output_embeddings()
    before = [*layer.parameters()]  # which FSDP2 replaces for the layer's call
    gather_for_backward(lm, before)  # its own never runs, as its output, the probe, is a constant
    calls: list[tuple] = []  # (hidden states, fields computed from them, the head, the probe)
    scaled_before = lm.config.get_text_config().model_type in _SCALED_BEFORE_THE_HEAD

    def take(_: torch.nn.Module, inputs: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict]:
        if calls or keywords or len(inputs) != 1 or inputs[0].dim() != 3:
            raise ValueError(f"{type(lm).__name__} must call its output embeddings once, with hidden states (B, T, H) alone")
        head = LMHead.from_model(lm, fp32_head=fp32_head)
        head = dataclasses.replace(head, logit_scale=1.0) if scaled_before else head
        parameters = [*layer.parameters()]
        arguments["gathered"] = any(p is not q for p, q in zip(parameters, before, strict=True))
        hidden = inputs[0].to(head.weight.device)  # as accelerate's hook does where the model is split across devices
        probe = torch.linspace(-100, 100, head.vocab_size, device=head.weight.device)[None, None]  # (1, 1, V)
        calls.append((hidden, compute(hidden, head, arguments), head, probe))
        return (inputs[0][:1, :1].detach(),), {}

    handles = [
        layer.register_forward_pre_hook(take, with_kwargs=True),  # after existing hooks, so that it sees the layer's input
        layer.register_forward_hook(lambda *_: calls[0][3], prepend=True),  # the probe, before existing hooks
    ]
    try:
        out = original(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(f"{type(lm).__name__}.forward does not call its output embeddings")
    hidden, fields, head, probe = calls[0]
    _check_logits(lm, out, head, probe, check)
    names = ("aux_loss", "router_logits", "hidden_states", "attentions")
    result = HeadlessOutput(last_hidden_state=hidden, **fields, **{name: getattr(out, name, None) for name in names})
    if result.loss is not None and result.aux_loss is not None:
        result.loss = result.loss + _router_coefficient(lm) * result.aux_loss.to(result.loss.device)
    return result


def _until_backward(head: LMHead, arguments: dict[str, Any], one_pass: bool = False) -> LMHead:
    """The head of two passes, whose backward multiplies by the weight again: a copy, if it was gathered for the call alone."""
    if not arguments["gathered"] or not torch.is_grad_enabled() or one_pass:
        return head
    bias = None if head.bias is None else head.bias.clone()
    return dataclasses.replace(head, weight=head.weight.clone(), bias=bias)


def _on(x: Any, like: torch.Tensor) -> Any:
    """x on the device of `like`, where it is a tensor, a `Kept`, a `Support` or a `Mismatch`."""
    if isinstance(x, (Support, Mismatch)):
        return x.to(like.device)
    if isinstance(x, Kept):
        return x if x.mask.device == like.device else x.mask.to(like.device)
    return x.to(like.device) if isinstance(x, torch.Tensor) and x.dim() else x


def _loss_arguments(forward: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of the loss, remaining arguments for the model's own forward)"""
    given = dict(zip(inspect.signature(forward).parameters, args, strict=False)) | kwargs
    loss = {name: given.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")}
    kept = given.get("logits_to_keep")
    if isinstance(kept, torch.Tensor) or kept:
        raise ValueError("logits_to_keep is not understood; pass labels (B, T), -100 where unwanted")
    return loss, given


def _check_logits(lm: PreTrainedModel, out: Any, head: LMHead, probe: torch.Tensor, check: bool) -> None:
    """Checks that the model scaled and capped the probe as fastpg does with logits."""
    logits = getattr(out, "logits", None)
    if logits is None or logits.shape != probe.shape:
        raise ValueError(f"{type(lm).__name__} must return a ModelOutput, with logits of the shape that its lm_head returns")
    want = head.logit_scale * probe
    want = want if head.softcap is None else head.softcap * torch.tanh(want / head.softcap)
    error, tolerance = (logits - want).abs(), max(1e-5, 2 * torch.finfo(logits.dtype).eps)
    if check:
        agrees = error <= tolerance * (1 + want.abs())
        validation.require(agrees, lambda: other_logits(lm, head, bool((logits == probe).all())))


class _Batch(NamedTuple):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    completion_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    check: bool
    fp32_head: bool


def _run(model: torch.nn.Module, compute: _Compute, batch: _Batch, model_inputs: dict[str, Any]) -> HeadlessOutput:
    """Calls the model once, wrappers included."""
    if refused := _REFUSED & model_inputs.keys():
        raise ValueError(f"{sorted(refused)} cannot be handed on: the model is run once, on all of input_ids")
    lm = causal_lm(model)
    accepted = inspect.signature(lm.forward).parameters
    name = "_prepare_position_ids_for_generation"  # models with positions of their own, such as M-RoPE's, override it
    plain = getattr(type(lm), name, None) is getattr(GenerationMixin, name, None)
    attention_mask, position_ids = batch.attention_mask, batch.position_ids
    first = states_before(model, lm, position_ids)  # beside which PEFT leaves positions to the model
    if position_ids is None and attention_mask is not None and "position_ids" in accepted and plain and not first:
        position_ids = (attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, 0)
    inputs = {"input_ids": batch.input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    if "use_cache" in accepted or (takes_any and hasattr(lm.config.get_text_config(), "use_cache")):
        inputs["use_cache"] = False
    inputs = {name: value for name, value in inputs.items() if value is not None} | model_inputs
    of_tokens = (lambda hidden, *others: compute(hidden[:, first:], *others)) if first else compute
    with _intercepted(model, of_tokens, batch.check, batch.fp32_head):
        return model(**inputs)


def _targets(batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) bool: tokens with a prediction that are asked for. (B, T): these, at the states that predict them, else -100."""
    ids, attention_mask, completion_mask, position_ids, check, _ = batch
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2:
        shape = tuple(getattr(ids, "shape", ()))
        raise TypeError(f"input_ids and labels must be integer tensors (B, T); got {validation.kind(ids)} {shape}")
    shape = tuple(ids.shape)
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(f"attention_mask must be (B, T) = {shape}, 0 for padding; got {tuple(attention_mask.shape)}")
    if attention_mask is not None and attention_mask.dtype != torch.bool and check:
        said = (
            "attention_mask must hold 0 and 1; other numbers, such as those of packed segments, are not understood: pass "
            "position_ids that begin anew in each sequence"
        )
        validation.require((attention_mask == 0) | (attention_mask == 1), lambda: said)
    validation.check_mask(completion_mask, "input_ids", ids)
    mask = torch.ones_like(ids, dtype=torch.bool) if completion_mask is None else completion_mask.clone()
    mask[:, :1] = False
    real = torch.ones_like(mask) if attention_mask is None else attention_mask != 0
    follows = real[:, 1:] & real[:, :-1]
    if position_ids is not None and position_ids.dim() == 2:
        if position_ids.shape not in (shape, (1, shape[1])):
            raise ValueError(f"position_ids must be (B, T) = {shape} or (1, T); got {tuple(position_ids.shape)}")
        next_of = position_ids.diff(dim=1) == 1
        if attention_mask is not None and check:
            said = "position_ids begin a second sequence in a row; with an attention_mask it sees the first: leave the mask out"
            validation.require(next_of | ~follows, lambda: said)
        follows = follows & next_of
    mask[:, 1:] &= follows
    return mask, ids.masked_fill(~mask, validation.IGNORED_TOKEN).roll(-1, 1)


def _router_coefficient(lm: PreTrainedModel) -> float:
    coefficient = getattr(lm, "router_aux_loss_coef", getattr(lm.config.get_text_config(), "router_aux_loss_coef", None))
    if coefficient is None:
        raise ValueError(f"{type(lm).__name__} has no router_aux_loss_coef: there is no router loss to add")
    return coefficient


def _ahead(input_ids: torch.Tensor, name: str, value: Any) -> Any:
    """Moves values (B, T) from tokens to the hidden states that predict them. Numbers stay as they are."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.shape != input_ids.shape:
        raise ValueError(f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}; got {tuple(value.shape)}")
    return value.roll(-1, 1)


def _at_states(input_ids: torch.Tensor, packed: bool, given: dict[str, Any]) -> list[Any]:
    """Values by name, moved to the hidden states, where packed tokens are (N,)."""
    ahead = [_ahead(input_ids, name, value) for name, value in given.items()]
    return [x.flatten() if packed and isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in ahead]


def _at_tokens(out: PolicyLossOutput, input_ids: torch.Tensor, mismatch: Mismatch | None) -> PolicyLossOutput:
    return PolicyLossOutput(out.loss, _back(out.logprobs.view(input_ids.shape)), out.metrics.beside(mismatch))


def _back(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.roll(1, 1)
