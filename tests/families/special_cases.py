"""What single families need beside the general rules of `tiny_models`."""

from __future__ import annotations

from typing import Any

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_MROPE_HALF = {**_MROPE, "partial_rotary_factor": 1.0}

_CODES = {f"IMGIMG{'ABCDEFGH'[i]}Z": 10 + i for i in range(8)} | {"<image>": 3, "<|extra_200|>": 4}
_SMALL_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "latent_channels": 32, "num_embeddings": 8, "resolution": 8}
_NO_LAYERS_OF_THEIR_OWN: dict[str, Any] = {"per_layer_config": {}, "head_dim": 8, "shared_experts_intermediate_size": 16}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 50,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

# Arguments of a configuration, over those that the general rules give; ... leaves one out.
# "default": arguments of the configuration that is shrunk.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1, "linear_head_dim": 8, "linear_num_heads": 4, "layer_group_size": 2},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "bart": {"is_decoder": True},
    "blt": {
        "global_config": {"encoder_cross_output_size": 64},
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
    },
    "dbrx": {
        "n_heads": 4,
        "d_model": 32,
        "num_key_value_heads": ...,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0, "model_type": ...},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_top_k": 2, "model_type": ...},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE}}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_experts_per_tok": 2},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "flint": {"mlp_only_layers": [0]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "hash_seed": 0,
    },
    "xlm": {"emb_dim": 32, "causal": True},
    "xlstm": {"qk_dim_factor": 1.0, "num_heads": 4, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "inkling_mm_model": {"vision_config": {"num_hidden_layers": 4, "n_layers": ...}},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "perception_lm": {"vision_config": ...},
    "aria": {"projector_patch_to_query_dict": {4: 2}},
    "blip-2": {"image_token_index": 30},
    "instructblip": {"image_token_index": 30},
    "instructblipvideo": {"video_token_index": 30},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "gemma4": {"default": {"vision_config": {}}, "vision_config": {"pooling_kernel_size": 2, "position_embedding_size": 16}},
    "gemma4_unified": {"default": {"vision_config": {}}},
    "blip": {"text_config": {"is_decoder": True}},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0, 1]}},
    "got_ocr2": {"vision_config": {"image_size": 32}},
    "pp_chart2table": {"vision_config": {"image_size": 32}},
    "granite_docling": {"vision_config": {"image_size": 32}},
    "llama4": {"vision_config": {"projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128}},
    "mllama": {
        "vision_config": {"intermediate_layers_indices": [0, 1], "num_global_layers": 1, "vision_output_dim": 96},
        "text_config": {"cross_attention_layers": [1]},
    },
    "muse_glimmer": {"out_hidden_size": 128},
    "kimi_k25": {"projection_hidden_size": 32},
    "kosmos-2": {"latent_query_num": 4},
    "llava_next": {"image_grid_pinpoints": [[8, 8]]},
    "llava_next_video": {"image_grid_pinpoints": [[8, 8]]},
    "llava_onevision": {"image_grid_pinpoints": [[8, 8]]},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    # below: vision-language models
    "chameleon": {"vocabulary_map": _CODES, "vq_config": _SMALL_VQ},
    "deepseek_ocr2": {
        "text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {"sam_config": {"downsample_channels": [32, 32], "output_channels": 32, "global_attn_indexes": [1]}},
    },
    "dots3_note": {
        "text_config": _NO_LAYERS_OF_THEIR_OWN,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": {}},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "conv_output_size": 96, "downsample_hidden_size": 6},
    },
    "dots3_note_text": _NO_LAYERS_OF_THEIR_OWN,
    "emu3": {
        "image_token_id": 3,
        "vocabulary_map": _CODES,
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 8},
    },
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 16], "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}}
    },
    "florence2": {
        "vision_config": {
            "embed_dim": [8, 16, 32, 32],
            "num_heads": [1, 2, 4, 4],
            "num_groups": [1, 2, 4, 4],
            "depths": [1, 1, 1, 1],
            "projection_dim": 32,
        }
    },
    "glm46v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _MROPE_HALF}},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "glmga": {"text_config": {"rope_parameters": _MROPE}},
    "glm5_next": {
        "text_config": {"qk_rope_head_dim": 0, "head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4, "index_kpool": 4}
    },
    "granite4_vision": {
        "image_grid_pinpoints": [[8, 8]],
        "vision_config": {"hidden_size": 64},
        "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64},
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/1",
        "spatial_target_layers": [1],
    },
    "hunyuan_vl": {"text_config": {"rope_parameters": _MROPE}},
    "janus": {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "latent_channels": 32, "num_embeddings": 8}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config": {"patch_sizes": [4, 2, 2, 2], "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        "text_config": {"moe_hidden_size": 32},
    },
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "image_token_id": 3,
        "video_token_id": 4,
        "audio_token_id": 5,
    },
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _MROPE}, "vision_start_token_id": 30},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 30},
    "qwen2_5_vl": {  # the ids are named for older versions, whose configuration has no default for them
        "text_config": {"rope_parameters": _MROPE, "rope_scaling": _MROPE},
        "image_token_id": 3,
        "video_token_id": 4,
        "vision_start_token_id": 5,
    },
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "step3p7": {"text_config": {"sliding_window": 16, "share_expert_dim": 16}},
}
_ASSISTANT = "it drafts tokens from the keys and values of another model"
# Classes that are no causal language models, and why.
CLASSES: dict[str, str] = {
    "DiffusionGemmaForBlockDiffusion": "it denoises a block of tokens at once",
    "Gemma4AssistantForCausalLM": _ASSISTANT,
    "Gemma4UnifiedAssistantForCausalLM": _ASSISTANT,
    "PI0ForConditionalGeneration": "it predicts a robot's actions",
}
# Models whose vision tower is one of the package timm: SigLIP's takes its place.
WITHOUT_TIMM = ("fast_vlm", "gemma3n", "perception_lm")
# Models whose backward works in training mode alone. Their dropout is 0.
TRAINING = ("reformer",)
