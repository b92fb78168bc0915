"""Next-token loss of whole documents in one forward, without ever holding the logits of a whole document."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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
    progress: Callable[[int], object] | None = None,
    seed: int = 0,
) -> Score:
    """Mean next-token loss in nats: the mean over a row's tokens, then over rows.

    One forward per batch; under `apply_lrsa` it gives the loss that chunk-by-chunk prefill over an `LRSACache` gives.
    Memory grows linearly with row length: logits are made and dropped piece by piece.

    Args:
        model: a transformers causal LM or a PEFT model, in the state that shall be measured.
        rows: each `{"input_ids": [...]}` of at least 2 tokens; with `"prompt_length"` the prompt's tokens do not count.
        batch_size: rows per batch; padded on the right, where no token of the row sees it, so that no mask is needed.
        progress: called with the number of rows of every batch that is done (`tqdm.update` fits).

    Raises:
        ValueError: when a row has no token to predict.
    """
    check_rows(rows, ("input_ids",))
    firsts = [max(1, row.get("prompt_length", 0)) for row in rows]
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        if len(row["input_ids"]) <= first:
            tokens = len(row["input_ids"])
            raise ValueError(f"evaluation row {number} has {tokens} tokens, none of them to be predicted: drop it.")
    losses = [0.0] * len(rows)
    with in_eval_mode(model):
        for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
            found = _row_losses(causal_lm(model), [rows[i]["input_ids"] for i in batch], [firsts[i] for i in batch])
            for i, loss in zip(batch, found, strict=True):
                losses[i] = loss
            if progress is not None:
                progress(len(batch))
    return Score.from_rows(losses, "nats per token", seed)


def perplexity_of(loss: Score) -> Score:
    """`exp` of a loss and of its interval; of a row, `exp` of its own loss (so `value` is not their mean)."""
    value, low, high = map(math.exp, (loss.value, loss.low, loss.high))
    return Score(value, low, high, loss.n, "perplexity", tuple(map(math.exp, loss.per_row)))


def _row_losses(lm: PreTrainedModel, documents: list[list[int]], firsts: list[int]) -> list[float]:
    """Mean loss of each document's tokens from `firsts` on."""
    width = max(map(len, documents))
    ids = torch.tensor([document + [0] * (width - len(document)) for document in documents], device=lm.device)
    column = torch.arange(width, device=lm.device)
    lengths, starts = (torch.tensor(x, device=lm.device)[:, None] for x in (list(map(len, documents)), firsts))
    counted = (column < lengths) & (column >= starts)
    total = torch.zeros(len(documents), dtype=torch.float64, device=lm.device)
    vocabulary = lm.config.get_text_config().vocab_size
    piece = max(1, LOGITS_AT_ONCE // (vocabulary * len(documents)))
    with _backbone_run_once(lm, ids) as logits_of:
        for start in range(0, width - 1, piece):
            columns = torch.arange(start, min(start + piece, width - 1), device=lm.device)
            logits, labels = logits_of(columns).float(), ids[:, columns + 1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            total += loss.double().mul(counted[:, columns + 1]).sum(1)
    return (total / counted.sum(1)).tolist()


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
