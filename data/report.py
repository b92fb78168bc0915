"""What the rows of a run look like, printed before training and stored beside the adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

REPORT_NAME = "data_report.json"
BINS = 8
BAR = 30  # characters of the longest bar
SHOWN = 400  # characters of the sample that are shown at each end; the JSON file holds all of it


@dataclass(frozen=True)
class DataReport:
    """Rows, lengths, what can be compressed, what is trained, what was dropped and why, and one sample.

    Attributes:
        source, kind: where the rows come from.
        rows, evaluation_rows: rows to train on and to evaluate on.
        context_length, smallest_compressed: rows are at most the one, and compressed only when longer than the other.
        lengths: shortest, median, mean and longest row, in tokens.
        histogram: `[from, to, rows]`, both ends included.
        compressed_share, trained_share: share of rows longer than `smallest_compressed`; share of tokens in the loss.
        dropped, evaluation_dropped: what was left out, rows by reason.
        fingerprints: of the rows to train on and of those to evaluate on, as tokens and in their order: what decides
            them, such as files, tokenizer and chat template, cannot change them unnoticed.
        sample: the first row decoded, as `[text, is trained]` pieces.
        notes: what is worth knowing about this data; warning: set when hardly anything would be compressed.
        sources: a line on each, where there are several.
        streaming: whether all this is only about the first rows, for the others will be made as they are needed.
    """

    source: str
    kind: str
    rows: int
    evaluation_rows: int
    context_length: int
    smallest_compressed: int
    lengths: dict[str, float]
    histogram: list[list[int]]
    compressed_share: float
    trained_share: float
    dropped: dict[str, int]
    evaluation_dropped: dict[str, int]
    fingerprints: dict[str, str]
    sample: list[list]
    notes: list[str] = field(default_factory=list)
    warning: str | None = None
    sources: list[str] = field(default_factory=list)
    streaming: bool = False

    def print(self, console: Console) -> None:
        """Show the report on a terminal."""
        console.print(Text(f"Data: {self.kind} rows from {self.source}", style="bold"))
        table = Table(show_header=False)
        for name, value in self._facts():
            table.add_row(name, escape(value))
        console.print(table)
        for line in self._bars():
            console.print(Text("  " + line))
        sample = Text()
        for text, trained in _shortened(self.sample):
            sample.append(f"[{text}]" if trained else text, style="bold green" if trained else "")
        console.print(Panel(sample, title=Text("one row; trained tokens are green, in [ ]"), title_align="left"))
        if self.warning:
            console.print(Text(f"warning: {self.warning}", style="bold yellow"))

    def save(self, directory: str | Path) -> None:
        """Write `data_report.json` and `data_report.md` into `directory` (made if missing)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        values = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (directory / REPORT_NAME).write_text(values + "\n", encoding="utf-8")
        (directory / "data_report.md").write_text(self._markdown(), encoding="utf-8")

    def _facts(self) -> list[tuple[str, str]]:
        numbers, more = self.lengths, " (the first ones, all others are made as they are needed)" * self.streaming
        facts = [
            ("rows", f"{self.rows}{more} to train on, {self.evaluation_rows} to evaluate on"),
            *(("source", line) for line in self.sources),
            (
                "tokens per row",
                f"{numbers['shortest']:.0f} to {numbers['longest']:.0f}, median {numbers['median']:.0f} "
                f"(context_length {self.context_length})",
            ),
            (
                "compressed",
                f"{self.compressed_share:.1%} of the rows are longer than {self.smallest_compressed} tokens",
            ),
            ("trained", f"{self.trained_share:.2%} of the tokens"),
        ]
        for title, dropped in (("dropped", self.dropped), ("dropped, evaluation", self.evaluation_dropped)):
            facts.append((title, "; ".join(f"{count}: {reason}" for reason, count in dropped.items()) or "nothing"))
        return facts + [("note", note) for note in self.notes]

    def _bars(self) -> list[str]:
        most = max(count for *_, count in self.histogram)
        width = len(str(self.histogram[-1][1]))
        lines = []
        for low, high, count in self.histogram:
            bar = "█" * round(BAR * count / most) or ("▏" if count else "")
            lines.append(f"{low:>{width}} to {high:>{width}} {bar:<{BAR}} {count}")
        return lines

    def _markdown(self) -> str:
        sample = "".join(f"⟦{text}⟧" if trained else text for text, trained in _shortened(self.sample))
        lines = [f"# Data: {self.kind} rows from {self.source}", ""]
        lines += [f"> **Warning:** {self.warning}", ""] if self.warning else []
        lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self._facts())]
        lines += ["", "Rows by length in tokens:", "", "```", *self._bars(), "```"]
        lines += ["", "One row, the trained tokens in ⟦ ⟧:", "", "~~~~", sample, "~~~~", ""]
        return "\n".join(lines)


def length_summary(lengths: Sequence[int]) -> tuple[dict[str, float], list[list[int]]]:
    """Shortest, median, mean and longest of some row lengths, and their histogram `[from, to, rows]`."""
    values = np.asarray(lengths)
    numbers = {"shortest": values.min(), "median": np.median(values), "mean": values.mean(), "longest": values.max()}
    low, high = int(values.min()), int(values.max())
    step = max(1, -(-(high - low + 1) // BINS))
    starts = range(low, high + 1, step)
    counts = np.bincount((values - low) // step, minlength=len(starts))
    bins = [[start, min(start + step - 1, high), int(count)] for start, count in zip(starts, counts, strict=True)]
    return {name: float(number) for name, number in numbers.items()}, bins


def compression_warning(lengths: Sequence[int], smallest_compressed: int) -> str | None:
    """A warning when no row, or fewer than one in twenty, is long enough to be compressed."""
    longest, share = max(lengths), float(np.mean(np.asarray(lengths) > smallest_compressed))
    advice = f"sink_size + 2 * lag_size = {smallest_compressed}; lower lrsa.lag_size or use longer data"
    if share == 0:
        return f"nothing would be compressed: longest row {longest} <= {advice}"
    if share < 0.05:
        return f"hardly anything would be compressed: {share:.1%} of the rows are longer than {advice}"
    return None


def marked_sample(tokenizer, input_ids: Sequence[int], trained: Sequence[bool]) -> list[list]:
    """A row as `[text, is trained]` pieces whose texts join to the decoded row."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    pieces, done = [], ""
    for end in range(1, len(input_ids) + 1):
        if end == len(input_ids) or trained[end] != trained[end - 1]:
            text = tokenizer.decode(input_ids[:end], **options)
            pieces.append([text[len(done) :], bool(trained[end - 1])])
            done = text
    return [piece for piece in pieces if piece[0]]


def _shortened(sample: list[list]) -> list[list]:
    """Pieces of which long ones show only both ends."""
    return [
        [text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} [...] {text[-SHOWN:]}", trained]
        for text, trained in sample
    ]
