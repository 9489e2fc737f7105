"""The forward of a transformers causal language model without its lm_head: hidden states and the head go to a function instead.

The model runs its own forward, so that position ids, images, routers, autocast and the hooks of FSDP, DDP and PEFT work as
always. Only its lm_head is replaced, by two hooks. One takes all hidden states and gives the layer a single row of them. The
other returns a row of known numbers, the probe, in place of the logits. The model then applies its own softcap and scale to the
probe. The result must agree with the softcap and scale that `LMHead.from_model` read from the configuration. A model that does
anything else is refused rather than trained on other logits.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .. import validation
from ..lm_head import LMHead, is_elsewhere, other_logits
from ..loss.policy_loss import PolicyLossOutput
from .deepspeed import gather_for_backward
from .peft import causal_lm, shortcuts, states_before
from .placed import Placed, placed_on
from .token_layout import Batch

# (hidden states (B, T, H), the head, arguments of the loss such as `labels`) -> fields of a HeadlessOutput
Compute = Callable[[torch.Tensor, LMHead, dict[str, Any]], dict[str, Any]]

_SCALED_BEFORE_THE_HEAD = ("minicpm3",)  # models that divide hidden states, and not logits, by config.logits_scaling
_REFUSED = {"labels", "num_items_in_batch", "logits_to_keep", "past_key_values", "inputs_embeds", "return_dict"}


@dataclass
class HeadlessOutput(ModelOutput):
    """The output of a model under `patched` or `patch`. logits are always None.

    loss: () if there are labels. log_probs, entropy: (B, T) for each label, 0 where it is -100.
    policy: for `causal_lm_policy_loss`. last_hidden_state: (B, T, H), the input of the lm_head; None of `patch`.
    The others are the model's own.
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


class Headless(NamedTuple):
    """What takes the place of the lm_head.

    lasting: calls without labels are passed on to the model's own forward, and the states are no part of the output.
    """

    compute: Compute
    check: bool
    fp32_head: bool
    lasting: bool = False


