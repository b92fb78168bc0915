"""Plain language modelling rows: documents split to `context_length`, or joined to it when asked.

Every row begins with BOS where the tokenizer has one: it is the first thing a model sees in pretraining and the sink
that later tokens lean on, so a piece from the middle of a document gets one too. A row holds tokens of one document,
unless `join_documents` is set; then documents follow each other, each with its BOS in front. Every document ends with
EOS, which is trained, unless `end_of_document` is false; joined documents without BOS are told apart by EOS even then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from data.duplicates import DistinctTexts, normal_form
from data.encoding import Encoder
from data.progress import progress
from data.rows import EVALUATED, EVALUATION_NOT_CHOSEN, NOT_CHOSEN, Records, Row, Rows, chosen
from data.settings import DataSettings
from data.sources.columns import columns_of
from data.sources.files import DataError
from lrsa import PromptFormat

EMPTY = "empty document"
DUPLICATE = "document that is there already"
REWRITTEN = "document that is there already, apart from blanks, case or Unicode form"
TOO_SHORT = "piece of a document with fewer than 2 tokens"
_BATCH = 64


def text_rows(settings: DataSettings, tokenizer, seed: int, turn: PromptFormat, records: Records) -> Rows:
    """Rows of documents; a document is either trained on or evaluated on, unless none is short enough to be held out.

    Raises:
        DataError: when the data cannot be read.
    """
    result, encoder = Rows(source=settings.origin), Encoder(tokenizer)
    rng = np.random.default_rng([seed, 0])
    documents = read_documents(records.train, settings.columns, settings.source, result.dropped, records.first)
    if records.evaluation is None:
        train, evaluation = _held_out(documents, encoder, settings, rng, result, records.held)
    else:
        held = read_documents(
            records.evaluation, settings.columns, settings.evaluation_source, result.evaluation_dropped
        )
        result.held = set(map(normal_form, held))
        found = _rows(_encoded(held, encoder, settings), settings, tokenizer, result.evaluation_dropped)
        evaluation = [found[i] for i in chosen(len(found), settings.eval_rows, rng)]
        result.evaluation_dropped[EVALUATION_NOT_CHOSEN] += len(found) - len(evaluation)
        kept = _without(documents, result.held | records.held, result)
        train = _rows(_encoded(kept, encoder, settings), settings, tokenizer, result.dropped)
    result.notes += [_end_note(settings, tokenizer), *encoder.notes()]
    result.train = [Row(train[i], prompt_length=0) for i in chosen(len(train), settings.max_rows, rng)]
    result.dropped[NOT_CHOSEN] += len(train) - len(result.train)
    result.evaluation = [{"input_ids": ids.tolist()} for ids in evaluation]
    return result


def _end_note(settings: DataSettings, tokenizer) -> str:
    if tokenizer.eos_token_id is None:
        return "the end of a document is not trained: the tokenizer has no end-of-text token"
    if settings.end_of_document:
        return f"the end of every document is trained, as {tokenizer.eos_token}"
    return "the end of a document is not trained (data.end_of_document: false): the model may unlearn to stop"


def _without(documents: list[str], held: Set[str], result: Rows) -> list[str]:
    """The documents that are evaluated nowhere, which are those to train on."""
    kept = [document for document in documents if normal_form(document) not in held]
    result.dropped[EVALUATED] += len(documents) - len(kept)
    result.seen = set(map(normal_form, kept))
    return kept


def _held_out(
    texts: list[str], encoder: Encoder, settings: DataSettings, rng: np.random.Generator, result: Rows, other: Set[str]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows to train on and to evaluate on; `other` documents are evaluated elsewhere, in normal form."""
    length, wanted, tokenizer = settings.context_length, settings.eval_rows, encoder.tokenizer
    documents = _encoded(texts, encoder, settings)
    if settings.join_documents:  # then tokens are counted, for a row has no document of its own
        taken = _hold_out([len(ids) for ids in documents], wanted * length, rng)
    else:
        taken = _hold_out([-(-len(ids) // length) for ids in documents], wanted, rng)
    result.held = {normal_form(texts[i]) for i in taken}
    evaluation = _rows([documents[i] for i in sorted(taken)], settings, tokenizer, result.evaluation_dropped)[:wanted]
    of_text = dict(zip(texts, documents, strict=True))
    own = set(taken)
    kept = _without([text for i, text in enumerate(texts) if i not in own], other, result)
    rows = _rows([of_text[text] for text in kept], settings, tokenizer, result.dropped)
    if taken or not wanted:
        return rows, evaluation
    result.held = result.seen  # so that no other source trains on the rows at the end
    border = len(rows) - min(wanted, len(rows) // 2)
    result.notes.append("no document is short enough to be held out whole: the last rows are held out instead")
    return rows[:border], rows[border:]


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
        if bos is None and eos is None:
            raise DataError("data.join_documents needs a tokenizer with a BOS or an EOS token to tell documents apart.")
        border = None if settings.end_of_document and eos is not None else eos
        return join_documents(documents, bos, border, length, dropped)
    return [row for ids in documents for row in split_document(ids, bos, length, dropped)]


def read_documents(
    records: list[dict[str, Any]], columns: dict[str, str], source: str, dropped: Counter, first: int = 0
) -> list[str]:
    """The documents of `records`, each text once; empty and repeated ones are counted in `dropped`.

    Raises:
        DataError: no such column, or a record whose text is not a text.
    """
    [text_column] = columns_of(records, ("text",), columns, source, "text")
    documents = DistinctTexts()
    for number, record in enumerate(records, first):
        text = record.get(text_column)
        if not isinstance(text, str):
            raise DataError(f"{source}: record {number} holds no text in column {text_column!r}, but {text!r:.200}.")
        text = text.strip("\n")
        before, rewritten = len(documents.texts), documents.rewritten
        if not text.strip():
            dropped[EMPTY] += 1
        elif documents.number(text) < before:
            dropped[REWRITTEN if documents.rewritten > rewritten else DUPLICATE] += 1
    return documents.texts


def _encoded(documents: Sequence[str], encoder: Encoder, settings: DataSettings) -> list[np.ndarray]:
    """Token ids (int32) of each document, with the end-of-text token that is trained."""
    encoder.count(documents)
    eos = encoder.tokenizer.eos_token_id
    end = np.asarray([eos] if settings.end_of_document and eos is not None else [], dtype=np.int32)
    batches = [documents[start : start + _BATCH] for start in range(0, len(documents), _BATCH)]
    parts = (ids for batch in progress(batches, "tokenizing documents") for ids in encoder.ids(batch))
    return [np.concatenate([ids, end]) for ids in parts]


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

    Args:
        bos: put in front of every document; `eos` behind it where there is no BOS and it does not end with EOS itself.
    """
    if not documents:
        return []
    ends = (bos, eos if bos is None else None)
    front, behind = (np.asarray([] if end is None else [end], dtype=np.int32) for end in ends)
    stream = np.concatenate([part for ids in documents for part in (front, ids, behind)])
    rows, start = [], 0
    while start < len(stream):
        first = front if stream[start] != bos else front[:0]
        end = start + context_length - len(first)
        rows.append(np.concatenate([first, stream[start:end]]))
        start = end
    if len(rows[-1]) < 3:
        dropped[TOO_SHORT] += 1
        rows.pop()
    return rows
