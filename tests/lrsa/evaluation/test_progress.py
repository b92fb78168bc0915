"""An evaluation tells a log file how far it is."""

from lrsa import LRSAConfig
from lrsa.evaluation import compare, progress
from tests.lrsa.evaluation.test_comparison import make_rows


def test_a_log_file_shows_rows_time_and_score(random_llama, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    results = compare({"base": random_llama}, None, make_rows(6), "loss", LRSAConfig(2, 8, 2), (), batch_size=3)
    told = capsys.readouterr().err
    for done, setting in ((6, "full"), (12, "1/4")):
        score = results.score("base", setting).value
        line = next(line for line in told.split("\n") if f" {done}/12 [" in line)
        assert line.startswith(f"base, {setting}: ") and f"loss {score:.3f} so far]" in line


def test_seldom_and_at_the_end(capsys):
    bar = progress.Progress(100)
    bar.begin("base", "loss")
    for _ in range(100):
        bar.add([0.0])
    first, last = capsys.readouterr().err.strip().split("\n")
    assert " 0/100 [" in first and " 100/100 [" in last
    silent = progress.Progress(1, silent=True)
    silent.begin("base", "loss")
    silent.add([1.0])
    assert capsys.readouterr().err == ""
