import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

import data
from data.report import compression_warning, length_summary, marked_sample

ROW = {"question": "Who [bold]found[/bold] it?", "context": "Anna found it.", "answers": "Anna"}


@pytest.fixture
def corpus(tmp_path, byte_tokenizer):
    path = tmp_path / "qa[red].json"
    records = [ROW | {"context": f"{ROW['context']} Number {n} is here." * (1 + n % 3)} for n in range(12)]
    path.write_text(json.dumps([*records, ROW | {"answers": []}]))
    settings = data.DataSettings(kind="qa", path=str(path), context_length=400, eval_rows=2)
    return data.load(settings, byte_tokenizer, 0, 36)


def test_the_report_counts_the_rows_themselves(corpus):
    report = corpus.report
    lengths = [len(ids) for ids in corpus.train["input_ids"]]
    labels = [label for row in corpus.train["labels"] for label in row]
    assert (report.rows, report.evaluation_rows) == (len(corpus.train), len(corpus.evaluation)) == (10, 2)
    assert report.lengths["longest"] == max(lengths) and report.lengths["shortest"] == min(lengths)
    assert sum(count for *_, count in report.histogram) == 10
    assert report.trained_share == pytest.approx(sum(label != -100 for label in labels) / len(labels))
    assert report.compressed_share == 1 and report.warning is None
    assert report.dropped == {"no answer is given (unanswerable)": 1}


def test_the_sample_is_the_first_row_with_its_trained_end_marked(corpus, byte_tokenizer):
    [(prompt, _), (answer, trained)] = corpus.report.sample
    assert prompt + answer == byte_tokenizer.decode(corpus.train[0]["input_ids"])
    assert answer == " Anna</s>" and trained
    assert marked_sample(byte_tokenizer, [5, 6], [True, True]) == [[byte_tokenizer.decode([5, 6]), True]]


def printed(report: data.DataReport) -> str:
    console = Console(width=200, file=io.StringIO())
    report.print(console)
    return console.file.getvalue()


def test_print_shows_all_of_it_as_plain_text(corpus):
    shown = printed(corpus.report)
    parts = (
        "10 to train on, 2 to evaluate on",
        "100.0% of the rows",
        "█",
        "1: no answer",
        "Who [bold]found[/bold] it?",
    )
    for part in (*parts, "[ Anna</s>]", "context_length 400", "qa[red].json"):
        assert part in shown, part


def test_save_writes_json_and_markdown(corpus, tmp_path):
    corpus.report.save(tmp_path / "run")
    values = json.loads((tmp_path / "run/data_report.json").read_text())
    assert values["rows"] == 10 and data.DataReport(**values) == corpus.report
    text = (tmp_path / "run/data_report.md").read_text()
    assert "⟦ Anna</s>⟧" in text and "| rows | 10 to train on" in text and "█" in text


def test_too_short_rows_warn():
    assert compression_warning([1800, 900], 2064) == (
        "nothing would be compressed: longest row 1800 <= sink_size + 2 * lag_size = 2064; "
        "lower lrsa.lag_size or use longer data"
    )
    assert compression_warning([2064] * 99, 2064).startswith("nothing would be compressed")
    assert "1.0% of the rows" in compression_warning([2065] + [100] * 99, 2064)
    assert compression_warning([2065] * 5 + [100] * 95, 2064) is None


def test_the_warning_is_in_print_and_markdown(corpus, tmp_path):
    report = dataclasses.replace(corpus.report, warning="nothing would be compressed: x", notes=["[red]kept[/red]"])
    report.save(tmp_path)
    shown = printed(report)
    assert "warning: nothing would be compressed: x" in shown and "[red]kept[/red]" in shown
    assert "**Warning:** nothing would be compressed: x" in (tmp_path / "data_report.md").read_text()


@pytest.mark.parametrize("lengths", [[7], [7, 7], [1, 2, 3], list(range(3, 517)), [5, 5000]])
def test_the_histogram_holds_every_row_once(lengths):
    numbers, bins = length_summary(lengths)
    assert len(bins) <= 8 and sum(count for *_, count in bins) == len(lengths)
    for low, high, count in bins:
        assert count == sum(low <= length <= high for length in lengths)
    assert (
        bins[0][0] == min(lengths)
        and bins[-1][1] == max(lengths)
        and numbers["mean"] == pytest.approx(np.mean(lengths))
    )
