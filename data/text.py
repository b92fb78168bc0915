"""Plain language modelling rows: documents split to `context_length`, or joined to it when asked.

Every row begins with BOS where the tokenizer has one: it is the first thing a model sees in pretraining and the sink
that later tokens lean on, so a piece from the middle of a document gets one too. A row holds tokens of one document,
unless `join_documents` is set; then documents follow each other, each with its BOS in front (EOS behind, without BOS).
Without joining no end-of-text token is trained: such rows adapt a model to its cache, not teach it when to stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.progress import progress
from data.prompt import token_ids
from data.reading import DataError, column, evaluation_source, read_evaluation_records, read_records
from data.rows import EVALUATED, EVALUATION_NOT_CHOSEN, NOT_CHOSEN, Row, Rows, chosen
from data.settings import DataSettings

EMPTY = "empty document"
DUPLICATE = "document that is there already"
TOO_SHORT = "piece of a document with fewer than 2 tokens"
_BATCH = 64


def text_rows(settings: DataSettings, tokenizer, seed: int) -> Rows:
    """Rows of documents; a document is either trained on or evaluated on, unless none is short enough to be held out.

    Raises:
        DataError: when the data cannot be read.
    """
    result = Rows(source=settings.path)
    rng = np.random.default_rng([seed, 0])
    records = read_records(settings.path, settings.name, settings.split)
    documents = read_documents(records, settings.columns, f"data.path {settings.path}", result.dropped)
    records = read_evaluation_records(settings)
    if records is not None:
        held = read_documents(records, settings.columns, evaluation_source(settings), result.evaluation_dropped)
        found = _rows(tokenize_documents(held, tokenizer), settings, tokenizer, result.evaluation_dropped)
        evaluation = [found[i] for i in chosen(len(found), settings.eval_rows, rng)]
        result.evaluation_dropped[EVALUATION_NOT_CHOSEN] += len(found) - len(evaluation)
        elsewhere = set(held)
        kept = [document for document in documents if document not in elsewhere]
        result.dropped[EVALUATED] += len(documents) - len(kept)
        train = _rows(tokenize_documents(kept, tokenizer), settings, tokenizer, result.dropped)
    else:
        train, evaluation = _held_out(tokenize_documents(documents, tokenizer), settings, tokenizer, rng, result)
    result.train = [Row(train[i], prompt_length=0) for i in chosen(len(train), settings.max_rows, rng)]
    result.dropped[NOT_CHOSEN] += len(train) - len(result.train)
    result.evaluation = [{"input_ids": ids.tolist()} for ids in evaluation]
    return result


def _held_out(
    documents: list[np.ndarray], settings: DataSettings, tokenizer, rng: np.random.Generator, result: Rows
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows to train on and to evaluate on."""
    length, wanted = settings.context_length, settings.eval_rows
    if settings.join_documents:  # then tokens are counted, for a row has no document of its own
        taken = _hold_out([len(ids) for ids in documents], wanted * length, rng)
    else:
        taken = _hold_out([-(-len(ids) // length) for ids in documents], wanted, rng)
    if not taken and wanted:
        rows = _rows(documents, settings, tokenizer, result.dropped)
        border = len(rows) - min(wanted, len(rows) // 2)
        result.notes.append("no document is short enough to be held out whole: the last rows are held out instead")
        return rows[:border], rows[border:]
    held = set(taken)
    train = _rows([ids for i, ids in enumerate(documents) if i not in held], settings, tokenizer, result.dropped)
    evaluation = _rows([documents[i] for i in sorted(held)], settings, tokenizer, result.evaluation_dropped)[:wanted]
    return train, evaluation


def _hold_out(sizes: Sequence[int], wanted: int, rng: np.random.Generator) -> list[int]:
    """Numbers of the documents that are held out: random ones, as long as they fit into `wanted`, at most half of all.

    The list is empty when no document is short enough.
    """
    room = min(wanted, sum(sizes) // 2)
    taken = []
    for document in rng.permutation(len(sizes)).tolist():
        if sizes[document] <= room:
            taken.append(document)
            room -= sizes[document]
    return taken


def _rows(documents: Sequence[np.ndarray], settings: DataSettings, tokenizer, dropped: Counter) -> list[np.ndarray]:
    bos, eos, length = tokenizer.bos_token_id, tokenizer.eos_token_id, settings.context_length
    if settings.join_documents:
        return join_documents(documents, bos, eos, length, dropped)
    return [row for ids in documents for row in split_document(ids, bos, length, dropped)]


def read_documents(records: list[dict[str, Any]], columns: dict[str, str], source: str, dropped: Counter) -> list[str]:
    """The documents of `records`, each text once; empty and repeated ones are counted in `dropped`.

    Raises:
        DataError: no such column, or a record whose text is not a text.
    """
    text_column = column(records, "text", columns, source)
    documents: dict[str, None] = {}
    for number, record in enumerate(records):
        text = record.get(text_column)
        if not isinstance(text, str):
            raise DataError(f"{source}: record {number} holds no text in column {text_column!r}, but {text!r}.")
        text = text.strip("\n")
        if not text.strip() or text in documents:
            dropped[DUPLICATE if text in documents else EMPTY] += 1
        else:
            documents[text] = None
    return list(documents)


def tokenize_documents(documents: Sequence[str], tokenizer) -> list[np.ndarray]:
    """Token ids (int32) of each document, nothing added."""
    batches = [documents[start : start + _BATCH] for start in range(0, len(documents), _BATCH)]
    return [ids for batch in progress(batches, "tokenizing documents") for ids in token_ids(tokenizer, batch)]


def split_document(ids: np.ndarray, bos: int | None, context_length: int, dropped: Counter) -> list[np.ndarray]:
    """One document as rows of at most `context_length` tokens, each with BOS in front."""
    front = np.asarray([] if bos is None else [bos], dtype=np.int32)
    step = context_length - len(front)
    pieces = [ids[start : start + step] for start in range(0, len(ids), step)]
    rows = [np.concatenate([front, piece]) for piece in pieces if len(piece) > 1]
    dropped[TOO_SHORT] += len(pieces) - len(rows)
    return rows


def join_documents(
    documents: Sequence[np.ndarray], bos: int | None, eos: int | None, context_length: int, dropped: Counter
) -> list[np.ndarray]:
    """Documents one after the other, in order, as rows of `context_length` tokens; only the last may be shorter.

    Raises:
        DataError: when the tokenizer has neither BOS nor EOS to tell documents apart.
    """
    border = bos if bos is not None else eos
    if border is None:
        raise DataError("data.join_documents needs a tokenizer with a BOS or an EOS token to tell documents apart.")
    mark = np.asarray([border], dtype=np.int32)
    if not documents:
        return []
    stream = np.concatenate([part for ids in documents for part in ((mark, ids) if bos is not None else (ids, mark))])
    rows, start = [], 0
    while start < len(stream):
        front = mark if bos is not None and stream[start] != bos else mark[:0]
        end = start + context_length - len(front)
        rows.append(np.concatenate([front, stream[start:end]]))
        start = end
    if len(rows[-1]) < 3:
        dropped[TOO_SHORT] += 1
        rows.pop()
    return rows
