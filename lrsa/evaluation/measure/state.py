"""Which model is measured: adapters that are switched on for a while, and everything put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedModel

from lrsa.config import LRSAConfig
from lrsa.hf import NAME, apply_lrsa, config_of, is_applied, remove_lrsa

if TYPE_CHECKING:
    from peft import PeftModel


class Variant(NamedTuple):
    """One of several models that share the weights of a single `PeftModel`.

    Attributes:
        model: the PEFT model that carries the adapters, or a model without any.
        adapter: name of the adapter to switch on; `None` switches all of them off, which is the base model.
        config: settings in place of those that all are measured with: another lag, or another choice of tokens (one of
            `CONTROLS`); the keep ratio is that of each measurement.
    """

    model: PeftModel | PreTrainedModel
    adapter: str | None
    config: LRSAConfig | None = None


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside; adapters act in its layers, so calling it is calling the adapted model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def active_config(model: PreTrainedModel | PeftModel) -> LRSAConfig | None:
    """The LRSA settings that the model runs with, `None` when its attention is dense."""
    lm = causal_lm(model)
    return config_of(lm) if is_applied(lm) else None


@contextmanager
def in_eval_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """`model.eval()` without gradients; afterwards every module has its own training flag again, also on error."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def with_adapter(variant: Variant) -> Iterator[None]:
    """Switch the variant's adapter on, or all off, if there can be any; then make active and trainable what was."""
    model, adapter, _ = variant
    if not hasattr(model, "peft_config"):
        yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active, enabled = model.active_adapter, model.get_model_status().enabled
    try:
        if adapter is None:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(adapter)
        yield
    finally:
        model.base_model.set_adapter(active)
        model.active_adapter = active
        if enabled:
            model.base_model.enable_adapter_layers()
        else:
            model.base_model.disable_adapter_layers()
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


@contextmanager
def with_attention(model: PreTrainedModel | PeftModel, config: LRSAConfig | None) -> Iterator[None]:
    """Run under these LRSA settings, or dense when `None`; afterwards the attention is what it was, also on error.

    The implementation is the model's: what `apply_lrsa` was given, or `lrsa_impl` of a model that is dense.
    """
    before = active_config(model)
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    lm = causal_lm(model)
    impls = {module.lrsa_impl for module in lm.modules() if module is not lm and hasattr(module, "lrsa_impl")}
    impl = impls.pop() if len(impls) == 1 else getattr(lm, "lrsa_impl", "auto")
    carried = [(found, found.lrsa) for found in configs if hasattr(found, NAME)]  # also by a model that runs dense
    try:
        _attend(model, config, impl)
        yield
    finally:
        _attend(model, before, impl)
        lm.lrsa_impl = impl
        for found, settings in carried:
            found.lrsa = settings


def _attend(model, config: LRSAConfig | None, impl: str) -> None:
    if config is None:
        remove_lrsa(model)
    else:
        apply_lrsa(model, config, impl)
