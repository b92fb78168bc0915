"""Facts hidden in a long text at a known depth: LagKV's passkey, one of several keys, several values of one key.

A row is `{"input_ids", "prompt_length", "answers", "depth"}` of at most `length` tokens, prompt and answer together, as
near to it as whole sentences allow. Source of the passkey's text: arXiv 2305.16300, as in LagKV, arXiv 2504.04704.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from lrsa.evaluation.score import Score
from lrsa.prompt import PromptFormat

PASSKEY_FILLER = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",)
FILLER = (
    "The train to the coast leaves twice a day and takes about four hours.",
    "Most of the shops in the old town close early on Wednesdays.",
    "She planted the tomatoes along the south wall, where the light is best.",
    "The committee met in the library to talk about the new roof.",
    "A light rain had fallen during the night, and the paths were still wet.",
    "He kept the letters in a wooden box under the stairs.",
    "The museum has added a room about the history of printing.",
    "Several farmers in the valley have begun to grow hops again.",
    "The bridge was repaired last summer, but the road is still narrow.",
    "On Sundays the bakery sells a dark bread that is baked with honey.",
)
ROOMS = ("amber", "blue", "copper", "garden", "ivory", "north", "silver", "violet")
INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there."
)


def passkey_rows(
    tokenizer, turn: PromptFormat, length: int, depths: Sequence[float], count: int, seed: int = 0, digits: int = 16
) -> list[dict]:
    """A key of so many digits, said twice at one place; `count` rows for each depth, a share of the text between 0 and
    1.

    Raises:
        ValueError: when `length` holds no such row.
    """
    rng, question = random.Random(f"passkey {digits} {length} {seed}"), "What is the pass key? Answer with the number."
    rows = []
    for depth in [depth for depth in depths for _ in range(count)]:
        key = _number(rng, digits)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        rows.append(_row(tokenizer, turn, length, PASSKEY_FILLER, [(depth, needle)], question, key, rng))
    return rows


def multi_key_rows(
    tokenizer, turn: PromptFormat, length: int, depths: Sequence[float], count: int, seed: int = 0, keys: int = 4
) -> list[dict]:
    """Codes of several rooms at random depths, one of which, at the depth of the row, is asked for."""
    rng, rows = random.Random(f"multi key {length} {seed}"), []
    for depth in [depth for depth in depths for _ in range(count)]:
        rooms, codes = rng.sample(ROOMS, keys), [_number(rng, 5) for _ in range(keys)]
        texts = [f"The access code of the {room} room is {code}." for room, code in zip(rooms, codes, strict=True)]
        places = [(depth, texts[0]), *((rng.random(), text) for text in texts[1:])]
        question = f"What is the access code of the {rooms[0]} room? Answer with the number."
        rows.append(_row(tokenizer, turn, length, FILLER, places, question, codes[0], rng))
    return rows


def multi_value_rows(
    tokenizer, turn: PromptFormat, length: int, depths: Sequence[float], count: int, seed: int = 0, values: int = 3
) -> list[dict]:
    """Several codes of one room at random depths, all of which are asked for, in any order; `depth` is None."""
    rng, rows = random.Random(f"multi value {length} {seed}"), []
    for _ in range(len(depths) * count):
        room, codes = rng.choice(ROOMS), [_number(rng, 5) for _ in range(values)]
        texts = [f"One of the access codes of the {room} room is {code}." for code in codes]
        places = list(zip(sorted(rng.random() for _ in texts), texts, strict=True))
        question = f"What are all the access codes of the {room} room? Answer with the numbers, separated by commas."
        row = _row(tokenizer, turn, length, FILLER, places, question, ", ".join(codes), rng)
        rows.append(row | {"depth": None})
    return rows


def score_numbers(generated: Sequence[str], rows: Sequence[dict], seed: int = 0) -> dict[str, Score]:
    """Share of the right numbers that an answer holds; of a single number, the share of its digits in place."""
    pairs = zip(generated, (row["answers"][0] for row in rows), strict=True)
    return {
        "accuracy": Score.from_rows(
            [_numbers_right(answer, gold) for answer, gold in pairs],
            "numbers right (of one number: digits in place)",
            seed,
        )
    }


def _numbers_right(answer: str, gold: str) -> float:
    numbers = re.findall(r"\d+", gold)
    found = [number in re.findall(r"\d+", answer) for number in numbers]
    if len(numbers) == 1 and not all(found):
        digits = re.sub(r"\D", "", answer)
        return sum(a == b for a, b in zip(digits, gold, strict=False)) / len(gold)
    return sum(found) / len(numbers)


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _row(tokenizer, turn, length, filler, needles, question, answer, rng) -> dict:
    """The longest prompt that fits; needles `(depth, text)` stand between whole sentences."""
    sentences = [rng.choice(filler) for _ in range(length // 4)]

    def prompt(count: int) -> list[int]:
        text = list(sentences[:count])
        for depth, needle in sorted(needles, reverse=True):
            text.insert(round(depth * count), needle)
        text = turn.prompt(f"{INTRO}\n\n{' '.join(text)}\n\n{question}")
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    end = tokenizer(turn.lead + answer + turn.after, add_special_tokens=False)["input_ids"]
    room = length - len(end)
    count = _most_that_fit(lambda count: len(prompt(count)) <= room, len(sentences))
    if count < 1:
        raise ValueError(f"{length} tokens hold no text around a fact and its question: raise the length.")
    ids = prompt(count)
    return {"input_ids": ids + end, "prompt_length": len(ids), "answers": [answer], "depth": needles[0][0]}


def _most_that_fit(fits: Callable[[int], bool], most: int) -> int:
    """Largest number up to `most` that fits, 0 when not even 1 does, by halving."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
