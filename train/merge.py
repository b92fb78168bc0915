"""An adapter merged into its base model: checked against the adapter's own logits, a folder that loads in one line."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import GenerationConfig, PreTrainedModel

import lrsa
from lrsa.hf import set_config
from lrsa.loading import Loaded
from train.model import embedding_count
from train.publish.model_card import CARD_NAME, TAGS, USE, hub_id
from train.resume.checkpoints import replace_text
from train.settings.errors import Problem, SettingsError

TOKENS = 256  # of the check, of random text
FACTOR, EPSILON = 4, 1e-4  # of the adapter's own rounding error, and what fp32 is allowed

ABOUT = """\
# {name}

{base} with the LoRA adapter {adapter} merged into its weights, in {dtype}. It was trained under
[Lag-Relative Sparse Attention](https://arxiv.org/abs/2506.11498) to work with a compressed KV cache: of a long context,
every KV head keeps the first {sink_size} tokens, {top_k} of each older window of {lag_size} tokens ({keep_ratio:.1%}),
and the last one to two windows completely.

The logits of {tokens} random tokens with the full cache differ from the adapter's in float32 by {error:.2g} of their
size (root mean square); the adapter itself, in {dtype}, by {budget:.2g}.

## Use

{use}
"""


def merge(adapter: str, out: Path, dtype: str = "auto", base_model: str | None = None) -> tuple[float, float]:
    """Merge an adapter into its base model and write the model, its tokenizer, compression, prompt format and card.

    Args:
        adapter: directory or Hub id of an adapter that was trained with lrsa.
        out: the folder to write, new or empty.
        dtype: of the merged weights; auto: that of the base model. They are added in fp32.
        base_model: as `lrsa.load` takes it.

    Returns:
        how far the logits of the merged model, and of the adapter beside its base in the same dtype, are from those of
        the adapter in fp32: the root mean square of the difference divided by that of the logits.

    Raises:
        SettingsError: when there is no such adapter, it cannot be merged, `out` holds files, or the merged model's
            logits are not the adapter's.
    """
    if out.exists() and any(out.iterdir()):
        raise SettingsError([Problem("--out", str(out), "already holds files: choose another folder, or empty it")])
    beside = _load(adapter, dtype, base_model)
    base = beside.model.get_base_model()
    dtype, name = base.dtype, base.config.name_or_path
    ids = torch.randint(embedding_count(base), (1, TOKENS), generator=torch.Generator().manual_seed(0))
    rounded = _logits(beside.model, ids)
    del beside, base
    gc.collect()
    exact = _load(adapter, "float32", base_model)
    truth, config = _logits(exact.model, ids), exact.model.get_base_model().config.lrsa
    merged = exact.model.merge_and_unload(safe_merge=True)
    set_config(merged, config)
    drop_unused_sampling(merged.generation_config)
    merged.to(dtype).save_pretrained(out)
    exact.tokenizer.save_pretrained(out)
    config.save_pretrained(out)
    if (prompt := lrsa.PromptFormat.from_pretrained(adapter)) is not None:
        prompt.save_pretrained(out)
    del exact, merged
    gc.collect()
    loaded = lrsa.load(out)
    error, budget = (_distance(logits, truth) for logits in (_logits(loaded.model, ids), rounded))
    if loaded.model.config.lrsa != config or not error <= max(FACTOR * budget, EPSILON):
        text = (
            f"the merged model's logits differ from the adapter's by {error:.2g} of their size, where rounding to "
            f"{dtype} explains {budget:.2g}: do not use {out}"
        )
        raise SettingsError([Problem("--adapter", adapter, text)])
    _save_card(out, adapter, base_model or name, dtype, config, error, budget)
    return error, budget


def drop_unused_sampling(config: GenerationConfig) -> None:
    """Take sampling settings out of a greedy configuration: they do nothing, but it could not be saved with them."""
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        if not config.do_sample and hasattr(config, name):
            setattr(config, name, None)


def _load(adapter: str, dtype: str, base_model: str | None) -> Loaded:
    try:
        loaded = lrsa.load(adapter, base_model=base_model, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError([Problem("--adapter", adapter, str(error))]) from error
    if not hasattr(loaded.model, "peft_config"):
        raise SettingsError([Problem("--adapter", adapter, "is a model, not an adapter: there is nothing to merge")])
    if getattr(loaded.model.get_base_model(), "quantization_method", None) is not None:
        text = "its base model is stored quantised, where merging would round the adapter away: give the full one"
        raise SettingsError([Problem("--adapter", adapter, f"{text} with --base-model")])
    return loaded


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """With the full cache: which tokens a compressed one keeps may flip when weights are rounded."""
    config = getattr(model, "get_base_model", lambda: model)().config.lrsa
    set_config(model, config.full())
    with torch.no_grad():
        logits = model(ids.to(model.device), use_cache=False).logits.float().cpu()
    set_config(model, config)
    return logits


def _distance(logits: torch.Tensor, truth: torch.Tensor) -> float:
    return ((logits - truth).square().mean() / truth.square().mean()).sqrt().item()


def _save_card(out: Path, adapter: str, base: str, dtype: torch.dtype, config, error: float, budget: float) -> None:
    """The card; local places are named by their last name."""
    data = ModelCardData(
        base_model=None if Path(base).exists() else hub_id(base), tags=[*TAGS[:-1], "merged"],
        library_name="transformers", pipeline_tag="text-generation",
    )  # fmt: skip
    names = {key: f"`{Path(place).name if Path(place).exists() else place}`" for key, place in
             (("base", base), ("adapter", adapter))}  # fmt: skip
    use = USE.format(source=f'"{out.name}"', prompt='"Once upon a time"').replace("lrsa peft", "lrsa")
    text = ABOUT.format(
        name=out.name, dtype=str(dtype).removeprefix("torch."), tokens=TOKENS, error=error, budget=budget, use=use,
        keep_ratio=config.keep_ratio, **names, **config,
    )  # fmt: skip
    replace_text(out / CARD_NAME, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")))
