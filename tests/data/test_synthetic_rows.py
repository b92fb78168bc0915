import re

import pytest

import data
from tests.lrsa.test_prompt import CHATML, with_template


def load(tokenizer, seed=0, eval_rows=5, context_length=200, **synthetic) -> data.Corpus:
    settings = data.DataSettings(
        kind="synthetic", context_length=context_length, eval_rows=eval_rows, synthetic={"rows": 20} | synthetic
    )
    return data.load(settings, tokenizer, seed, 36)


@pytest.mark.parametrize("which", ["byte_tokenizer", "blank_tokenizer"])
@pytest.mark.parametrize("task", ["key_value", "passkey"])
def test_rows_ask_for_digits_that_the_prompt_holds(task, which, request):
    tokenizer = request.getfixturevalue(which)
    corpus = load(tokenizer, task=task, digits=4)
    assert len(corpus.train) == 20 and len(corpus.evaluation) == 5
    for row in corpus.train:
        answer = tokenizer.decode([label for label in row["labels"] if label != -100]).strip()
        digits = answer.removesuffix("</s>")
        prompt = tokenizer.decode(
            [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        )
        assert answer.endswith("</s>") and len(digits.split()) == 4 and prompt.count(digits) == 1
        assert 180 < len(row["input_ids"]) <= 200 and row["input_ids"][0] == tokenizer.bos_token_id


def test_evaluation_rows_are_made_as_training_rows_and_are_others(byte_tokenizer):
    corpus = load(byte_tokenizer)
    trained = [byte_tokenizer.decode(ids) for ids in corpus.train["input_ids"]]
    for row in corpus.evaluation:
        prompt, rest = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
        assert byte_tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] == prompt
        assert byte_tokenizer.decode(rest) == f" {row['answers'][0]}</s>"
        assert not any(text.startswith(row["prompt"]) for text in trained)


def test_the_chat_template_counts_towards_the_length(byte_tokenizer):
    corpus = load(with_template(byte_tokenizer, CHATML))
    lengths = [len(ids) for ids in corpus.train["input_ids"]]
    assert min(lengths) > 180 and max(lengths) <= 200
    row = corpus.evaluation[0]
    assert row["prompt"].startswith("<|im_start|>user\n") and row["prompt"].endswith("<|im_start|>assistant\n")


def test_the_seed_decides(byte_tokenizer):
    assert load(byte_tokenizer).train["input_ids"][:] == load(byte_tokenizer).train["input_ids"][:]
    assert load(byte_tokenizer).train["input_ids"][:] != load(byte_tokenizer, seed=1).train["input_ids"][:]


def test_facts_that_do_not_fit_name_the_setting(byte_tokenizer):
    with pytest.raises(data.DataError, match=r"data.synthetic: context_length"):
        load(byte_tokenizer, context_length=30)


def test_several_questions_train_every_answer_and_nothing_between(byte_tokenizer):
    corpus = load(byte_tokenizer, context_length=400, eval_rows=2, keys=3, digits=2, questions=3)
    for row in corpus.train:
        text = byte_tokenizer.decode(row["input_ids"])
        pairs = re.findall(r"code (\w+) (\d \d)", text)
        facts, asked = dict(pairs[:3]), pairs[3:]
        assert sorted(facts) == sorted(name for name, _ in asked)
        assert all(facts[name] == code for name, code in asked)
        answers = byte_tokenizer.decode([label for label in row["labels"] if label != -100])
        assert answers == "".join(f" {code}" for _, code in asked) + "</s>"
        assert len(row["input_ids"]) <= 400
    for row in corpus.evaluation:
        assert "code" not in byte_tokenizer.decode(row["input_ids"][row["prompt_length"] :])
    sample = [text for text, trained in corpus.report.sample if trained]
    assert len(sample) == 3 and not any("code" in text for text in sample)
