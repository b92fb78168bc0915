"""The chat kind: which chats are trained on and which are held out, and their rows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from data.chat.messages import Chat, Completion, read_chats
from data.chat.rendering import Rendered, Renderer, reasons
from data.chat.subjects import groups_of, subjects_of, texts_of
from data.duplicates import DistinctTexts
from data.encoding import Encoder
from data.progress import progress
from data.rows import EVALUATED, EVALUATION_NOT_CHOSEN, NOT_CHOSEN, Records, Row, Rows, drawn
from data.settings import DataSettings
from data.sources.files import DataError
from lrsa import PromptFormat

TOO_LONG = "chat longer than context_length"
DUPLICATE = "chat that is there already"
SHORT = 32  # tokens of an answer that generated ones are compared with
_BATCH = 64


def chat_rows(settings: DataSettings, tokenizer, seed: int, turn: PromptFormat, records: Records) -> Rows:
    """Rows of chats; chats about the same document, and all answers to one message, are trained on or held out.

    Raises:
        DataError: when the data cannot be used, or cannot be split.
    """
    result = Rows(source=settings.origin)
    chats = read_chats(records.train, settings.columns, settings.source, result.dropped, records.first)
    chats = _distinct(chats, result.dropped)
    rng = np.random.default_rng([seed, 0])
    subjects = dict(zip(map(id, chats), subjects_of(chats), strict=True))
    held = [] if records.evaluation is None else read_chats(
        records.evaluation, settings.columns, settings.evaluation_source, result.evaluation_dropped
    )  # fmt: skip
    _one_kind([(settings.evaluation_source, held), (settings.source, chats)])
    builder = _Builder(settings, tokenizer, turn, chats, held)
    if records.evaluation is None:
        evaluation, held = _held_out(chats, subjects, builder, settings, rng, result)
        result.held = {form for chat in held for form in subjects[id(chat)]}
    else:
        evaluation, more = drawn(
            held, settings.eval_rows, rng, partial(builder.rows, dropped=result.evaluation_dropped)
        )
        result.evaluation_dropped[EVALUATION_NOT_CHOSEN] += more
        numbers = {chat.number for chat, _, _ in evaluation}
        held = [chat for chat in held if chat.number in numbers]
        result.held = {form for forms in subjects_of(held, chats) for form in forms}
    elsewhere = result.held | records.held
    kept = [chat for chat in chats if elsewhere.isdisjoint(subjects[id(chat)])]
    result.dropped[EVALUATED] += len(chats) - len(kept)
    result.seen = {form for chat in kept for form in subjects[id(chat)]}
    train, more = drawn(kept, settings.max_rows, rng, partial(builder.rows, dropped=result.dropped))
    result.dropped[NOT_CHOSEN] += more
    result.train = [row for _, _, row in train]
    builder.encoder.count(
        text for chat in {chat.number: chat for chat, _, _ in train}.values() for text in texts_of(chat)
    )
    result.evaluation = [builder.evaluation_row(*entry) for entry in evaluation]
    result.notes += builder.notes([chat for chat, *_ in train], [chat for chat, *_ in evaluation])
    result.prompt = builder.turn
    return result


def _distinct(chats: list[Chat | Completion], dropped: Counter) -> list[Chat | Completion]:
    texts, kept = DistinctTexts(), []
    for chat in chats:
        said = chat.prompt + chat.text if isinstance(chat, Completion) else repr((chat.messages, chat.options))
        kept += [chat] if texts.number(said) == len(kept) else []
    dropped[DUPLICATE] += len(chats) - len(kept)
    return kept


def _one_kind(groups: list[tuple[str, list[Chat | Completion]]]) -> None:
    """Refuse messages among texts, in groups of chats that each have a name for error messages."""
    first = {type(chat): (source, chat.number) for source, chats in groups for chat in chats[::-1]}
    if len(first) > 1:
        (source, number), (other, record) = first[Chat], first[Completion]
        raise DataError(
            f"{source}: record {number}: prompt and completion are messages, in {other}, record {record}, they are "
            "texts: put the two into files of their own, and name both in data.sources."
        )


def _held_out(
    chats: list, subjects: dict[int, set[str]], builder: _Builder, settings: DataSettings, rng, result: Rows
) -> tuple[list[tuple], list]:
    """Up to `eval_rows` rows to evaluate on, of whole random groups that fit, at most half of them; and their chats."""
    groups, held, held_chats = groups_of(chats, subjects), [], []
    for number in rng.permutation(len(groups))[: len(groups) // 2].tolist() if settings.eval_rows else []:
        dropped: Counter = Counter()
        rows = builder.rows(groups[number], dropped)
        if rows and len(held) + len(rows) <= settings.eval_rows:
            held += rows
            held_chats += groups[number]
            result.evaluation_dropped.update(dropped)
        if len(held) == settings.eval_rows:
            break
    if settings.eval_rows and not held:
        raise DataError(
            f"{settings.source}: no chat can be held out for data.eval_rows = {settings.eval_rows} (chats: "
            f"{len(chats)}, about different documents: {len(groups)}): they share these, have more rows, or are longer "
            f"than data.context_length = {settings.context_length}. Change one of the two, give data.eval_path, or set "
            "data.eval_rows: 0."
        )
    return held, held_chats


def _reasoning(chats: Sequence[Chat]) -> int:
    """How many chats have a last answer with reasoning."""
    return sum(reasons(chat.messages[chat.answers[-1]]) for chat in chats)


class _Builder:
    """Makes rows of chats.

    Attributes:
        turn: what stands around prompts and answers of these chats.
    """

    def __init__(self, settings: DataSettings, tokenizer, turn: PromptFormat, chats: list, held: list):
        self.settings, self.encoder, self.turn = settings, Encoder(tokenizer), turn
        self.texts = any(isinstance(chat, Completion) for chat in chats + held)
        if self.texts:
            self.turn = dataclasses.replace(PromptFormat.plain(tokenizer), lead="")
        elif chats + held and not tokenizer.chat_template:
            raise DataError(
                f"{settings.source}: chats need a chat template, the tokenizer has none: set model.chat_template to "
                "a Jinja file, such as that of the instruct model of the same family."
            )
        elif chats + held:
            self.renderer = Renderer(self.encoder, turn)
            if 2 * _reasoning(chats) > len(chats):
                self.turn = self.renderer.generation_prompt()

    def rows(self, chats: Sequence[Chat | Completion], dropped: Counter) -> list[tuple[Chat | Completion, int, Row]]:
        """Chat, length of the prompt of its last answer, and row; chats that are too long are counted in `dropped`."""
        found, batches = [], [chats[start : start + _BATCH] for start in range(0, len(chats), _BATCH)]
        for batch in progress(batches, "building rows"):
            todo = [pair for chat in batch for pair in self._rendered(chat)]
            for (chat, _), (end, row) in zip(todo, self._encoded([text for _, text in todo]), strict=True):
                if len(row.input_ids) <= self.settings.context_length:
                    found.append((chat, end, row))
                elif shorter := self._without_oldest(chat):
                    found += self.rows([shorter], dropped)
                else:
                    dropped[TOO_LONG] += 1
        return found

    def _rendered(self, chat: Chat | Completion) -> list[tuple[Chat | Completion, Rendered]]:
        """Every text of a chat, each with the part of the chat that it holds and trains."""
        if isinstance(chat, Completion):
            prompt = self.turn.before + self.encoder.held(chat.prompt)
            text = prompt + self.encoder.held(chat.text) + self.turn.after
            return [(chat, Rendered(text, [(len(prompt), len(text))], len(prompt)))]
        if self.settings.train_on == "last":
            chat = dataclasses.replace(chat, answers=chat.answers[-1:])
        try:
            rows = self.renderer.rows(chat)
        except DataError as error:
            raise DataError(f"{self.settings.source}: {error}") from error
        pairs, left, part = [], chat.answers, chat.part or len(rows) > 1
        for rendered in rows:
            own, left = left[: len(rendered.trained)], left[len(rendered.trained) :]
            messages = chat.messages[: own[-1] + 1]
            pairs.append((dataclasses.replace(chat, messages=messages, answers=own, part=part), rendered))
        return pairs

    def _without_oldest(self, chat: Chat | Completion) -> Chat | None:
        """The chat without its oldest turn, a message of the user and all that follows it up to the next one."""
        if isinstance(chat, Completion) or self.settings.too_long == "drop":
            return None
        users = [place for place, message in enumerate(chat.messages) if message["role"] == "user"]
        if len(users) < 2 or users[1] > chat.answers[-1]:
            return None
        first, gone = users[0], users[1] - users[0]
        answers = [place - gone for place in chat.answers if place >= users[1]]
        messages = chat.messages[:first] + chat.messages[users[1] :]
        return dataclasses.replace(chat, messages=messages, answers=answers, cut=chat.cut + 1)

    def _encoded(self, texts: Sequence[Rendered]) -> list[tuple[int, Row]]:
        """Length of the last answer's prompt, and row, of each text."""
        prefixes, parts, trained, owners = [], [], [], []
        for owner, rendered in enumerate(texts):
            last = rendered.prompt_end
            cuts = sorted({0, len(rendered.text), last, *(place for span in rendered.trained for place in span)})
            before = ""
            for start, end in pairwise(cuts):
                part = self.encoder.rendered(rendered.text[start:end])
                prefixes.append(self.encoder.tail(before))
                parts.append(part)
                trained.append(any(begin <= start < stop for begin, stop in rendered.trained))
                owners.append((owner, end <= last))
                before += part
        _, ids = self.encoder.continued(prefixes, parts)
        rows = []
        for owner in range(len(texts)):
            own = [place for place, (number, _) in enumerate(owners) if number == owner]
            marks = np.concatenate([np.full(len(ids[place]), trained[place]) for place in own])
            end = sum(len(ids[place]) for place in own if owners[place][1])
            rows.append((end, Row(np.concatenate([ids[place] for place in own]), int(marks.argmax()), answers=marks)))
        return rows

    def evaluation_row(self, chat: Chat | Completion, prompt_length: int, row: Row) -> dict:
        """The row with the trained tokens whose loss is measured, and the last answer where it is short."""
        tokenizer, ids = self.encoder.tokenizer, row.input_ids.tolist()
        message = {"content": chat.text.strip()} if isinstance(chat, Completion) else chat.messages[chat.answers[-1]]
        short = len(ids) - prompt_length <= SHORT and not message.get("tool_calls") and not reasons(message)
        return {
            "prompt": tokenizer.decode(ids[:prompt_length], clean_up_tokenization_spaces=False),
            "answers": [message["content"].strip()] if short else [],
            "input_ids": ids,
            "prompt_length": prompt_length,
            "trained": row.trained.tolist(),
        }

    def notes(self, train: list, evaluation: list) -> list[str]:
        """What is worth knowing about the rows, given the chat of each, for the report."""
        if self.texts:
            text = "prompts and completions are texts: no chat template goes around them, in training and after"
            return [text, *self.encoder.notes()]
        notes = []
        if cut := sum(chat.cut for chat in train + evaluation):
            notes.append(f"the oldest turns of chats longer than context_length are cut: {cut} turns")
        if split := sum(len({chat.number for chat in chats if chat.part}) for chats in (train, evaluation)):
            notes.append(
                f"{split} chats make a row for each answer: the chat template writes earlier turns in another way "
                "than the last one"
            )
        if reasoning := _reasoning(train):
            notes.append(f"{reasoning} last answers hold reasoning, which is trained with them")
        return notes + self.encoder.notes()
