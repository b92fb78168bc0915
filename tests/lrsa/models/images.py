"""Tiny models for text and images, and a row of text around an image for each."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModel, AutoModelForImageTextToText, Gemma3nVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from tests.lrsa.models.build import build_config, config_of
from tests.lrsa.models.parts import INPUTS, OVERRIDES, PIXELS, PLACES
from tests.lrsa.models.subject import KINDS_OF_TOKENS, LENGTH, Subject

STAND_INS = {"gemma3n", "perception_lm", "fast_vlm"}  # their encoders of images are timm's, which need torchvision


class Patches(PreTrainedModel):
    """An encoder of images for Gemma 3n: one convolution."""

    config_class = Gemma3nVisionConfig

    def __init__(self, config: Gemma3nVisionConfig):
        super().__init__(config)
        self.patches = torch.nn.Conv2d(3, config.hidden_size, 14, 14)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **options) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.patches(pixel_values))


AutoModel.register(Gemma3nVisionConfig, Patches, exist_ok=True)


def _of(table: dict, family: str) -> dict:
    return next((entry for names, entry in table.items() if family in names.split()), {})


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a family for text and images, in fp64, with eager attention and experts."""
    return build_config(config_of(family, **_of(OVERRIDES, family)), seed, AutoModelForImageTextToText)


def subject_with_an_image(model: PreTrainedModel) -> Subject:
    """A model and what its forward takes: `LENGTH` tokens or more, those of an image among the first, and the image."""
    generator = torch.Generator().manual_seed(3)
    image = _image(model, generator)
    tokens = _count(model, image)
    ids = torch.randint(3, 45, (1, max(LENGTH, tokens + 40)), generator=generator)
    ids[0, 4 : 4 + tokens] = token = 50
    if (start := getattr(model.config, "vision_start_token_id", None)) is not None:
        ids[0, 3] = start
    for name in KINDS_OF_TOKENS:
        if name in inspect.signature(model.forward).parameters:
            image[name] = (ids == token).long()
    return Subject(model, {"input_ids": ids} | image, head=5 + tokens)


def _image(model: PreTrainedModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    takes = set(inspect.signature(model.forward).parameters)
    vision = getattr(model.config, "vision_config", model.config)
    patch = getattr(vision, "patch_size", 14)
    channels = next((getattr(vision, n) for n in ("in_channels", "in_chans", "num_channels") if hasattr(vision, n)), 3)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if own := _of(INPUTS, model.config.model_type):
        image = {name: torch.tensor(x) if isinstance(x, list) else noise(*x) for name, x in own.items()}
        if "flattened_patches" in image:
            image["flattened_patches"][0, :, :2] = torch.tensor(PLACES)
        return image
    if "image_grid_thw" in takes:
        values = channels * getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1)) * patch**2
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
    if "image_sizes" in inspect.signature(_owner(model).get_image_features).parameters:
        image["image_sizes"] = torch.tensor([[size, size]])
    if hasattr(model.config, "image_grid_pinpoints"):  # the whole image and one tile of it
        image["pixel_values"] = noise(1, 2, channels, size, size)
    if "pixel_attention_mask" in takes:
        image["pixel_values"] = image["pixel_values"][None]
    if "tile_fine_mask" in takes:
        image["pixel_attention_mask"] = torch.ones(1, 1, dtype=torch.bool)
    return image


def _owner(model: PreTrainedModel) -> PreTrainedModel:
    return model if hasattr(model, "get_image_features") else model.model


@torch.no_grad()
def _count(model: PreTrainedModel, image: dict[str, torch.Tensor]) -> int:
    """Tokens that an image takes in a row: vectors that its encoder gives."""
    found = _owner(model).get_image_features(**image, return_dict=True)
    pooled = getattr(found, "pooler_output", found)
    if pooled is None:
        deep = getattr(found, "deepstack_features", None)
        pooled = deep[0][1] if deep else found.last_hidden_state
    parts = pooled if isinstance(pooled, (list, tuple)) else [pooled]
    return sum(part.numel() for part in parts) // model.config.get_text_config().hidden_size
