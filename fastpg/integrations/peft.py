"""What stands around a transformers model: wrappers, and the virtual tokens of PEFT's prompt tuning.

Prompt tuning, p-tuning and CPT put the vectors of virtual tokens before the embeddings of the tokens: the model then has more
states than tokens. Prefix tuning and cartridges put keys and values into the cache: the states are those of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

_IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # the values of PeftType whose virtual tokens have no states


def unwrapped(model: Any) -> Iterator[Any]:
    """The model and what it wraps (torch.compile, DDP, FSDP, PEFT), outermost first, down to the transformers model."""
    while model is not None:
        yield model
        if isinstance(model, PreTrainedModel):
            return
        if hasattr(model, "_orig_mod"):  # of torch.compile
            model = model._orig_mod
        else:
            model = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside the wrapper of PEFT, DDP or FSDP."""
    inner = [model, *unwrapped(model)][-1]
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a transformers model or a wrapper around one; got {type(model).__name__}")
    if inner.config.is_encoder_decoder:
        raise ValueError(f"{type(inner).__name__} has an encoder; a decoder-only model is wanted")
    return inner


def shortcuts(model: Any, lm: PreTrainedModel) -> list[Any]:
    """The wrappers that hold the forward of `lm` as their own attribute: PEFT's adaption prompts, and models with prompt tuning
    while their adapter is disabled."""
    around = [x for wrapper in unwrapped(model) for x in (wrapper, getattr(wrapper, "base_model", None)) if x is not lm]
    return [x for x in around if "forward" in getattr(x, "__dict__", ()) and x.forward == lm.forward]


def states_before(model: Any, lm: PreTrainedModel, position_ids: Any) -> int:
    """How many states of virtual tokens stand before those of the tokens.

    Raises ValueError for position_ids beside virtual tokens: PEFT drops them, or attention sees packed sequences as one.
    """
    plain = shortcuts(model, lm)
    configs = [getattr(x, "active_peft_config", None) for x in unwrapped(model) if x not in plain]
    for config in configs:
        if getattr(config, "is_prompt_learning", False):
            if position_ids is not None:
                raise ValueError(
                    f"position_ids cannot be given to a model with PEFT's {config.peft_type.value}, whose virtual tokens come "
                    "before them: leave them out, and pass one sequence a row with an attention_mask"
                )
            return 0 if config.peft_type in _IN_THE_CACHE else config.num_virtual_tokens
    return 0


def check_labels_are_ours(model: Any) -> None:
    """Raises ValueError for PEFT's CPT, which takes labels out of the call and computes their loss from logits."""
    for wrapper in unwrapped(model):
        config = getattr(wrapper, "active_peft_config", None)
        if getattr(config, "peft_type", None) == "CPT":
            raise ValueError(
                "PEFT's CPT computes the loss of labels itself, from logits, of which a patched model has none: use "
                "token_logprobs"
            )
