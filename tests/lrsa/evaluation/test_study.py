"""What compression costs a model before training, and the choice of whole layers: each number by another way."""

import json

import pytest

from lrsa import LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.evaluation import Results, Score, evaluate_loss
from lrsa.evaluation.layers import LayerChoice, choose_layers, save_layers
from lrsa.evaluation.measure.controls import Random, Recent
from lrsa.evaluation.measure.cost import kept_share, prefill_cost
from lrsa.evaluation.study import save_study, study, summary
from tests.lrsa.evaluation.test_comparison import make_rows

CONFIG = LRSAConfig(sink_size=2, lag_size=8, top_k=2)
QUIET = {"progress": False}


@pytest.fixture
def rows():
    return [row | {"prompt_length": len(row["input_ids"]) - 5, "answers": ["x"]} for row in make_rows(8)]


def loss_under(model, config, rows):
    if config is None:
        remove_lrsa(model)
    else:
        apply_lrsa(model, config)
    score = evaluate_loss(model, rows)
    remove_lrsa(model)
    return score


def test_every_way_to_compress_is_measured_and_the_full_cache_once(random_llama, rows):
    runs = []
    hook = random_llama.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    found = study(random_llama, None, rows, "qa", CONFIG, (0.5,), lags=(16,), metric="loss", batch_size=8, **QUIET)
    hook.remove()
    assert found.models == ["lag 16, lag-relative", "lag 8, random", "lag 8, recent", "lag 8, lag-relative"]
    assert len(runs) == 3 + 1 + 4 * 2  # the cost at three settings, the full cache, four ways at two ratios
    ways = [CONFIG.replace(lag_size=16), Random(**CONFIG), Recent(**CONFIG), CONFIG]
    for model, config in zip(found.models, ways, strict=True):
        assert found.score(model) == loss_under(random_llama, None, rows)
        for name, ratio in (("1/2", 0.5), ("1/4", 0.25)):
            assert found.score(model, name) == loss_under(random_llama, config.with_keep_ratio(ratio), rows)
    assert len({found.score(model, "1/4").value for model in found.models}) == 4
    with pytest.raises(ValueError, match=r"lag_relative, recent, random, got \['newest'\]"):
        study(random_llama, None, rows, "qa", CONFIG, scores=["newest"], metric="loss", **QUIET)


def test_share_of_the_cache_is_that_of_a_real_one(random_llama, rows):
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    for config in (CONFIG, CONFIG.replace(skip_layers=[1]), Recent(**CONFIG)):
        apply_lrsa(random_llama, config)
        layers = [layer for ids in prompts for layer in prefill_cost(random_llama, ids)]
        share = sum(layer.kept for layer in layers) / sum(layer.seen for layer in layers)
        assert kept_share(random_llama, config, list(map(len, prompts))) == pytest.approx(share)
        remove_lrsa(random_llama)
    assert kept_share(random_llama, None, [9]) == 1


