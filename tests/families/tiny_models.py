"""Tiny random models of every family of transformers: configurations shrunk by general rules, then by `special_cases`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from special_cases import CLASSES, SPECIAL, TRAINING, WITHOUT_TIMM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

V, MOST_PARAMETERS = 64, 2e7
# Ids of words. Below are those of images and padding, above those that only fill up the vocabulary.
FIRST_WORD, END_OF_WORDS = 40, 60
# A name that many configurations share, and a small value. Widths are all 32, heads 4, so that parts fit to one another.
SMALL: dict[str, Any] = {
    name: value
    for value, names in {
        32: """hidden_size n_embd d_model word_embed_proj_dim embed_dim lru_width embedding_size out_hidden_size projection_dim
            vision_hidden_size encoder_hidden_size text_hidden_size output_dim lm_hidden_size vision_output_dim hidden_dim
            output_hidden_size projector_hidden_size hidden_size_global attention_hidden_size qformer_hidden_size""",
        48: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size d_ff mlp_dim
            dense_intermediate_size intermediate_size_mlp shared_intermediate_size block_ff_dim""",
        2: """num_hidden_layers n_layer n_layers decoder_layers encoder_layers num_layers depth num_decoder_layers
            num_encoder_layers resampler_depth num_key_value_heads n_head_kv num_kv_heads index_n_heads num_experts_per_tok
            num_experts_per_token moe_k moe_topk moe_top_k""",
        4: """num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads attention_heads
            num_global_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts qk_rope_head_dim
            qk_nope_head_dim patch_size""",
        8: """head_dim v_head_dim d_kv rotary_dim index_head_dim linear_head_dim image_size tokens_per_image mamba_chunk_size
            chunk_size""",
        16: """moe_intermediate_size q_lora_rank kv_lora_rank shared_expert_intermediate_size sliding_window
            attention_window_size moe_shared_expert_intermediate_size state_size mamba_d_state index_topk linear_key_head_dim
            linear_value_head_dim attention_chunk_size""",
        1: """n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts
            num_dense_layers""",
        64: """max_position_embeddings n_positions max_seq_len max_sequence_length max_target_positions seq_length vocab_size
            vocab_size_per_layer_input""",
        END_OF_WORDS: "unpadded_vocab_size",
    }.items()
    for name in names.split()
} | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1, "init_std": 0.1}
ALWAYS = ("pad_token_id", "bos_token_id", "eos_token_id", "head_dim", "num_key_value_heads")  # where the default is None too
# What the head's own settings are set to where a family's default leaves them out: each shows in the logits.
ACTIVE = {
    "final_logit_softcapping": 6.0, "logits_soft_cap": 6.0, "output_logit_soft_cap": 6.0, "logit_scale": 0.25,
    "lm_head_multiplier": 0.5, "output_multiplier": 0.5, "logits_scaling": 4.0, "unpadded_vocab_size": END_OF_WORDS,
}  # fmt: skip


class NotBuiltError(Exception):
    """Why there is no model of a family."""


class NotCausalError(Exception):
    """Why the logits of a model are not those of a sequence's next token."""


def active_settings(config: Any) -> dict[str, float]:
    """What a model's configuration says of caps, scales and cuts of logits, as far as it changes something."""
    values = {name: _read(config.get_text_config(), name) for name in ACTIVE}
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) and value not in (0, 1)}


def with_all_active(config: Any) -> dict[str, Any]:
    """Changes of a configuration that make the neutral ones of these settings active; {} if it has none."""
    text = config.get_text_config()
    changes = {name: value for name, value in ACTIVE.items() if name in text.to_dict() and name not in active_settings(config)}
    if text is config or not changes:
        return changes
    return {next(name for name in config.to_dict() if _read(config, name) is text): changes}


def families() -> list[tuple[str, str]]:
    """(model_type, class) of both mappings of this transformers, each class once."""
    mappings = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    found: dict[str, str] = {}
    for mapping in mappings:
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, model_type)
    return [(model_type, name) for name, model_type in found.items()]


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # one value a layer
        return None


