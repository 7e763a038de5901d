"""What a run says while it runs: a progress bar on a terminal, plain lines elsewhere, nothing from Python."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from fedsim.quantities import flat, interval, label, remaining, score, show

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

Row = Mapping[str, Any]


class Observer:
    """Told what happens, and does nothing with it unless a method is overridden; must not influence the run."""

    def plan(self, line: str) -> None:
        """Hear once, before round 1, how the run will be done."""

    def start(self, total: int, done: int) -> None:
        """Hear that rounds done + 1 to total begin."""

    def round(self, row: Row) -> None:
        """Hear the row of a finished round: `round`, and what is known of accuracy, loss and so on."""

    def note(self, line: str) -> None:
        """Hear something worth knowing."""

    def warn(self, line: str) -> None:
        """Hear something that may be wrong."""

    def skew(self, rows: Iterable[Sequence[Any]]) -> None:
        """Hear (name, value, meaning) of each figure of a partition."""

    def finish(self, summary: Row) -> None:
        """Hear the results, once, at the end."""


def open_observer(stream: TextIO | None = None) -> Plain | Live:
    """Return what fits a stream: `Live` on a terminal, `Plain` elsewhere. Both are context managers."""
    stream = sys.stdout if stream is None else stream
    terminal = stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    return Live(stream) if terminal else Plain(stream)


class Plain(Observer):
    """Writes lines, about twenty of a run's rounds: for logs and pipes. Warnings go to standard error.

    Args:
        stream: written to and flushed line by line.
        num_lines: how many rounds of a run are written, evenly spread, beside the first and the last.
        seconds: after so long a silence the next round is written in any case.

    """

    def __init__(self, stream: TextIO, *, num_lines: int = 20, seconds: float = 30.0) -> None:
        self._stream, self._num_lines, self._seconds = stream, num_lines, seconds
        self._total, self._done, self._began, self._spoke = 0, 0, 0.0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def plan(self, line: str) -> None:
        """Write the plan."""
        self._write(f"plan: {line}")

    def start(self, total: int, done: int) -> None:
        """Begin to count."""
        self._total, self._done = total, done
        self._began = self._spoke = time.monotonic()

    def round(self, row: Row) -> None:
        """Write the row if its turn has come."""
        number, now = int(row["round"]), time.monotonic()
        every = max(1, math.ceil(self._total / self._num_lines))
        due = number % every == 0 or number in (self._done + 1, self._total)
        if not due and now - self._spoke < self._seconds:
            return
        self._spoke = now
        width = len(str(self._total))
        parts = [f"round {number:>{width}}/{self._total}", *scores(row)]
        if row.get("evaluated") is False:
            parts.append("(as last evaluated)")
        if self._done < number < self._total:
            left = (now - self._began) / (number - self._done) * (self._total - number)
            parts.append(remaining(left))
        self._write("  ".join(parts))

    def note(self, line: str) -> None:
        """Write a note."""
        self._write(f"note: {line}")

    def warn(self, line: str) -> None:
        """Write a warning to standard error."""
        sys.stderr.write(f"warning: {line}\n")

    def skew(self, rows: Iterable[Sequence[Any]]) -> None:
        """Write the figures of a partition as columns."""
        cells = [
            [show(str(name), value) if i == 1 else str(value) for i, value in enumerate((name, *rest))]
            for name, *rest in rows
        ]
        self._columns(cells)

    def finish(self, summary: Row) -> None:
        """Write the summary as two columns."""
        self._columns([[label(name), show(name, value)] for name, value in flat(summary)])

    def _columns(self, rows: Sequence[Sequence[str]]) -> None:
        if not rows:
            return
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            self._write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except BrokenPipeError:  # who read has gone; the run has not
            discard(self._stream)


class Live(Observer):
    """Draws a progress bar and tables on a terminal.

    Args:
        stream: the terminal.
        console: a rich console to draw on instead.

    """

    def __init__(self, stream: TextIO | None = None, *, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(file=stream, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop()  # gives the cursor back, whatever happened

    def plan(self, line: str) -> None:
        """Print the plan, dimmed."""
        self._console.print(f"plan: {line}", style="dim", markup=False, emoji=False)

    def start(self, total: int, done: int) -> None:
        """Draw the bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._stop()
        if done >= total:  # a resumed run that has its rounds
            return
        self._progress = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[scores]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total, completed=done, scores="", left="left")
        self._progress.start()

    def round(self, row: Row) -> None:
        """Move the bar."""
        if self._progress is None or self._task is None:
            return
        number = int(row["round"])
        left = "" if number == self._progress.tasks[0].total else "left"
        self._progress.update(self._task, completed=number, scores="  ".join(scores(row)), left=left)

    def note(self, line: str) -> None:
        """Print a note above the bar."""
        self._console.print(f"note: {line}", style="cyan", markup=False, emoji=False)

    def warn(self, line: str) -> None:
        """Print a warning above the bar."""
        self._console.print(f"warning: {line}", style="bold yellow", markup=False, emoji=False)

    def skew(self, rows: Iterable[Sequence[Any]]) -> None:
        """Print the figures of a partition as a table."""
        self._table([[str(name), show(str(name), value), *map(str, rest)] for name, value, *rest in rows])

    def finish(self, summary: Row) -> None:
        """End the bar and print the summary as a table."""
        self._stop()
        self._table([[label(name), show(name, value)] for name, value in flat(summary)])

    def _table(self, rows: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.HORIZONTALS, show_header=False, pad_edge=False)
        for i in range(len(rows[0]) if rows else 0):
            table.add_column(justify="left", style=("bold", "", "dim")[min(i, 2)], overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(table)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def discard(stream: TextIO) -> None:
    """Send what is still written to a stream nowhere, so that a closed pipe stops nobody, not even at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def scores(row: Row) -> list[str]:
    """Return accuracy and loss, where they are known, in a width that does not jump; of several runs ± `NAME_half`."""
    known = [(name, row[name], row.get(f"{name}_half")) for name in ("accuracy", "loss") if row.get(name) is not None]
    return [f"{name} {score(name, x) if half is None else interval(name, x, half)}" for name, x, half in known]
