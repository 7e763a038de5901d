"""`fedsim report`: run folders in, a page or a table out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedsim.errors import UserError, did_you_mean
from fedsim.files import atomic
from fedsim.report import tables
from fedsim.report.groups import Table, group
from fedsim.report.html import html
from fedsim.report.runs import Run, num_unread, read
from fedsim.report.tables import Comparison
from fedsim.report.tuned import budget, tunings

Writer = Callable[[Sequence[Run], Table, Comparison], str]

FORMATS: Mapping[str, Writer] = {
    "html": html,
    "latex": lambda _, table, comparison: tables.latex(comparison, table),
    "markdown": lambda _, table, comparison: tables.markdown(comparison, table),
    "csv": lambda _, table, comparison: tables.as_csv(
        [tables.compare(table, name, comparison.baseline) for name in tables.metrics(table)], table
    ),
}


def report(
    folders: Sequence[Path],
    *,
    format: str = "html",
    out: Path | None = None,
    baseline: str | None = None,
    metric: str | None = None,
) -> tuple[str, Path | None]:
    """Report on all runs in some folders.

    Runs that have not ended or failed are left out of all but the list of runs, unless none has ended; how many they
    are is said below the table and on standard error.

    Args:
        folders: run folders, or folders that hold run folders, such as a sweep's; a tuning's search is not among them.
        format: html, latex, markdown or csv (plain numbers, every metric).
        out: file to write; None: report.html in the only folder, or here if there are several; for the other
            formats no file.
        baseline: method that the others are tested against; None: fedavg, or the first.
        metric: of the final table; None: accuracy on the test split.

    Returns:
        What was written, and where; None where it is for the terminal.

    Raises:
        UserError: no runs, or no such format, baseline or metric.

    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: no such format{did_you_mean(format, FORMATS)}")
    runs = read(folders)
    table = group([run for run in runs if run.summary is not None] or [run for run in runs if run.rows])
    if not table.methods:
        raise UserError(f"{', '.join(map(str, folders))}: no run has finished a round yet")
    comparison = tables.compare(table, tables.choose_metric(table, metric), tables.choose_baseline(table, baseline))
    searches = tunings(folders)
    left_out = _left_out(runs, table, num_unread(folders))
    comparison = replace(comparison, left_out=left_out, budget=budget(searches), searches=searches)
    if comparison.left_out and format != "html":  # the page says it by itself
        sys.stderr.write(f"note: {comparison.left_out}\n")
    text = FORMATS[format](runs, table, comparison)
    if out is None and format == "html":
        out = (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if out is not None:
        try:
            with atomic(out) as file:
                file.write(text.rstrip("\n").encode() + b"\n")
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    return text, out


def _left_out(runs: Sequence[Run], table: Table, unread: int) -> str:
    """Return how many runs the table leaves out, or that all of its runs go on; nothing where it has all."""
    used = sum(len(group.runs) for group in table.all)
    left, total = len(runs) - used + unread, len(runs) + unread
    if left:
        return f"{left} of {total} runs failed or have not ended, and {'is' if left == 1 else 'are'} left out."
    return "No run has ended yet: what is shown is what they have so far." if runs[0].summary is None else ""
