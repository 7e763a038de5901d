"""Heat-maps: clients and classes over rounds, what strategies record of each client, and the partitions' pictures."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from html import escape
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.report import delay
from fedsim.report.charts import colour_bar, data_uri, heat_map
from fedsim.report.groups import Group, Table
from fedsim.report.page import columns_for, figures, paragraph, section
from fedsim.report.runs import Run, is_seed
from fedsim.report.sections import against_rounds

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

CLIENTS = ("client_accuracy_mean", "client_accuracy_worst", "client_accuracy_std", "held_out_accuracy_mean")
_STANDARD = ("round", "client", "num_samples", "num_steps", "train_loss", "update_norm", "cosine", "test_accuracy",
             "test_loss", "num_test_samples", "byzantine", *delay.COLUMNS)  # fmt: skip
_MOST_MAPS = 24  # of one kind; a report stays small
_MOST_PICTURES = 12
_MOST_CELLS = 200  # of a heat-map, each way: more than it has pixels


def clients(table: Table) -> str:
    """Return what the clients get: curves of mean and tails, and each client's accuracy over rounds."""
    text = "On each client's own test samples: mean, worst tenth, spread, and clients that never train."
    curves = against_rounds(table, "clients", "Clients", text, CLIENTS)
    maps: dict[str, list[str]] = {}  # of each method
    for group in table.all[:_MOST_MAPS]:
        if (found := by_client(group.runs[0], "test_accuracy")) is not None:
            drawn = _sorted_map(group.name, found, "client, worst to best", (0.0, 1.0), show=_percent)
            maps.setdefault(group.method, []).append(drawn)
    if not maps:
        return curves
    note = paragraph(f"Accuracy (%) of each client that has test samples of its own, by rank, {_whose(table)}.")
    # Settings stand side by side, as in the curves above; where there is one, the methods do.
    alone = all(len(row) == 1 for row in maps.values())
    firsts = [row[0] for row in maps.values()]
    rows = [figures(firsts, columns_for(len(firsts)))] if alone else [figures(row, "row") for row in maps.values()]
    return curves + "\n" + note + colour_bar((0.0, 1.0), _percent) + "".join(rows)


def _whose(table: Table) -> str:
    seeds = "the first seed of each" if any(len(group.runs) > 1 for group in table.all) else "one run each"
    return seeds + (f"; the first {_MOST_MAPS} of {len(table.all)}" if len(table.all) > _MOST_MAPS else "")


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


class ByClient(NamedTuple):
    """A column of clients.parquet."""

    clients: Int  # (K,) ids, ascending
    rounds: Int  # (T,) in which it was measured, ascending
    values: Float  # (K, T) NaN where missing

    @property
    def last(self) -> Float:
        """Each client's last known value (K,)."""
        return np.array([row[np.isfinite(row)][-1] for row in self.values])


def by_client(run: Run, column: str) -> ByClient | None:
    """Read a column of a run's clients.parquet; None where it is not there or holds nothing."""
    path = run.folder / "clients.parquet"
    if not path.is_file():
        return None
    import pyarrow.parquet as pq

    if column not in pq.read_schema(path).names:
        return None
    stored = pq.read_table(path, columns=["round", "client", column])
    values = stored[column].to_numpy().astype(np.float64)  # (rows,) NaN where null
    known = np.isfinite(values)
    if not known.any():
        return None
    rounds, at = np.unique(stored["round"].to_numpy()[known], return_inverse=True)  # (T,)
    ids, row = np.unique(stored["client"].to_numpy()[known], return_inverse=True)  # (K,)
    matrix = np.full((len(ids), len(rounds)), np.nan)  # (K, T)
    matrix[row, at] = values[known]
    return ByClient(ids, rounds, matrix)


def _sorted_map(
    title: str, found: ByClient, axis: str, span: tuple[float, float], below: AbstractSet[int] = frozenset(), **how: Any
) -> str:
    """Draw clients, sorted by their last value, over rounds; some of them below the others."""
    above = np.isin(found.clients, list(below))  # (K,) False comes first
    matrix = _coarse(found.values[np.lexsort((found.last, above))])
    ends, ranks = [str(found.rounds[0]), str(found.rounds[-1])], ["1", str(len(found.clients))]
    return heat_map(title, matrix, axes=(axis, "round"), span=span, names=(ranks, ends), **how)


def _coarse(matrix: Float) -> Float:
    """Average neighbours of a matrix (R, C) until it has at most 200 rows, and keep every n-th column."""
    rows = min(len(matrix), _MOST_CELLS)
    starts = np.arange(rows) * len(matrix) // rows
    known = np.isfinite(matrix)
    total = np.add.reduceat(np.where(known, matrix, 0.0), starts)  # (rows, C)
    count = np.add.reduceat(known.astype(np.int64), starts)  # (rows, C)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    columns = np.linspace(0, matrix.shape[1] - 1, min(matrix.shape[1], _MOST_CELLS)).astype(int)
    return mean[:, columns]


