"""Models that were once accepted and wrong, or refused badly: each is right now, or refused by `apply_lrsa` by name."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedTokenizerFast

import lrsa
from lrsa import LRSACache, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT
from tests.lrsa.models import checks, images, sweep
from tests.lrsa.models.build import SHARED, SLIDES, WINDOW, build, build_config, config_of
from tests.lrsa.models.checks import CONFIG, Subject, logits

SLIDING = {"sliding_window": WINDOW, "layer_types": SLIDES}
REFUSED = [
    ("diffllama", {}, "attends 2 times in one layer"),
    ("hrm_text", {}, "cache index of its own"),
    ("dory", {}, "cache index of its own"),
    ("jetmoe", {}, "changes its keys after they were stored"),
    ("doge", {}, "mask of its own"),
    ("xlstm", {}, "no layer of its language model attends"),
    ("llama", {"is_causal": False}, "see later ones"),
    ("gemma3_text", SLIDING | {"use_bidirectional_attention": True}, "see later ones"),
    ("bert", {"is_decoder": False}, "not causal"),
    ("jamba", {}, "do not go on from their state"),
    ("minimax", {}, "one of its own class"),
    ("deepseek_v32", {}, "layers of indexed_attention"),
    ("gemma4_unified_assistant", {}, "the cache of another model"),
]


@pytest.mark.parametrize(("family", "options", "reason"), REFUSED, ids=[family for family, *_ in REFUSED])
def test_refused_by_name_and_left_as_it_was(family, options, reason):
    model = build(family, **options)
    before = {name: value for name, value in vars(model).items() if not name.startswith("_modules")}
    with pytest.raises(ValueError, match=f"lrsa does not support {type(model).__name__}: .*{reason}"):
        apply_lrsa(model, CONFIG)
    after = {name: value for name, value in vars(model).items() if not name.startswith("_modules")}
    assert after.keys() == before.keys() and not hasattr(model.config, "lrsa")
    assert model.config._attn_implementation == "eager"


# xLSTM asks for no attention, and Gemma 4's assistant for the keys of another model.
NAMED = [case for case in REFUSED if case[0] not in ("xlstm", "gemma4_unified_assistant")]


@pytest.mark.parametrize("case", NAMED, ids=lambda c: c[0])
def test_refused_when_the_attention_is_set_by_its_name_too(case):
    model = build(case[0], **case[1])
    model.set_attn_implementation("lrsa")
    with pytest.raises(ValueError, match=f"lrsa does not support this model.*({case[2]}|its own pattern)"):
        logits(model, torch.ones(1, 9, dtype=torch.long))


def test_a_result_that_the_model_views():
    subject = Subject(build("afmoe", **SLIDING))
    assert set(subject.kinds) == {"sliding", "compressed"}
    checks.one_forward(subject)


def test_a_window_that_the_model_ignores():
    model = build("moshi", sliding_window=WINDOW)
    own = Subject(model).own
    found = logits(apply_lrsa(model, CONFIG.replace(top_k=CONFIG.lag_size)), Subject(model).ids)
    assert (found - own).abs().max() < 1e-4 * own.abs().max()


def shared_over_cache(model, ids, chunks, **options):
    cache, start = LRSACache(CONFIG), 0
    for size in chunks:
        with torch.no_grad():
            out = model(ids[:, start : start + size], **{CACHE_ARGUMENT: cache}, use_cache=True, **options)
        start += size
    return out.logits[:, -1], cache


@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text"])
def test_layers_that_share_keys(family):
    subject = Subject(build(family, **SHARED))
    checks.one_forward(subject)
    checks.padded(subject)
    model = subject.applied()
    for chunks in ([40, 20], [60], [30] + [1] * 30):
        for keep in (0, 1):
            found, cache = shared_over_cache(model, subject.ids, chunks, logits_to_keep=keep)
            subject.close(found, subject.expected[:, -1])
            assert len(cache.layers) == 2, "sharing layers store nothing"
    mask = torch.ones_like(subject.ids)
    mask[:, :20] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        last = logits(model, subject.ids, **padded, logits_to_keep=1)
        subject.close(last[:, -1], logits(model, subject.ids, **padded)[:, -1])


@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text"])
def test_checkpointing_that_loses_the_gradients_of_shared_keys(family):
    """ZeRO-3 with PEFT sets `use_reentrant`, and transformers' own gradients are off by 0.4 of the largest then."""
    subject = Subject(build(family, **SHARED))
    tuned, expected = checks._tuned(subject.applied(), subject)
    assert checks._checkpointed(tuned, expected, subject, reentrant=False) < 1e-9
    with pytest.raises(ValueError, match="gradient_checkpointing: false"):
        checks._checkpointed(tuned, expected, subject, reentrant=True)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
    ],
)
def test_rows_within_one_rotary_table(family, options):
    length = {"original_max_position_embeddings": 64}
    rope = {"rope_parameters": options | {"rope_theta": 1e4} | length} | (length if family == "phi3" else {})
    model = apply_lrsa(build(family, max_position_embeddings=256 if family == "phi3" else 64, **rope), CONFIG)
    checks.logits(model, torch.ones(1, 64, dtype=torch.long))
    ids = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(ValueError, match="rows of up to 64 tokens, got 65"):
        logits(model, ids)
    with pytest.raises(ValueError, match="rows of up to 64 tokens, got 65"):
        shared_over_cache(model, ids, [60, 5])
    packed = torch.cat([torch.arange(60), torch.arange(40)])[None]
    assert logits(model, torch.ones(1, 100, dtype=torch.long), position_ids=packed).isfinite().all()


