"""The chat kind: which chats are trained on and which are held out, and their rows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from data.chat.messages import Chat, Completion, read_chats
from data.chat.rendering import Rendered, Renderer, reasons
from data.duplicates import DistinctTexts, normal_form
from data.encoding import Encoder
from data.progress import progress
from data.rows import EVALUATED, NOT_CHOSEN, Records, Row, Rows, chosen
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
    builder = _Builder(settings, tokenizer, turn, chats)
    rng = np.random.default_rng([seed, 0])
    if records.evaluation is None:
        train, evaluation = _held_out(chats, builder, settings, rng, result)
    else:
        held = read_chats(records.evaluation, settings.columns, settings.evaluation_source, result.evaluation_dropped)
        held = [held[index] for index in chosen(len(held), settings.eval_rows, rng)]
        train, evaluation = chats, [pair for chat in held for pair in builder.rows([chat], result.evaluation_dropped)]
    result.held = {_subject(chat) for chat, _, _ in evaluation}
    kept = [chat for chat in train if _subject(chat) not in result.held | records.held]
    result.dropped[EVALUATED] += len(chats) - len(kept)
    train = [kept[index] for index in chosen(len(kept), settings.max_rows, rng)]
    result.dropped[NOT_CHOSEN] += len(kept) - len(train)
    result.seen = set(map(_subject, train))
    result.train = [row for _, _, row in builder.rows(train, result.dropped)]
    builder.encoder.count(text for chat in train for text in _texts(chat))
    result.evaluation = [builder.evaluation_row(*entry) for entry in evaluation]
    result.notes += builder.notes(len(train))
    result.prompt = builder.turn
    return result


def _distinct(chats: list[Chat | Completion], dropped: Counter) -> list[Chat | Completion]:
    texts, kept = DistinctTexts(), []
    for chat in chats:
        said = chat.prompt + chat.text if isinstance(chat, Completion) else repr((chat.messages, chat.options))
        kept += [chat] if texts.number(said) == len(kept) else []
    dropped[DUPLICATE] += len(chats) - len(kept)
    return kept


def _texts(chat: Chat | Completion) -> list[str]:
    return (
        [chat.prompt, chat.text] if isinstance(chat, Completion) else [message["content"] for message in chat.messages]
    )


def _subject(chat: Chat | Completion) -> str:
    """What chats about one document share: the longest line of the first message, in its normal form."""
    if isinstance(chat, Completion):
        first = chat.prompt or chat.text
    else:
        first = next((message["content"] for message in chat.messages if message["role"] == "user"), str(chat.messages))
    return max(map(normal_form, first.split("\n")), key=len)


def _held_out(
    chats: list[Chat | Completion], builder: _Builder, settings: DataSettings, rng: np.random.Generator, result: Rows
) -> tuple[list, list]:
    """Chats to train on, and up to `eval_rows` rows of others that fit, of at most half of the subjects."""
    groups: dict[str, list] = {}
    for chat in chats:
        groups.setdefault(_subject(chat), []).append(chat)
    held: list[tuple] = []
    for subject in rng.permutation(list(groups))[: len(groups) // 2].tolist() if settings.eval_rows else []:
        dropped: Counter = Counter()
        rows = builder.rows(groups[subject], dropped)
        if rows and len(held) + len(rows) <= settings.eval_rows:
            held += rows
            result.evaluation_dropped.update(dropped)
            del groups[subject]
        if len(held) == settings.eval_rows:
            break
    if settings.eval_rows and not held:
        raise DataError(
            f"{settings.source}: no chat can be held out for data.eval_rows = {settings.eval_rows} (chats: "
            f"{len(chats)}, different first messages: {len(groups)}): they share these, have more rows, or are longer "
            f"than data.context_length = {settings.context_length}. Change one of the two, give data.eval_path, or set "
            "data.eval_rows: 0."
        )
    return [chat for group in groups.values() for chat in group], held


class _Builder:
    """Makes rows of chats.

    Attributes:
        turn: what stands around prompts and answers of these chats.
    """

    def __init__(self, settings: DataSettings, tokenizer, turn: PromptFormat, chats: Sequence[Chat | Completion]):
        self.settings, self.encoder, self.turn = settings, Encoder(tokenizer), turn
        self.cut, self.split, self.texts = 0, 0, any(isinstance(chat, Completion) for chat in chats)
        answers = [chat.messages[place] for chat in chats if isinstance(chat, Chat) for place in chat.answers[-1:]]
        self.reasoning = sum(map(reasons, answers))
        if self.texts:
            if other := next((chat for chat in chats if isinstance(chat, Chat)), None):
                raise DataError(
                    f"{settings.source}: record {other.number}: prompt and completion are messages, in other records "
                    "they are texts: put the two into files of their own, and name both in data.sources."
                )
            self.turn = dataclasses.replace(PromptFormat.plain(tokenizer), lead="")
        elif not tokenizer.chat_template:
            raise DataError(
                f"{settings.source}: chats need a chat template, the tokenizer has none: set model.chat_template to "
                "a Jinja file, such as that of the instruct model of the same family."
            )
        else:
            self.renderer = Renderer(self.encoder, turn)
            if 2 * self.reasoning > len(answers):
                self.turn = self.renderer.generation_prompt()

    def rows(self, chats: Sequence[Chat | Completion], dropped: Counter) -> list[tuple[Chat | Completion, int, Row]]:
        """Chat, length of the prompt of its last answer, and row; chats that are too long are counted in `dropped`."""
        found, batches = [], [chats[start : start + _BATCH] for start in range(0, len(chats), _BATCH)]
        for batch in progress(batches, "building rows"):
            todo = [(chat, rendered) for chat in batch for rendered in self._rendered(chat)]
            for (chat, _), (end, row) in zip(todo, self._encoded([text for _, text in todo]), strict=True):
                if len(row.input_ids) <= self.settings.context_length:
                    found.append((chat, end, row))
                elif shorter := self._without_oldest(chat):
                    self.cut += 1
                    found += self.rows([shorter], dropped)
                else:
                    dropped[TOO_LONG] += 1
        return found

    def _rendered(self, chat: Chat | Completion) -> list[Rendered]:
        if isinstance(chat, Completion):
            prompt = self.turn.before + self.encoder.held(chat.prompt)
            text = prompt + self.encoder.held(chat.text) + self.turn.after
            return [Rendered(text, [(len(prompt), len(text))], len(prompt))]
        if self.settings.train_on == "last":
            chat = dataclasses.replace(chat, answers=chat.answers[-1:])
        try:
            rows = self.renderer.rows(chat)
        except DataError as error:
            raise DataError(f"{self.settings.source}: {error}") from error
        self.split += len(rows) > 1
        return rows

    def _without_oldest(self, chat: Chat | Completion) -> Chat | None:
        """The chat without its oldest turn, a message of the user and all that follows it up to the next one."""
        if isinstance(chat, Completion) or self.settings.too_long == "drop":
            return None
        users = [place for place, message in enumerate(chat.messages) if message["role"] == "user"]
        if len(users) < 2 or users[1] > chat.answers[-1]:
            return None
        first, gone = users[0], users[1] - users[0]
        answers = [place - gone for place in chat.answers if place >= users[1]]
        return dataclasses.replace(chat, messages=chat.messages[:first] + chat.messages[users[1] :], answers=answers)

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

    def notes(self, chats: int) -> list[str]:
        """What is worth knowing about the rows, for the report."""
        notes = []
        if self.texts:
            notes.append("prompts and completions are texts: no chat template goes around them, in training and after")
        if self.cut:
            notes.append(f"the oldest turns of chats longer than context_length are cut: {self.cut} turns")
        if self.split:
            notes.append(
                f"{self.split} chats make a row for each answer: the chat template writes earlier turns in another way "
                "than the last one"
            )
        if self.reasoning:
            notes.append(f"{self.reasoning} last answers hold reasoning, which is trained with them")
        return notes + self.encoder.notes()
