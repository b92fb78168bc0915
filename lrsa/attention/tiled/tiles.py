"""The visible pairs of a row as tiles, every pair in exactly one of them: dense rectangles, and causal tiles along the
diagonal.

                 sink, kept 0 .. p-2     window p-1     window p
    window p          all                    all          causal

In the first column each window sees the kept tokens of one window more than the window before it. What several windows
in a row all see is one rectangle; the triangle above it is filled with rectangles of 1, 2, 4, ... windows. The other
two columns are taken a block of queries at a time: with a mask for the corner that is not seen, or as a causal square
and a rectangle where kernels want no mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Tile(NamedTuple):
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


def tiles(
    length: int, sink: int, lag: int, top_k: int, sink_queries: bool, block: int, together: int, masked: bool
) -> Iterator[Tile]:
    """All tiles of a row of `length` tokens; each query's causal tile comes before its others.

    Args:
        sink, lag, top_k: tokens of the sink, of a window, and kept of a window.
        sink_queries: whether the queries of the sink are computed.
        block: queries of a window in a tile.
        together: tokens of the windows that are computed in one call.
        masked: whether a causal tile may have earlier keys besides those of its queries.
    """
    if sink_queries and sink:
        yield Tile(0, sink, 0, sink, causal=True)
    several = max(together // lag, 1) * lag
    for start in range(sink, length, several):
        stop = min(start + several, length)
        yield from _near(start, stop, block, masked, start == sink, lag)
        yield from _far(start, stop, sink, lag, top_k)


def _near(start: int, stop: int, block: int, masked: bool, is_first: bool, lag: int) -> Iterator[Tile]:
    """Own and previous window of the windows from `start` to `stop`; the last one may be incomplete."""
    if is_first:  # window 0 has none before it
        yield from _blocks(start, min(lag, stop - start), block, 0, 1, lag, masked)
        start += lag
    count, rest = divmod(max(stop - start, 0), lag)
    if count:
        yield from _blocks(start, lag, block, lag, count, lag, masked)
    if rest:
        yield from _blocks(stop - rest, rest, block, lag, 1, lag, masked)


def _blocks(start: int, rows: int, block: int, before: int, blocks: int, lag: int, masked: bool) -> Iterator[Tile]:
    """`rows` queries of each of some windows, `block` at a time, over the `before` tokens before the window and on to
    themselves."""
    for done in range(0, rows, block):
        size = min(block, rows - done)
        row, columns = start + done, before + done
        if masked:
            yield Tile(row, size, start - before, columns + size, False, True, blocks, lag, lag)
        else:
            yield Tile(row, size, row, size, False, True, blocks, lag, lag)
            if columns:
                yield Tile(row, size, start - before, columns, False, False, blocks, lag, lag)


def _far(start: int, stop: int, sink: int, lag: int, top_k: int) -> Iterator[Tile]:
    """Sink and kept tokens: what all windows from `start` to `stop` see, then the triangle that is left above it.

    Window `w` sees the kept tokens of the windows before `w - 1`, so each window of the group sees those of one window
    more than the one before it. Rectangles of 1, 2, 4, ... windows fill that triangle.
    """
    common = max((start - sink) // lag - 1, 0)  # windows that all of them see
    if sink + common * top_k:
        yield Tile(start, stop - start, 0, sink + common * top_k, compact=True)
    low, column = sink + (common + 1) * lag, sink + common * top_k
    size = 1
    while low + size * lag < stop:
        blocks = (stop - low) // (2 * size * lag)
        if blocks:
            steps = (2 * size * lag, 2 * size * top_k)
            yield Tile(low + size * lag, size * lag, column, size * top_k, True, False, blocks, *steps)
        row = low + (2 * blocks + 1) * size * lag
        if row < stop:
            yield Tile(row, stop - row, column + 2 * blocks * size * top_k, size * top_k, compact=True)
        size *= 2
