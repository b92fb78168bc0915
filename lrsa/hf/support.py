"""Whether a model can run LRSA, found out before anything of it is changed.

What an attention module does with its keys is read from its source: how often it calls its attention, what it hands
over, and what it gives to the cache. All models of transformers write this in one way, which their tests enforce.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lrsa.config import LRSAConfig
from lrsa.hf.layers import ATTENTION

# Kinds of layers in `config.layer_types` beside those that attend.
RECURRENT = {"linear_attention", "conv"}  # their state is kept beside the cache of the others
EMPTY = {"mlp", "moe"}
# Recurrent layers that do not go on from their state over several new tokens, in transformers' own cache neither.
INEXACT = {"jamba", "bamba"}
OWN_CACHE = {"minimax"}

# What a model may ask of its attention that this one does not do: named and refused, never ignored.
REFUSED = {
    "sinks": "computes attention sinks from its tokens, and lrsa takes those that are parameters",
    "position_bias": "adds a bias to its attention scores, which flash kernels cannot",
    "indices": "chooses the tokens that it attends to itself",
    "block_indices": "chooses the tokens that it attends to itself",
    "head_mask": "masks heads",
}


def text_config(model: PreTrainedModel):
    """The configuration of the language model inside a model, which may see and hear besides."""
    return model.config.get_text_config(decoder=True)


def check_model(model: PreTrainedModel, config: LRSAConfig) -> None:
    """Refuse a model that LRSA cannot be applied to.

    Raises:
        ValueError: with the model's class, the reason, and what is supported.
    """
    name, text = type(model).__name__, text_config(model)
    problem = _problem_of_config(text) or _problem(model, text)
    if problem:
        raise ValueError(f"lrsa does not support {name}: {problem}.")
    layers = text.num_hidden_layers
    missing = [layer for layer in config.skip_layers if layer >= layers]
    if missing:
        raise ValueError(f"skip_layers must name layers from 0 to {layers - 1}, got {missing}: the model has {layers}.")


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules of the language model that call an attention of transformers' AttentionInterface."""
    text = text_config(model)
    mine = [module for module in model.modules() if getattr(module, "config", None) is text]
    return [module for module in mine if _source(type(module)) is not None]


def check_named(config: PreTrainedConfig, module: torch.nn.Module | None = None) -> None:
    """Refuse what `check_model` refuses of a model that was loaded with `attn_implementation="lrsa"` alone.

    Args:
        config: as the model gives it to its mask; module: a layer that attends.

    Raises:
        ValueError: with the kind of model, the reason, and what is supported.
    """
    text = config.get_text_config(decoder=True)
    problem = _problem_of_config(text) or (module is not None and _problem_of_module(module))
    if problem:
        raise ValueError(
            f"lrsa does not support this model ({text.model_type}): {problem}. Of a model for text and images, "
            "lrsa.apply_lrsa(model, config) sets the language model alone."
        )


def _problem_of_config(text) -> str:
    kinds = getattr(text, "layer_types", None) or ()
    other = sorted(set(kinds) - ATTENTION - RECURRENT - EMPTY)
    if set(kinds) & RECURRENT and text.model_type in INEXACT:
        return "its recurrent layers do not go on from their state over several tokens, so chunks would differ"
    if text.model_type in OWN_CACHE:
        return "it takes no cache but one of its own class"
    if getattr(text, "number_of_conv_states", 1) > 1:
        other = ["several convolution states"]
    if other:
        return (
            f"it has layers of {', '.join(other)}, which neither its attention nor its cache can hold. Full attention, "
            "sliding windows and recurrent layers are supported"
        )
    if getattr(text, "num_kv_shared_layers", 0) >= getattr(text, "num_hidden_layers", 1):
        return "its layers attend to what the cache of another model holds, and it has no keys of its own"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all") or getattr(text, "is_causal", True) is False:
        return "its tokens see later ones; lrsa is for causal language models"
    return ""


