"""The model card: metadata that the Hub can read, the measured table, and code that can be pasted."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from lrsa.evaluation import Results
from tests.train.publish.hub_server import LocalHub
from train.publish.model_card import model_card
from train.settings.defaults import with_defaults
from train.settings.load import load_settings


def settings_of(config: str, *overrides: str):
    return with_defaults(load_settings(config, [*overrides, "train.deepspeed=null"]))


def code_of(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)


def test_a_run_ends_with_its_card(tiny_run):
    card = ModelCard.load(tiny_run / "README.md")
    results = Results.load(tiny_run)
    report = (tiny_run / "report.md").read_text()
    table = report.partition("## Loss (nats per token, lower is better)\n\n")[2].partition("\n\n")[0]
    assert str(results.score("LRSA-LoRA", "1/4")) in table and table in card.text
    assert "4 rows of " in card.text and "](score_vs_keep_ratio.png)" in card.text
    assert f'lrsa.load("{tiny_run}")' in card.text and "| LRSA | sink_size 4, lag_size 8, top_k 2" in card.text
    assert card.data.base_model is None and "a local model, `base`" in card.text, "a local path is no base model"
    assert card.data.datasets is None and "local data text.jsonl" in card.text
    assert len(code_of(card)) == 1, "what lies in a directory has no custom_generate"


def test_metadata_holds_every_score_of_the_adapter(tiny_run):
    results = Results.load(tiny_run)
    data = ModelCard.load(tiny_run / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", None)
    assert {"lrsa", "kv-cache", "lora", "custom_generate"} <= set(data.tags)
    assert data.model_name == "tiny" and len(data.eval_results) == 9, "three caches, three metrics"
    found = {(item.metric_type, item.metric_name): item for item in data.eval_results}
    item, score = found["loss", "Loss, keep 1/4 (trained)"], results.score("LRSA-LoRA", "1/4")
    assert item.metric_value == pytest.approx(score.value, abs=1e-6) and score != results.score("base", "1/4")
    assert item.metric_args == {"n": 4, "low": round(score.low, 6), "high": round(score.high, 6)}
    assert (item.dataset_type, item.dataset_name) == ("local", "local data text.jsonl, held-out rows")


def test_names_on_the_hub_are_metadata(tiny_run):
    settings = settings_of("qa.yaml")
    card = model_card(settings, tiny_run, repo_id="user/qa", license="mit")
    read = ModelCard(str(card)).data
    assert (read.base_model, read.datasets) == ("Qwen/Qwen2.5-1.5B-Instruct", ["hotpotqa/hotpot_qa"])
    assert (read.license, read.model_name) == ("mit", "qa")
    result = read.eval_results[0]
    assert (result.dataset_type, result.dataset_config) == ("hotpotqa/hotpot_qa", "distractor")
    assert "[Qwen/Qwen2.5-1.5B-Instruct](https://huggingface.co/Qwen/Qwen2.5-1.5B-Instruct)" in card.text
    assert "| length | 1 epochs |" in card.text and "| batch | 1 rows per device x 16 accumulated |" in card.text


def test_scores_of_every_source_are_shown_with_their_pictures(tiny_run, tmp_path):
    sources = [{"kind": "text", "path": f"org/{name}"} for name in ("none", "held", "more")]
    sources[0]["eval_rows"] = 0
    values = {"model": {"name_or_path": "org/model"}, "data": {"sources": sources}}
    (tmp_path / "three.yaml").write_text(json.dumps(values))
    for folder in (tmp_path, tmp_path / "evaluation" / "more"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_run / "results.json", folder)
    card = model_card(settings_of(str(tmp_path / "three.yaml")), tmp_path)
    assert [item.dataset_type for item in card.data.eval_results] == ["org/held"] * 9 + ["org/more"] * 9
    held, more = card.text.index("### held"), card.text.index("### more")
    assert held < card.text.index("](score_vs_keep_ratio.png)") < more
    assert more < card.text.index("](evaluation/more/score_vs_keep_ratio.png)") < card.text.index("## Training")
    assert "none" not in [line.strip("# ") for line in card.text.splitlines()]


def test_a_run_without_evaluation_says_so(tmp_path):
    card = model_card(settings_of("qa.yaml"), tmp_path)
    assert "This adapter was not evaluated" in card.text and "| cache |" not in card.text
    assert "model-index" not in card.data.to_dict()


@pytest.mark.parametrize("config", ["qa.yaml", "chat.yaml", "text.yaml", "quickstart.yaml"])
def test_code_samples_ask_as_the_training_rows_do(config, tmp_path):
    template = 'Say "{question}" of:\n\n{context}\n\nAnswer:'
    settings = settings_of(config, *[f"data.prompt_template={json.dumps(template)}"] * (config == "qa.yaml"))
    samples = code_of(model_card(settings, tmp_path, repo_id="user/name"))
    assert len(samples) == 2
    for code in samples:
        assigned = {
            node.targets[0].id: node.value
            for node in ast.parse(code).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        prompt = ast.literal_eval(assigned["prompt"])
        if config == "qa.yaml":
            assert prompt.startswith('Say "Who found the river?" of:\n\nThe river') and prompt.endswith("\n\nAnswer:")
        assert 'lrsa.PromptFormat.from_pretrained("user/name").encode(tokenizer, prompt)' in code


def test_the_hub_s_validation_accepts_the_card_and_refuses_a_broken_one(tiny_run, monkeypatch):
    with LocalHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        card = ModelCard.load(Path(tiny_run) / "README.md")
        card.validate()
        card.data.tags = [["nested"]]
        with pytest.raises(ValueError, match="tags must be a list of strings"):
            card.validate()
        assert hub.requests == ["POST /api/validate-yaml"] * 2
