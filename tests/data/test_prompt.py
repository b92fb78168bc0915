import copy

import pytest

from data import DataError
from data.prompt import turn_of

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
    tokenizer = copy.deepcopy(tokenizer)
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
    turn = turn_of(tokenizer)
    messages = [{"role": "user", "content": "Who found it?"}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert turn.before + "Who found it?" + turn.between == asked
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Anna"}], tokenize=False)
    assert (asked + turn.lead + "Anna" + turn.after) == whole.rstrip()
    assert (turn.lead, turn.after) == (lead, after)


def test_without_a_template_bos_and_eos_stand_around(byte_tokenizer):
    turn = turn_of(byte_tokenizer)
    assert (turn.before, turn.between, turn.lead, turn.after) == ("<s>", "", " ", "</s>")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] * 2 }}{{ messages[1]['content'] }}",
        "{{ messages[1]['content'] }}{{ messages[0]['content'] }}",
    ],
    ids=["raises", "no answer", "question twice", "wrong order"],
)
def test_a_template_that_cannot_be_used_is_an_error(template, byte_tokenizer):
    with pytest.raises(DataError, match="chat template"):
        turn_of(with_template(byte_tokenizer, template))