def test_a_stored_use_cache_false_is_set_aside():
    model = build("llama")
    model.generation_config.use_cache = False
    apply_lrsa(model, CONFIG)
    cache = LRSACache(CONFIG)
    model.generate(torch.ones(1, 40, dtype=torch.long), **{CACHE_ARGUMENT: cache}, max_new_tokens=5, min_new_tokens=5)
    assert cache.layers[0].seen == [44], "a cache that generate does not use sees every token at every step"
    remove_lrsa(model)
    assert model.generation_config.use_cache is False


def test_the_way_out_of_attention_dropout():
    dropping = apply_lrsa(build("gpt2", attn_pdrop=0.1), CONFIG).train()
    with pytest.raises(ValueError, match="load the model with attn_pdrop=0"):
        logits(dropping, torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize("family", ["phi4_multimodal", "gemma3"])
def test_only_the_language_model_is_set(family):
    model = build(family)
    apply_lrsa(model, CONFIG)
    text = model.config.get_text_config()
    assert text._attn_implementation == "lrsa" and model.config.vision_config._attn_implementation == "eager"
    remove_lrsa(model)
    assert text._attn_implementation == "eager"


def test_packed_rows_of_a_recurrent_model_are_refused():
    subject = Subject(build("qwen3_5_text"))
    assert checks.packed(subject) == "packing refused"
    checks.over_the_cache(subject)
    model, cache = subject.applied(), LRSACache(CONFIG)
    with torch.no_grad():
        model(subject.ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
    held = [layer.held() if hasattr(layer, "held") else None for layer in cache.layers]
    assert held == [None, [CONFIG.kept_length(60)]] * 2


@pytest.mark.parametrize("family", ["exaone4_5", "hyperclovax_vision_v2", "moss_transcribe_diarize"])
def test_padding_that_counts_as_positions_is_refused(family):
    """Rotary positions are relative, but the scores of keys are not: other tokens would be selected."""
    model = apply_lrsa(build_config(config_of(family), auto=AutoModelForMultimodalLM), CONFIG)
    ids = torch.randint(3, 45, (1, 40))
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    with pytest.raises(ValueError, match="count from a row's first real token"):
        model.generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: LRSACache(CONFIG)}, max_new_tokens=2)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = logits(model, ids, attention_mask=mask, position_ids=counted)[:, 9:]
        torch.testing.assert_close(found, logits(model, ids[:, 9:]))


