"""The numbers of docs/serving.md follow from the rule."""

from pathlib import Path

from lrsa import LRSAConfig

PAGE = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")


def test_bytes_and_blocks():
    for length in (8192, 32768, 131072):
        cells = [f"{length}"]
        for held in [length, *(LRSAConfig(16, 128, top_k).kept_length(length) for top_k in (32, 16))]:
            cells.append(f"{held * 32 * 8 * 128 * 2 * 2 / 2**30:.2f}, {-(-held // 16)}")
        assert f"| {' | '.join(cells)} |" in PAGE


def test_block_table_of_a_window():
    """19 blocks before, 13 after, for 400 tokens of which the last two windows are complete."""
    config = LRSAConfig(sink_size=16, lag_size=128, top_k=32)
    assert config.kept_length(400) == 13 * 16 and config.kept_length(399) == 19 * 16 - 1
