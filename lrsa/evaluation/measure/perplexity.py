"""Next-token loss and accuracy in one forward, without ever holding the logits of a whole document."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lrsa.evaluation.measure.generation import by_length, check_rows
from lrsa.evaluation.measure.state import causal_lm, in_eval_mode
from lrsa.evaluation.score import Score

LOGITS_AT_ONCE = 2**25


def evaluate_loss(
    model,
    rows: Sequence[dict],
    *,
    batch_size: int = 8,
    progress: Callable[[list[int], list], object] | None = None,
    seed: int = 0,
) -> Score:
    """Mean next-token loss in nats: the mean over a row's tokens, then over rows; args and errors: `teacher_forced`."""
    return teacher_forced(model, rows, batch_size=batch_size, progress=progress, seed=seed)["loss"]


def teacher_forced(
    model,
    rows: Sequence[dict],
    *,
    batch_size: int = 8,
    edges: Sequence[int] = (),
    progress: Callable[[list[int], list], object] | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """`"loss"`, nats per token, and `"token_accuracy"`, the share of tokens that had the largest logit, while the model
    reads the right tokens: the mean over a row's tokens, then over rows.

    They tell models apart on far fewer rows than generated answers. One forward per batch; under `apply_lrsa` it gives
    what chunk-by-chunk prefill over an `LRSACache` gives. Memory grows linearly with row length.

    Args:
        model: a transformers causal LM or a PEFT model, in the state that shall be measured.
        rows: each `{"input_ids": [...]}` of at least 2 tokens; with `"prompt_length"` the prompt's tokens do not count,
            and with `"trained"`, a bool for every token, only those that it marks.
        batch_size: rows per batch; padded on the right, where no token of the row sees it, so that no mask is needed.
        edges: positions in a row; the loss between each two of them is measured too, as `"loss_FROM_TO"`.
        progress: called after every batch with its row numbers and their losses.

    Raises:
        ValueError: when a row has no token to predict, or none between two edges.
    """
    tokens = forced_tokens(model, rows, batch_size=batch_size, progress=progress)
    loss, right = ([part.double().mean().item() for part in parts] for parts in zip(*tokens, strict=True))
    scores = {
        "loss": Score.from_rows(loss, "nats per token", seed),
        "token_accuracy": Score.from_rows(right, "tokens right", seed),
    }
    firsts = [max(1, row.get("prompt_length", 0)) for row in rows]
    for begin, end in pairwise(edges):
        pairs = zip(tokens, firsts, strict=True)
        spans = [part[max(begin - first, 0) : max(end - first, 0)] for (part, _), first in pairs]
        if not all(map(len, spans)):
            raise ValueError(f"a row has no token to predict from position {begin} to {end}: give other edges.")
        means = [span.double().mean().item() for span in spans]
        scores[f"loss_{begin}_{end}"] = Score.from_rows(means, "nats per token", seed)
    return scores


def forced_tokens(
    model, rows: Sequence[dict], *, batch_size: int = 8, progress: Callable[[list[int], list], object] | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss of every predicted token of every row, and whether it had the largest logit; see `teacher_forced`."""
    check_rows(rows, ("input_ids",))
    firsts = [max(1, row["trained"].index(True) if "trained" in row else row.get("prompt_length", 0)) for row in rows]
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        if len(row["input_ids"]) <= first:
            tokens = len(row["input_ids"])
            raise ValueError(f"evaluation row {number} has {tokens} tokens, none of them to be predicted: drop it.")
    found: list = [None] * len(rows)
    with in_eval_mode(model):
        for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
            tokens = _batch_tokens(causal_lm(model), [rows[i]["input_ids"] for i in batch], [firsts[i] for i in batch])
            for i, pair in zip(batch, tokens, strict=True):
                marked = torch.tensor(rows[i]["trained"][firsts[i] :]) if "trained" in rows[i] else slice(None)
                found[i] = tuple(part[marked] for part in pair)
            if progress is not None:
                progress(batch, [found[i][0].mean().item() for i in batch])
    return found


def perplexity_of(loss: Score) -> Score:
    """`exp` of a loss and of its interval; of a row, `exp` of its own loss (so `value` is not their mean)."""
    value, low, high = map(math.exp, (loss.value, loss.low, loss.high))
    return Score(value, low, high, loss.n, "perplexity", tuple(map(math.exp, loss.per_row)))


def _batch_tokens(
    lm: PreTrainedModel, documents: list[list[int]], firsts: list[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Losses `[tokens]` and hits `[tokens]` of each document's tokens from `firsts` on."""
    width, begin = max(map(len, documents)), min(firsts)
    ids = torch.tensor([document + [0] * (width - len(document)) for document in documents], device=lm.device)
    piece = max(1, LOGITS_AT_ONCE // (lm.config.get_text_config().vocab_size * len(documents)))
    losses, right = [], []
    with _backbone_run_once(lm, ids) as logits_of:
        for start in range(begin - 1, width - 1, piece):
            columns = torch.arange(start, min(start + piece, width - 1), device=lm.device)
            logits, labels = logits_of(columns).float(), ids[:, columns + 1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            losses.append(loss.cpu())
            right.append((logits.argmax(-1) == labels).cpu())
    parts = [torch.cat(x, 1) for x in (losses, right)]
    spans = [slice(first - begin, len(document) - begin) for document, first in zip(documents, firsts, strict=True)]
    return [tuple(part[row, span] for part in parts) for row, span in enumerate(spans)]


@contextmanager
def _backbone_run_once(lm: PreTrainedModel, ids: torch.Tensor) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A function that gives the logits `[B, columns, vocabulary]` of some columns from one forward of the backbone.

    The model's own forward makes the logits, over a backbone that hands out what it has found before: models scale or
    cap their logits in many ways, and none of them has to be known here.
    """
    backbone = lm.base_model
    found = backbone(input_ids=ids, use_cache=False)
    patched = backbone.__dict__.get("forward")  # accelerate's device hooks sit here
    backbone.forward = lambda *args, **kwargs: found
    try:
        yield lambda columns: lm(input_ids=ids, logits_to_keep=columns, use_cache=False).logits
    finally:
        if patched is None:
            del backbone.forward
        else:
            backbone.forward = patched
