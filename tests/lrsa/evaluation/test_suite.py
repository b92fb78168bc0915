"""The long-context suite: rows that hold what they ask for where they say, and cells that are the measured rows'."""

import json

import pytest

from lrsa import LRSAConfig, PromptFormat
from lrsa.evaluation import Variant, teacher_forced
from lrsa.evaluation.measure.controls import Recent
from lrsa.evaluation.suite import long_context, needles, run, save_suite
from tests.lrsa.evaluation.test_comparison import make_rows
from tests.lrsa.evaluation.test_perplexity import slow_loss

CONFIG = LRSAConfig(sink_size=2, lag_size=16, top_k=4)
TURN = PromptFormat("<s>", "\n", " ", "</s>", 1)


@pytest.mark.parametrize("make", [needles.passkey_rows, needles.multi_key_rows, needles.multi_value_rows])
def test_rows_hold_their_facts_at_their_depth_and_fill_their_length(byte_tokenizer, make):
    rows = make(byte_tokenizer, TURN, 1500, (0.0, 0.5, 1.0), 2)
    assert len(rows) == 6 and rows == make(byte_tokenizer, TURN, 1500, (0.0, 0.5, 1.0), 2)
    for row in rows:
        text = byte_tokenizer.decode(row["input_ids"][: row["prompt_length"]])
        answer = byte_tokenizer.decode(row["input_ids"][row["prompt_length"] :])
        assert answer == f" {row['answers'][0]}</s>" and 1300 < len(row["input_ids"]) <= 1500
        body = text.split("\n\n")[1]
        places = [body.index(number) / len(body) for number in row["answers"][0].split(", ")]
        if row["depth"] is not None:
            assert places == [pytest.approx(row["depth"], abs=0.12)]
        else:
            assert len(places) == 3
    with pytest.raises(ValueError, match="100 tokens hold no text"):
        make(byte_tokenizer, TURN, 100, (0.5,), 1)


def test_numbers_are_scored_wherever_the_answer_has_them():
    rows = [{"answers": [gold]} for gold in ("12345", "12345", "12345", "11, 22, 33", "11, 22, 33")]
    answers = ["The pass key is 12345.", "12395", "none", "33 and 11", "112233"]
    assert needles.score_numbers(answers, rows)["accuracy"].per_row == (1, 0.8, 0, pytest.approx(2 / 3), 0)


def test_loss_between_two_positions(random_llama):
    rows = make_rows(3)
    found = teacher_forced(random_llama, rows, edges=(0, 10, 30))
    for row, first, second in zip(rows, found["loss_0_10"].per_row, found["loss_10_30"].per_row, strict=True):
        cut = {"input_ids": row["input_ids"][:30]}
        assert second == pytest.approx(slow_loss(random_llama, cut, first=10), abs=1e-6)
        assert first == pytest.approx(slow_loss(random_llama, {"input_ids": row["input_ids"][:10]}), abs=1e-6)
    with pytest.raises(ValueError, match="from position 90 to 99"):
        teacher_forced(random_llama, rows, edges=(90, 99))


@pytest.fixture
def model(random_llama, byte_tokenizer):
    random_llama.resize_token_embeddings(len(byte_tokenizer))
    random_llama.config.max_position_embeddings = 4096
    return random_llama.float()


