"""Greedy answers for rows of different lengths, batched, over the cache that fits the model's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from lrsa.cache import CACHE_ARGUMENT, LRSACache
from lrsa.evaluation.measure.state import active_config, causal_lm, in_eval_mode


def generate_answers(
    model,
    tokenizer,
    rows: Sequence[dict],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[list[int], list], object] | None = None,
) -> list[str]:
    """The model's greedy continuation of every prompt, up to its end-of-text token, in row order.

    Under `apply_lrsa(model, config)` every batch runs over a fresh `LRSACache(config)`, otherwise over the model's own
    full cache. Only the largest logit counts: sampling and penalties in the model's generation settings are left aside.

    Args:
        model: a transformers causal LM or a PEFT model, in the state that shall be measured.
        tokenizer: decodes the answers; its end-of-text token ends them, as do those of the model.
        rows: each `{"input_ids": [...], "prompt_length": int, "answers": [str, ...]}`; the prompt is
            `input_ids[:prompt_length]`.
        batch_size: prompts per batch; padded on the left.
        max_new_tokens: most tokens of an answer; `None`: as many as the longest correct answer has, and one.
        progress: called after every batch with its row numbers and their answers.

    Raises:
        ValueError: when rows lack a field, or a number is not positive.
    """
    check_rows(rows, ("input_ids", "prompt_length", "answers"))
    if max_new_tokens is None:
        max_new_tokens = longest_answer(tokenizer, rows)
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    lm, config = causal_lm(model), active_config(model)
    answers: list[str] = [""] * len(rows)
    with in_eval_mode(model), _plain_greedy(lm, tokenizer, _end_of_rows(tokenizer, rows)) as greedy:
        for batch in by_length([row["prompt_length"] for row in rows], batch_size):
            prompts = [rows[i]["input_ids"][: rows[i]["prompt_length"]] for i in batch]
            ids, mask = (x.to(lm.device) for x in _pad_left(prompts, greedy.pad_token_id))
            cache = {} if config is None else {CACHE_ARGUMENT: LRSACache(config)}
            out = lm.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, use_cache=True, **cache)
            for i, new in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = tokenizer.decode(_before_end(new, greedy.eos_token_id), skip_special_tokens=True).strip()
            if progress is not None:
                progress(batch, [answers[i] for i in batch])
    return answers


def check_rows(rows: Sequence[dict], fields: Sequence[str]) -> None:
    """Raise a `ValueError` that names the first row without one of the fields, or with nothing in it."""
    if not len(rows):
        raise ValueError("there are no evaluation rows: check eval_rows, or the file they come from.")
    for number, row in enumerate(rows):
        for field in fields:
            if not row.get(field):
                raise ValueError(f"evaluation row {number} has no {field}: a row needs {', '.join(fields)}.")


def longest_answer(tokenizer, rows: Sequence[dict]) -> int:
    """Tokens of the longest correct answer, and one for the end of the text."""
    written = max(len(row["input_ids"]) - row["prompt_length"] for row in rows)
    texts = [answer for row in rows for answer in row["answers"]]
    return max(written, 1 + max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])))


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, so that little is padded; the longest first, to fail early."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _pad_left(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `[B, T]`; the last token of every prompt stands in the last column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _end_of_rows(tokenizer, rows: Sequence[dict]) -> list[int]:
    """The token with which every correct answer ends: a chat template's end of turn need not be the end of text."""
    last = {row["input_ids"][-1] for row in rows if len(row["input_ids"]) > row["prompt_length"]}
    return list(last) if len(last) == 1 and last <= set(tokenizer.all_special_ids) else []


@contextmanager
def _plain_greedy(lm: PreTrainedModel, tokenizer, more_ends: list[int]) -> Iterator[GenerationConfig]:
    """Generation settings that hold nothing but where to stop; the model's own ones are put back afterwards.

    `generate` fills what a call leaves open from the model's settings, so these must go to be rid of their penalties.
    """
    own = lm.generation_config
    ends = [own.eos_token_id, tokenizer.eos_token_id, more_ends]
    ends = sorted({end for item in ends if item is not None for end in (item if isinstance(item, list) else [item])})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    lm.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends or None, pad_token_id=pad)
    try:
        yield lm.generation_config
    finally:
        lm.generation_config = own


def _before_end(tokens: list[int], ends: list[int] | None) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in (ends or ())), tokens)
