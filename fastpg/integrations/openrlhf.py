"""OpenRLHF's Actor on fastpg: log-probabilities and entropies without the logits.

from fastpg.integrations.openrlhf import use_fastpg
use_fastpg(actor)     # before or after strategy.prepare
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from ..validation import IGNORED_TOKEN
from .transformers import patched
from .versions import check_version

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OLDEST, NEWEST = "0.11.1", "0.11.2"  # before 0.11.1 entropies were those of temperature 1


def use_fastpg(actor: torch.nn.Module, *, workspace: int | None = None, check: bool = True) -> None:
    """Gives this Actor of OpenRLHF a forward that computes action log-probabilities and entropies by fastpg.

    The model's own forward runs as always, inside of DeepSpeed's engine, PEFT's wrapper and gradient checkpointing. Only its
    lm_head is replaced for the call, as by `fastpg.integrations.transformers.patched`.

    workspace, check: as in `linear_logprobs`.

    Raises ImportError where openrlhf is absent, TypeError for anything but an Actor, ValueError for an actor of images and for
    an lm_head that fastpg does not know (`LMHead.from_model`). Warns (UserWarning) of a version that was not tested.
    """
    check_version("openrlhf", OLDEST, NEWEST)
    from openrlhf.models.actor import Actor

    if not isinstance(actor, Actor):
        raise TypeError(f"use_fastpg wants an Actor of OpenRLHF's; got {type(actor).__name__}")
    if getattr(actor, "is_vlm", False):
        raise ValueError("the Actor's model takes images (is_vlm), which this adapter does not hand on; text models are served")
    with patched(actor.model):  # for its errors
        pass

    actor.forward = functools.partial(_forward, actor, {"workspace": workspace, "check": check})


def _forward(
    actor: Any,
    plan: dict[str, Any],
    sequences: torch.Tensor,  # (B, T)
    action_mask: torch.Tensor | None = None,  # (B, A), of the last A tokens
    attention_mask: torch.Tensor | None = None,  # (B, T)
    *,
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: ProcessGroup | None = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
) -> Any:
    """As Actor.forward: log-probabilities (B, A), 0 outside of action_mask; without one (B, T - 1) of all tokens but the first.

    With return_output a pair of these and of the model's output, whose `entropy` is (B, T - 1) and whose logits are None.
    Rows of the lm_head outside of action_mask are not computed: there entropies are 0 too, which OpenRLHF masks out.
    """
    from openrlhf.models.ring_attn_utils import gather_and_pad_tensor, unpad_and_slice_tensor

    if action_mask is None and not return_logprobs:
        raise ValueError(
            "action_mask or return_logprobs must be given: the Actor would return logits, of which fastpg has none"
        )
    if return_entropy and not return_output:
        raise ValueError("return_entropy must come with return_output, whose entropy it sets")
    if attention_mask is None:
        raise ValueError("attention_mask must be given, as for OpenRLHF's own forward")
    batch, length = sequences.shape
    labels = sequences
    if action_mask is not None:
        left_out = torch.nn.functional.pad(action_mask == 0, (length - action_mask.shape[1], 0), value=True)
        labels = sequences.masked_fill(left_out, IGNORED_TOKEN)
    if actor.packing_samples:
        # the labels first: ring attention keeps the parameters of the last call
        labels = unpad_and_slice_tensor(labels, attention_mask, ring_attn_group)[2]
        ids, position_ids, _, pad, indices = unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group)
        model_mask = None
    else:
        ids, labels, model_mask = sequences, labels.roll(-1, 1), attention_mask
        position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    with patched(actor.model, temperature=actor.temperature, entropy=return_entropy, **plan):
        output = actor.model(ids, attention_mask=model_mask, position_ids=position_ids, shift_labels=labels)

    def shaped(x: torch.Tensor) -> torch.Tensor:
        x = gather_and_pad_tensor(x, ring_attn_group, pad, indices, batch, length) if actor.packing_samples else x
        return x[:, :-1]

    if return_entropy:
        output.entropy = shaped(output.entropy)
    log_probs = shaped(output.log_probs)
    if action_mask is not None:
        log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
    return (log_probs, output) if return_output else log_probs
