"""An evaluation tells a log file how far it is."""

from lrsa import LRSAConfig
from lrsa.evaluation import compare, progress
from tests.lrsa.evaluation.test_comparison import make_rows


def test_a_log_file_shows_rows_time_and_score(random_llama, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    results = compare({"base": random_llama}, None, make_rows(6), "loss", LRSAConfig(2, 8, 2), (), batch_size=3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"{done} of 12 rows" for done in (3, 6, 9, 12)]
    assert all(" left; " in line for line in lines)
    for line, setting in ((lines[1], "full"), (lines[3], "1/4")):
        assert f"base, {setting}: loss {results.score('base', setting).value:.3f} so far" in line


def test_seldom_and_at_the_end(monkeypatch, capsys):
    bar = progress.Progress(100)
    for _ in range(100):
        bar.add([0.0])
    assert len(capsys.readouterr().err.splitlines()) == 1
    progress.Progress(1, silent=True).add([1.0])
    assert capsys.readouterr().err == ""
    assert (progress._minutes(99), progress._minutes(600)) == ("99 s", "10 min")
