"""Whatever is put in comes out right or is refused with a message: never wrong, never a crash without one."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data.settings import DataSettings
from lrsa import LRSACache, LRSAConfig, apply_lrsa, lrsa_attention
from train.problems import SettingsError
from train.settings import load_settings

# Fixtures hold models and directories that examples share and do not change.
common = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}


@st.composite
def configs(draw) -> LRSAConfig:
    lag = draw(st.integers(1, 9))
    return LRSAConfig(
        draw(st.integers(0, 5)), lag, draw(st.integers(1, lag)), draw(st.sampled_from([0.0, 0.5, 1.0, 9.0]))
    )


@st.composite
def attention_inputs(draw, dtypes=(torch.float64,)) -> tuple:
    """Queries, keys and values as models make them, and degenerate ones: equal tokens, large values, one channel."""
    batch, groups, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 60))
    heads, channels = groups * draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8]))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    size, dtype = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0])), draw(st.sampled_from(dtypes))
    query, key, value = (
        torch.randn(batch, count, tokens, channels, dtype=torch.float64) for count in (heads, groups, groups)
    )
    if draw(st.booleans()):  # few distinct tokens: many ties
        key, value = (x[:, :, torch.randint(0, min(3, tokens), (tokens,))] for x in (key, value))
    query, key, value = query.to(dtype), (key * size).to(dtype), value.to(dtype)
    mask = positions = None
    padding = draw(st.sampled_from(["none", "left", "right", "both", "anywhere"]))
    if padding != "none":
        mask = torch.ones(batch, tokens, dtype=torch.long)
        for row in mask:
            first, last = sorted((draw(st.integers(0, tokens)), draw(st.integers(0, tokens))))
            row[: first if padding in ("left", "both") else 0] = 0
            row[last if padding in ("right", "both") else tokens :] = 0
        if padding == "anywhere":
            mask = torch.randint(0, 2, (batch, tokens))
    if draw(st.booleans()):  # packed documents
        starts = torch.rand(batch, tokens) < draw(st.sampled_from([0.02, 0.1, 0.5]))
        positions = torch.stack([_restarting(row.tolist()) for row in starts])
    return query, key, value, mask, positions


def _restarting(starts: list[bool]) -> torch.Tensor:
    position, found = -1, []
    for start in starts:
        position = 0 if start else position + 1
        found.append(position)
    return torch.tensor(found)


dropped = []


@settings(max_examples=150, **common)
@given(attention_inputs(), configs())
def test_attention_equals_its_reference(inputs, config):
    query, key, value, mask, positions = inputs
    options = {"position_ids": positions, "attention_mask": mask}
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    found = lrsa_attention(*leaves, config, impl="rectangles", **options)
    expected = lrsa_attention(query, key, value, config, impl="reference", **options)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert torch.isfinite(found).all()
    if mask is not None:
        assert not found.transpose(1, 2)[mask == 0].any(), "padding attends to nothing"
    if found.requires_grad:  # not where all is padding
        assert all(torch.isfinite(x).all() for x in torch.autograd.grad(found.sum(), leaves))
    dropped.append(config.compressed_windows(query.shape[2]) > 0 and mask is None and positions is None)


def test_the_examples_did_drop_tokens():
    assert sum(dropped) >= 5


@settings(max_examples=60, **common)
@given(attention_inputs(dtypes=(torch.float32, torch.bfloat16, torch.float16)), configs())
def test_attention_in_low_precision(inputs, config):
    """Outputs are averages of values, so their error is a few roundings of the largest score and value."""
    query, key, value, mask, positions = inputs
    options = {"position_ids": positions, "attention_mask": mask}
    found = lrsa_attention(query, key, value, config, **options)
    expected = lrsa_attention(query, key, value, config, impl="reference", **options)
    assert found.dtype == query.dtype and torch.isfinite(found).all()
    largest = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max() * query.shape[-1] ** -0.5
    budget = 8 * torch.finfo(query.dtype).eps * (1 + largest) * value.double().abs().max()
    assert (found.double() - expected.double()).abs().max() <= budget


@settings(max_examples=60, **common)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=5), st.data())
def test_attention_of_any_shapes(shape, drawn):
    """Shapes that do not fit are refused with a message."""
    query = torch.randn(shape)
    sizes = drawn.draw(st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape)))
    key = torch.randn(drawn.draw(st.sampled_from([shape, sizes])))
    mask = drawn.draw(st.sampled_from([None, torch.ones(1, 2), torch.ones(2, 2, 2)]))
    try:
        found = lrsa_attention(query, key, key, LRSAConfig(1, 2, 1), attention_mask=mask)
    except ValueError as error:
        assert str(error)
    else:
        assert found.shape == query.shape


@settings(max_examples=40, **common)
@given(configs(), st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_any_chunks_over_the_cache_equal_one_forward(random_llama, config, chunks, drawn):
    model = apply_lrsa(random_llama, config)
    tokens = sum(chunks)
    pads = drawn.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=3))
    ids = torch.randint(1, 48, (len(pads), tokens), generator=torch.Generator().manual_seed(tokens))
    mask = (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, found, start = LRSACache(config), [], 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        for size in chunks:
            stop = start + size
            options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            found.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **options).logits)
            start = stop
    torch.testing.assert_close(torch.cat(found, 1)[mask == 1], expected[mask == 1], atol=1e-9, rtol=0)
    assert cache.layers[0].held() == [config.kept_length(tokens - pad) for pad in pads]


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
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    with pytest.raises(SettingsError) as told:  # no example names a model
        load_settings(str(file), overrides)
    assert str(told.value).strip()


@settings(max_examples=100, **common)
@given(st.binary(max_size=60) | st.text(alphabet="ab:- \n\t[]{}&*!#|>'\"%@`,?0.", max_size=60).map(str.encode))
def test_settings_of_any_bytes(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(content)
    with pytest.raises(SettingsError):
        load_settings(str(file))


odd_words = ["river", "ß", "\u2028", "{context}", "<s>", "</s>", "𝄞", "\x00", "\n\n", ""]
words = st.lists(st.sampled_from(["river", "fox", "dog"]), min_size=1, max_size=30)
texts = (words | st.lists(st.sampled_from(odd_words), max_size=30)).map(" ".join)
question = st.fixed_dictionaries(
    {"question": texts, "context": texts | st.lists(texts, max_size=3), "answers": texts | st.lists(texts, max_size=2)}
)
hotpot = st.fixed_dictionaries(
    {
        "question": texts,
        "answer": texts,
        "context": st.lists(st.tuples(texts, st.lists(texts, max_size=3)), max_size=3),
        "supporting_facts": st.lists(st.tuples(texts, st.integers(0, 2)), max_size=2),
    }
)
squad = st.fixed_dictionaries(
    {
        "paragraphs": st.lists(
            st.fixed_dictionaries(
                {
                    "context": texts,
                    "qas": st.lists(
                        st.fixed_dictionaries(
                            {"question": texts, "answers": st.lists(st.fixed_dictionaries({"text": texts}), max_size=2)}
                        ),
                        max_size=3,
                    ),
                }
            ),
            max_size=3,
        )
    }
)
finite = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "title", "x"]), inner, max_size=3)
    ),
)
broken = finite | st.dictionaries(st.sampled_from(["question", "context", "answers", "text", "paragraphs"]), finite)


@st.composite
def sources(draw) -> tuple[dict, list]:
    kind = draw(st.sampled_from(["qa", "text"]))
    good = (
        st.fixed_dictionaries({"text": texts}) if kind == "text" else draw(st.sampled_from([question, hotpot, squad]))
    )
    spoiled = draw(st.booleans())
    records = draw(st.lists(good | broken if spoiled else good, min_size=0 if spoiled else 3, max_size=12))
    options = {"kind": kind, "context_length": draw(st.integers(8, 300)), "eval_rows": draw(st.integers(0, 4))}
    options["format"] = draw(st.sampled_from(["generic", "squad", "hotpotqa"])) if spoiled else "auto"
    options["max_rows"] = draw(st.none() | st.integers(1, 5))
    options["prompt_template"] = draw(st.sampled_from([None, "{context}\n{question}", "{question} {context} x"]))
    options["join_documents"] = draw(st.booleans())
    return options, records


made, refused = [], []


@settings(max_examples=250, **common)
@given(sources(), st.booleans(), st.integers(0, 3))
def test_rows_of_any_records(tmp_path_factory, byte_tokenizer, blank_tokenizer, source, blank, seed):
    options, records = source
    file = tmp_path_factory.getbasetemp() / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tokenizer = blank_tokenizer if blank else byte_tokenizer
    try:
        corpus = data.load(DataSettings(path=str(file), **options), tokenizer, seed, 20)
    except data.DataError as error:
        assert str(error).strip()
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


def test_the_examples_did_make_rows():
    assert made.count("qa") >= 15 and made.count("text") >= 15, refused


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