def test_report_says_what_each_ratio_costs_and_is_read_back(random_llama, rows, tmp_path):
    found = study(random_llama, None, rows, "qa", CONFIG, (0.5,), scores=["recent"], metric="loss", **QUIET)
    cells = found.cells["lag 8, recent"]
    for name, right in (("full", 0.9), ("1/2", 0.88), ("1/4", 0.79)):
        cells[name].scores["token_accuracy"] = Score.from_rows([right] * 8, "tokens right")
    text = summary(found)
    assert "90.0 points of token accuracy (n = 8)" in text
    assert "1/2 costs 2.0 [2.0, 2.0], 1/4 costs 11.0 [11.0, 11.0] points" in text
    assert "less than 1 at no ratio that was measured, less than 3 at 1/2, less than 10 at 1/2" in text
    save_study(found, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert text in report and "(trained)" not in report and "nats lost" in report
    assert Results.load(tmp_path).to_dict() == found.to_dict() and not Results.load(tmp_path).is_trained


def test_layers_are_measured_alone_and_whole_at_equal_size(random_llama, rows, tmp_path):
    choice = choose_layers(random_llama, rows, CONFIG, most=2, **QUIET)
    first, other = rows[:4], rows[4:]
    assert choice.full == loss_under(random_llama, None, first)
    for layer in range(3):
        others = [other for other in range(3) if other != layer]
        assert choice.alone[layer] == loss_under(random_llama, CONFIG.replace(skip_layers=others), first)
    lengths = [row["prompt_length"] for row in rows]
    for config, score in choice.whole:
        assert score == loss_under(random_llama, config, first)
        assert kept_share(random_llama, config, lengths) <= kept_share(random_llama, CONFIG, lengths)
    assert [config.top_k for config, _ in choice.whole] == sorted((c.top_k for c, _ in choice.whole), reverse=True)
    worst = max(choice.alone, key=lambda layer: choice.alone[layer].value)
    assert all(worst in config.skip_layers for config, _ in choice.whole[1:])
    assert choice.chosen == min(choice.whole, key=lambda pair: pair[1].value)[0]
    assert choice.held_out["chosen"] == loss_under(random_llama, choice.chosen, other)
    save_layers(choice, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.json", "layers.md", "layers.png"]
    assert json.loads((tmp_path / "layers.json").read_text())["alone"]["0"]["n"] == 4


def test_a_choice_is_a_sentence_and_settings_to_paste(tmp_path):
    def score(value):
        return Score.from_rows([value, value], "nats per token")

    chosen = CONFIG.replace(top_k=1, skip_layers=[1])
    losses = {"full": score(1.0), "uniform": score(2.0), "chosen": score(1.25)}
    whole = [(CONFIG, score(2)), (chosen, score(1.2))]
    choice = LayerChoice(
        CONFIG, chosen, score(1), {0: score(1), 1: score(2)}, whole, losses, {"uniform": 0.25, "chosen": 0.24}
    )
    text = choice.summary()
    assert "`lrsa.skip_layers: [1]` with `lrsa.top_k: 1` wins back 75% of what compression costs" in text
    assert "24.0% of the tokens in place of 25.0%" in text
    save_layers(choice, tmp_path)
    assert "lrsa:\n  lag_size: 8\n  top_k: 1\n  skip_layers: [1]\n" in (tmp_path / "layers.md").read_text()


def test_rows_that_tell_nothing_about_layers_are_refused(random_llama, rows):
    with pytest.raises(ValueError, match="at least 4 rows longer than 18 tokens"):
        choose_layers(random_llama, rows[:3], CONFIG, **QUIET)
    with pytest.raises(ValueError, match="at least 4 rows longer than 130 tokens"):
        choose_layers(random_llama, rows, CONFIG.replace(lag_size=64), **QUIET)


def test_layers_of_a_run_are_chosen_with_its_adapter_and_none_of_them_whole(tiny_run, tmp_path):
    from rich.console import Console

    import data
    from lrsa.evaluation.measure.state import with_adapter
    from train.evaluation import TUNED, evaluate_layers, load_variants
    from train.model import load_tokenizer
    from train.resume.run_directory import config_of_run
    from train.settings.load import load_settings

    settings = load_settings(config_of_run(tiny_run))
    rows = data.load(settings.data, load_tokenizer(settings.model), 0, 20).evaluation
    evaluate_layers(settings, tiny_run, rows, Console(), tmp_path)
    found = json.loads((tmp_path / "layers.json").read_text())
    assert settings.lrsa.skip_layers == (0,) and set(found["alone"]) == {"0", "1"}
    lrsa, models = load_variants(settings, tiny_run)
    with with_adapter(models[TUNED]):
        score = loss_under(models[TUNED].model, lrsa.replace(skip_layers=[0]), rows[:2])
    assert found["alone"]["1"]["value"] == pytest.approx(score.value)
