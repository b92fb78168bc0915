"""Several models at several settings: the right weights are measured, all is put back, and the files can be read."""

import json
import random
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from lrsa import LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.evaluation import Results, Variant, compare, evaluate_loss, print_report, save_report, score
from lrsa.evaluation.report.tables import markdown

CONFIG = LRSAConfig(sink_size=2, lag_size=8, top_k=1)


@pytest.fixture
def adapted(random_llama):
    """A PEFT model with two different adapters, "default" active and trainable, and dropout when training."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, init_lora_weights=False)
    model = get_peft_model(random_llama, lora)
    model.add_adapter("control", lora)
    return model.double().eval()


def make_rows(count=6):
    rng = random.Random(0)
    return [{"input_ids": [rng.randrange(48) for _ in range(rng.randrange(30, 70))]} for _ in range(count)]


def state_of(model):
    """Everything that an evaluation may not leave changed."""
    flags = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    lrsa = getattr(model.config, "lrsa", None)
    torch.manual_seed(0)
    logits = model(torch.tensor([list(range(2, 40))]), use_cache=False).logits
    return (
        flags, trainable, model.config._attn_implementation, lrsa, model.active_adapter, list(model.active_adapters),
        model.get_model_status().enabled, logits.tolist(),
    )  # fmt: skip


def scores_of(results):
    return {(model, name): cell.scores for model, cells in results.cells.items() for name, cell in cells.items()}


def run(adapted, rows=None, config=CONFIG, **options):
    adapters = {"base": None, "control": "control", "lrsa": "default"}
    models = {name: Variant(adapted, adapter) for name, adapter in adapters.items()}
    options = {"keep_ratios": (0.5, 0.25), "progress": False} | options
    return compare(models, None, rows or make_rows(), "loss", config, **options)


def test_every_cell_is_the_named_adapter_under_the_named_setting(adapted):
    results = run(adapted)
    assert results.models == ["base", "control", "lrsa"]
    assert [setting.name for setting in results.settings] == ["full", "1/2", "1/4", "1/8"]
    assert [setting.config and setting.config.top_k for setting in results.settings] == [None, 4, 2, 1]
    for setting in results.settings:
        remove_lrsa(adapted)
        if setting.config:
            apply_lrsa(adapted, setting.config)
        adapted.set_adapter("default")
        assert results.score("lrsa", setting.name) == evaluate_loss(adapted, make_rows())
        adapted.set_adapter("control")
        assert results.score("control", setting.name) == evaluate_loss(adapted, make_rows())
        with adapted.disable_adapter():
            assert results.score("base", setting.name) == evaluate_loss(adapted, make_rows())
    values = {results.score(model, setting.name).value for model in results.models for setting in results.settings}
    assert len(values) == 12


STARTS = {
    "training": lambda model: model.train(),
    "partly in eval": lambda model: model.train().get_base_model().model.layers[1].eval(),
    "other adapter": lambda model: model.set_adapter("control"),
    "frozen": lambda model: model.requires_grad_(False),
    "adapters off": lambda model: model.base_model.disable_adapter_layers(),
    "lrsa": lambda model: apply_lrsa(model, CONFIG.replace(top_k=3)),
    "dense, with settings": lambda model: setattr(model.config, "lrsa", CONFIG.to_dict()),
}


@pytest.mark.parametrize("start", STARTS)
def test_state_is_put_back_and_has_no_influence(adapted, start):
    expected = scores_of(run(adapted, keep_ratios=()))
    STARTS[start](adapted)
    before = state_of(adapted)
    assert scores_of(run(adapted, keep_ratios=())) == expected
    assert state_of(adapted) == before


@pytest.mark.parametrize("start", STARTS)
def test_state_is_put_back_after_an_error(adapted, start):
    STARTS[start](adapted)
    before = state_of(adapted)
    forwards = []

    def fail(*_):
        forwards.append(1)
        if len(forwards) > 23:  # two for the cost, then twelve for every model: within the control, compressed
            raise RuntimeError("out of memory, say")

    hook = adapted.get_base_model().model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(adapted, keep_ratios=(), batch_size=1)
    hook.remove()
    assert state_of(adapted) == before


def test_plain_model_is_measured_as_it_stands(random_llama):
    results = compare({"model": random_llama}, None, make_rows(), "loss", CONFIG, (0.5,), progress=False)
    assert results.score("model") == evaluate_loss(random_llama, make_rows())
    assert results.differences == {}


def test_differences_are_paired(adapted):
    results = run(adapted)
    found = results.difference("lrsa", "base", "1/8")
    pairs = zip(results.score("lrsa", "1/8").per_row, results.score("base", "1/8").per_row, strict=True)
    assert found.per_row == pytest.approx([a - b for a, b in pairs])
    assert [other for other, _ in results.differences["loss"]] == ["base", "control"]


def test_measured_cost_stands_in_the_results(adapted):
    settings = run(adapted, rows=[{"input_ids": list(range(42))}, {"input_ids": list(range(9))}]).settings
    kept = [[layer.kept for layer in setting.cost] for setting in settings]
    assert kept == [[42] * 3, [2 + 4 * 4 + 8] * 3, [2 + 4 * 2 + 8] * 3, [2 + 4 * 1 + 8] * 3]


def test_report_says_what_layers_hold_alone_and_together(adapted):
    config = LRSAConfig(2, 8, 1, skip_layers=[1])
    rows = [{"input_ids": (list(range(48)) * 5)[:length]} for length in (240, 60)]  # the short one holds a larger share
    results = run(adapted, rows=rows, config=config)
    held = (1 + 2 * sum(map(config.kept_length, (240, 60))) / 300) / 3
    cost = results.settings[-1].cost
    whole = sum(layer.bytes for layer in cost) / sum(layer.full_bytes for layer in cost)
    report = markdown(results)
    assert f"| keep 1/8 | each of 0, 2 | {cost[0].kept} of 240 |" in report
    assert "| keep 1/8 | each of 1 | 240 of 240 |" in report
    assert f"| keep 1/8 (trained) | {held:.1%} | {results.score('base', '1/8')} |" in report
    assert f"{held:.1%}" != f"{whole:.1%}"
    assert re.search(rf"\| keep 1/8 \| all \|  \| .* \| {whole:.1%} \|", report)


def test_files_can_be_read_and_hold_everything(adapted, tmp_path):
    results = run(adapted)
    directory = save_report(results, tmp_path / "new" / "run")
    assert sorted(path.name for path in directory.iterdir()) == ["report.md", "results.json", "score_vs_keep_ratio.png"]
    found = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(results.to_dict()))
    cell = next(cell for cell in found["cells"] if (cell["model"], cell["setting"]) == ("control", "1/4"))
    assert cell["scores"]["loss"]["per_row"] == list(results.score("control", "1/4").per_row)
    assert (found["n"], found["trained_setting"], len(found["cells"])) == (6, "1/8", 12)
    assert LRSAConfig.from_dict(found["lrsa"]) == CONFIG
    assert {"torch", "transformers", "lrsa"} <= set(found["versions"])
    assert "last two windows stay dense" in found["prefill"]
    report = (directory / "report.md").read_text(encoding="utf-8")
    assert str(results.score("lrsa", "1/8")) in report and "keep 1/8 (trained)" in report
    tables = re.findall(r"(?:^\|.*\n)+", report, flags=re.MULTILINE)
    assert len(tables) == 7 and all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    assert (directory / "score_vs_keep_ratio.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_splits_rows_by_length(adapted):
    rows = make_rows(8)
    results = run(adapted, rows)
    table = markdown(results).partition("## By length (loss)\n\n")[2].partition("\n\n")[0].splitlines()
    lengths = [len(row["input_ids"]) for row in rows]
    shortest = sorted(range(8), key=lengths.__getitem__)[:2]
    expected = sum(results.score("lrsa", "1/8").per_row[row] for row in shortest) / 2
    cells = [cell.strip() for cell in table[3].strip("|").split("|")]
    assert len(table) == 2 + 4 * 2 and cells[1:3] == ["2", "keep 1/8 (trained)"]
    assert cells[0] == f"{lengths[shortest[0]]} to {lengths[shortest[1]]}" and cells[-1] == f"{expected:.3f}"
    assert "By length" not in markdown(run(adapted, [rows[0]] * 4)), "rows of one length"


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_shows_every_score(adapted, width, capsys):
    results = run(adapted)
    results.cells["tuned[bold]"] = results.cells.pop("lrsa")
    print_report(results, Console(width=width))
    shown = capsys.readouterr().out
    assert "tuned[bold]" in shown
    for model in results.models:
        for setting in results.settings:
            assert f"{results.score(model, setting.name).value:.3f}" in shown
    assert "[" + str(results.score("tuned[bold]", "1/8")).partition("[")[2] in shown


def test_rows_that_are_never_compressed_are_a_warning(adapted):
    assert run(adapted).warning is None
    short = run(adapted, rows=[{"input_ids": list(range(18))}] * 2)
    assert "nothing was compressed: longest row 18" in short.warning
    assert short.score("lrsa", "full") == short.score("lrsa", "1/8")


def test_ratio_of_one_is_the_full_cache_and_equal_ratios_are_measured_once(adapted):
    assert [s.name for s in run(adapted, keep_ratios=(1.0, 0.26, 0.25, 0.7)).settings] == ["full", "3/4", "1/4", "1/8"]


def test_errors_come_before_any_work(adapted):
    rows = make_rows()
    with pytest.raises(ValueError, match="task must be one of retrieval, qa, chat, loss, got 'bleu'"):
        compare({"base": Variant(adapted, None)}, None, rows, "bleu", CONFIG)
    with pytest.raises(ValueError, match="has no adapter 'contrl': it has default, control"):
        compare({"x": Variant(adapted, "contrl")}, None, rows, "loss", CONFIG)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        compare({"x": Variant(adapted, None)}, None, rows, "qa", CONFIG)
    with pytest.raises(ValueError, match="keep_ratio must be above 0"):
        run(adapted, keep_ratios=(0.0,))
    with pytest.raises(ValueError, match="no evaluation rows"):
        compare({"x": Variant(adapted, None)}, None, [], "loss", CONFIG)


def test_saved_results_are_read_back(adapted, tmp_path):
    results = run(adapted)
    found = Results.load(save_report(results, tmp_path))
    assert found.to_dict() == results.to_dict() and markdown(found) == (tmp_path / "report.md").read_text()
    assert found.score("lrsa", "1/8") == results.score("lrsa", "1/8")
    (tmp_path / "results.json").write_text('{"task": "loss"}')
    with pytest.raises(ValueError, match=r"results\.json cannot be read as the results of an evaluation"):
        Results.load(tmp_path)


def test_intervals_are_computed_once(adapted, tmp_path, monkeypatch):
    results, computed = run(adapted), []
    real = score._bootstrap_interval
    monkeypatch.setattr(score, "_bootstrap_interval", lambda *args: computed.append(1) or real(*args))
    save_report(results, tmp_path)
    print_report(results, Console())
    assert len(computed) == 2 * 4  # differences from two other models at four settings
