"""What a report shows: each section is a function of the grouped runs, and empty where they did not record it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape

import numpy as np
import numpy.typing as npt

from fedsim.report import tables
from fedsim.report.charts import NUM_STYLES, Line, line_chart, span_of
from fedsim.report.groups import Group, Table
from fedsim.report.page import columns_for, figures, html_table, paragraph, section
from fedsim.report.runs import Run
from fedsim.report.tables import Comparison

Float = npt.NDArray[np.float64]

CURVES = ("accuracy", "loss", "validation_accuracy", "train_loss")
DRIFT = ("drift_ratio", "dissimilarity", "update_norm_mean", "cosine_mean", "cosine_previous", "mean_norm")
ATTACK = ("honest_accuracy_mean", "honest_accuracy_worst", "backdoor_accuracy", "honest_distance", "honest_cosine",
          "num_byzantine")  # fmt: skip
DECOMPOSITION = (
    "decomposition_total", "decomposition_local", "decomposition_shift", "decomposition_aggregation",
)  # fmt: skip


def results(comparison: Comparison, table: Table) -> str:
    """Return the final table."""
    metric = comparison.metric
    rows = [["method", *(escape(setting or tables.heading(metric)) for setting in table.settings)]]
    for method in table.methods:
        row = [escape(method)]
        for setting in table.settings:
            cell = comparison.cells.get((method, setting))
            if cell is None:
                row.append("–")
                continue
            text = tables.plus_minus(metric, cell.mean) + ("*" if tables.differs(cell) else "")
            if cell.difference and cell.p is not None:
                by = tables.number(metric, cell.difference.mean, signed=True)
                half = tables.number(metric, cell.difference.half)
                verdict = "" if tables.differs(cell) else " · no difference shown"
                text += f"<small>{by} ± {half}, p {_equals(tables.p_value(cell.p))}{verdict}</small>"
            elif method == comparison.baseline and len(table.methods) > 1:
                text += "<small>baseline</small>"
            row.append(f'<td class="best">{text}</td>' if cell.best and len(table.methods) > 1 else text)
        rows.append(row)
    note = tables.caption(comparison, table)
    if any(cell.difference for cell in comparison.cells.values()):
        note += f" Small: the difference to {comparison.baseline} with an interval of its own, and p."
    return section("results", "Results", paragraph(note), html_table(rows))


def _equals(p: str) -> str:
    return escape(p) if p.startswith("<") else f"= {p}"


def legend(table: Table) -> str:
    """Return which line is which method."""
    shown = "".join(
        f'<span><svg viewBox="0 0 34 10"><path class="line s{i}" d="M1 5H33"/></svg>{escape(method)}</span>'
        for i, method in enumerate(table.methods[:NUM_STYLES])
    )
    more = len(table.methods) - NUM_STYLES
    rest = f'<span><svg viewBox="0 0 34 10"><path class="line more" d="M1 5H33"/></svg>{more} more</span>'
    return f'<div class="legend">{shown}{rest if more > 0 else ""}</div>'


def against_rounds(table: Table, name: str, title: str, text: str, columns: Sequence[str]) -> str:
    """Return curves of some columns over rounds, a panel a column and setting."""
    drawn = []
    for column in columns:
        lines = {group.name: line for group in table.all if (line := _line(table, group, column)) is not None}
        if lines:
            drawn.append(_panels(table, column, lines, "round"))
    return section(name, title, paragraph(text), *_laid_out(drawn)) if drawn else ""


def panels_of(table: Table, columns: Sequence[str]) -> str:
    """Return curves over rounds without a section of their own, of the columns that change."""
    drawn = []
    for column in columns:
        lines = {group.name: line for group in table.all if (line := _line(table, group, column)) is not None}
        lines = {name: line for name, line in lines.items() if len(set(line.y.tolist())) > 1}
        if lines:
            drawn.append(_panels(table, column, lines, "round"))
    return "".join(_laid_out(drawn)) if drawn else ""


def along_time(table: Table, column: str, groups: Sequence[Group]) -> str:
    """Return curves of a column of some groups over simulated time, a panel a setting."""
    timed = [group for group in groups if all("simulated_seconds" in run.columns for run in group.runs)]
    found = {g.name: line for g in timed if (line := _line(table, g, column, _simulated)) is not None}
    if not found:
        return ""
    scaled, label = _in_unit(list(found.values()), _TIMES)
    return "".join(_laid_out([_panels(table, column, dict(zip(found, scaled, strict=True)), label)]))


def _panels(table: Table, column: str, lines: Mapping[str, Line], x_label: str) -> list[str]:
    """Return a panel for each setting, all with one scale; lines are by the names of their groups."""
    span = span_of(list(lines.values()))
    drawn = []
    for setting in table.settings:
        inside = [lines[group.name] for group in table.in_setting(setting) if group.name in lines]
        if inside:
            drawn.append(line_chart(_title(column, setting), inside, x_label, span=span, show=_writer(column)))
    return drawn


def _laid_out(rows: Sequence[Sequence[str]]) -> list[str]:
    """Put the settings of a column side by side; where there is one setting, the columns."""
    if all(len(row) == 1 for row in rows):
        return [figures(panels := [panel for row in rows for panel in row], columns_for(len(panels)))]
    return [figures(row, "row") for row in rows]


def _title(column: str, setting: str) -> str:
    return tables.heading(column) + (f" · {setting}" if setting else "")


def _writer(column: str) -> Callable[[float], str] | None:
    return (lambda value: f"{100 * value:.4g}") if tables.is_percent(column) else None


def _line(table: Table, group: Group, column: str, along: Callable[[Run, Float], Float] | None = None) -> Line | None:
    """Return mean and range over a group's runs, at the rounds in which all of them measured."""
    measured = [(run, *run.series(column)) for run in group.runs if column in run.columns]
    if not measured:
        return None
    rounds = measured[0][1]
    for _, others, _ in measured[1:]:
        rounds = np.intersect1d(rounds, others)
    if not rounds.size:
        return None
    values = np.stack([values[np.searchsorted(own, rounds)] for _, own, values in measured])  # (runs, n)
    x = rounds if along is None else np.stack([along(run, rounds) for run, _, _ in measured]).mean(0)  # (n,)
    style = table.methods.index(group.method)
    return Line(group.method, style, x, values.mean(0), values.min(0), values.max(0))