def classes(table: Table) -> str:
    """Return the recall of each class: at the end by method, and over rounds."""
    names = _recalls(table)
    if not names:
        return ""
    labels = [name.removeprefix("recall_") for name in names]
    final, courses = [], []
    for setting in table.settings:
        rows = [(g.method, last) for g in table.in_setting(setting) if (last := _last_recalls(g, names)) is not None]
        if rows:
            final.append(
                heat_map(
                    "after the last round" + (f" · {setting}" if setting else ""),
                    np.stack([row for _, row in rows]),
                    axes=("method", "class"),
                    span=(0.0, 1.0),
                    names=([name for name, _ in rows], labels),
                    show=_percent,
                )
            )
    for group in table.all[:_MOST_MAPS]:
        course = [group.runs[0].series(name) for name in names]
        rounds = course[0][0]
        if all(len(own) == len(rounds) for own, _ in course) and len(rounds) > 1:
            matrix = _coarse(np.stack([values for _, values in course]))  # (C, T)
            ends = [f"{rounds[0]:.0f}", f"{rounds[-1]:.0f}"]
            courses.append(
                heat_map(group.name, matrix, axes=("class", "round"), span=(0.0, 1.0), names=([], ends), show=_percent)
            )
    text = paragraph("Recall of each class on the test split (%), mean over seeds at the end.")
    more = [f"<details><summary>Over rounds, {_whose(table)}</summary>{figures(courses)}</details>"] if courses else []
    return section("classes", "Classes", text, colour_bar((0.0, 1.0), _percent), figures(final, "wide"), *more)


def _recalls(table: Table) -> list[str]:
    found = {name for group in table.all for run in group.runs for name in run.columns if name.startswith("recall_")}
    return sorted(found, key=lambda name: int(name.removeprefix("recall_")))


def _last_recalls(group: Group, names: Sequence[str]) -> Float | None:
    """Return the mean over seeds of the last recall of each class (C,), NaN where a class has no test samples."""
    rows = [[series[-1] if len(series := run.series(name)[1]) else np.nan for name in names] for run in group.runs]
    last = np.array(rows, dtype=np.float64)  # (runs, C)
    known = np.isfinite(last)
    if not known.any():
        return None
    return np.where(known.any(0), np.where(known, last, 0.0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def partitions(table: Table) -> str:
    """Return the picture of each setting's partition."""
    drawn: dict[bytes, str] = {}
    for setting in table.settings:
        run = table.in_setting(setting)[0].runs[0]
        path = run.folder / "partition.png"
        if path.is_file():
            drawn.setdefault(path.read_bytes(), ", ".join(filter(None, (setting, _seed_text(run)))))
    if not drawn:
        return ""
    text = "Who has how much of which class."
    if any(len(group.runs) > 1 for group in table.all):
        text += " One seed of each setting; the others' partitions follow from their seeds."
    shown = [
        f'<figure class="picture"><img alt="partition, {escape(name, quote=True)}" src="{data_uri(png)}">'
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for png, name in list(drawn.items())[:_MOST_PICTURES]
    ]
    first, more = (f'<div class="grid-of full">{"".join(part)}</div>' for part in (shown[:2], shown[2:]))
    rest = f"<details><summary>{len(shown) - 2} more</summary>{more}</details>" if len(shown) > 2 else ""
    return section("partition", "Partition", paragraph(text), first, rest)


def _seed_text(run: Run) -> str:
    return ", ".join(f"{key}={value}" for key, value in run.config.items() if is_seed(key) and value is not None)


def recorded_of_clients(table: Table) -> str:
    """Return what strategies record of each client beside fedsim's own columns: quality scores, local rates."""
    drawn: list[str] = []
    attacked = False
    for group in table.all:
        attackers = _attackers(group.runs[0])
        axis = "client, attackers below" if attackers else "client, low to high"
        for column in _own_columns(group.runs[0]):
            found = by_client(group.runs[0], column)
            if found is not None and len(drawn) < _MOST_MAPS:
                attacked |= bool(attackers)
                span = float(np.nanmin(found.values)), float(np.nanmax(found.values))
                title = f"{column.replace('_', ' ')} · {group.name}"
                drawn.append(_sorted_map(title, found, axis, span, attackers) + colour_bar(span, "{:.3g}".format))
    if not drawn:
        return ""
    text = f"What strategies and clients record of each client, by rank, {_whose(table)}."
    text += " The lowest rows are those that attack." if attacked else ""
    maps = figures(drawn, columns_for(len(drawn)))
    return section("recorded-clients", "Recorded of each client", paragraph(text), maps)


def _attackers(run: Run) -> set[int]:
    """Return the clients that were seen to attack."""
    found = by_client(run, "byzantine")
    return set() if found is None else set(found.clients[found.last > 0].tolist())


def _own_columns(run: Run) -> list[str]:
    path = run.folder / "clients.parquet"
    if not path.is_file():
        return []
    import pyarrow.parquet as pq

    return [name for name in pq.read_schema(path).names if name not in _STANDARD]
