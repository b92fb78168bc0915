"""The plug into transformers: models with LoRA, checkpointing, accumulation, two configurations in one process."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig

import lrsa
import lrsa.hf.attention
from lrsa import LRSACache, LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT
from lrsa.evaluation.measure.controls import Recent

CONFIG = LRSAConfig(3, 8, 2)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, atol=1e-10):
    assert found.keys() == expected.keys() and found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=0)


def test_apply_and_remove(random_llama):
    ids = torch.randint(0, 48, (2, 80))
    dense = logits(random_llama, ids)
    assert apply_lrsa(random_llama, CONFIG) is random_llama
    assert random_llama.config.lrsa == CONFIG
    sparse = logits(random_llama, ids)
    assert (sparse[:, : CONFIG.dense_length] - dense[:, : CONFIG.dense_length]).abs().max() < 1e-10
    assert (sparse - dense).abs().max() > 0.01
    apply_lrsa(random_llama, CONFIG.replace(top_k=8))
    assert (logits(random_llama, ids) - dense).abs().max() < 1e-10
    remove_lrsa(random_llama)
    assert torch.equal(logits(random_llama, ids), dense)
    assert not hasattr(random_llama.config, "lrsa") and random_llama.config._attn_implementation == "sdpa"


def test_by_name_in_from_pretrained(random_llama, tmp_path):
    """`attn_implementation="lrsa"` after `import lrsa`; the settings come back with the model's own config."""
    apply_lrsa(random_llama, CONFIG).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["lrsa"] == CONFIG.to_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lrsa", dtype=torch.float64)
    ids = torch.randint(0, 48, (1, 80))
    assert torch.equal(logits(again, ids), logits(random_llama, ids))
    assert again.config._attn_implementation == "lrsa"
    remove_lrsa(again)
    assert again.config._attn_implementation == "sdpa"


def test_two_models_two_configurations(random_llama):
    other = AutoModelForCausalLM.from_config(LlamaConfig(**random_llama.config.to_dict())).double().eval()
    other.load_state_dict(random_llama.state_dict())
    ids = torch.randint(0, 48, (1, 80))
    apply_lrsa(random_llama, CONFIG)
    alone = logits(random_llama, ids)
    apply_lrsa(other, CONFIG.replace(lag_size=16))
    assert torch.equal(logits(random_llama, ids), alone)
    assert (logits(other, ids) - alone).abs().max() > 0.01


def with_lora(model):
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return tuned.double().train()


def loss_of(model, ids, **options):
    model.zero_grad()
    loss = model(ids, labels=ids, **options).loss
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(random_llama, reentrant):
    model = with_lora(apply_lrsa(random_llama, CONFIG))
    ids = torch.randint(0, 48, (2, 80))
    expected = loss_of(model, ids, use_cache=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(loss_of(model, ids, use_cache=False), expected)
    with pytest.raises(AssertionError):  # the recomputation must see the settings of the forward
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        apply_lrsa(model, CONFIG.replace(value_weight=0))
        loss.backward()
        assert_same(gradients(model), expected)


def test_checkpointed_padded_and_packed_batches(random_llama):
    model = with_lora(apply_lrsa(random_llama, CONFIG))
    ids = torch.randint(0, 48, (2, 80))
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[1, :30] = 0
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    positions = torch.cat([torch.arange(50), torch.arange(30)]).expand(2, -1)
    for options in ({"attention_mask": mask, "position_ids": counted}, {"position_ids": positions}):
        model.gradient_checkpointing_disable()
        expected = loss_of(model, ids, use_cache=False, **options)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_same(loss_of(model, ids, use_cache=False, **options), expected)


def test_accumulation_equals_batch(random_llama):
    model = with_lora(apply_lrsa(random_llama, CONFIG))
    ids = torch.randint(0, 48, (4, 60))
    expected = loss_of(model, ids)
    model.zero_grad()
    for row in ids:
        (model(row[None], labels=row[None]).loss / 4).backward()
    assert_same(gradients(model), expected)
    for row in ids[:1]:
        (model(row[None], labels=row[None]).loss / 4).backward()
    with pytest.raises(AssertionError):
        assert_same(gradients(model), expected)


def test_packed_documents_through_the_model(random_llama):
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (1, 90))
    positions = torch.cat([torch.arange(60), torch.arange(30)])[None]
    packed = logits(model, ids, position_ids=positions)
    assert (packed[:, :60] - logits(model, ids[:, :60])).abs().max() < 1e-10
    assert (packed[:, 60:] - logits(model, ids[:, 60:])).abs().max() < 1e-10
    assert (packed[:, 60:] - logits(model, ids)[:, 60:]).abs().max() > 0.01


def test_works_on_a_peft_model(random_llama):
    tuned = with_lora(random_llama).eval()
    ids = torch.randint(0, 48, (1, 80))
    dense = logits(tuned, ids)
    apply_lrsa(tuned, CONFIG)
    sparse = logits(tuned, ids)
    assert (sparse - dense).abs().max() > 0.01
    cached = logits(tuned, ids, **{CACHE_ARGUMENT: LRSACache(CONFIG)})
    assert (cached - sparse).abs().max() < 1e-10
    remove_lrsa(tuned)
    assert torch.equal(logits(tuned, ids), dense)


def test_cache_of_other_settings_warns(random_llama, caplog):
    lrsa.hf.attention._compare.cache_clear()
    apply_lrsa(random_llama, CONFIG)
    five = torch.zeros(1, 5, dtype=torch.long)
    with caplog.at_level(logging.WARNING, logger="lrsa"):
        logits(random_llama, five, **{CACHE_ARGUMENT: LRSACache(CONFIG.replace(top_k=3))})
        logits(random_llama, five, **{CACHE_ARGUMENT: LRSACache(CONFIG.replace(top_k=3))})
    assert "top_k 3 against 2" in caplog.text and len(caplog.records) == 1
    apply_lrsa(random_llama, Recent(**CONFIG))
    with caplog.at_level(logging.WARNING, logger="lrsa"):
        logits(random_llama, five, **{CACHE_ARGUMENT: LRSACache(CONFIG)})
    assert "selection by LRSAConfig against Recent" in caplog.text


def test_refused_by_name(random_llama):
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"skip_layers must name layers from 0 to 2, got \[3\]"):
        apply_lrsa(random_llama, CONFIG.replace(skip_layers=(3,)))
    apply_lrsa(random_llama, CONFIG)
    with pytest.raises(ValueError, match="2D padding mask"):
        random_llama(ids, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="packed"):
        random_llama(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1]]), **{CACHE_ARGUMENT: LRSACache(CONFIG)})
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(ValueError, match="attention dropout must be 0"):
        apply_lrsa(model, CONFIG).train()(ids)
    encoder = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(ValueError, match="lrsa"):
        apply_lrsa(encoder, CONFIG)(ids)


@pytest.mark.parametrize("option", ["sinks", "position_bias"])
def test_what_is_not_supported_is_never_ignored(random_llama, option):
    apply_lrsa(random_llama, CONFIG)
    with pytest.raises(ValueError, match=option):
        random_llama(torch.zeros(1, 5, dtype=torch.long), **{option: 3})


def test_the_first_layer_that_attends():
    from transformers import LlamaConfig, Qwen3NextConfig

    from lrsa.hf.layers import first_attention

    kinds = ["linear_attention", "linear_attention", "full_attention"]
    assert first_attention(Qwen3NextConfig(num_hidden_layers=3, layer_types=kinds)) == 2
    assert first_attention(LlamaConfig(num_hidden_layers=3)) == 0
