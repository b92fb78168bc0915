"""lm-evaluation-harness over the compressed cache: its model type "lrsa", and its command line with that type in it.

    python -m lrsa.evaluation.harness run --model lrsa --model_args pretrained=runs/qa --tasks niah_single_1 \
        --metadata '{"tokenizer": "runs/qa", "max_seq_lengths": [4096]}' --batch_size 8

Everything behind `--model_args` is `LRSALM`'s; all else is lm_eval's own command line, which knows no plug-ins, so that
a model type has to be imported to be there. In Python: `lm_eval.simple_evaluate(LRSALM("runs/qa"), tasks=[...])`.

Generation runs over a new `LRSACache` for every batch. Log-likelihoods need no cache: in one forward under the
attention "lrsa" every token sees exactly what the cache would still hold, so that the numbers are those of prompt and
continuation fed to the cache in chunks of any size. Needs `pip install "lrsa[harness]"`.
"""

from __future__ import annotations

import os
from dataclasses import fields

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype

import lrsa
from lrsa.cache import CACHE_ARGUMENT
from lrsa.config import LRSAConfig
from lrsa.prompt import conversation_prompt

CACHES = ("compressed", "full")
SETTINGS = tuple(field.name for field in fields(LRSAConfig))
# What HFLM does once it has a model; everything else an argument can say is about loading one, which is ours.
MEASURING = (
    "tokenizer", "truncation", "logits_cache", "max_length", "softmax_dtype", "mixed_precision_dtype", "batch_size",
    "max_batch_size", "add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip


@register_model("lrsa")
class LRSALM(HFLM):
    """A model under LRSA for lm-evaluation-harness.

    Args:
        pretrained: what `lrsa.load` takes: an adapter trained with lrsa, a merged model, or any model with settings.
        cache: `"compressed"`, or `"full"`: dense attention over the model's own cache.
        keep_ratio: share of each window to keep, in place of the stored one.
        device: where the model runs, unless `device_map` says so; a GPU if there is one.
        dtype: of the weights, `"auto"`: as they are stored.
        options: `LRSAConfig`'s fields, in place of the stored settings (those not given are its defaults); HFLM's own
            `batch_size`, `max_length`, `tokenizer` and the like; the rest goes to `from_pretrained` (`revision`, ...).

    Raises:
        ValueError: when an option cannot be used, or the model has no settings.
        TypeError: when no one knows an option.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        cache: str = "compressed",
        keep_ratio: float | None = None,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        **options,
    ):
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}.")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--model lrsa runs in one process: start it without accelerate launch or torchrun.")
        given = {name: options.pop(name) for name in SETTINGS if name in options}
        measuring = {name: options.pop(name) for name in MEASURING if name in options}
        model, tokenizer, new_cache = lrsa.load(
            pretrained, LRSAConfig(**given) if given else None, dtype=get_dtype(dtype), **options
        )
        if "device_map" not in options:
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if cache == "full":
            lrsa.remove_lrsa(model)
        elif keep_ratio is not None:
            config = new_cache().config.with_keep_ratio(keep_ratio)
            lrsa.apply_lrsa(model, config)
        self.prompt_format = lrsa.PromptFormat.from_pretrained(pretrained)
        self.new_cache = None if cache == "full" else lambda: lrsa.LRSACache(model.config.lrsa)
        super().__init__(model, backend="causal", **({"tokenizer": tokenizer} | measuring))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Up to the answer as training put it, whatever the template writes for generation."""
        if self.prompt_format is not None and add_generation_prompt:
            return conversation_prompt(self.tokenizer, self.prompt_format, chat_history)
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options) -> torch.Tensor:
        if self.new_cache is not None:
            options[CACHE_ARGUMENT] = self.new_cache()
        return super()._model_generate(context, max_length, stop, **options)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
