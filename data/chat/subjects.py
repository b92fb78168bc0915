"""Which chats are about the same document: all of them are trained on, or all are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data.chat.messages import Chat, Completion
from data.duplicates import normal_form

LONG = 80  # characters of a line that tells a document


def texts_of(chat: Chat | Completion) -> list[str]:
    """All that is said in a chat."""
    return (
        [chat.prompt, chat.text] if isinstance(chat, Completion) else [message["content"] for message in chat.messages]
    )


def subjects_of(chats: Sequence[Chat | Completion], train: Sequence[Chat | Completion] | None = None) -> list[set[str]]:
    """Of each chat what others about the same document share with it: the long lines of its first message.

    A line that most chats of `train` have (by default of these) is an instruction, and says nothing; where no long line
    is left it is the whole message.
    """
    train = chats if train is None else train
    number = Counter(form for chat in train for form in _long_lines(chat))
    told = {form for form, count in number.items() if count > max(len(train) // 2, 8)}
    return [_long_lines(chat) - told or {normal_form(_first(chat))} for chat in chats]


def _long_lines(chat: Chat | Completion) -> set[str]:
    return {form for line in _first(chat).split("\n") if len(form := normal_form(line)) >= LONG}


def _first(chat: Chat | Completion) -> str:
    if isinstance(chat, Completion):
        return texts_of(chat)[0]
    return next((message["content"] for message in chat.messages if message["role"] == "user"), str(chat.messages))


def groups_of(chats: Sequence[Chat | Completion], subjects: dict[int, set[str]]) -> list[list]:
    """The chats in groups that share no subject with each other."""
    group_of: dict[str, list] = {}
    for chat in chats:
        joined = [chat]
        for group in {id(group): group for form in subjects[id(chat)] if (group := group_of.get(form))}.values():
            joined += group
        group_of |= {form: joined for member in joined for form in subjects[id(member)]}
    return list({id(group): group for group in group_of.values()}.values())
