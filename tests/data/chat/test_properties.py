"""Any records under kind chat: rows that end with a trained end of turn and fit, or a message."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from tests.data.chat.test_rows import CHATML, MARKED, THINKING, with_template

TEXTS = st.sampled_from(
    [
        *("", "Who?", "a\nb", "<|im_end|>", "</s>x", "<think>\nq\n</think>\n\nz", "</think>", "ANSWERTEXTGOESHERE"),
        *("\ufdd0", "ünï 漢字", "{{ x }}", "long " * 60, "<|im_start|>assistant\n"),
    ]
)
ODD = st.sampled_from([None, 3, [], ["a"], {"a": 1}, "x"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "assistant", "system", "tool"]), "content": TEXTS},
        optional={"tool_calls": ODD, "reasoning_content": ODD | TEXTS, "weight": st.sampled_from([0, 1, None])},
    )
    | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "boss"]), "value": TEXTS | ODD}),
    max_size=5,
)


def turns(texts: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(
        lambda pairs: {
            "conversations": [{"from": r, "value": t} for pair in pairs for r, t in zip(ROLES, pair, strict=True)]
        }
    )


ROLES = ("user", "gpt")
GOOD = turns(st.sampled_from(["Who?", "a\nb", "ünï 漢字"]))  # most chats of all texts are refused
RECORDS = (
    st.lists(GOOD, min_size=1)
    | st.lists(turns(TEXTS), min_size=1, max_size=3)
    | st.lists(
        st.fixed_dictionaries(
            {"messages": MESSAGES}, optional={"tools": ODD, "system": ODD, "chat_template_kwargs": ODD}
        )
        | st.fixed_dictionaries({"prompt": TEXTS | ODD | MESSAGES, "completion": TEXTS | ODD | MESSAGES})
        | st.fixed_dictionaries(
            {"instruction": TEXTS, "output": TEXTS | ODD}, optional={"input": TEXTS, "history": ODD}
        ),
        min_size=1,
        max_size=2,
    )
)


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING], ids=["prefix", "marked", "thinking"])
def test_rows_are_right_or_refused(template, tmp_path_factory, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, template)
    path = tmp_path_factory.mktemp("fuzz") / "chats.jsonl"
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    counts = {"right": 0, "refused": 0}

    @settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(RECORDS, st.sampled_from(["all", "last"]), st.sampled_from(["drop", "cut"]), st.sampled_from([80, 400]))
    def check(records, train_on, too_long, length):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        options = {"train_on": train_on, "too_long": too_long, "context_length": length, "eval_rows": 0}
        try:
            train = data.load(data.DataSettings(kind="chat", path=str(path), **options), tokenizer, 0, 36).train
        except data.DataError as error:
            counts["refused"] += 1
            assert "Error" not in str(error)
            return
        counts["right"] += 1
        for row in train:
            assert len(row["input_ids"]) <= length and row["labels"][-1] in ends

    check()
    assert min(counts.values()) > 5, counts
