"""Tiny models for text and images, and a row of text around an image for each."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tests.lrsa.models.build import build_config, config_of
from tests.lrsa.models.subject import KINDS_OF_TOKENS, LENGTH, Subject

PIXELS = 56  # height and width of an image: 16 patches of 14

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
HALF_MROPE = {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}
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
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "idefics2": {"perceiver_config": {"resampler_n_latents": 8}},
    "paligemma": {"projection_dim": 32},
    "vipllava": {"vision_feature_layers": [-1]},
    "ernie4_5_vl_moe": {"text_config": MROPE | {"moe_intermediate_size": [16, 16]}},
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a family for text and images, in fp64, with eager attention and experts."""
    options = next((options for names, options in OVERRIDES.items() if family in names.split()), {})
    return build_config(config_of(family, **options), seed, AutoModelForImageTextToText)


def subject_with_an_image(model: PreTrainedModel) -> Subject:
    """A model and what its forward takes: `LENGTH` tokens, those of an image among the first, and the image itself."""
    generator = torch.Generator().manual_seed(3)
    image = _image(model, generator)
    token = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    ids = torch.randint(3, 45, (1, LENGTH), generator=generator)
    tokens = _count(model, image)
    ids[0, 4 : 4 + tokens] = token
    if (start := getattr(model.config, "vision_start_token_id", None)) is not None:
        ids[0, 3] = start
    for name in KINDS_OF_TOKENS:
        if name in inspect.signature(model.forward).parameters:
            image[name] = (ids == token).long()
    return Subject(model, {"input_ids": ids} | image, head=4 + tokens)


def _image(model: PreTrainedModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    vision = model.config.vision_config
    takes = set(inspect.signature(model.forward).parameters)
    patch = getattr(vision, "patch_size", 14)
    channels = next((getattr(vision, n) for n in ("in_channels", "in_chans", "num_channels") if hasattr(vision, n)), 3)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if "image_grid_thw" in takes:
        values = channels * getattr(vision, "temporal_patch_size", 1) * patch**2
        grid = {"image_grid_thw": torch.tensor([[1, 8, 8]])}
        if "image_merge_sizes" in takes:
            grid["image_merge_sizes"] = torch.tensor([2])
        return {"pixel_values": noise(64, values)} | grid
    if "spatial_shapes" in takes:
        shape = {"spatial_shapes": torch.tensor([[8, 8]]), "pixel_attention_mask": torch.ones(1, 64, dtype=torch.long)}
        return {"pixel_values": noise(1, 64, channels * patch**2)} | shape
    if "image_position_ids" in takes:
        places = torch.cartesian_prod(torch.arange(8), torch.arange(8))[None]
        values = 3 * getattr(vision, "model_patch_size", patch) ** 2
        return {"pixel_values": noise(1, 64, values), "image_position_ids": places}
    size = getattr(vision, "image_size", PIXELS)
    size = size if isinstance(size, int) else size[0]
    image = {"pixel_values": noise(1, channels, size, size)}
    if "image_sizes" in inspect.signature(model.get_image_features).parameters:
        image["image_sizes"] = torch.tensor([[size, size]])
    if hasattr(model.config, "image_grid_pinpoints"):  # the whole image and one tile of it
        image["pixel_values"] = noise(1, 2, channels, size, size)
    if "pixel_attention_mask" in takes:
        image["pixel_values"] = image["pixel_values"][None]
    return image


@torch.no_grad()
def _count(model: PreTrainedModel, image: dict[str, torch.Tensor]) -> int:
    """Tokens that an image takes in a row: vectors that its encoder gives."""
    found = model.get_image_features(**image, return_dict=True)
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() for part in parts) // model.config.get_text_config().hidden_size