def place(model: torch.nn.Module, headless: Headless, over_lasting: bool = False) -> Placed:
    """Replaces the forward of the causal language model, on the instance. Returns what `undo()` takes back.

    over_lasting: where it has been replaced already by one that is lasting, this one stands before it.
    """
    lm = causal_lm(model)
    if any(not (placed.passes_on and over_lasting) for placed in placed_on(lm.forward)):
        raise RuntimeError(f"this {type(lm).__name__} is patched already; leave that context, or undo() that patch, before")
    if not is_elsewhere(lm.get_output_embeddings()):
        LMHead.from_model(lm, fp32_head=headless.fp32_head)  # for its errors; it is built anew where the weights are whole

    names = tuple(inspect.signature(lm.forward).parameters)  # once, as `generate` calls the model for every token

    @torch.compiler.disable  # a compiled model would trace hooks that every call has anew
    def answer(lm: PreTrainedModel, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if headless.lasting and given.get("labels") is None and given.get("shift_labels") is None:
            return original(*args, **kwargs)
        return _headless_forward(lm, original, headless, given)

    return Placed(lm, answer, shortcuts(model, lm), passes_on=headless.lasting)


def _headless_forward(lm: PreTrainedModel, original: Callable, headless: Headless, given: dict[str, Any]) -> HeadlessOutput:
    """Runs the model's own forward, with `compute` in place of its lm_head.

    The head is read inside the layer's own call, where FSDP and ZeRO-3 have gathered its weight.
    """
    arguments, inputs = _loss_arguments(given)
    layer = lm.get_output_embeddings()
    before = [*layer.parameters()]  # which FSDP2 replaces for the layer's call
    gather_for_backward(lm, before)  # its own never runs, as its output, the probe, is a constant
    calls: list[tuple] = []  # (hidden states, fields computed from them, the head, the probe)
    scaled_before = lm.config.get_text_config().model_type in _SCALED_BEFORE_THE_HEAD

    def take(_: torch.nn.Module, inputs: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict]:
        if calls or keywords or len(inputs) != 1 or inputs[0].dim() != 3:
            raise ValueError(f"{type(lm).__name__} must call its output embeddings once, with hidden states (B, T, H) alone")
        head = LMHead.from_model(lm, fp32_head=headless.fp32_head)
        head = dataclasses.replace(head, logit_scale=1.0) if scaled_before else head
        parameters = [*layer.parameters()]
        arguments["gathered"] = any(p is not q for p, q in zip(parameters, before, strict=True))
        hidden = inputs[0].to(head.weight.device)  # as accelerate's hook does where the model is split across devices
        probe = torch.linspace(-100, 100, head.vocab_size, device=head.weight.device)[None, None]  # (1, 1, V)
        calls.append((hidden, headless.compute(hidden, head, arguments), head, probe))
        return (inputs[0][:1, :1].detach(),), {}

    handles = [
        layer.register_forward_pre_hook(take, with_kwargs=True),  # after existing hooks, so that it sees the layer's input
        # the probe, before existing hooks; a copy, since a model may write into its logits
        layer.register_forward_hook(lambda *_: calls[0][3].clone(), prepend=True),
    ]
    try:
        out = original(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(f"{type(lm).__name__}.forward does not call its output embeddings")
    hidden, fields, head, probe = calls[0]
    _check_logits(lm, out, head, probe, headless.check)
    names = ("aux_loss", "router_logits", "hidden_states", "attentions")
    states = None if headless.lasting else hidden
    result = HeadlessOutput(last_hidden_state=states, **fields, **{name: getattr(out, name, None) for name in names})
    if result.loss is not None and result.aux_loss is not None:
        result.loss = result.loss + router_coefficient(lm) * result.aux_loss.to(result.loss.device)
    return result


def until_backward(head: LMHead, arguments: dict[str, Any], one_pass: bool = False) -> LMHead:
    """The head of two passes, whose backward multiplies by the weight again: a copy, if it was gathered for the call alone."""
    if not arguments["gathered"] or not torch.is_grad_enabled() or one_pass:
        return head
    bias = None if head.bias is None else head.bias.clone()
    return dataclasses.replace(head, weight=head.weight.clone(), bias=bias)


def _loss_arguments(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of the loss, remaining arguments for the model's own forward)"""
    names = ("labels", "shift_labels", "num_items_in_batch")
    kept = given.get("logits_to_keep")
    if isinstance(kept, torch.Tensor) or kept:
        raise ValueError("logits_to_keep is not understood; pass labels (B, T), -100 where unwanted")
    return {name: given.get(name) for name in names}, {name: x for name, x in given.items() if name not in names}


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


def run_headless(model: torch.nn.Module, compute: Compute, batch: Batch, model_inputs: dict[str, Any]) -> HeadlessOutput:
    """Calls the model once, wrappers included."""
    if refused := _REFUSED & model_inputs.keys():
        raise ValueError(f"{sorted(refused)} cannot be handed on: the model is run once, on all of input_ids")
    lm = causal_lm(model)
    accepted = inspect.signature(lm.forward).parameters
    attention_mask, position_ids = batch.attention_mask, batch.position_ids
    first = states_before(model, lm, position_ids)  # beside which PEFT leaves positions to the model
    if position_ids is None and attention_mask is not None and "position_ids" in accepted and not first:
        position_ids = _positions(lm, batch.input_ids, attention_mask, model_inputs)
    inputs = {"input_ids": batch.input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    if "use_cache" in accepted or (takes_any and hasattr(lm.config.get_text_config(), "use_cache")):
        inputs["use_cache"] = False
    inputs = {name: value for name, value in inputs.items() if value is not None} | model_inputs
    of_tokens = (lambda hidden, *others: compute(hidden[:, first:], *others)) if first else compute
    placed = place(model, Headless(of_tokens, batch.check, batch.fp32_head), over_lasting=True)
    try:
        return model(**inputs)
    finally:
        placed.undo()


def _positions(
    lm: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, model_inputs: dict[str, Any]
) -> torch.Tensor | None:
    """Positions as `generate` gives them. None: the model counts them itself.

    Models with positions of their own, such as M-RoPE's, override a method for them. It may need more than is known here to
    place an image, as the model's forward does by itself.
    """
    name = "_prepare_position_ids_for_generation"
    if getattr(type(lm), name, None) is getattr(GenerationMixin, name, None):
        return (attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, 0)
    if any(given.startswith(("pixel_values", "image_", "video_", "input_features")) for given in model_inputs):
        return None
    return getattr(lm, name)(input_ids, {"attention_mask": attention_mask})


def router_coefficient(lm: PreTrainedModel) -> float:
    coefficient = getattr(lm, "router_aux_loss_coef", getattr(lm.config.get_text_config(), "router_aux_loss_coef", None))
    if coefficient is None:
        raise ValueError(f"{type(lm).__name__} has no router_aux_loss_coef: there is no router loss to add")
    return coefficient