@pytest.mark.parametrize("family", ["glm4v_moe", "ernie4_5_vl_moe"])
def test_positions_in_three_dimensions_that_reach_the_attention(family):
    subject = Subject(images.build(family))
    checks.one_forward(subject)
    checks.padded(subject)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_text_trains_in_a_model_that_sees_images(family):
    """Its training wants the kinds of tokens; an image whose tokens see each other is refused."""
    model = images.build(family)
    kinds = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
    subject = images.subject_with_an_image(model)
    text = torch.randint(3, 45, (1, 60))
    applied = subject.applied().train()
    for options in ({}, {kinds: torch.zeros_like(text)}):
        out = applied(input_ids=text, labels=text, use_cache=False, **options)
        assert out.loss.isfinite() and out.loss.requires_grad
        subject.close(out.logits, logits(applied, text))
    if family == "gemma3":
        with pytest.raises(ValueError, match=r"an image for this model \(gemma3_text\)"):
            logits(applied, subject.ids, **subject.image)


def test_a_model_whose_generate_has_other_places_for_its_arguments():
    model, cache = apply_lrsa(images.build("janus"), CONFIG), LRSACache(CONFIG)
    out = model.generate(torch.ones(1, 40, dtype=torch.long), **{CACHE_ARGUMENT: cache}, max_new_tokens=2)
    assert out.shape == (1, 42) and cache.layers[0].seen == [41]


@pytest.mark.parametrize("case", [("llama", ""), *sweep.UNJUDGED], ids=" ".join)
def test_a_family_that_is_not_judged_makes_the_sweep_fail_unless_it_is_listed(case, monkeypatch, capsys):
    family, variant = case
    monkeypatch.setattr(sweep, "cases", lambda: [(family, variant, {})])
    monkeypatch.setattr(sweep, "judge", lambda *args: sweep.Verdict(*case, "", "not judged", "no such field"))
    assert sweep.main([family]) == (case not in sweep.UNJUDGED)
    assert ("not judged: llama : no such field" in capsys.readouterr().out) == (family == "llama")


def test_the_encoder_of_an_image_stays_as_it_is():
    model = build("phi4_multimodal")
    encoder = model.model.embed_tokens_extend.image_embed.img_processor
    pixels, mask = torch.randn(1, 3, 56, 56, dtype=torch.float64), torch.ones(1, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        own = encoder(pixels, patch_attention_mask=mask).last_hidden_state
        apply_lrsa(model, CONFIG)
        assert torch.equal(encoder(pixels, patch_attention_mask=mask).last_hidden_state, own)


def test_a_model_loaded_by_name_gets_its_encoder_back_from_apply_lrsa():
    model = images.build("llava")
    subject = images.subject_with_an_image(model)
    model.set_attn_implementation("lrsa")
    with pytest.raises(ValueError, match="sets the language model alone"):
        logits(model, subject.ids, **subject.image)
    with torch.no_grad():
        subject.close(logits(apply_lrsa(model, CONFIG), subject.ids, **subject.image), subject.expected, 1e-5)


def test_an_adapter_of_a_model_that_sees_images_loads_and_generates(tmp_path):
    subject = images.subject_with_an_image(images.build("llava"))
    subject.model.save_pretrained(tmp_path / "base")
    subject.model.name_or_path = str(tmp_path / "base")
    tuned, _ = checks._tuned(subject.applied(), subject)
    tuned.eval().save_pretrained(tmp_path / "adapter")
    CONFIG.save_pretrained(tmp_path / "adapter")
    plain = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0").save_pretrained(tmp_path / "adapter")
    options = {"auto_class": AutoModelForImageTextToText, "dtype": torch.float64, "attn_implementation": "eager"}
    model, _, new_cache = lrsa.load(tmp_path / "adapter", **options)
    found, error = checks._greedy(subject, model, new_cache())
    assert error < 1e-6 and torch.equal(found, checks._greedy(subject, tuned, new_cache())[0])
