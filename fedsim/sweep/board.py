"""What a sweep says while it runs: a live table on a terminal, a line for each trial elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TextIO

from fedsim.console import discard
from fedsim.quantities import counted, duration, interval, label, remaining, score, show
from fedsim.sweep.pool import Event

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

Row = dict[str, Any]


@dataclass
class Running:
    """How far one trial is."""

    began: float = field(default_factory=time.monotonic)
    total: int | None = None
    first: int = 0  # rounds that were done when it began
    round: int = 0
    figures: dict[str, Any] = field(default_factory=dict)

    def share(self, rounds: int) -> float:
        """Return what share of the trial so many rounds are; 0 where nobody knows."""
        return rounds / self.total if self.total else 0.0

    @property
    def left(self) -> str:
        """Time left, from the rounds so far."""
        if self.total is None or self.round <= self.first:
            return ""
        each = (time.monotonic() - self.began) / (self.round - self.first)
        return remaining(each * (self.total - self.round))


class Board:
    """Keeps count, and says nothing: what a sweep from Python has.

    Both subclasses only add how it is said.
    """

    figures: tuple[str, str] = ("accuracy", "loss")  # of a trial; tuning shows those that it chooses by

    def __init__(self) -> None:
        self.total = self.done = self.failed = self.before = 0
        self.running: dict[str, Running] = {}
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, total: int, done: int, at_once: int) -> None:
        """Hear that trials begin: how many there are, how many are done already, and how many run side by side."""
        self.total, self.done, self.failed, self.before = total, done, 0, done
        self.running, self.began = {}, time.monotonic()

    def heard(self, event: Event) -> None:
        """Hear what a trial tells before it ends."""
        running = self.running.setdefault(event.name, Running())
        if event.kind == "start":
            running.total, running.first = event.content["total"], event.content["done"]
        elif event.kind == "round":
            running.round, running.figures = event.content["round"], dict(event.content)
        elif event.kind == "warn":
            self.warn(f"{event.name}: {event.content['line']}")

    def ended(self, row: Row, seconds: float | None) -> None:
        """Hear that a trial is done or has failed."""
        self.running.pop(row["trial"], None)
        self.done += row["state"] == "done"
        self.failed += row["state"] == "failed"

    def end(self) -> None:
        """Hear that no trial runs any more."""

    def finish(self, means: Sequence[Row], keys: Sequence[str]) -> None:
        """Hear the results: a row for each point of the sweep, averaged over seeds."""

    def note(self, line: str) -> None:
        """Hear something worth knowing."""

    def warn(self, line: str) -> None:
        """Hear something that may be wrong."""

    def outcome(self, row: Row, seconds: float | None) -> tuple[str, ...]:
        """Return what came of a trial, in words: two figures and its time, or why it failed."""
        if row["state"] == "failed":
            return (f"failed: {row['error']}",)
        known = ((name, row[name]) for name in self.figures if row.get(name) is not None)
        return (*(f"{label(name)} {score(name, value)}" for name, value in known), duration(seconds or 0.0))

    @property
    def left(self) -> str:
        """Time left, from the trials that ended so far and from the rounds of those that run."""
        known = [one for one in self.running.values() if one.total]
        spent = self.done + self.failed - self.before + sum(one.share(one.round - one.first) for one in known)
        missing = self.total - self.done - self.failed - sum(one.share(one.round) for one in known)
        if spent <= 0 or missing <= 0:
            return ""
        return remaining((time.monotonic() - self.began) / spent * missing)


class Lines(Board):
    """Writes a line for each trial that ends.

    Args:
        stream: written to and flushed line by line; warnings go to standard error.

    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def begin(self, total: int, done: int, at_once: int) -> None:
        """Write how many trials there are."""
        super().begin(total, done, at_once)
        self._write(opening(total, done, at_once))

    def ended(self, row: Row, seconds: float | None) -> None:
        """Write what came of a trial."""
        super().ended(row, seconds)
        number = f"[{self.done + self.failed:>{len(str(self.total))}}/{self.total}]"
        self._write("  ".join(part for part in (number, row["trial"], *self.outcome(row, seconds), self.left) if part))

    def finish(self, means: Sequence[Row], keys: Sequence[str]) -> None:
        """Write the results as columns."""
        cells = results(means)
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        for line in cells:
            self._write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if said := what_intervals_are(means):
            self._write(said)

    def note(self, line: str) -> None:
        """Write a note."""
        self._write(f"note: {line}")

    def warn(self, line: str) -> None:
        """Write a warning to standard error."""
        sys.stderr.write(f"warning: {line}\n")

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except BrokenPipeError:  # who read has gone; the sweep has not
            discard(self._stream)


