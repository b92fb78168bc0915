"""Which models work: a tiny random one of each family, and the table of them in docs/models.md.

python -m tests.lrsa.test_models    puts that table into docs/models.md
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask

from lrsa import LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT, LRSACache, compressed, sliding
from tests.lrsa.cache.feeding import close, over_cache, padded

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MARKERS = ("<!-- models: made by `python -m tests.lrsa.test_models` -->\n", "\n<!-- end of models -->")
CONFIG = LRSAConfig(3, 8, 2)
WINDOW = 12
LENGTH = 70
SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATE = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
SHARED = {"shared_expert_intermediate_size": 16, "use_sliding_window": True}


@dataclass
class Family:
    """A row of the table.

    Attributes:
        name: as the table shows it.
        config: the configuration class in transformers; options: what makes it tiny, and what it is here for.
        slides: how many of its four layers keep a sliding window.
        note: what a reader should know.
    """

    name: str
    config: str
    options: dict = field(default_factory=dict)
    slides: int = 0
    note: str = ""

    def model(self):
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**SMALL | self.options)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        return model.double().eval()


FAMILIES = [
    Family("Llama", "LlamaConfig"),
    Family("Qwen2", "Qwen2Config"),
    Family("Qwen2 with `use_sliding_window`", "Qwen2Config", ALTERNATE | {"use_sliding_window": True}, slides=2),
    Family("Qwen2-MoE with `use_sliding_window`", "Qwen2MoeConfig", ALTERNATE | EXPERTS | SHARED, slides=2),
    Family("Qwen3", "Qwen3Config"),
    Family("Qwen3-MoE", "Qwen3MoeConfig", EXPERTS),
    Family("Mistral", "MistralConfig", {"sliding_window": None}),
    Family(
        "Mistral v0.1",
        "MistralConfig",
        {"sliding_window": WINDOW},
        slides=4,
        note="nothing to compress, and a warning says so, until it is loaded with `sliding_window=None`",
    ),
    Family("Mixtral", "MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    Family(
        "Phi-3",
        "Phi3Config",
        {"sliding_window": SMALL["max_position_embeddings"]},
        note="a window of at least `max_position_embeddings` counts as none",
    ),
    Family("SmolLM3", "SmolLM3Config", {"no_rope_layer_interval": 2}),
    Family("OLMo 2", "Olmo2Config"),
    Family("OLMo 3", "Olmo3Config", ALTERNATE, slides=2),
    Family("Granite", "GraniteConfig", {"attention_multiplier": 0.2}),
    Family("Gemma 3 (text)", "Gemma3TextConfig", ALTERNATE | {"query_pre_attn_scalar": 50}, slides=2),
    Family("Gemma 2", "Gemma2Config", ALTERNATE | {"attn_logit_softcapping": 2.0}, slides=2, note="soft-capped scores"),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        ALTERNATE | {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        slides=2,
        note="attention sinks as parameters",
    ),
    Family(
        "Llama 4",
        "Llama4TextConfig",
        {"intermediate_size_mlp": 48, "attention_chunk_size": LENGTH - WINDOW},
        slides=3,
        note="they attend within chunks instead",
    ),
]
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def table() -> str:
    """The table, from the list above."""
    lines = ["| model | | layers with a sliding window | |", "|---|---|---|---|"]
    for family in FAMILIES:
        slides = {0: "", 4: "all"}.get(family.slides, "keep it; the others are compressed")
        lines.append(f"| {family.name} | works | {slides} | {family.note} |")
    return "\n".join(lines)


def documented() -> tuple[str, str, str]:
    """The page in front of the table, the table, and what follows."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKERS[0])
    found, after = rest.split(MARKERS[1])
    return before, found, after


def test_the_page_shows_the_table():
    assert documented()[1] == table(), "docs/models.md is out of date: run python -m tests.lrsa.test_models"


@families
def test_one_forward_equals_chunks_and_decoding(family):
    model = family.model()
    ids = torch.randint(3, 48, (2, LENGTH))
    with torch.no_grad():
        own = model(ids).logits
        expected = apply_lrsa(model, CONFIG)(ids).logits
    # Up to where LRSA is dense, it is the model's own attention: its scaling, its windows. (Eager's softmax is fp32.)
    dense = CONFIG.dense_length
    close(expected[:, :dense], own[:, :dense], atol=1e-4)
    assert ((expected - own).abs().max() > 0.1) == (family.slides < 4)  # and behind that it is another
    for chunks in ([LENGTH], [1] * LENGTH, [25, 1, 9, 20, 1, 14]):
        found, cache = over_cache(model, ids, chunks, CONFIG)
        close(found, expected)
        held = [(layer.is_sliding, layer.held()) for layer in cache.layers]
        assert held.count((True, [WINDOW] * 2)) == family.slides
        assert held.count((False, [CONFIG.kept_length(LENGTH)] * 2)) == 4 - family.slides
    assert CONFIG.kept_length(LENGTH) < LENGTH / 2


