"""Rows beyond the model's positions: scaled in training, evaluation, loading and merging alike."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lrsa
from lrsa.base_loading import BaseLoading
from lrsa.evaluation import Results, evaluate_loss
from tests import tiny_run
from tests.tiny_run import make_workplace
from train.merge import merge
from train.publish.prepare import read_run, write_folder

YARN = {"rope_type": "yarn", "factor": 4}
SETTINGS = {
    "model": {"name_or_path": "model", "rope_scaling": YARN},
    "lrsa": {"sink_size": 4, "lag_size": 8, "top_k": 2},
    "data": {"kind": "text", "path": "text.jsonl", "eval_path": "held_out.jsonl", "context_length": 96},
    "train": {"output_dir": "run", "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05,
              "use_cpu": True, "save_steps": 2},
    "eval": {"keep_ratios": [0.25]},
}  # fmt: skip


run_here = partial(tiny_run.run_here, overwrite=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    """The model has 24 positions, most rows more."""
    directory = make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer, SETTINGS)
    config = directory / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 24}))
    assert run_here(directory) == 0
    return directory


def scaled(workplace: Path):
    config = AutoConfig.from_pretrained(workplace / "model")
    config.rope_parameters |= YARN | {"original_max_position_embeddings": 24}
    return AutoModelForCausalLM.from_pretrained(workplace / "model", config=config)


def test_the_adapter_is_loaded_on_the_scaled_base(workplace):
    base, ids = scaled(workplace), torch.arange(3, 80)[None]
    for directory in (workplace / "run", workplace / "run" / "checkpoint-2"):
        model = lrsa.load(directory).model
        assert model.config.max_position_embeddings == 96
        with torch.no_grad(), model.disable_adapter():
            found = lrsa.remove_lrsa(model)(ids).logits
        with torch.no_grad():
            assert torch.equal(found, base(ids).logits)
            plain = AutoModelForCausalLM.from_pretrained(workplace / "model")(ids).logits
        assert (found - plain).abs().max() > 0.1, "the scaling is felt"


def test_training_and_evaluation_run_on_the_scaled_base(workplace):
    results = Results.load(workplace / "run")
    texts = [json.loads(line)["text"] for line in (workplace / "held_out.jsonl").read_text().splitlines()]
    tokenizer = lrsa.load(workplace / "run").tokenizer
    rows = [{"input_ids": tokenizer(f"<s>{text}</s>")["input_ids"]} for text in texts]
    assert results.score("base", "full").value == pytest.approx(evaluate_loss(scaled(workplace), rows).value, rel=1e-5)
    assert "By length" in (workplace / "run" / "report.md").read_text()
    assert "positions times 4 (yarn)" in (workplace / "run" / "README.md").read_text()


def test_the_merged_model_and_the_published_adapter_keep_it(workplace):
    ids = torch.arange(3, 80)[None]
    merge(str(workplace / "run"), workplace / "merged")
    with torch.no_grad():
        found, wanted = (lrsa.load(workplace / name).model(ids).logits for name in ("merged", "run"))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    folder = write_folder(read_run(workplace / "run", "user/run", "org/base", []))
    assert BaseLoading.from_pretrained(folder) == BaseLoading(rope_scaling=YARN)
    assert not (folder / "custom_generate").exists() and "custom_generate=" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{rope_type: dynamic, factor: 2}", "model.rope_scaling.rope_type: cannot be dynamic: its frequencies change"),
        ("{rope_type: ntk, factor: 2}", "model.rope_scaling.rope_type must be yarn or linear, got 'ntk'"),
        ("{rope_type: yarn, factor: 1}", "model.rope_scaling.factor must be above 1, got 1"),
        ("{rope_type: yarn}", "model.rope_scaling.factor must be set"),
    ],
)
def test_scalings_that_cannot_be_used(workplace, capsys, given, message):
    assert run_here(workplace, f"model.rope_scaling={given}", "train.output_dir=refused") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (None, "has no rotary positions"),
        ({"rope_type": "llama3", "factor": 8}, r"scales its positions already \(llama3"),
        ({"full_attention": {}}, "positions of its own for each kind of layer"),
    ],
)
def test_models_that_cannot_be_scaled(tmp_path, random_llama, rope, message):
    random_llama.config.rope_parameters = rope
    config = random_llama.config.to_dict() | {"rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loading = BaseLoading(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoConfig, "from_pretrained", lambda *args, **options: random_llama.config)
        with pytest.raises(ValueError, match=message):
            loading.options(tmp_path)
    with pytest.raises(ValueError, match="rope_scaling has no effect: LlamaForCausalLM"):
        loading.check(random_llama)
