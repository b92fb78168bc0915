"""Generated retrieval rows, and the tiny base model that can answer them."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from data.synthetic.text import NAMES, key_value_row, passkey_row

TINY_BASE = Path(__file__).parents[2] / "data" / "tiny_base"


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY_BASE)


@pytest.fixture(scope="module")
def pieces(byte_tokenizer):
    """Another tokenizer, for which most words cost several tokens."""
    return byte_tokenizer


ROWS = [key_value_row, passkey_row]


@pytest.mark.parametrize("make", ROWS)
def test_same_seed_same_rows(make, words):
    first, again = ([make(rng, words, 128) for _ in range(3)] for rng in (random.Random(5), random.Random(5)))
    assert first == again
    assert first != [make(random.Random(6), words, 128) for _ in range(3)]


@pytest.mark.parametrize("make", ROWS)
@pytest.mark.parametrize(("kind", "shortest"), [("words", 96), ("pieces", 128)])  # four facts take so many tokens
@pytest.mark.parametrize("context_length", ["shortest", 256, 1000])
def test_length_is_near_below_the_limit_and_never_above(make, kind, shortest, context_length, request):
    context_length = shortest if context_length == "shortest" else context_length
    tokenizer, rng = request.getfixturevalue(kind), random.Random(1)
    slack = 0 if kind == "words" else 12  # a longest word more would have been too long
    for _ in range(20):
        row = make(rng, tokenizer, context_length)
        length = len(tokenizer(f"{row['prompt']} {row['answers'][0]}")["input_ids"]) + 1
        assert context_length - slack <= length <= context_length


def test_filler_is_cut_when_words_cost_more_in_company(pieces):
    class Longer:
        """A tokenizer for which a long text takes a quarter more tokens than its words do."""

        def __call__(self, text):
            ids = pieces(text)["input_ids"]
            return {"input_ids": ids + [0] * (max(0, len(ids) - 200) // 4)}

    row = key_value_row(random.Random(1), Longer(), 600)
    assert 550 <= len(Longer()(f"{row['prompt']} {row['answers'][0]}")["input_ids"]) + 1 <= 600


@pytest.mark.parametrize(("make", "asked"), [(key_value_row, 2), (passkey_row, 4)])
def test_answer_stands_once_and_is_the_one_asked_for(make, asked, words):
    rng = random.Random(2)
    for _ in range(200):
        row = make(rng, words, 256)
        (answer,) = row["answers"]
        question = " ".join(row["prompt"].split()[-asked:])
        assert row["prompt"].count(f" {answer} ") == 1
        assert f"{question} {answer} ." in row["prompt"]


def test_further_questions_ask_for_other_facts_of_the_row(words):
    rng = random.Random(7)
    for _ in range(50):
        row = key_value_row(rng, words, 256, questions=3)
        text = " ".join([row["prompt"], *row["answers"], *(part for turn in row["more"] for part in turn)])
        assert len(row["more"]) == 2 and len({answer for _, answer in row["more"]} | set(row["answers"])) == 3
        for question, answer in row["more"]:
            assert f"{question.removeprefix('. ')} {answer} ." in row["prompt"]
        assert len(words(text)["input_ids"]) + 1 == 256


def test_facts_stand_at_all_depths(words):
    rng = random.Random(3)
    depths = []
    for _ in range(300):
        row = key_value_row(rng, words, 256)
        depths.append(row["prompt"].index(row["answers"][0]) / len(row["prompt"]))
    histogram = torch.histc(torch.tensor(depths), bins=5, min=0, max=1)
    assert histogram.min() > 30


def test_settings_are_honoured(words):
    row = key_value_row(random.Random(4), words, 256, keys=6, digits=2)
    assert sum(name in row["prompt"].split() for name in NAMES) == 6
    assert len(row["answers"][0].split()) == 2


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (dict(context_length=20), "context_length"),
        (dict(keys=len(NAMES) + 1), "keys"),
        (dict(keys=0), "keys"),
        (dict(digits=0), "digits"),
        (dict(keys=11, digits=1), "digits"),
        (dict(keys=2, questions=3), "questions"),
    ],
)
def test_impossible_settings_name_the_field(settings, field, words):
    with pytest.raises(ValueError, match=f"^{field} "):
        key_value_row(random.Random(0), words, **(dict(context_length=256) | settings))


def test_the_tiny_base_speaks_words_and_answers_with_the_full_cache(words):
    """The committed model, as the quickstart loads it: its accuracy on new rows, each answer ended."""
    assert sum(path.stat().st_size for path in TINY_BASE.iterdir()) <= 3e6
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE).eval()
    rng = random.Random(99)
    rows = [key_value_row(rng, words, 256) for _ in range(50)]
    texts = [f"{row['prompt']} {row['answers'][0]}" for row in rows]
    ids = torch.tensor([[*words(text)["input_ids"], words.eos_token_id] for text in texts])
    assert ids.shape == (50, 256) and (ids[:, 0] == words.bos_token_id).all() and words.pad_token_id is not None
    assert words.decode(ids[0], skip_special_tokens=True) == texts[0]
    with torch.no_grad():
        right = model(ids, logits_to_keep=5).logits[:, :-1].argmax(-1) == ids[:, -4:]
    assert right[:, :3].float().mean() > 0.8
    assert right[:, 3].float().mean() > 0.95