class LiveTable(Board):
    """Draws the running trials and the last ones that ended, and prints warnings above them.

    Args:
        stream: the terminal.
        console: a rich console to draw on instead.
        num_ended: how many of the ended trials are shown.

    """

    def __init__(self, stream: TextIO | None = None, *, console: Console | None = None, num_ended: int = 8) -> None:
        from rich.console import Console

        super().__init__()
        self._console = console or Console(file=stream, highlight=False)
        self._ended: deque[tuple[str, ...]] = deque(maxlen=num_ended)
        self._live: Live | None = None

    def begin(self, total: int, done: int, at_once: int) -> None:
        """Begin to draw."""
        from rich.live import Live

        super().begin(total, done, at_once)
        self._console.print(opening(total, done, at_once), style="dim", markup=False)
        self._ended.clear()
        self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def ended(self, row: Row, seconds: float | None) -> None:
        """Move the trial to those that ended; a failure stays above the table."""
        super().ended(row, seconds)
        what = self.outcome(row, seconds)
        if row["state"] == "failed":
            self._console.print(f"{row['trial']}  {what[0]}", style="bold red", markup=False, emoji=False)
        known = row.get(self.figures[0])
        figure = "" if known is None else show(self.figures[0], known)
        self._ended.append((row["trial"], row["state"], figure, "" if row["state"] == "failed" else what[-1]))

    def end(self) -> None:
        """Take the table away; what ended is in the results."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finish(self, means: Sequence[Row], keys: Sequence[str]) -> None:
        """Print the results as a table."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        head, *lines = results(means)
        table = Table(box=box.HORIZONTALS, pad_edge=False)
        for name in head:
            table.add_column(name, overflow="fold")
        for line in lines:
            table.add_row(*map(Text, line))
        table.caption, table.caption_justify = what_intervals_are(means) or None, "left"
        self._console.print(table)

    def note(self, line: str) -> None:
        """Print a note above the table."""
        self._console.print(f"note: {line}", style="cyan", markup=False, emoji=False)

    def warn(self, line: str) -> None:
        """Print a warning above the table."""
        self._console.print(f"warning: {line}", style="bold yellow", markup=False, emoji=False)

    def _draw(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in ("trial", "state", "round", label(self.figures[0]), "time"):
            table.add_column(name, overflow="ellipsis", no_wrap=True)
        for name, state, figure, last in self._ended:
            table.add_row(*map(Text, (name, state, "", figure, last)), style="dim")
        first = self.figures[0]
        for name, running in list(self.running.items()):
            rounds = f"{running.round}/{running.total}" if running.total else ""
            table.add_row(*map(Text, (name, "running", rounds, show(first, running.figures.get(first)), running.left)))
        counts = f"{self.done}/{self.total} done"
        table.caption = "  ".join(filter(None, (counts, f"{self.failed} failed" if self.failed else "", self.left)))
        table.caption_justify = "left"
        return table


def open_board(stream: TextIO | None = None) -> Lines | LiveTable:
    """Return what fits a stream: a live table on a terminal, lines elsewhere. Both are context managers."""
    stream = sys.stdout if stream is None else stream
    terminal = stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    return LiveTable(stream) if terminal else Lines(stream)


def opening(total: int, done: int, at_once: int) -> str:
    """Say what is about to run."""
    already = f", {done} done already" if done else ""
    return f"{counted(total, 'trial')}{already}, {at_once} at a time"


def results(means: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the head and the lines of a table of `fedsim.sweep.table.means`."""
    names = list(
        dict.fromkeys(name for row in means for name in row if name != "failed" or any(r["failed"] for r in means))
    )
    return [tuple(map(label, names)), *(tuple(cell(name, row.get(name)) for name in names) for row in means)]


def what_intervals_are(means: Sequence[Row]) -> str:
    """Say what stands behind ±; "" where nothing does."""
    has = any(isinstance(value, tuple) and value[1] is not None for row in means for value in row.values())
    return "±: half of the 95 % interval over seeds (Student's t), as in fedsim report" if has else ""


def cell(name: str, value: Any) -> str:
    """Return a value, or a (mean, half of its interval), as a person reads it.

    >>> cell("accuracy", (0.915, 0.0123)), cell("accuracy", (0.915, None)), cell("client.lr", 0.1)
    ('91.50 ± 1.23 %', '91.50 %', '0.1')
    """
    if not isinstance(value, tuple):
        return "-" if value is None else str(value)
    return interval(name, *value)