def _layers_that_differ(values: dict[str, Any]) -> tuple[int, list[int]]:
    """(the number of layers, which of them stay): the first of each kind, and at least two."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    count = next((values[name] for name in names if isinstance(values.get(name), int)), 0)
    lists = [x for x in values.values() if isinstance(x, list) and len(x) == count]
    kinds = list(map(str, zip(*lists, strict=True)))
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept += [i for i in range(count) if i not in kept][: max(0, 2 - len(kept))]
    return count, sorted(kept)


def shrunk(config: Any, numbers: dict[str, int]) -> dict[str, Any]:
    """Arguments of a small configuration of the same class. numbers: ids of special tokens by name, which it adds to."""
    values, small = config.to_dict(), {}
    layers, kept = _layers_that_differ(values)
    latent = "qk_rope_head_dim" in values  # multi-head latent attention
    for name, value in values.items():
        part = _read(config, name)
        if hasattr(part, "to_dict"):
            small[name] = {"model_type": part.model_type, **shrunk(part, numbers)}
        elif latent and name in ("head_dim", "num_key_value_heads"):
            small[name] = 4
        elif name == "is_decoder" or ("drop" in name and isinstance(value, float)):
            small[name] = value if name == "is_decoder" else 0.0
        elif name in SMALL and (name in ALWAYS or (value is not None and not isinstance(value, (list, dict)))):
            small[name] = float(SMALL[name]) if isinstance(value, float) else SMALL[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = numbers.setdefault(name.removesuffix("_id").removesuffix("_index"), 3 + len(numbers))
        elif isinstance(value, dict) and "mrope_section" in value:
            small[name] = {**value, "mrope_section": [2, 1, 1]}  # of half a head of 8
        elif isinstance(value, list) and layers > 2 and len(value) == layers:
            small[name] = [value[i] for i in kept]
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in small and layers:
            small[name] = len(kept)
    return small


def merged(small: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """special over small, in nested configurations too. A value of `...` leaves the name out: the family's default."""
    result = dict(small)
    for name, value in special.items():
        if value is ...:
            result.pop(name, None)
        elif isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        else:
            result[name] = value
    return result


def tiny_config(model_type: str, class_name: str, changes: dict[str, Any] | None = None) -> Any:
    made = getattr(getattr(transformers, class_name), "config_class", None) or CONFIG_MAPPING[model_type]
    special = SPECIAL.get(getattr(made, "model_type", model_type), {})
    numbers: dict[str, int] = {}
    small = shrunk(made(**special.get("default", {})), numbers)
    if class_name.endswith(("ForCausalLM", "LMHeadModel", "Decoder")) and "is_decoder" in small:
        small["is_decoder"] = True
    own = {name: value for name, value in special.items() if name != "default"}
    config = made(**merged(merged(small, own), changes or {}))
    if model_type in WITHOUT_TIMM:
        siglip = CONFIG_MAPPING["siglip_vision_model"]
        asked = {"model_args": {"embed_dim": 32}, "vocab_size": 4, "vocab_offset": V, "rms_norm_eps": 1e-6}
        object.__setattr__(config, "vision_config", siglip(**shrunk(siglip(), numbers), **asked))
    return config


def tiny_model(model_type: str, class_name: str, changes: dict[str, Any] | None = None) -> Any:
    """The model, in eval mode and float32, with weights whose logits differ."""
    if class_name in CLASSES:
        raise NotCausalError(CLASSES[class_name])
    config, cls = tiny_config(model_type, class_name, changes), getattr(transformers, class_name)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise NotBuiltError(f"{size / 1e6:.0f} million parameters after shrinking")
    model = cls(config).float().train(model_type in TRAINING)
    with torch.no_grad():
        for p in model.parameters():
            constant = p.is_floating_point() and p.numel() > 0 and bool((p == p.flatten()[0]).all())
            if constant and (p.numel() > 1 or not p.any()):
                p.add_(0.1 * torch.randn_like(p))  # zeros and ones, of biases and norms
        _spread_logits(model)
    return model


def _spread_logits(model: Any) -> None:
    """Scales the head's weight, until logits differ by several units and reach the bend of a cap."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None:
        return
    caps = [value for name, value in active_settings(model.config).items() if "cap" in name]
    target = min(caps) / 2 if caps else 3.0
    weight.mul_(target / float(weight.norm(dim=1).mean()))