def costs(table: Table) -> str:
    """Return accuracy against bytes and, where devices are simulated, against simulated time."""
    column = "accuracy" if any("accuracy" in run.columns for group in table.all for run in group.runs) else "loss"
    drawn = []
    # Without devices the clock counts rounds, and no job is ever lost.
    for needs, along, units in (("bytes_up", _bytes, _BYTES), ("num_lost", _simulated, _TIMES)):
        has = {g.name for g in table.all if all(needs in run.columns for run in g.runs)}
        found = {g.name: line for g in table.all if g.name in has and (line := _line(table, g, column, along))}
        if found:
            scaled, label = _in_unit(list(found.values()), units)
            drawn.append(_panels(table, column, dict(zip(found, scaled, strict=True)), label))
    text = "What it costs: bytes of models and updates over the network, and time where devices are simulated."
    return section("costs", "Against communication and time", paragraph(text), *_laid_out(drawn)) if drawn else ""


def _bytes(run: Run, rounds: Float) -> Float:
    """Return the bytes sent until the end of some rounds (n,)."""
    own = np.array([row["round"] for row in run.rows], dtype=np.float64)
    return run.total("bytes_up", "bytes_down")[np.searchsorted(own, rounds)]


def _simulated(run: Run, rounds: Float) -> Float:
    """Return the virtual clock at the end of some rounds (n,)."""
    return np.interp(rounds, *run.series("simulated_seconds"))


# From which value on, divided by what, under which name.
_BYTES = ((1e9, 1e9, "GB sent, both ways"), (1e6, 1e6, "MB sent, both ways"), (0.0, 1e3, "kB sent, both ways"))
_TIMES = ((7200.0, 3600.0, "simulated hours"), (120.0, 60.0, "simulated minutes"), (0.0, 1.0, "simulated seconds"))


def _in_unit(lines: Sequence[Line], units: Sequence[tuple[float, float, str]]) -> tuple[list[Line], str]:
    """Bring the horizontal axis to the largest unit that fits its end."""
    end = max(float(line.x.max()) for line in lines)
    factor, label = next((factor, label) for least, factor, label in units if end >= least)
    return [replace(line, x=line.x / factor) for line in lines], label
