"""The visible pairs of a row as rectangles and pieces along the diagonal, every pair in exactly one of them.

                 sink, kept 0 .. p-2     window p-1     window p
    window p          all                    all          causal

The first column has stairs: each window sees the kept tokens of one window more than the window before it. What several
windows in a row all see is one rectangle, and the stairs above it are filled with rectangles of 1, 2, 4, ... windows.
The other two columns are taken a few queries at a time: with a mask for the corner that is not seen, or as a causal
square and a rectangle where kernels want no mask.
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
    causal: bool = False  # the last keys are the queries' own, and none sees a later one
    blocks: int = 1
    step: int = 0
    key_step: int = 0


def pieces(
    length: int, config: LRSAConfig, sink_queries: bool, leaf: int, together: int, masked: bool
) -> Iterator[Piece]:
    """All pieces of a row of `length` tokens; each query's causal piece comes before its others.

    Args:
        sink_queries: whether the queries of the sink are asked for.
        leaf: queries of a window that are computed at once.
        together: tokens of windows whose pieces are computed at once.
        masked: whether a causal piece may have earlier keys besides those of its queries.
    """
    sink, lag = config.sink_size, config.lag_size
    if sink_queries and sink:
        yield Piece(0, sink, 0, sink, causal=True)
    several = max(together // lag, 1) * lag
    for start in range(sink, length, several):
        stop = min(start + several, length)
        yield from _near(start, stop, leaf, masked, start == sink, lag)
        yield from _far(start, stop, config)


def _near(start: int, stop: int, leaf: int, masked: bool, is_first: bool, lag: int) -> Iterator[Piece]:
    """Own and previous window of the windows from `start` to `stop`; the last one may be incomplete."""
    if is_first:  # window 0 has none before it
        yield from _leaves(start, min(lag, stop - start), leaf, 0, 1, lag, masked)
        start += lag
    count, rest = divmod(max(stop - start, 0), lag)
    if count:
        yield from _leaves(start, lag, leaf, lag, count, lag, masked)
    if rest:
        yield from _leaves(stop - rest, rest, leaf, lag, 1, lag, masked)


def _leaves(start: int, rows: int, leaf: int, before: int, blocks: int, lag: int, masked: bool) -> Iterator[Piece]:
    """`rows` queries of each of some windows, `leaf` at a time, over the `before` tokens before the window and on to
    themselves."""
    for done in range(0, rows, leaf):
        size = min(leaf, rows - done)
        row, columns = start + done, before + done
        if masked:
            yield Piece(row, size, start - before, columns + size, False, True, blocks, lag, lag)
        else:
            yield Piece(row, size, row, size, False, True, blocks, lag, lag)
            if columns:
                yield Piece(row, size, start - before, columns, False, False, blocks, lag, lag)


def _far(start: int, stop: int, config: LRSAConfig) -> Iterator[Piece]:
    """Sink and kept tokens: what all windows from `start` to `stop` see, then the stairs that are left above it.

    Window `w` sees the kept tokens of the windows before `w - 1`, so each window of the group sees those of one window
    more than the one before it. Steps of 1, 2, 4, ... windows fill these stairs with rectangles.
    """
    sink, lag, top_k = config.sink_size, config.lag_size, config.top_k
    common = max((start - sink) // lag - 1, 0)  # windows that all of them see
    if sink + common * top_k:
        yield Piece(start, stop - start, 0, sink + common * top_k, compact=True)
    low, column = sink + (common + 1) * lag, sink + common * top_k
    size = 1
    while low + size * lag < stop:
        blocks = (stop - low) // (2 * size * lag)
        if blocks:
            steps = (2 * size * lag, 2 * size * top_k)
            yield Piece(low + size * lag, size * lag, column, size * top_k, True, False, blocks, *steps)
        row = low + (2 * blocks + 1) * size * lag
        if row < stop:
            yield Piece(row, stop - row, column + 2 * blocks * size * top_k, size * top_k, compact=True)
        size *= 2
