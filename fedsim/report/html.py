"""A report as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsim.report import background, delay, maps, sections, tables, tuned
from fedsim.report.groups import Table
from fedsim.report.page import page, paragraph
from fedsim.report.runs import Run


def html(runs: Sequence[Run], table: Table, comparison: tables.Comparison) -> str:
    """Return a page that is whole in itself: it works offline and asks for nothing.

    Args:
        runs: all that were read, finished or not.
        table: of those that count.
        comparison: the metric of the final table.

    """
    parts = [
        sections.results(comparison, table),
        tuned.chosen(comparison.searches),
        sections.against_rounds(table, "curves", "Curves", _bands(table), sections.CURVES),
        sections.costs(table),
        delay.section_of(table),
        maps.clients(table),
        maps.classes(table),
        maps.partitions(table),
        sections.against_rounds(table, "attack", "Attack", _ATTACK, sections.ATTACK),
        sections.against_rounds(table, "drift", "Drift", _DRIFT, sections.DRIFT),
        sections.against_rounds(table, "decomposition", "The loss, term by term", _TERMS, sections.DECOMPOSITION),
        background.recorded(table),
        maps.recorded_of_clients(table),
        background.seconds(table),
        background.figures_table(table),
        background.configs(table),
        background.run_list(runs, table),
    ]
    body = "\n".join(part for part in parts if part)
    found = re.findall(r'<section id="([\w-]+)">\n<h2>(.*?)</h2>', body)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in found)
    title = _title(table)
    head = [f"<h1>{title}</h1>", paragraph(_counts(runs, table)), *_notes(runs, table), f"<nav>{links}</nav>"]
    return page(title, "\n".join([*head, sections.legend(table), body]))


_DRIFT = (
    "How far the clients of a round pull apart: the drift ratio is 1 where all move alike and 0 where they cancel; "
    "docs/metrics.md defines the others."
)
_ATTACK = (
    "What the honest clients get of the model, what a backdoor's trigger does to it, how far the server's step is from "
    "the honest clients' mean, in units of its norm and as a cosine, and how many attackers a round had "
    "(docs/byzantine.md)."
)
_TERMS = (
    "Global loss = local loss of the clients' models on their own data + distribution shift + aggregation "
    "(docs/metrics.md)."
)


def _bands(table: Table) -> str:
    repeated = any(len(group.runs) > 1 for group in table.all)
    return "Mean over seeds; the band goes from the lowest to the highest seed." if repeated else "One run each."


def _title(table: Table) -> str:
    from html import escape

    names = " · ".join(table.methods[:4]) + (" · …" if len(table.methods) > 4 else "")
    data = sorted({run.choices.get("data", "") for group in table.all for run in group.runs})
    return escape(f"{names} on {', '.join(data)}" if any(data) else names)


def _counts(runs: Sequence[Run], table: Table) -> str:
    used = sum(len(group.runs) for group in table.all)

    def many(number: int, word: str) -> str:
        return f"{number} {word}{'s' * (number != 1)}"

    parts = [many(len(table.methods), "method"), many(len(table.settings), "setting"), many(used, "run")]
    return ", ".join(parts) + "."


def _notes(runs: Sequence[Run], table: Table) -> list[str]:
    """Return what a reader must not overlook."""
    used = {run.folder for group in table.all for run in group.runs}
    left = [run for run in runs if run.folder not in used]
    notes = []
    if left:
        notes.append(f"{len(left)} of {len(runs)} runs have not ended and are left out: {_some(left)}.")
    elif any(run.summary is None for run in runs):
        notes.append("No run has ended yet: what is shown is what they have so far.")
    if len({len(group.runs) for group in table.all}) > 1:
        notes.append("Not every method has as many runs as the others; tests use the seeds that both have.")
    return [paragraph(note, "note") for note in notes]


def _some(runs: Sequence[Run], most: int = 5) -> str:
    names = ", ".join(run.name for run in runs[:most])
    return names + (f" and {len(runs) - most} more" if len(runs) > most else "")