def test_every_cell_is_the_mean_of_its_rows_and_what_is_not_measured_is_said(
    model, byte_tokenizer, tmp_path, monkeypatch
):
    def none(name, *_):
        raise OSError(f"{name} cannot be fetched\nat length")

    monkeypatch.setattr(run, "harness_rows", none)
    sizes = []
    models = {"base, recent": Variant(model, None, Recent(**CONFIG)), "base": Variant(model, None)}
    rows = [row | {"prompt_length": 20, "answers": ["x"]} for row in make_rows(4)]
    suite = long_context(
        models, byte_tokenizer, TURN, CONFIG, (0.25,), lengths=(900, 1000), depths=(0.0, 1.0), count=2,
        questions={900: rows}, metric="loss", progress=False, each=lambda suite: sizes.append(len(suite.depths)),
        tasks=("passkey_16", "multi_value", "questions", "position", "longbench"),
    )  # fmt: skip
    assert set(suite.parts) == {
        *((task, length) for task in ("passkey_16", "multi_value") for length in (900, 1000)),
        ("questions", 900),
        ("position", 900),
    }
    assert sizes == [1, 2, 3, 4, 5, 6]
    save_suite(suite, tmp_path)
    cells = json.loads((tmp_path / "suite.json").read_text())["cells"]
    results = suite.parts["passkey_16", 1000]
    for model_name in models:
        for cache in ("full", "1/4"):
            score = results.score(model_name, cache, "token_accuracy")
            for depth, part in ((None, score.per_row), (0.0, score.per_row[:2]), (1.0, score.per_row[2:])):
                wanted = {"task": "passkey_16", "length": 1000, "depth": depth, "model": model_name, "cache": cache}
                [cell] = [c for c in cells if {**c, **wanted} == c and c["metric"] == "token_accuracy"]
                assert cell["value"] == pytest.approx(sum(part) / len(part)) and cell["n"] == len(part)
                assert cell["low"] <= cell["value"] <= cell["high"]
    assert results.score("base", "1/4", "loss") != results.score("base, recent", "1/4", "loss")
    report = (tmp_path / "suite.md").read_text()
    assert "| longbench_qasper, 900 tokens | longbench_narrativeqa cannot be fetched |" in report
    assert "| questions, 1000 tokens | there are no rows of questions of this length |" in report
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["suite_passkey_16.png", "suite_position.png"]
    with pytest.raises(ValueError, match=r"tasks of the suite are passkey_16.*got needle"):
        long_context(models, byte_tokenizer, TURN, CONFIG, lengths=(900,), tasks=("needle",))


def test_a_run_is_measured_with_its_controls(tiny_run, tmp_path, monkeypatch):
    """Base and adapter, and the adapter with other choices of tokens, through the settings of the run."""
    from matplotlib.figure import Figure
    from rich.console import Console

    import data
    from train.evaluation import load_variants
    from train.model import load_tokenizer
    from train.resume.run_directory import config_of_run
    from train.settings.load import load_settings
    from train.suite import run_suite

    given = ["eval.suite=[passkey_16]", "eval.suite_lengths=[700]", "eval.suite_depths=2", "eval.suite_rows=1"]
    settings = load_settings(config_of_run(tiny_run), [*given, "eval.metric=loss"])
    tokenizer = load_tokenizer(settings.model)
    corpus = data.load(settings.data, tokenizer, 0, 20)
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **o: (drawn.append(figure), save(figure, *a, **o)))
    run_suite(settings, *load_variants(settings, tiny_run), tokenizer, corpus, Console(), tmp_path)
    titles = [axes.get_title().split("\n") if axes.axison else None for axes in drawn[-1].axes[:12]]
    models = ["base", "LRSA-LoRA, recent", "LRSA-LoRA, random", "LRSA-LoRA"]
    assert titles[:4] == [["base", "full cache"], None, None, ["LRSA-LoRA", "full cache"]]
    assert titles[4:] == [[model, f"keep {ratio}"] for ratio in ("1/2", "1/4") for model in models]
    cells = json.loads((tmp_path / "suite.json").read_text())["cells"]
    assert {cell["model"] for cell in cells} == {"base", "LRSA-LoRA, recent", "LRSA-LoRA, random", "LRSA-LoRA"}
    assert {cell["cache"] for cell in cells} == {"full", "1/2", "1/4"}
    loss = {(c["model"], c["cache"]): c["value"] for c in cells if c["metric"] == "loss" and c["depth"] is None}
    assert loss["LRSA-LoRA, recent", "full"] == loss["LRSA-LoRA", "full"] != loss["base", "full"]
    assert loss["LRSA-LoRA, recent", "1/4"] != loss["LRSA-LoRA", "1/4"]


@pytest.mark.slow
def test_ruler_is_generated_and_scored_by_its_tasks():
    pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install "lrsa[harness]"')
    pytest.importorskip("wonderwords", reason='RULER generates with wonderwords: pip install "lrsa[harness]"')
    from transformers import AutoTokenizer

    from lrsa.evaluation.suite.harness_rows import RULER, harness_rows

    tokenizer = AutoTokenizer.from_pretrained("data/tiny_base")
    for name in RULER:
        rows, score, most = harness_rows(name, tokenizer, PromptFormat.plain(tokenizer), 2048, 2)
        assert len(rows) == 2 and all(1000 < row["prompt_length"] <= 2048 - most for row in rows)
        assert score([rows[0]["answers"][0], "nothing"], rows)["accuracy"].per_row == (1.0, 0.0)
