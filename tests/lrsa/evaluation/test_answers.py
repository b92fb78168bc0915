"""Generated answers and what they score: known values, a slow reference, and rows that do not disturb each other."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lrsa import LRSAConfig, apply_lrsa
from lrsa.evaluation import evaluate_question_answering, evaluate_retrieval, generate_answers
from lrsa.evaluation.measure.question_answering import exact_match, f1, score_question_answering
from lrsa.evaluation.measure.retrieval import symbols_in_place

CONFIG = LRSAConfig(sink_size=2, lag_size=8, top_k=2)
END = 1
STEPS = 4


@pytest.fixture
def tokenizer():
    words = ["<pad>", "<end>", *(f"w{i}" for i in range(2, 48))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>")


def make_rows(count=7, seed=0):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(2, 48) for _ in range(rng.randrange(25, 60))]
        answer = " ".join(f"w{i}" for i in ids[-(STEPS - 1) :])
        rows.append({"input_ids": [*ids, END], "prompt_length": len(ids) - STEPS + 1, "answers": [answer]})
    return rows


def slow_answer(model, row, steps=STEPS):
    """The largest logit of a whole forward, token after token, without any cache."""
    ids = row["input_ids"][: row["prompt_length"]]
    new = []
    for _ in range(steps):
        new.append(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item())
        if new[-1] == END:
            break
    return " ".join(f"w{i}" for i in new if i > END)


@pytest.mark.parametrize("compressed", [False, True])
def test_batch_of_different_lengths_equals_slow_reference_in_row_order(random_llama, tokenizer, compressed):
    rows = make_rows()
    if compressed:
        apply_lrsa(random_llama, CONFIG)
    with torch.no_grad():
        expected = [slow_answer(random_llama, row) for row in rows]
    assert len(set(expected)) > 1
    assert generate_answers(random_llama, tokenizer, rows, batch_size=3) == expected
    assert generate_answers(random_llama, tokenizer, rows, batch_size=1) == expected


def test_compression_changes_answers(random_llama, tokenizer):
    """Otherwise the test above would not notice a cache that keeps everything."""
    rows = make_rows()
    full = generate_answers(random_llama, tokenizer, rows)
    assert generate_answers(apply_lrsa(random_llama, CONFIG), tokenizer, rows) != full


def test_answer_stops_at_the_end_token_of_the_model_or_the_tokenizer(random_llama, tokenizer):
    rows = make_rows(3)
    long = [answer.split() for answer in generate_answers(random_llama, tokenizer, rows, max_new_tokens=6)]
    third = tokenizer.convert_tokens_to_ids(long[0][2])
    random_llama.generation_config.eos_token_id = [45, third]
    stopped = generate_answers(random_llama, tokenizer, rows, max_new_tokens=6)
    cut = [words[: words.index(long[0][2])] if long[0][2] in words else words for words in long]
    assert [answer.split() for answer in stopped] == cut
    assert len(cut[0]) <= 2


def test_answer_stops_at_the_end_of_turn_of_the_rows(random_llama, tokenizer):
    """A chat template's end of turn is neither the model's nor the tokenizer's end of text."""
    rows = make_rows()
    first = [slow_answer(random_llama, row) for row in rows]
    turn = int(first[0].split()[1][1:])
    tokenizer.add_special_tokens({"additional_special_tokens": [f"w{turn}"]})
    ended = [row | {"input_ids": [*row["input_ids"][:-1], turn]} for row in rows]
    assert generate_answers(random_llama, tokenizer, ended)[0] == first[0].split()[0]
    assert generate_answers(random_llama, tokenizer, rows)[0] != first[0].split()[0]


def test_generation_settings_of_the_model_are_left_aside_and_put_back(random_llama, tokenizer):
    rows = make_rows(3)
    plain = generate_answers(random_llama, tokenizer, rows, max_new_tokens=8)
    own = random_llama.generation_config
    own.do_sample, own.repetition_penalty, own.temperature = True, 5.0, 2.0
    assert generate_answers(random_llama, tokenizer, rows, max_new_tokens=8) == plain
    assert random_llama.generation_config is own


def test_retrieval_counts_symbols_in_place(random_llama, tokenizer):
    rows = make_rows(2)
    first, second = (answer.split() for answer in generate_answers(random_llama, tokenizer, rows, max_new_tokens=4))
    rows[0]["answers"] = ["no match here at", " ".join(first)]
    rows[1]["answers"] = [" ".join(["x", *second[1:]])]
    progress = []
    told = {"progress": lambda *batch: progress.append(batch)}
    score = evaluate_retrieval(random_llama, tokenizer, rows, max_new_tokens=4, batch_size=1, **told)
    assert score.per_row == (1.0, 0.75)
    assert (score.value, score.n) == (0.875, 2)
    assert sorted(progress) == [([0], [" ".join(first)]), ([1], [" ".join(second)])]


def test_symbols_in_place():
    assert symbols_in_place("4 8 2", "4 8 2") == 1
    assert symbols_in_place("4 8 2 and more", "4 8 2") == 1
    assert symbols_in_place("8 4 2", "4 8 2") == pytest.approx(1 / 3)
    assert symbols_in_place("4", "4 8 2") == pytest.approx(1 / 3)
    assert symbols_in_place("", "4 8 2") == 0
    assert (symbols_in_place("", ""), symbols_in_place("4", "")) == (1, 0)


def test_f1_and_exact_match_are_those_of_squad():
    assert exact_match("The Denver  Broncos!", "denver broncos") == 1
    assert exact_match("Denver", "Denver Broncos") == 0
    assert f1("the Denver team", "Denver Broncos") == pytest.approx(0.5)
    assert f1("a a b b c", "b b b c d") == pytest.approx(2 * 3 / (3 + 5))  # articles go, repeated words count
    assert f1("Berlin", "Paris") == 0
    assert f1("", "Paris") == 0
    assert f1("", "") == 1


def test_best_answer_and_first_line_count():
    rows = [{"answers": ["Paris", "the city of Paris"]}, {"answers": ["42"]}]
    scores = score_question_answering(["city of Paris\nQuestion: what else", "41"], rows)
    assert scores["f1"].per_row == (1.0, 0.0)
    assert scores["exact_match"].per_row == (1.0, 0.0)


def test_question_answering_scores_what_was_generated(random_llama, tokenizer):
    rows = make_rows(3)
    answers = generate_answers(random_llama, tokenizer, rows, max_new_tokens=STEPS)
    rows[1]["answers"] = [answers[1]]
    found = evaluate_question_answering(random_llama, tokenizer, rows, max_new_tokens=STEPS)
    assert found == score_question_answering(answers, rows)
    assert found["exact_match"].per_row[1] == 1


def test_errors_name_the_row_and_the_field(random_llama, tokenizer):
    rows = make_rows(2)
    del rows[1]["answers"]
    with pytest.raises(ValueError, match="row 1 has no answers"):
        generate_answers(random_llama, tokenizer, rows)
    with pytest.raises(ValueError, match="no evaluation rows"):
        generate_answers(random_llama, tokenizer, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        generate_answers(random_llama, tokenizer, make_rows(2), batch_size=0)
