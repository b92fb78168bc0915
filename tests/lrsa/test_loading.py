"""Loading elsewhere: base, adapter and cache come back as they were trained."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lrsa
from lrsa import LRSACache, LRSAConfig, apply_lrsa

CONFIG = LRSAConfig(3, 8, 2)


@pytest.fixture
def saved(random_llama, tmp_path):
    """A base model with tokenizer, and an adapter of it, as a run leaves them; and the tuned model itself."""
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0").save_pretrained(tmp_path / "base")
    random_llama.save_pretrained(tmp_path / "base")
    random_llama.name_or_path = str(tmp_path / "base")
    torch.manual_seed(1)
    tuned = get_peft_model(random_llama, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned = apply_lrsa(tuned.double().eval(), CONFIG)
    tuned.save_pretrained(tmp_path / "adapter")
    CONFIG.save_pretrained(tmp_path / "adapter")
    return tmp_path, tuned


def text_of(length=60):
    return " ".join(f"w{i}" for i in torch.randint(1, 48, (length,)).tolist())


def test_adapter_loads_in_three_lines(saved):
    directory, tuned = saved
    model, tokenizer, new_cache = lrsa.load(directory / "adapter", dtype=torch.float64)
    inputs = tokenizer(text_of(), return_tensors="pt")
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**inputs, past_key_values=new_cache(), **options)
    assert torch.equal(found, tuned.generate(**inputs, past_key_values=LRSACache(CONFIG), **options))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, tuned(**inputs).logits)
    assert new_cache() is not new_cache() and new_cache().config == CONFIG
    assert model.get_base_model().config.lrsa == CONFIG


@pytest.mark.parametrize(("trained_on", "expected"), [("v2", "v2"), (None, "main")])
def test_base_is_loaded_at_the_revision_that_was_trained_on(saved, monkeypatch, trained_on, expected):
    directory, _ = saved
    path = directory / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": trained_on}))
    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **options: asked.append(options) or load(*args, **options),
    )
    lrsa.load(directory / "adapter")
    assert [options["revision"] for options in asked] == [expected]


def test_merged_model_keeps_its_settings(saved):
    directory, tuned = saved
    inputs = torch.randint(1, 48, (1, 60))
    with torch.no_grad():
        expected = tuned(inputs).logits
    merged = tuned.merge_and_unload()
    merged.save_pretrained(directory / "merged")
    AutoTokenizer.from_pretrained(directory / "base").save_pretrained(directory / "merged")
    assert merged.config.lrsa == CONFIG
    model, _, new_cache = lrsa.load(directory / "merged", dtype=torch.float64)
    assert new_cache().config == CONFIG
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, expected, atol=1e-10, rtol=0)


def test_adapter_without_settings_is_refused(saved):
    directory, _ = saved
    (directory / "adapter" / "lrsa_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no lrsa_config\.json: is it an adapter that was trained with lrsa"):
        lrsa.load(directory / "adapter")


def test_settings_that_do_not_fit_the_base_are_refused(saved):
    directory, _ = saved
    CONFIG.replace(skip_layers=(7,)).save_pretrained(directory / "adapter")
    with pytest.raises(ValueError, match="skip_layers must name layers from 0 to 2"):
        lrsa.load(directory / "adapter")


def test_given_settings_stand_in_for_stored_ones(saved):
    """A plain base has none of its own; an adapter's give way."""
    directory, _ = saved
    given = LRSAConfig(2, 4, 1)
    for name in ("base", "adapter"):
        model, _, new_cache = lrsa.load(directory / name, given)
        assert new_cache().config == given == model.config.lrsa


def test_a_base_model_that_moved(saved):
    directory, tuned = saved
    (directory / "base").rename(directory / "moved")
    (directory / "adapter" / "tokenizer_config.json").unlink(missing_ok=True)
    with pytest.raises(OSError, match=r"base model .*base cannot be loaded: .*if it moved, pass base_model="):
        lrsa.load(directory / "adapter")
    model, tokenizer, _ = lrsa.load(directory / "adapter", base_model=directory / "moved", dtype=torch.float64)
    inputs = tokenizer(text_of(), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, tuned(**inputs).logits)
    with pytest.raises(ValueError, match="base_model is for an adapter"):
        lrsa.load(directory / "moved", CONFIG, base_model=directory / "moved")


@pytest.mark.parametrize("change", ["another depth", "another width", "cut file"])
def test_an_adapter_of_another_base_is_refused(saved, change):
    """peft loads what fits and warns of the rest: the model would answer with half of its adapter."""
    directory, tuned = saved
    config, file = tuned.get_base_model().config.to_dict(), directory / "adapter" / "adapter_model.safetensors"
    config |= {"another depth": {"num_hidden_layers": 2}, "another width": {"hidden_size": 64}}.get(change, {})
    config.pop("lrsa")
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(directory / "other")
    if change == "cut file":
        save_file({name: x for name, x in load_file(file).items() if "layers.1" not in name}, file)
    message = {
        "another depth": r"the base model has no .*layers\.2.* \(one of 14\)",
        "another width": "size mismatch for .*lora_A",
        "cut file": r"it holds no .*layers\.1.* \(one of 14\)",
    }[change]
    with pytest.raises(ValueError, match=f"is an adapter of another base model, or is damaged: {message}"):
        lrsa.load(directory / "adapter", base_model=directory / "other")
