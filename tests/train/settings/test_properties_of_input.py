"""Any records and any settings of the data: rows that are right, or a message; and settings and YAML of any kind."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data.settings import DataSettings
from lrsa import LRSAConfig
from tests.data.test_properties import is_message
from train.settings.errors import SettingsError
from train.settings.load import load_settings
from train.settings.sources import to_yaml

# Fixtures hold tokenizers and directories that examples share.
common = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}

odd = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=12), st.just("auto"), st.just(2**70)
)
values = st.recursive(
    odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@settings(max_examples=150, **common)
@given(st.one_of(values, st.dictionaries(st.sampled_from([*LRSAConfig(), "extra"]), values)))
def test_a_configuration_of_a_stranger(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp()
    (directory / "lrsa_config.json").write_text(json.dumps(content))
    try:
        config = LRSAConfig.from_pretrained(directory)
    except ValueError as error:
        assert "lrsa_config.json" in str(error)
    else:
        assert isinstance(content, dict) and 1 <= config.top_k <= config.lag_size
        assert LRSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


NAMES = {
    "model": ["name_or_path", "revision", "dtype", "trust_remote_code", "chat_template"],
    "lrsa": list(LRSAConfig()),
    "lora": ["r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"],
    "data": [*DataSettings.model_fields],
    "train": [
        "output_dir",
        "max_steps",
        "learning_rate",
        "seed",
        "deepspeed",
        "packing",
        "optim",
        "save_steps",
        "fp16",
    ],
    "eval": ["enabled", "keep_ratios", "rows", "batch_size", "control"],
}
sections = st.fixed_dictionaries(
    {},
    optional={
        name: values | st.dictionaries(st.sampled_from([*names, "odd"]), values) for name, names in NAMES.items()
    },
)


@settings(max_examples=150, **common)
@given(
    sections | values,
    st.lists(st.text(max_size=20) | st.sampled_from(["lrsa.top_k=[", "data.x.y=1", "train=1"]), max_size=2),
)
def test_settings_of_any_kind(tmp_path_factory, content, overrides):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(to_yaml(content), encoding="utf-8", errors="surrogatepass")
    with pytest.raises(SettingsError) as told:  # no example names a model
        load_settings(str(file), overrides)
    assert is_message(told.value)


@settings(max_examples=100, **common)
@given(st.binary(max_size=60) | st.text(alphabet="ab:- \n\t[]{}&*!#|>'\"%@`,?0.", max_size=60).map(str.encode))
def test_settings_of_any_bytes(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as told:
        load_settings(str(file))
    assert is_message(told.value)


plain = st.lists(st.sampled_from(["river", "fox", "dog"]), min_size=1, max_size=30).map(" ".join)
odd_words = ["river", "ß", "\u2028", "{context}", "<s>", "</s>", "𝄞", "\x00", "\n\n", ""]
odd_texts = plain | st.lists(st.sampled_from(odd_words), max_size=30).map(" ".join)


def layouts(texts, least: int) -> dict[str, st.SearchStrategy]:
    """One record in each layout, every list of at least so many things."""

    def some(things, most=3):
        return st.lists(things, min_size=least, max_size=most)

    answers = some(st.fixed_dictionaries({"text": texts}))
    qas = some(st.fixed_dictionaries({"question": texts, "answers": answers}))
    titled = some(st.tuples(texts, some(texts)))
    facts = some(st.tuples(texts, st.integers(0, 2)))
    found = {
        "text": {"text": texts},
        "generic": {"question": texts, "context": texts | some(texts), "answers": texts | some(texts)},
        "hotpotqa": {"question": texts, "answer": texts, "context": titled, "supporting_facts": facts},
        "squad": {"paragraphs": some(st.fixed_dictionaries({"context": texts, "qas": qas}))},
    }
    return {name: st.fixed_dictionaries(fields) for name, fields in found.items()}


finite = st.recursive(
    st.none() | st.booleans() | st.integers() | odd_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "title"]), inner, max_size=3),
)
broken = finite | st.dictionaries(st.sampled_from(["question", "context", "answers", "text", "paragraphs"]), finite)
GOOD, ODD = layouts(plain, least=1), layouts(odd_texts, least=0)


@st.composite
def sources(draw) -> tuple[dict, list]:
    kind = draw(st.sampled_from(["qa", "text"]))
    layout = draw(st.sampled_from(["generic", "hotpotqa", "squad"])) if kind == "qa" else "text"
    spoiled = draw(st.booleans())
    records = draw(st.lists(ODD[layout] | broken) if spoiled else st.lists(GOOD[layout], min_size=3, max_size=8))
    options = {
        "kind": kind,
        "context_length": draw(st.sampled_from([8, 300, 500])),
        "eval_rows": draw(st.integers(0, 4)),
    }
    options["format"] = draw(st.sampled_from(["generic", "squad", "hotpotqa"])) if spoiled else "auto"
    options["max_rows"] = draw(st.none() | st.integers(1, 5))
    options["prompt_template"] = draw(st.sampled_from([None, "{context}\n{question}", "{question} {context} x"]))
    options["join_documents"] = draw(st.booleans())
    return options, records


def test_rows_of_any_records(tmp_path_factory, byte_tokenizer, blank_tokenizer):
    made, refused = [], []

    @settings(max_examples=120, **common)
    @given(sources(), st.booleans(), st.integers(0, 3))
    def check(source, blank, seed):
        options, records = source
        file = tmp_path_factory.getbasetemp() / "records.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        tokenizer = blank_tokenizer if blank else byte_tokenizer
        try:
            corpus = data.load(DataSettings(path=str(file), **options), tokenizer, seed, 20)
        except data.DataError as error:
            assert is_message(error)
            refused.append(str(error)[-150:])
            return
        assert len(corpus.train) and len(corpus.evaluation) <= options["eval_rows"]
        assert len(corpus.train) <= (options["max_rows"] or len(corpus.train))
        for row in corpus.train:
            assert 1 < len(row["input_ids"]) == len(row["labels"]) <= options["context_length"]
            trained = [label for label in row["labels"] if label != -100]
            assert trained and all(
                label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True)
            )
        for row in corpus.evaluation:
            assert len(row["input_ids"]) <= options["context_length"]
        made.append(options["kind"])

    check()
    assert made.count("qa") >= 3 and made.count("text") >= 3, refused


@settings(max_examples=25, **common)
@given(st.data())
def test_generated_rows_of_any_settings(byte_tokenizer, drawn):
    numbers = {
        name: drawn.draw(st.integers(1, most))
        for name, most in {"keys": 80, "digits": 4, "questions": 4, "rows": 3}.items()
    }
    task = drawn.draw(st.sampled_from(["key_value", "passkey"]))
    length = drawn.draw(st.integers(8, 200))
    options = DataSettings(kind="synthetic", context_length=length, eval_rows=1, synthetic={"task": task, **numbers})
    try:
        corpus = data.load(options, byte_tokenizer, 0, 20)
    except data.DataError as error:
        assert str(error).startswith("data.synthetic: ")
    else:
        assert all(len(row["input_ids"]) <= length for row in corpus.train)
