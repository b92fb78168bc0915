"""What masks and attention modules a model may have: right under LRSA, or refused by name."""

import copy

import pytest
import torch
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention

from lrsa import apply_lrsa
from tests.lrsa.models import checks, images
from tests.lrsa.models.build import SLIDES, WINDOW, build
from tests.lrsa.models.checks import CONFIG, Subject, logits

SLIDING = {"sliding_window": WINDOW, "layer_types": SLIDES}


@pytest.mark.parametrize("family", ["gpt_bigcode", "persimmon", "cohere_compass_text", "moshi"])
def test_documents_are_told_apart_by_models_that_give_positions_to_their_mask_only(family, monkeypatch):
    subject = Subject(build(family))
    assert checks.packed(subject) is None
    monkeypatch.setattr("lrsa.hf.mask._positions", lambda *args: None)
    with pytest.raises(AssertionError, match="packed documents"):
        checks.packed(subject)


@pytest.mark.parametrize("positions", [torch.arange(8)[None], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])])
def test_blocks_that_see_the_future_are_refused_in_packed_rows_too(positions):
    config = apply_lrsa(build("gemma3_text", **SLIDING), CONFIG).config
    options = {"config": config, "inputs_embeds": torch.zeros(1, 8, 32), "attention_mask": None, "cache": None}
    blocks = torch.tensor([[-1, 0, 0, -1, -1, -1, -1, -1]])
    with pytest.raises(ValueError, match=r"an image for this model \(gemma3_text\)"):
        create_causal_mask(**options, position_ids=positions, block_sequence_ids=blocks)
    blocks = torch.tensor([[-1, 0, -1, -1, -1, -1, -1, -1]])  # a block of one token sees nothing new
    found = create_causal_mask(**options, position_ids=positions, block_sequence_ids=blocks)
    assert (found is None) if positions[0, 5] == 5 else torch.equal(found[:, 0, :, 0].long(), positions)


def test_documents_are_told_apart_by_a_mask_that_is_made_twice():
    """Molmo 2 hands its mask to its language model, which takes one of two dimensions for padding."""
    assert checks.packed(Subject(images.build("molmo2"))) is None


def test_attention_across_inputs_stays_as_it_is():
    """Kosmos-2.5 reads the patches of an image by an attention module of its language model."""
    subject = images.subject_with_an_image(images.build("kosmos-2.5"))
    checks.one_forward(subject)


def test_attention_to_the_same_input_that_is_not_causal_is_refused():
    model = build("llama")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="LlamaAttention is not causal"):
        logits(apply_lrsa(model, CONFIG), torch.ones(1, 9, dtype=torch.long))


def test_a_model_that_makes_its_own_mask_is_refused():
    model = images.build("kosmos-2")
    with pytest.raises(ValueError, match="Kosmos2ForConditionalGeneration: KosmosTextAttention gets an attention mask"):
        apply_lrsa(model, CONFIG)
    model.text_model.set_attn_implementation("lrsa")
    with pytest.raises(ValueError, match="makes its own mask"):
        model.text_model(torch.ones(1, 9, dtype=torch.long))


def test_an_attention_in_another_file_than_the_model():
    """As in a user's script, or in code from the Hub that has its attention and its mask in two files."""
    own = type("MyAttention", (LlamaAttention,), {"__module__": "math"})
    model = build("llama")
    expected = logits(apply_lrsa(copy.deepcopy(model), CONFIG), ids := torch.ones(1, 40, dtype=torch.long))
    for layer in model.model.layers:
        layer.self_attn.__class__ = own
    assert torch.equal(logits(apply_lrsa(copy.deepcopy(model), CONFIG), ids), expected)
    model.set_attn_implementation("lrsa")
    assert logits(model, ids).isfinite().all()