@families
def test_padded_batch_equals_rows_alone(family):
    model = apply_lrsa(family.model(), CONFIG)
    rows = [torch.randint(3, 48, (length,)) for length in (60, 5, 13, 41)]
    with torch.no_grad():
        alone = [model(row[None]).logits[0] for row in rows]
    for side, chunks in (("left", [50, 6, 1, 1, 1, 1]), ("right", [30, 30]), ("left", [60])):
        ids, mask = padded(rows, side)
        found, cache = over_cache(model, ids, chunks, CONFIG, mask)
        for logits, real, expected in zip(found, mask, alone, strict=True):
            close(logits[real == 1], expected)
        assert cache.layers[3].held() == [cache.layers[3].length(len(row)) for row in rows]


@families
def test_lora_learns_through_it(family):
    names = ["qkv_proj"] if family.config == "Phi3Config" else ["q_proj", "k_proj", "v_proj"]
    model = apply_lrsa(family.model(), CONFIG)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False)).double().train()
    ids = torch.randint(3, 48, (1, LENGTH))
    tuned(ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name: p.grad.abs().max() for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(gradients) == 4 * len(names) * 2 and min(gradients.values()) > 0


GEMMA = next(family for family in FAMILIES if family.config == "Gemma3TextConfig")


def test_packed_documents_under_sliding_windows():
    model = apply_lrsa(GEMMA.model(), CONFIG)
    documents = [torch.randint(3, 48, (length,)) for length in (50, 9, 40)]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    with torch.no_grad():
        packed = model(torch.cat(documents)[None], position_ids=positions, use_cache=False).logits[0]
        alone = [model(document[None]).logits[0] for document in documents]
    close(packed, torch.cat(alone))


@pytest.mark.parametrize("broken", ["window off by one", "sliding layers compressed", "windows ignored"])
def test_wrong_windows_are_noticed(broken, monkeypatch):
    """The broken variants of the equalities above: they fail for a layer that slides otherwise in the cache."""
    family = GEMMA
    model = apply_lrsa(family.model(), CONFIG)
    ids = torch.randint(3, 48, (1, LENGTH))
    with torch.no_grad():
        expected = model(ids).logits
    if broken == "window off by one":
        kind = sliding.SlidingLayer
        monkeypatch.setattr("lrsa.cache.api.SlidingLayer", lambda window: kind(window + 1))
    elif broken == "sliding layers compressed":
        monkeypatch.setattr("lrsa.cache.api.SlidingLayer", lambda window: compressed.CompressedLayer(CONFIG))
    else:
        monkeypatch.setattr("lrsa.hf.attention.window_of", lambda *args: None)
    with pytest.raises(AssertionError):
        close(over_cache(model, ids, [LENGTH], CONFIG)[0], expected)


def test_a_model_that_only_slides_warns(caplog):
    family = next(family for family in FAMILIES if family.slides == 4)
    with caplog.at_level(logging.WARNING, logger="lrsa"):
        apply_lrsa(family.model(), CONFIG)
    assert f"every layer of MistralForCausalLM slides over its last {WINDOW} tokens" in caplog.text
    caplog.clear()
    apply_lrsa(GEMMA.model(), CONFIG)
    assert not caplog.records


def test_the_way_out_that_the_message_names(tmp_path):
    next(family for family in FAMILIES if family.slides == 4).model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, sliding_window=None)
    cache = LRSACache(CONFIG)
    with torch.no_grad():
        apply_lrsa(model, CONFIG)(torch.randint(3, 48, (1, LENGTH)), **{CACHE_ARGUMENT: cache})
    assert [CONFIG.kept_length(LENGTH)] in [layer.held() for layer in cache.layers]
    remove_lrsa(model)


@pytest.mark.parametrize("option", ["or_mask_function", "and_mask_function", "block_sequence_ids"])
def test_a_pattern_of_the_models_own_is_refused(option):
    """As when the tokens of an image see each other: only the mask shows it, never the attention call."""
    config = apply_lrsa(GEMMA.model(), CONFIG).config
    value = torch.zeros(1, 5) if option == "block_sequence_ids" else lambda batch, head, query, key: query >= key
    plain = {"config": config, "inputs_embeds": torch.zeros(1, 5, 32), "attention_mask": None, "past_key_values": None}
    assert create_causal_mask(**plain) is None
    with pytest.raises(ValueError, match="own pattern"):
        create_causal_mask(**plain, **{option: value})


if __name__ == "__main__":
    before, _, after = documented()
    PAGE.write_text(before + MARKERS[0] + table() + MARKERS[1] + after, encoding="utf-8")
