"""Tiny random models of every family of transformers, large enough in their weights for attention to matter."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MusicgenForCausalLM,
    MusicgenMelodyForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.lrsa.models.parts import PARTS

WINDOW = 12
LARGEST = 12_000_000  # parameters: more means that a field below does not make this family tiny

# What a field of a configuration becomes wherever it occurs, by value.
VALUES = [
    (64, "vocab_size vocab_size_per_layer_input n_words mamba_d_ssm shape_vocab_size pronunciation_vocab_size"),
    (
        48,
        "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size intermediate_size_mlp "
        "shared_intermediate_size",
    ),
    (32, "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim rel_extent dim_ff dim_model"),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank kv_lora_rank "
        "mamba_chunk_size chunk_size index_topk attention_chunk_size indexer_budget shared_experts_intermediate_size",
    ),
    (
        8,
        "head_dim v_head_dim state_size mamba_d_state mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim "
        "ssm_state_size linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim indexer_head_dim "
        "d_rel hidden_size_per_layer_input hc_lowrank pronunciation_embed_dim shape_embed_dim kv_channels dim_head",
    ),
    (
        4,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head n_heads num_heads "
        "decoder_attention_heads encoder_layers encoder_attention_heads attention_heads qk_rope_head_dim "
        "qk_nope_head_dim rotary_dim num_experts num_local_experts n_routed_experts moe_num_experts "
        "linear_num_value_heads linear_num_heads "
        "indexer_compress_ratio laurel_rank",
    ),
    (
        2,
        "eos_token_id num_key_value_heads num_experts_per_tok type_vocab_size mamba_expand expand moe_k moe_topk "
        "linear_num_key_heads index_n_heads indexer_n_heads",
    ),
    (
        1,
        "bos_token_id n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group mamba_n_groups "
        "n_groups mamba_ngroups first_k_dense_replace indexer_kv_heads",
    ),
    (24, "local_attention"),
    (50, "image_token_id image_token_index"),
    (51, "video_token_id video_token_index"),
    (52, "vision_start_token_id image_start_token_id boi_token_id"),
    (53, "vision_end_token_id image_end_token_id eoi_token_id"),
    (54, "audio_token_id audio_token_index"),
    (0, "pad_token_id num_mtp_layers"),
    (
        0.0,
        "hidden_dropout attention_dropout attn_pdrop resid_pdrop embd_pdrop dropout activation_dropout "
        "hidden_dropout_prob attention_probs_dropout_prob residual_dropout embedding_dropout layerdrop "
        "decoder_layerdrop router_jitter_noise input_jitter_noise",
    ),
    (0.3, "initializer_range init_std"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (True, "is_decoder use_cache"),
    (False, "use_mamba_kernels tie_word_embeddings"),
]
SMALL = {name: value for value, names in VALUES for name in names.split()}

SLIDES = ["sliding_attention", "full_attention"] * 2
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONV = {"layer_types": ["conv", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4, "head_dim": 4, "qk_nope_head_dim": 8}
SHARED = {"num_kv_shared_layers": 2, "layer_types": SLIDES, "sliding_window": WINDOW}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
ROPE_BY_KIND = {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}
SLIDING_HEADS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
BRANCHES = {"swa_qk_nope_head_dim": 4, "swa_v_head_dim": 8, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16}

# What else it takes to build a family.
OVERRIDES = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "sarvam_mla",
            "youtu",
            "hy_v4",
        ],
        LATENT,
    ),
    **dict.fromkeys(
        ["granitemoehybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "minimax"],
        LINEAR,
    ),
    **dict.fromkeys(["lfm2", "lfm2_moe", "lfm3"], CONV),
    **dict.fromkeys(["inkling_text", "inkling2_text", "inkling2_loop_text"], SLIDING_HEADS),
    "kimi_linear": LATENT | LINEAR,
    "bailing_hybrid": LATENT | LINEAR,
    "longcat_flash": LATENT | {"num_layers": 2, "zero_expert_num": 1},
    "dots3_note_text": LATENT
    | SLIDING_HEADS
    | BRANCHES
    | {"use_sliding_window": False, "use_dsa": False, "swa_num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"]},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
    },
    "mamba2": {"num_heads": 8},
    "rwkv": {"attention_hidden_size": 32},
    "gemma3n_text": SHARED,
    "gemma4_text": {"layer_types": SLIDES, "sliding_window": WINDOW},
    "gemma4_unified_text": {"layer_types": SLIDES, "sliding_window": WINDOW},
    "cohere_compass_text": {"layer_types": SLIDES, "sliding_window": WINDOW, "rope_parameters": ROPE_BY_KIND},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "gpt_neo": {"attention_types": [[["global"], 4]]},
    "falcon": {"new_decoder_architecture": False, "alibi": False, "multi_query": False},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "qwen4_exp_text": {"rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.5}},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "xlm": {"causal": True},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    "granitemoe": {"attention_multiplier": 0.2},
    "stablelm": {"qk_layernorm": True},
    **{family: {"sliding_window": 512} for family in ("granite_swa", "granitemoe_swa", "mimo_v2_flash")},
    "gpt_oss": {"rope_parameters": PLAIN_ROPE, "sliding_window": 512},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "num_hidden_layers": 4, "num_kv_shared_layers": 4}
        | {"hidden_size": 32, "vocab_size": 64, "layer_types": SLIDES}
        | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "moshi": {"audio_vocab_size": 64},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "chunk_size": 16},
    "reformer": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "attn_layers": ["local"] * 4,
        "feed_forward_size": 48,
    },
}
# These compute some of their parts in fp32 whatever they are given.
SINGLE = {"inkling2_text", "inkling2_loop_text", "xglm", "dory", "granite_swa", "granitemoe_swa", "kosmos-2"}
# transformers maps these names to configurations that the classes of their causal LMs do not take.
DECODERS = {"musicgen": MusicgenForCausalLM, "musicgen_melody": MusicgenMelodyForCausalLM}
for _kind in DECODERS.values():
    AutoModelForCausalLM.register(_kind.config_class, _kind, exist_ok=True)


def fields_of(kind: type[PreTrainedConfig]) -> set[str]:
    """Names that a configuration class takes."""
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(inspect.signature(kind.__init__).parameters)


def config_of(family: str, **options) -> PreTrainedConfig:
    """A tiny configuration of a family (its `model_type`); options on top of what the tables above say."""
    kind = DECODERS[family].config_class if family in DECODERS else CONFIG_MAPPING[family]
    return _config(kind, OVERRIDES.get(family, {}) | options)


def _config(kind: type[PreTrainedConfig], options: dict) -> PreTrainedConfig:
    fields = fields_of(kind)
    values = {name: value for name, value in SMALL.items() if name in fields}
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        given = options.get(name, {})
        if "model_type" in given:
            continue
        if part is AutoConfig:
            part = type(getattr(kind(), name, None))
        if not issubclass(part, PreTrainedConfig):
            continue
        mine = PARTS.get(name, {}) if name != "text_config" else OVERRIDES.get(part.model_type, {})
        mine = {key: value for key, value in mine.items() if key in fields_of(part)}
        values[name] = _config(part, mine | given).to_dict()
        options = {key: value for key, value in options.items() if key != name}
    return kind(**values | options)


def build(family: str, seed: int = 0, **options) -> PreTrainedModel:
    """A tiny random causal LM of a family, in fp64, with eager attention and experts.

    Raises:
        ValueError: when the family stays large.
    """
    return build_config(config_of(family, **options), seed)


def build_config(config: PreTrainedConfig, seed: int = 0, auto: type = AutoModelForCausalLM) -> PreTrainedModel:
    """A model of a configuration, its weights made random where transformers sets them to constants."""
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"a tiny {config.model_type} has {size:,} parameters: add its fields to the tables above.")
    torch.manual_seed(seed)
    try:
        model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager")
    except (TypeError, ValueError) as error:
        if "experts" not in str(error):
            raise
        model = auto.from_config(config, attn_implementation="eager")
    _randomise(model)
    return (model if config.model_type in SINGLE else model.double()).eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)

    def noise(parameter, scale):
        return torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale

    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if not torch.isfinite(parameter).all():
            parameter.copy_(noise(parameter, 0.3))
        first = parameter.flatten()[0]
        if (parameter == first).all():  # norms, biases, sinks
            parameter.add_(noise(parameter, 0.3 if first == 0 else 0.1))
        elif parameter.dim() > 1 and parameter.std() < 0.1 and "position" not in name and "wpe" not in name:
            parameter.mul_(0.3 / max(float(parameter.std()), 1e-6))
    for buffer in model.buffers():
        if buffer.is_floating_point() and not torch.isfinite(buffer).all():
            buffer.zero_()
