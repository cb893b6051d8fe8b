"""What the general rules of `configs.py` can't shrink, by type of configuration."""

from __future__ import annotations

from typing import Any

_AXIAL = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}
_PYRAMID = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}
_FOUR_STAGES = {"embed_dim": 24, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 4, 4]}
_CODEC = {"quantization_dim": 128, "downsampling_ratios": (2, 2), "encoder_hidden_size": 16}
# Backbones of readers of text lines: images shrink in height more than in width.
_LINES = {
    "backbone_config": {
        "stem_strides": [2, 1, 1, 1, 1],
        "stage_downsample": [True] * 4,
        "stage_downsample_strides": [[2, 1], [1, 2], [2, 1], [2, 1]],
    }
}
_WIDTHS = {"hidden_sizes": [16, 16, 32, 32]}
_WORDS = {"vocab_size": 32}
# Prompts for images of SAM 2, whose last features have a stride of 16.
_PROMPTS = {"prompt_encoder_config": {"image_size": 128, "patch_size": 16}}
# Necks that make a pyramid of the outputs of four layers.
_NECK = {"neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16}
_THREE_AXES = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
}
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"] * 2
_LINEAR_THEN_FULL = ["linear_attention", "full_attention"] * 2
_GEMMA4_TEXT = {
    "layer_types": _SLIDING_THEN_FULL,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
}
_GEMMA4_ASSISTANT_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "layer_types": _SLIDING_THEN_FULL,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 4,
    "sliding_window": 4,
    "max_position_embeddings": 64,
}

