"""Long-context retrieval in plain words: a few facts hidden among filler words, one of them asked for at the end.

The text is words and digits separated by blanks, lower case: a word-level tokenizer reads it word by word, and any
subword tokenizer reads it too; digits stand apart ("4 8 2") so that every digit is a token of its own. Everything comes
from the `random.Random` that is passed in: the same seed and tokenizer give the same rows on every machine.
"""

from __future__ import annotations

import random
from functools import lru_cache

NAMES = (  # noqa: SIM905
    "amber anna apple arrow basil bella birch boston cedar clara coral daisy delta eagle ember falcon fern ginger "
    "grace harbor hazel iris ivory jade jasper juniper kiwi lemon lily lotus maple marble mango nora olive onyx "
    "opal orchid otter panda pearl pepper piano poppy quartz raven robin rose ruby sage salem silver stella tiger "
    "topaz tulip velvet violet walnut willow winter zebra zinc"
).split()

FILLER = (  # noqa: SIM905
    "a about after again air all along also always and animal another answer any around away back be because been "
    "before below between big book both boy but by call came can car change city close come could country cut day "
    "did different do does down each earth eat end enough even every eye face family far father feet few find first "
    "follow food for form found four from get girl give go good great group grow had hand hard has have head hear "
    "help her here high him his home house how idea if important in into it just keep kind know land large last "
    "late leave left letter life light like line little live long look made make man many may me mean men might "
    "mile more most mother mountain move much must my near need never new next night no not now number off often "
    "old on once one only open or our out over own page paper part people picture place plant play point put read "
    "real right river run said same saw say school sea second see sentence set she should show side small so some "
    "something song soon sound spell state still stop story study such"
).split()


def key_value_row(
    rng: random.Random, tokenizer, context_length: int, keys: int = 4, digits: int = 3, questions: int = 1
) -> dict[str, str | list]:
    """Facts "code amber 4 8 2 ." at random depths in filler words; the prompt ends by asking for one of them.

    Args:
        rng: the only source of randomness.
        tokenizer: measures length; the row is `tokenizer(prompt + " " + answer)` and one end-of-text token.
        context_length: most tokens a row may have; the row is as near below it as whole words allow.
        keys: number of facts, each with its own name and code.
        digits: digits of each code.
        questions: how many of the facts are asked for, one after the other, each after the answer to the last.

    Returns:
        `{"prompt": str, "answers": [str], "more": [(question, answer), ...]}`; the answer stands exactly once in the
        prompt; `more` holds what follows the first answer, ". code onyx" and "1 3 5", when there are several questions.

    Raises:
        ValueError: when the facts do not fit, or there are not that many names, codes or questions.
    """
    if not 1 <= keys <= len(NAMES):
        raise ValueError(f"keys must be between 1 and {len(NAMES)}, got {keys}: that many names exist.")
    if not 1 <= questions <= keys:
        raise ValueError(
            f"questions must be between 1 and keys ({keys}), got {questions}: each fact is asked for once."
        )
    if digits < 1 or keys > 10**digits:
        raise ValueError(f"digits must be at least 1 and give {keys} different codes, got {digits}: raise digits.")
    names = rng.sample(NAMES, keys)
    codes = [" ".join(f"{code:0{digits}d}") for code in rng.sample(range(10**digits), keys)]
    facts = [f"code {name} {code} ." for name, code in zip(names, codes, strict=True)]
    first, *others = rng.sample(range(keys), questions)
    more = [(f". code {names[i]}", codes[i]) for i in others]
    answers = " ".join([codes[first], *(part for pair in more for part in pair)])
    row = _row(rng, tokenizer, context_length, facts, f"code {names[first]}", answers)
    return row | {"answers": [codes[first]], "more": more}


def passkey_row(rng: random.Random, tokenizer, context_length: int, digits: int = 5) -> dict[str, str | list[str]]:
    """One fact "the pass key is 4 8 2 1 7 ." at a random depth in filler words; the prompt ends by asking for it.

    Args, result and errors as in `key_value_row`.
    """
    if digits < 1:
        raise ValueError(f"digits must be at least 1, got {digits}: raise digits.")
    code = " ".join(str(rng.randrange(10)) for _ in range(digits))
    return _row(rng, tokenizer, context_length, [f"the pass key is {code} ."], "the pass key is", code)


def _row(rng, tokenizer, context_length, facts, question, answer) -> dict[str, str | list[str]]:
    """Put `facts` in order among as many filler words as fit, then ask `question`."""
    needed = _length(tokenizer, " ".join([*facts, question, answer]))
    room = context_length - needed
    if room < 0:
        raise ValueError(
            f"context_length {context_length} is too short for {len(facts)} facts, question and answer, which take "
            f"{needed} tokens: raise context_length, or ask for fewer keys or digits."
        )
    costs = _filler_costs(tokenizer)
    filler: list[str] = []
    while costs[word := rng.choice(FILLER)] <= room:
        filler.append(word)
        room -= costs[word]
    depths = sorted((rng.random() for _ in facts), reverse=True)
    while True:
        pieces = list(filler)
        for depth, fact in zip(depths, facts, strict=True):  # deepest first, so that no insertion moves another
            pieces.insert(int(depth * (len(filler) + 1)), fact)
        prompt = " ".join([*pieces, question])
        excess = _length(tokenizer, f"{prompt} {answer}") - context_length
        if excess <= 0:
            return {"prompt": prompt, "answers": [answer]}
        assert filler, "facts alone were measured to fit"
        del filler[-max(1, excess // max(costs.values())) :]  # words can cost more in company than alone


def _length(tokenizer, text: str) -> int:
    """Tokens of a row, with what the tokenizer puts around it and the end-of-text token that follows the answer."""
    return len(tokenizer(text)["input_ids"]) + 1


@lru_cache(maxsize=8)
def _filler_costs(tokenizer) -> dict[str, int]:
    """Tokens that each filler word adds to a text."""
    alone = len(tokenizer("the the")["input_ids"])
    return {word: len(tokenizer(f"the {word} the")["input_ids"]) - alone for word in FILLER}
