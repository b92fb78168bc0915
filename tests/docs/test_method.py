"""The picture of the method shows what the code does."""

import torch
from PIL import Image

from docs import method
from docs.method import CONFIG, DROPPED, FUTURE, KEPT, LENGTH, NEAR, SINK, cells, digest


def shown() -> str:
    """The digest of the cells that docs/method.png was drawn from."""
    return Image.open(method.PICTURE).text["Description"]


def test_the_picture_is_current():
    assert shown() == digest(cells()), "the rule has changed since docs/method.png: run python docs/method.py"


def test_a_changed_rule_is_noticed(monkeypatch):
    monkeypatch.setattr(method, "CONFIG", CONFIG.replace(top_k=3))
    assert shown() != digest(cells())


def test_every_cell_has_its_reason():
    """By the rule's own words: sink, previous and own window, `top_k` of every older one."""
    reasons = cells()
    for query in range(LENGTH):
        row, window = reasons[query], (query - CONFIG.sink_size) // CONFIG.lag_size
        near = CONFIG.sink_size + max(window - 1, 0) * CONFIG.lag_size
        assert (row[query + 1 :] == FUTURE).all()
        assert (row[: min(CONFIG.sink_size, query + 1)] == SINK).all()
        assert (row[near : query + 1] == NEAR).all()
        older = row[CONFIG.sink_size : near].view(-1, CONFIG.lag_size)
        assert ((older == KEPT).sum(1) == CONFIG.top_k).all()
        assert ((older == DROPPED).sum(1) == CONFIG.lag_size - CONFIG.top_k).all()
    assert torch.equal(reasons.unique(), torch.arange(5))


def test_it_draws(tmp_path):
    method.draw(tmp_path / "method.png")
    assert Image.open(tmp_path / "method.png").size == Image.open(method.PICTURE).size