# Added to (and above) the values of the general rules.
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "autoformer": _SERIES,
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "beit": {"out_indices": [1, 2, 3, 4]},
    "blip-2": {"image_token_index": 100, "qformer_config": {"use_qformer_text_input": True}},
    "chmv2": {
        "post_process_channels": [16, 16, 32, 32],
        "fusion_hidden_size": 16,
        "head_hidden_size": 16,
        "number_output_channels": 16,
    },
    "cohere_compass_text": {"layer_types": _SLIDING_THEN_FULL, "rope_parameters": _AXIAL},
    "convnext": _WIDTHS,
    "convnextv2": _WIDTHS,
    "data2vec-vision": {"out_indices": [1, 2, 3, 4]},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "max_window_layers": 2,
        "first_k_dense_replace": 1,
    },
    # Their block-sparse attention is refused by name.
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blenderbot": {"encoder_layers": 4},
    "blt": {"encoder_hash_byte_group_vocab": 64, "vocab_size": 260},
    "blt_local_encoder": {"vocab_size": 260, "hidden_size_global": 64},
    "blt_local_decoder": {"vocab_size": 260, "hidden_size_global": 64},
    "blt_patcher": {"vocab_size": 260},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGA": 101, "IMGIMGB": 102}},
    "cosmos3_edge_text": _THREE_AXES,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "num_experts_per_tok": 2,
    },
    "depth_pro": {
        "patch_size": 32,
        "intermediate_hook_ids": [3, 1],
        "fusion_hidden_size": 32,
        "intermediate_feature_dims": [32, 32],
        "scaled_images_feature_dims": [64, 64, 32],
    },
    "donut-swin": _PYRAMID,
    "dots3_note_vision_encoder": {
        "per_layer_config": {},
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "head_dim": 24,
        "sliding_window": 4,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dpt": {**_NECK, "backbone_out_indices": [0, 1, 2, 3]},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "fun_asr_nano": {
        "adaptor_config": {"hidden_size": 64, "intermediate_size": 16, "num_attention_heads": 4}
    },
    "gemma3n_text": {
        "layer_types": _SLIDING_THEN_FULL,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4_unified_text": _GEMMA4_TEXT,
    "glm4v_moe_text": _THREE_AXES,
    "glm4v_text": _THREE_AXES,
    "glm5_next_text": {
        "num_key_value_heads": 4,
        "index_topk": 4,
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
    },
    "glm_image_text": _THREE_AXES,
    "glm_ocr_text": _THREE_AXES,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite_speech5_encoder": {"num_key_value_heads": 4},
    "hiera": {
        "image_size": (96, 96),
        "decoder_hidden_size": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 2,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "granitemoehybrid": {"layer_types": _LINEAR_THEN_FULL},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "informer": _SERIES,
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _LINEAR_THEN_FULL},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longformer": {"attention_window": [4] * 4},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "maskformer-swin": _PYRAMID,
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "lw_detr_vit": {"num_windows": 4, "image_size": 64, "window_block_indices": [0, 2]},
    "luke": {"entity_vocab_size": 32, "entity_emb_size": 64},
    "ministral": {"head_dim": 16},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moshi": {"audio_vocab_size": 32},
    "muse_spark_audio": {"hidden_sizes": (16, 32, 64, 128)},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4},
    "nemotron3_diarization": {"head_config": {"hidden_size": 64, "audio_hidden_size": 64}},
    "nemotron_asr_streaming_encoder": {"sliding_window": 5, "default_num_lookahead_tokens": 1},
    "neucodec": _CODEC,
    "omdet-turbo": {"backbone_config": _FOUR_STAGES},
    "oneformer": {"backbone_config": _FOUR_STAGES},
    "perceiver": {
        "d_latents": 64,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "qk_channels": 32,
        "v_channels": 64,
    },
    "pp_doclayout_v2": {"class_thresholds": [0.0] * 25, "class_order": list(range(25))},
    "pp_ocrv5_server_rec": _LINES,
    "pp_ocrv6_small_det": {
        "layer_list_out_channels": (8, 8, 8, 8),
        "backbone_config": {
            "stem_channels": (3, 8, 8),
            "block_configs": [[[3, 8, 8, stride, False]] for stride in (1, 2, 2, 2)],
        },
    },
    "pvt_v2": {"image_size": 64},
    "qwen2_5_omni_text": _THREE_AXES,
    "qwen2_5_vl_text": _THREE_AXES,
    "qwen2_vl_text": _THREE_AXES,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
    },
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 8)},
    "resnet": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 32, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    },
    "sam2": _PROMPTS,
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "image_size": [128, 128],
        "blocks_per_stage": [1, 2, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 4],
        "window_positional_embedding_background_size": [4, 4],
        "global_attention_blocks": [4],
    },
    "sam2_video": _PROMPTS,
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "fpn_hidden_size": 64,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "sapiens2": {
        "head_config": {
            "upsample_out_channels": [16, 16],
            "conv_out_channels": [16],
            "scale_conv_out_channels": [16],
            "scale_final_hidden_sizes": [16, 16],
        }
    },
    "seggpt": {
        "image_size": (64, 32),
        "merge_index": 0,
        "intermediate_hidden_state_indices": [0, 1, 2, 3],
    },
    "squeezebert": {"embedding_size": 64},
    "swin": _PYRAMID,
    "swin2sr": _PYRAMID,
    "swinv2": _PYRAMID,
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "time_series_transformer": _SERIES,
    "tipsv2_dpt": _NECK,
    "uvdoc": {"backbone_config": {"out_indices": [1, 2, 3, 4, 5, 6]}},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4, "pred_num_hidden_layers": 4},
    "wav2vec2-bert": _WORDS,
    "wav2vec2-conformer": _WORDS,
    "xcodec2": _CODEC,
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zoedepth": {**_NECK, "bottleneck_features": 16},
}

# The whole configuration.
REPLACED: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 64,
        "vocab_size": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "gemma4_assistant": {"text_config": _GEMMA4_ASSISTANT_TEXT, "backbone_hidden_size": 64},
    "gemma4_unified_assistant": {
        "text_config": _GEMMA4_ASSISTANT_TEXT,
        "backbone_hidden_size": 64,
    },
}
