"""Where latent attention (MLA) of transformers is met: its modules expand latents into keys and values themselves.

Each has a method `expand_kv`, which it calls behind its cache and in front of its attention. Under the attention "lrsa"
the method hands the latents on as they are, and the attention expands those that it attends to.
"""

from __future__ import annotations

import functools
import sys

import torch
from transformers import PreTrainedConfig

from lrsa.hf.layers import NAME
from lrsa.latent import Expand


@torch.compiler.disable
@functools.cache
def hand_latents_on(config: type[PreTrainedConfig]) -> None:
    """Let the attention modules of a model, which has been made of such a configuration, hand their latents on.

    It is done to the classes of all models that are loaded, because one that was loaded by the name "lrsa" never meets
    `apply_lrsa`; modules under any other attention do what they did.
    """
    modelling = [module for name, module in list(sys.modules.items()) if ".modeling_" in name]
    for kind in {kind for module in modelling for kind in vars(module).values() if isinstance(kind, type)}:
        if "expand_kv" in vars(kind) and not hasattr(kind.expand_kv, "before_lrsa"):
            kind.expand_kv = _handing_on(kind.expand_kv)


def _handing_on(own):
    @functools.wraps(own)
    def expand_kv(self, c_kv: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (c_kv, k_rope) if self.config._attn_implementation == NAME else own(self, c_kv, k_rope)

    expand_kv.before_lrsa = own
    return expand_kv


def has_latents(model: torch.nn.Module) -> bool:
    """Whether a model's cache holds latents, which its attention modules expand."""
    return any(hasattr(module, "expand_kv") for module in model.modules())


def expansion(module: torch.nn.Module) -> Expand | None:
    """What expands the latents that an attention module hands on; None if it hands on keys and values.

    Raises:
        ValueError: when it has expanded them itself.
    """
    method = getattr(type(module), "expand_kv", None)
    if method is None:
        return None
    if not hasattr(method, "before_lrsa"):
        raise ValueError(
            f"lrsa selects tokens by the latent states of {type(module).__name__}, which it has not handed on: let the "
            "model make its attention mask (pass a 2D attention_mask, or none)."
        )
    return functools.partial(method.before_lrsa, module)
