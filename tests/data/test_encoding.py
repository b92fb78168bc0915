"""Texts that join markup and data: their tokens join, and control tokens in data are letters."""

import copy

import numpy as np
import pytest

from data import DataError
from data.encoding import Encoder


@pytest.mark.parametrize("which", ["byte_tokenizer", "blank_tokenizer"])
def test_pieces_join_to_the_tokens_of_the_whole(which, request):
    tokenizer = request.getfixturevalue(which)
    pieces = [
        Encoder(tokenizer).markup("<s>") + "Read the passages.\n\n",
        "The fox jumps.\n\n",
        "Anna found the river.\n\n",
        "Question: who?\nAnswer:",
    ]
    head = Encoder(tokenizer).ids(pieces[:1])
    _, rest = Encoder(tokenizer).continued(["\n\n"] * 3, pieces[1:])
    _, [answer] = Encoder(tokenizer).continued(pieces[-1:], [" Anna" + Encoder(tokenizer).markup("</s>")])
    [whole] = Encoder(tokenizer).ids(["".join(pieces) + " Anna" + Encoder(tokenizer).markup("</s>")])
    assert np.array_equal(np.concatenate([*head, *rest, answer]), whole)


def test_pieces_tokenized_alone_would_not_join(blank_tokenizer):
    alone = Encoder(blank_tokenizer).ids(["one.\n\n", "The fox"])
    [whole] = Encoder(blank_tokenizer).ids(["one.\n\nThe fox"])
    assert not np.array_equal(np.concatenate(alone), whole)


def test_a_seam_inside_a_token_leaves_both_sides_whole(byte_tokenizer):
    [prefix], [added] = Encoder(byte_tokenizer).continued(["The f"], ["ox jumps"])
    assert byte_tokenizer.decode(prefix) == "The f" and byte_tokenizer.decode(added) == "ox jumps"
    assert len(Encoder(byte_tokenizer).ids(["The fox jumps"])[0]) < len(prefix) + len(added)


@pytest.mark.parametrize("which", ["byte_tokenizer", "blank_tokenizer"])
def test_marked_tokens_are_control_tokens_and_the_same_letters_in_data_are_not(which, request):
    tokenizer = request.getfixturevalue(which)
    encoder = Encoder(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    [ids] = encoder.ids([encoder.markup("<s>") + "the fox </s> jumps" + encoder.markup("</s>")])
    assert (ids[0], ids[-1], ids.tolist().count(eos)) == (bos, eos, 1)
    assert "".join(tokenizer.decode(ids).split()) == "<s>thefox</s>jumps</s>"
    [plain] = encoder.ids([encoder.markup("<s>the fox jumps</s>")])
    assert plain.tolist() == tokenizer("<s>the fox jumps</s>", add_special_tokens=False)["input_ids"]
    assert encoder.plain(encoder.markup("<s>a</s>")) == "<s>a</s>"


def test_added_tokens_that_are_not_control_tokens_keep_their_ids(byte_tokenizer):
    from transformers import AddedToken

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    encoder = Encoder(tokenizer)
    tool, end = tokenizer.convert_tokens_to_ids(["<tool>", "<|end|>"])
    [ids] = encoder.ids(["fox <tool> <|end|> dog" + encoder.markup("<|end|>")])
    assert ids.tolist().count(tool) == 1 and ids.tolist().count(end) == 1 and ids[-1] == end
    assert tokenizer.decode(ids) == "fox <tool> <|end|> dog<|end|>"


def test_a_control_token_that_is_a_word_of_the_vocabulary_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "fox": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    encoder = Encoder(tokenizer)
    assert encoder.ids(["fox " + encoder.markup("</s>")])[0].tolist() == [2, 1]
    with pytest.raises(DataError, match="'fox </s> fox' holds '</s>', a control token that this tokenizer cannot read"):
        encoder.ids(["fox </s> fox"])


def test_tokens_that_are_written_are_counted(byte_tokenizer):
    encoder = Encoder(byte_tokenizer)
    assert encoder.notes() == []
    encoder.count(["</s> </s>", "a <s>"])
    [note] = encoder.notes()
    assert "2 x </s>, 1 x <s>" in note
