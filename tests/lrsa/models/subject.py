"""A model without LRSA, a row of tokens, perhaps with an image, and what the model must give for it under LRSA."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lrsa import LRSAConfig, apply_lrsa
from tests.lrsa.models.oracle import oracle

CONFIG = LRSAConfig(sink_size=3, lag_size=8, top_k=2)
LENGTH = 60
KINDS_OF_TOKENS = ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask")


class Subject:
    """Every check works on a copy of the model.

    Attributes:
        own: logits of the model's own attention over `ids`; expected: those of the oracle.
        kinds: what the attention calls of the oracle were.
        image: what the forward takes besides the tokens; head: tokens up to the first behind the image, 1 without one.
        pads: whether the model itself gives a padded row what it gives the row alone.
    """

    def __init__(self, model: PreTrainedModel, row: dict[str, torch.Tensor] | None = None, head: int = 1):
        self.model, self.head = model, head
        tokens = torch.randint(3, 45, (1, LENGTH), generator=torch.Generator().manual_seed(3))
        self.image = dict(row or {"input_ids": tokens})
        self.ids = self.image.pop("input_ids")
        self.length = self.ids.shape[1]
        self.pads = True
        self.exact = next(model.parameters()).dtype == torch.float64
        with oracle(model, None), torch.no_grad():
            self.own = logits(model, self.ids, **self.image)
        with oracle(model, CONFIG) as self.kinds, torch.no_grad():
            self.expected = logits(model, self.ids, **self.image)

    def applied(self) -> PreTrainedModel:
        return apply_lrsa(copy.deepcopy(self.model), CONFIG)

    def dense(self) -> PreTrainedModel:
        """The model on SDPA where it can: in fp64 eager attention gives NaN for padding on the left."""
        model = copy.deepcopy(self.model)
        if model._supports_sdpa:
            model.config.get_text_config(decoder=True)._attn_implementation_internal = "sdpa"
        return model

    def inputs(self, length: int, pads: int = 0) -> dict[str, torch.Tensor]:
        """The first tokens of the row behind so many of padding, with the image; longer than the row: more padding."""
        sizes = (pads, length - self.length)
        row = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        row |= {name: self.image[name] for name in KINDS_OF_TOKENS if name in self.image}
        return self.image | {name: F.pad(value, sizes) for name, value in row.items()}

    def batch(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rows of one length as one batch; images of all rows in one strip where a model takes them so."""
        strip = {"pixel_values": -1} if "target_sizes" in self.image else {}
        return {name: torch.cat([row[name] for row in rows], strip.get(name, 0)) for name in rows[0]}

    def close(self, found: torch.Tensor, expected: torch.Tensor, own_error: float = 0.0) -> None:
        """Equal to rounding, or as far off as the model is without LRSA (recurrences that compute in fp32)."""
        scale = max(float(expected.abs().max()), 1e-3)
        allowed = scale * max(3e-6 if self.exact else 1e-3, 10 * min(own_error, 1e-3))
        error = float((found - expected).detach().abs().max())
        assert error <= allowed, f"differs by {error:.1e} of {scale:.1f}"

    def own_error(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).detach().abs().max()) / max(float(expected.abs().max()), 1e-3)


def fails_alike(failure: Exception, own: Callable[[], object]) -> bool:
    """Whether the model without LRSA fails by the same error."""
    try:
        own()
    except Exception as error:
        return (type(error), str(error)) == (type(failure), str(failure))
    return False


def logits(model, input_ids: torch.Tensor, **options) -> torch.Tensor:
    return shown(model(input_ids=input_ids, use_cache=False, **options).logits)


def shown(logits: torch.Tensor) -> torch.Tensor:
    """0 for logits of tokens that a model never generates, next to whose size no error would show."""
    return logits.masked_fill(logits <= torch.finfo(torch.float32).min, 0.0)
