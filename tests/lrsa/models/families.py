"""Which families and variants the sweep judges, and what it cannot."""

from __future__ import annotations

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.lrsa.models.build import SLIDES, WINDOW, fields_of

# Configurations of a family that its default does not show.
SHARING = {"num_kv_shared_layers": 2, "layer_types": SLIDES, "sliding_window": WINDOW}
SLIDING = {"layer_types": SLIDES, "sliding_window": WINDOW}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
SPECIAL = [
    ("falcon", "ALiBi", {"alibi": True}),
    ("falcon", "grouped heads", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", "one KV head", {"multi_query": True}),
    ("gemma3n_text", "no shared layers", SHARING | {"num_kv_shared_layers": 0}),
    ("gemma4_text", "shared layers", SHARING),
    (
        "gemma4_text",
        "experts, keys as values",
        SLIDING
        | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16}
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    ("gemma3_text", "bidirectional", SLIDING | {"use_bidirectional_attention": True}),
    ("gemma3_text", "soft cap", SLIDING | {"attn_logit_softcapping": 20.0}),
    ("gemma2", "soft cap", SLIDING | {"attn_logit_softcapping": 2.0}),
    ("vaultgemma", "soft cap", SLIDING | {"attn_logit_softcapping": 2.0}),
    ("gpt2", "scores scaled by layer", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", "scores not scaled", {"scale_attn_weights": False}),
    ("gpt_bigcode", "a KV head per head", {"multi_query": False}),
    ("gpt_neo", "local layers", {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW}),
    ("llama4_text", "all layers full", {"layer_types": ["full_attention"] * 4}),
    ("llama4_text", "scaled by position", {"floor_scale": 16}),
    ("smollm3", "layers without RoPE", {"no_rope_layer_interval": 2}),
    ("laguna", "heads by layer", SLIDING | {"num_attention_heads_per_layer": [4, 8, 4, 8]}),
    ("llama", "is_causal=False", {"is_causal": False}),
    ("jamba", "all attention", {"attn_layer_period": 1, "attn_layer_offset": 0}),
    ("granitemoehybrid", "all attention", {"layer_types": ["full_attention"] * 4}),
    ("lfm2", "all attention", {"layer_types": ["full_attention"] * 4}),
    ("bert", "no decoder", {"is_decoder": False}),
    ("modernbert-decoder", "sliding", {"local_attention": WINDOW}),
    ("moshi", "sliding", {"sliding_window": WINDOW}),
    ("glm4_moe_lite", "keys as wide as values", {"qk_nope_head_dim": 4}),
    ("deepseek_v3", "keys as wide as values", {"qk_nope_head_dim": 4}),
    (
        "phi3",
        "longrope",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 64},
        },
    ),
    ("llama", "dynamic NTK", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
]
# Variants of a model for text and images: with text alone, and with an image among its tokens.
TEXT, IMAGE = "text alone", "an image"
# Encoders and decoders, a classifier, and models without an image, in the mapping for text and images.
NOT_DECODERS = [
    "blip",
    "blip-2",
    "diffusion_gemma",
    "evolla",
    "florence2",
    "git",
    "instructblip",
    "instructblipvideo",
    "mistral4",
    "pi0",
    "pix2struct",
    "pp_formulanet",
    "shieldgemma2",
    "t5gemma2",
    "udop",
    "vision-encoder-decoder",
]
# What cannot be judged with transformers 5.24, and why; whatever else cannot makes the command exit 1.
UNJUDGED = {
    ("llama4", IMAGE): "its forward reads image_outputs of a result without them: it fails in transformers itself",
}
NOT_SLIDING = {"lfm3", "zaya", "deepseek_v4", "minimax"}  # these have their own kinds of layers


def cases() -> list[tuple[str, str, dict]]:
    """Family, what is special about the configuration, and its options."""
    found = [(family, "", {}) for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    own = {family for family, *_ in SPECIAL}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        fields = fields_of(CONFIG_MAPPING[family])
        if {"sliding_window", "layer_types"} <= fields and family not in own | NOT_SLIDING:
            options = SLIDING | ({"use_sliding_window": True} if "use_sliding_window" in fields else {})
            found.append((family, "sliding", options))
    seeing = [family for family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if family not in NOT_DECODERS]
    found += [(family, TEXT, {}) for family in seeing if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    found += [(family, IMAGE, {}) for family in seeing]
    return sorted(found + SPECIAL, key=lambda case: case[0])
