import copy
import json
import re
from pathlib import Path

import jinja2
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

import data
from lrsa import PromptFormat
from lrsa.prompt import _USER, _rendered, conversation_prompt

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and thinks %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if thinks %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<h>' + m['role'] + '</h>\n\n' + (m['content'] | trim) + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<h>assistant</h>\n\n' }}{% endif %}"
)


def with_template(tokenizer, template):
    """The tokenizer with this template, whose markup is control tokens to it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(re.findall(r"<\|?\w+\|?>", template)))})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template, lead, after",
    [
        (CHATML, "", "<|im_end|>"),
        (CHATML.replace("thinks", "true"), "", "<|im_end|>"),
        (INST, " ", "</s>"),
        (HEADERS, "", "<|eot|>"),
    ],
    ids=["chatml", "empty thinking", "inst", "headers"],
)
def test_a_prompt_is_what_the_chat_template_makes_for_generation(template, lead, after, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, template)
    turn = PromptFormat.of(tokenizer)
    messages = [{"role": "user", "content": "Who found it?"}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert turn.prompt("Who found it?") == asked
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Anna"}], tokenize=False)
    assert (asked + turn.lead + "Anna" + turn.after) == whole.rstrip()
    assert (turn.lead, turn.after) == (lead, after)


def test_without_a_template_bos_and_eos_stand_around(byte_tokenizer):
    turn = PromptFormat.of(byte_tokenizer)
    assert (turn.before, turn.between, turn.lead, turn.after) == ("<s>", "", " ", "</s>")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] * 2 }}{{ messages[1]['content'] }}",
        "{{ messages[1]['content'] }}{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] | upper }}{{ messages[1]['content'] }}",
        "{{ messages[0]['content'] }}{{ messages[1]['content'] | lower }}",
    ],
    ids=["raises", "no answer", "question twice", "wrong order", "upper case", "lower case"],
)
def test_a_template_that_cannot_be_used_is_an_error(template, byte_tokenizer):
    with pytest.raises(ValueError, match="chat template"):
        PromptFormat.of(with_template(byte_tokenizer, template))


def trl_templates():
    import trl

    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", trl_templates(), ids=lambda path: path.stem)
def test_every_template_of_trl_is_rendered_once_and_used_everywhere(path, byte_tokenizer, tmp_path):
    """What rows are trained on is what the stored format gives to a card's sample, whatever the template adds."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = path.read_text()
    *_, after = _rendered(tokenizer, 1)
    tokenizer.add_special_tokens({"extra_special_tokens": [after.split()[-1]] if after.strip() else []})
    made = PromptFormat.of(tokenizer)
    assert made.end in (tokenizer.convert_tokens_to_ids(made.after.split()[-1]), tokenizer.eos_token_id)
    context = {"kind": "qa", "path": str(tmp_path / "rows.json"), "eval_rows": 1, "context_length": 20_000}
    rows = [{"question": f"Who {n}?", "context": f"Anna {n}.", "answers": f"Anna{n}"} for n in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = data.DataSettings(**context, prompt_template="Read:\n\n{context}\n\nQuestion: {question}")
    corpus = data.load(settings, tokenizer, 0, 36)
    corpus.prompt.save_pretrained(tmp_path)
    stored = PromptFormat.from_pretrained(tmp_path)
    assert stored == made
    [row] = corpus.evaluation
    number = row["answers"][0][-1]
    text = f"Read:\n\nAnna {number}.\n\nQuestion: Who {number}?"
    assert row["prompt"] == stored.prompt(text)
    assert row["input_ids"][: row["prompt_length"]] == stored.encode(tokenizer, text)["input_ids"][0].tolist()
    assert row["input_ids"][-1] == stored.end
    answer = tokenizer.decode(row["input_ids"][row["prompt_length"] :])
    assert answer == stored.lead + row["answers"][0] + stored.after


def test_there_are_templates_of_trl_in_which_generation_begins_elsewhere(byte_tokenizer):
    """Otherwise the test above would pass with the template's own prompt for generation."""
    different = 0
    for path in trl_templates():
        tokenizer = copy.deepcopy(byte_tokenizer)
        tokenizer.chat_template = path.read_text()
        before, between, _ = _rendered(tokenizer, 1)
        for content in ("Q", [{"type": "text", "text": "Q"}]):
            try:
                messages = [{"role": "user", "content": content}]
                asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                different += f"{before}Q{between.rstrip(' ')}" != asked
                break
            except (TypeError, jinja2.TemplateError):
                continue
    assert different >= 11


def test_a_template_that_ends_with_ordinary_text_is_refused(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=r"ends an answer with '<\|im_end\|>', which this tokenizer reads as ordinary"):
        PromptFormat.of(tokenizer)


def test_the_day_is_the_same_tomorrow(byte_tokenizer):
    template = "{{ strftime_now('%d %b %Y') }} " + INST
    assert PromptFormat.of(with_template(byte_tokenizer, template)).before.startswith("26 Jul 2024 <s>[INST]")


def test_generation_stops_where_answers_ended_too():
    ended = GenerationConfig(eos_token_id=3)
    turn = PromptFormat("", "", "", "<|im_end|>", 7)
    turn.add_end_to(ended)
    turn.add_end_to(ended)
    assert ended.eos_token_id == [3, 7]
    none = GenerationConfig()
    turn.add_end_to(none)
    assert none.eos_token_id == [7]


def test_a_tokenizer_that_adds_bos_by_itself_adds_no_second_one(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    adds = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds
    assert tokenizer("fox")["input_ids"][0] == tokenizer.bos_token_id
    ids = PromptFormat.plain(tokenizer).encode(tokenizer, "the fox")["input_ids"][0].tolist()
    assert ids == byte_tokenizer("<s>the fox")["input_ids"] and ids.count(tokenizer.bos_token_id) == 1


THINKS = (
    "{% for m in messages %}{{ '<s>' + m.role + ': ' }}{% if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ CONTENT + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
PARTS = "(m.content | map(attribute='text') | join(''))"
TALK = [{"role": role, "content": text} for role, text in (("user", "Who?"), ("assistant", "Anna."), ("user", "{}"))]


@pytest.mark.parametrize("strips", ["", " | trim", ".rstrip()", ".lstrip()", ".strip('\n')"])
@pytest.mark.parametrize("content", ["m.content", PARTS, "m.content[0]['text']"])
@pytest.mark.parametrize("last", ["When?", " When? \n", "a", "assistant", "Who?", f"{_USER} {_USER}"])
def test_a_conversation_leads_to_its_answer_as_in_training(content, strips, last, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, THINKS.replace("CONTENT", content + strips))
    prompt = PromptFormat.of(tokenizer)
    written = {" | trim": last.strip(), ".rstrip()": last.rstrip(), ".lstrip()": last.lstrip(), "": last}.get(
        strips, last.strip("\n")
    )
    text = f"<s>user: Who?</s><s>assistant: <think></think>Anna.</s><s>user: {written}</s><s>assistant: "
    talk = [*TALK[:2], TALK[2] | {"content": last}]
    assert conversation_prompt(tokenizer, prompt, talk) == text + "<think></think>"
    assert conversation_prompt(tokenizer, None, talk) == text
    assert conversation_prompt(tokenizer, prompt, talk[2:]) == f"<s>user: {written}</s><s>assistant: <think></think>"
    marked = [TALK[0] | {"content": _USER}, *talk[1:]]
    assert conversation_prompt(tokenizer, prompt, marked) == text.replace("Who?", _USER, 1) + "<think></think>"


def test_a_conversation_that_the_template_does_not_take_is_refused(byte_tokenizer):
    prompt = PromptFormat("<s>", "</s>", "", "", None)
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = None
    assert conversation_prompt(tokenizer, prompt, TALK[:1]) == "<s>Who?</s>"
    with pytest.raises(ValueError, match="has no chat template: only a single message"):
        conversation_prompt(tokenizer, prompt, TALK)
    for template, reason in {
        "{{ raise_exception('three are too many') if messages | length > 1 }}": "refuses these messages: three are too",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}": "does not write the last message as it is",
        "{{ messages[0].content }}": "does not write the last message as it is",
        "{% for m in messages %}{{ m.content | replace('{', '') }}{% endfor %}": "does not write the last message",
    }.items():
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"the chat template {reason}"):
            conversation_prompt(tokenizer, prompt, TALK)


def test_a_conversation_s_day_is_the_same_tomorrow(byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, "{{ strftime_now('%d %b %Y') }}" + THINKS.replace("CONTENT", "m.content"))
    assert conversation_prompt(tokenizer, None, TALK).startswith("26 Jul 2024<s>user: ")
