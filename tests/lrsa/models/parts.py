"""What it takes to make the parts of a model for text and images tiny, and what it takes for an image."""

PIXELS = 56  # height and width of an image: 16 patches of 14

# The parts of a model for text and images: what has no field of its own above.
PARTS = {
    "attn_config": {"attn_pdrop": 0},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "depth": 1,
        "embed_dim": 16,
        "num_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "crop_size": 56,
        "out_hidden_size": 32,
        "mlp_dim": 16,
        "output_channels": 16,
        "mm_embed_dim": 32,
        "model_patch_size": 14,
        "num_soft_tokens": 4,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "base_channels": 32,
        "codebook_size": 4,
        "latent_channels": 4,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": 32,
    },
    "vq_config": {
        "embed_dim": 4,
        "num_embeddings": 4,
        "codebook_size": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "hidden_size": 32,
        "projection_dim": 16,
        "image_token_embed_dim": 32,
    },
    "adapter_config": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16},
    "qformer_config": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
    "sam_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 16},
    "encoder_config": {"hidden_size": 32},
    "high_res_vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "output_channels": 16,
        "image_size": 56,
        "patch_size": 14,
        "global_attn_indexes": [0],
    },
    "audio_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "conv_channels": 16,
        "nemo_conv_channels": 16,
        "depthwise_separable_out_channel": 16,
        "input_size": 8,
    },
}

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
HALF_MROPE = {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}
PLACES = [[row, column] for row in range(4) for column in range(4)]
# Vocabularies with names for the codes of an image, 4 of them.
CODES = {"<image>": 50, "<|extra_200|>": 49} | {f"<|visual token {i:06}|>": 56 + i for i in range(4)}
NAMED_CODES = {"<image>": 50} | {f"IMGIMG{letter}Z": 56 + i for i, letter in enumerate("ABCD")}
# What else it takes to build families, by their parts.
OVERRIDES = {
    "qwen2_5_vl paddleocr_vl": {"text_config": MROPE},
    "qwen2_5_omni_thinker": {"text_config": MROPE, "vision_start_token_id": 52},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 52},
    "glm46v glm4v glm4v_moe glm_ocr glmga": {"text_config": HALF_MROPE},
    "llava_next llava_next_video llava_onevision": {"image_grid_pinpoints": [[PIXELS, PIXELS]]},
    "qwen2_vl": {"text_config": MROPE, "vision_config": {"hidden_size": 32}},
    "internvl": {"vision_config": {"image_size": [PIXELS, PIXELS], "patch_size": [14, 14]}},
    "gemma3": {"mm_tokens_per_image": 16},
    "gemma4": {"vision_config": {"pooling_kernel_size": 2}},
    "gemma4_unified": {"vision_config": {"pooling_kernel_size": 1, "output_proj_dims": 32}},
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "idefics2": {"perceiver_config": {"resampler_n_latents": 8}},
    "paligemma": {"projection_dim": 32},
    "vipllava": {"vision_feature_layers": [-1]},
    "ernie4_5_vl_moe": {"text_config": MROPE | {"moe_intermediate_size": [16, 16]}},
    "cosmos3_edge": {"text_config": MROPE, "projector_hidden_size": 32},
    "hunyuan_vl": {"text_config": MROPE, "im_start_id": 52, "im_end_id": 53, "im_newline_id": 49},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 3},
        "vision_config": {"sam_config": {"downsample_channels": [16, 32]}},
    },
    "step3p7": {"text_config": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}},
    "chameleon": {"vocabulary_map": NAMED_CODES},
    "emu3": {"vocabulary_map": CODES},
    "kosmos-2 kosmos-2.5": {"text_config": {"embed_dim": 32, "layers": 4}, "latent_query_num": 8},
    "molmo2": {
        "text_config": {"vocab_size": 60, "additional_vocab_size": 4},
        "vision_config": {"image_size": [PIXELS, PIXELS], "head_dim": 8, "num_key_value_heads": 2},
        "adapter_config": {"vision_feature_layer": [0], "text_hidden_size": 32},
        "image_patch_id": 50,
    },
    "kimi_k25": {"projection_hidden_size": 16},
    "muse_glimmer": {"out_hidden_size": 64, "projector_hidden_size": 32},
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "vision_hidden_size": 16,
        "projector_hidden_size": 32,
    },
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "image_grid_pinpoints": [[PIXELS, PIXELS]],
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
    },
    "granite_docling": {"vision_config": {"scale_factor": 2, "deepstack_visual_indexes": [0]}},
    "apertus1p5": {
        "image_token_offset": 56,
        "audio_token_offset": 60,
        "audio_config": {"codebook_size": 4, "codebook_dim": 16, "num_filters": 2},
    },
    "muse_spark": {
        "out_hidden_size": 64,
        "projector_hidden_size": 32,
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [4, 8, 16, 16], "out_hidden_size": 32},
    },
    "llama4": {"vision_config": {"intermediate_size": 64}},
    "fuyu": {"patch_size": 14},
    "gemma3n": {"vision_soft_tokens_per_image": 16},
    "perception_lm": {
        "vision_config": {"model_type": "clip_vision_model", "model_args": {"embed_dim": 16}} | PARTS["vision_config"]
    },
    "fast_vlm": {
        "vision_config": {"model_type": "resnet", "hidden_size": 16, "embedding_size": 16}
        | {"hidden_sizes": [16], "depths": [1], "layer_type": "basic"}
    },
}
# What an image is to families that take it in a form of their own: the shape of random numbers, or integers.
INPUTS = {
    "minicpm_ocr minicpmv4_6 minicpmv4_7": {"pixel_values": (1, 3, 14, 14 * 64), "target_sizes": [[8, 8]]},
    "kimi_k25 paddleocr_vl": {"pixel_values": (64, 3, 14, 14), "image_grid_thw": [[1, 8, 8]]},
    "nemotron_h_omni": {"pixel_values": (64, 3 * 14 * 14), "image_grid_hw": [[8, 8]]},
    "molmo2": {
        "pixel_values": (1, 16, 3 * 14 * 14),
        "image_token_pooling": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
        "image_grids": [[2, 2, 0, 0]],
        "image_num_crops": [1],
    },
    "kosmos-2.5": {"flattened_patches": (1, 16, 2 + 3 * 16 * 16)},  # row and column in front
    "chameleon fast_vlm": {"pixel_values": (1, 3, 16, 16)},
    "perception_lm": {"pixel_values": (1, 1, 3, PIXELS, PIXELS)},
    "emu3": {"pixel_values": (1, 3, 16, 16), "image_sizes": [[16, 16]]},
    "apertus1p5": {"pixel_values": (1, 3, 8, 8), "image_sizes": [[8, 8]]},
    "fuyu": {"pixel_values": (1, 16, 3 * 14 * 14)},
    "gemma4_unified": {"pixel_values": (1, 16, 3 * 14 * 14), "image_position_ids": [PLACES]},
    "deepseek_vl_hybrid": {"pixel_values": (1, 3, PIXELS, PIXELS), "high_res_pixel_values": (1, 3, PIXELS, PIXELS)},
}
