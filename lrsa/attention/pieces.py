"""The visible pairs of a row as rectangles and causal squares, none of them computed twice, none in vain.

                 sink, kept 0 .. p-2     window p-1     window p
    window p          all                    all          causal

The first column has stairs: each window sees the kept tokens of one window more than the window before it. What several
windows in a row all see is one rectangle, and the stairs above it are filled with rectangles of 1, 2, 4, ... windows. A
causal square is cut into small ones along the diagonal and rectangles below it, because kernels waste up to half of a
small causal square.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lrsa.config import LRSAConfig


class Piece(NamedTuple):
    """Equal blocks of attention: block `i` is `rows` queries from `query + i * step` on, and `columns` keys from
    `key + i * key_step` on."""

    query: int
    rows: int
    key: int
    columns: int
    compact: bool = False  # keys are counted in [sink | kept], else in the row itself
    causal: bool = False
    blocks: int = 1
    step: int = 0
    key_step: int = 0


def pieces(
    length: int, config: LRSAConfig, sink_queries: bool, square: int, together: int
) -> Iterator[tuple[bool, Piece]]:
    """All pieces of a row of `length` tokens; `True` marks those that are the first for their queries.

    Args:
        sink_queries: whether the queries of the sink are asked for.
        square: largest causal square that is not cut.
        together: tokens of windows whose pieces are computed at once.
    """
    sink, lag = config.sink_size, config.lag_size
    if sink_queries and sink:
        yield True, Piece(0, sink, 0, sink, causal=True)
    leaf = lag
    while leaf > square and leaf % 2 == 0:
        leaf //= 2
    several = max(together // lag, 1) * lag
    for start in range(sink, length, several):
        stop = min(start + several, length)
        yield from _near(start, stop, leaf, start == sink, lag)
        yield from _far(start, stop, config)


def _near(start: int, stop: int, leaf: int, is_first: bool, lag: int) -> Iterator[tuple[bool, Piece]]:
    """Own and previous window of the windows from `start` to `stop`; the last one may be incomplete."""
    count, rest = divmod(stop - start, lag)
    if count:
        yield True, Piece(start, leaf, start, leaf, False, True, count * lag // leaf, leaf, leaf)
        half = leaf
        while half < lag:
            yield (
                False,
                Piece(start + half, half, start, half, False, False, count * lag // (2 * half), *[2 * half] * 2),
            )
            half *= 2
    if rest:
        yield True, Piece(stop - rest, rest, stop - rest, rest, causal=True)
    first = start + lag * is_first  # window 0 has none before it
    if first + lag <= stop:
        yield False, Piece(first, lag, first - lag, lag, False, False, (stop - first) // lag, lag, lag)
    if rest and stop - rest >= first:
        yield False, Piece(stop - rest, rest, stop - rest - lag, lag)


def _far(start: int, stop: int, config: LRSAConfig) -> Iterator[tuple[bool, Piece]]:
    """Sink and kept tokens: what all windows from `start` to `stop` see, then the stairs that are left above it.

    Window `w` sees the kept tokens of the windows before `w - 1`, so each window of the group sees those of one window
    more than the one before it. Steps of 1, 2, 4, ... windows fill these stairs with rectangles.
    """
    sink, lag, top_k = config.sink_size, config.lag_size, config.top_k
    common = max((start - sink) // lag - 1, 0)  # windows that all of them see
    if sink + common * top_k:
        yield False, Piece(start, stop - start, 0, sink + common * top_k, compact=True)
    low, column = sink + (common + 1) * lag, sink + common * top_k
    size = 1
    while low + size * lag < stop:
        blocks = (stop - low) // (2 * size * lag)
        if blocks:
            steps = (2 * size * lag, 2 * size * top_k)
            yield False, Piece(low + size * lag, size * lag, column, size * top_k, True, False, blocks, *steps)
        row = low + (2 * blocks + 1) * size * lag
        if row < stop:
            yield False, Piece(row, stop - row, column + 2 * blocks * size * top_k, size * top_k, compact=True)
        size *= 2