def _problem(model: PreTrainedModel, text) -> str:
    kinds = getattr(text, "layer_types", None) or ()
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is text]
    if not all(owner._can_set_attn_implementation() for owner in owners):
        return (
            "it does not let its attention be chosen. Use a model of transformers whose attention goes through "
            "AttentionInterface"
        )
    modules = attention_modules(model)
    if set(kinds) & RECURRENT and "full_attention" not in kinds:
        modules = []
    causal = [module for module in modules if getattr(module, "is_causal", True) is not False]  # others: across inputs
    if modules and not causal:
        return f"{type(modules[0]).__name__} is not causal; lrsa is for causal language models"
    if not modules or not hasattr(text, "num_hidden_layers"):
        return "no layer of its language model attends through AttentionInterface, so there is nothing to compress"
    if any(hasattr(owner, "_prepare_decoder_attention_mask") for owner in owners):
        return f"{type(causal[0]).__name__} gets an attention mask that its model makes without AttentionMaskInterface"
    return next(filter(None, map(_problem_of_module, causal)), "")


def _problem_of_module(module: torch.nn.Module) -> str:
    name, source = type(module).__name__, _source(type(module))
    if not hasattr(module, "layer_idx"):
        return f"{name} does not know its layer (layer_idx)"
    if getattr(module, "is_causal", True) is False:
        return f"{name} is not causal; lrsa is for causal language models"
    if source.calls > 1:
        return f"{name} attends {source.calls} times in one layer, and a cache would store its tokens as often"
    if source.problem:
        return f"{name} {source.problem}"
    for keyword, attribute in source.keywords:
        if keyword in REFUSED and (attribute is None or getattr(module, attribute, None) is not None):
            return f"{name} {REFUSED[keyword]} ({keyword})"
    return ""


@dataclass(frozen=True)
class Source:
    """What the forward of an attention module says.

    Attributes:
        calls: how often it calls its attention.
        keywords: what it hands over by name, and the attribute of the module that it takes it from (None: it is made).
        problem: what it does with its keys or its mask that an LRSACache cannot follow, as the end of a sentence.
    """

    calls: int
    keywords: tuple[tuple[str, str | None], ...]
    problem: str


@functools.cache
def _source(kind: type) -> Source | None:
    """Read a module's class; None if it calls no attention of AttentionInterface."""
    try:
        forward = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body[0]
    except (OSError, TypeError, AttributeError, SyntaxError):
        return None
    assigns = [node for node in ast.walk(forward) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    names = {name for node in assigns if "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node) for name in _targets(node)}
    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    if not calls:
        return None
    keywords = tuple((word.arg, _attribute(word.value)) for call in calls for word in call.keywords if word.arg)
    return Source(len(calls), keywords, _problem_of_source(forward, calls[0], assigns))


def _problem_of_source(forward: ast.FunctionDef, call: ast.Call, assigns: list) -> str:
    arguments = [ast.unparse(argument) for argument in call.args]
    arguments += [ast.unparse(word.value) for word in call.keywords if word.arg == "attention_mask"]
    key, value, mask = arguments[2:5]
    expanding = [node for node in assigns if _targets(node) == [key, value] and _calls(node, "self.expand_kv")]
    fixed = {key, value} if expanding else {key}
    if expanding:  # what keys and values are expanded from is what is stored, and what the attention is given
        key, value = [ast.unparse(argument) for argument in expanding[0].value.args]
        fixed |= {key, value}
    if mask not in {argument.arg for argument in forward.args.args + forward.args.kwonlyargs}:
        return "makes an attention mask of its own"
    updates = [node for node in assigns if _calls(node, ".update") and node.value.args[2:]]
    for update in updates:
        stored = [ast.unparse(argument) for argument in update.value.args]
        if stored[:2] != [key, value] or _targets(update) != [key, value]:
            return "stores something else than its keys and values in its cache (latent states)"
        if stored[2] != "self.layer_idx":
            return "has a cache index of its own"
        between = [node for node in assigns if update.lineno < node.lineno < call.lineno]
        if any(fixed & set(_targets(node)) for node in between if node not in expanding):
            return "changes its keys after they were stored in its cache"
    return ""


def _calls(node: ast.Assign | ast.AnnAssign, name: str) -> bool:
    return isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith(name)


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [ast.unparse(part) for part in flat]


def _attribute(value: ast.expr) -> str | None:
    is_attribute = isinstance(value, ast.Attribute) and ast.unparse(value.value) == "self"
    return value.attr if is_attribute else None
