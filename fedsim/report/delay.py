"""Devices and delay: who trains when, how stale replies are, what the late class gets, and what inversion does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.report.bars import bars, timeline
from fedsim.report.charts import Line, line_chart
from fedsim.report.groups import Group, Table
from fedsim.report.page import figures, paragraph, section
from fedsim.report.runs import Run
from fedsim.report.sections import along_time, panels_of

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

SPENT = ("download_seconds", "compute_seconds", "upload_seconds")
COLUMNS = ("started", "arrived", "staleness", *SPENT)  # of clients.parquet
CURVES = ("staleness_mean", "staleness_max", "num_outstanding", "num_lost", "gamma", "num_inverted",
          "inversion_disparity")  # fmt: skip
ERRORS = ("e1", "e2")
_MOST_CLIENTS = 24  # of a timeline
_MOST_DRAWN = 6
_SLOW_JOBS, _FAST_JOBS = 3, 40  # of the slowest and of the median client that a timeline has room for


class Jobs(NamedTuple):
    """The replies of a run, one row each."""

    clients: Int  # (J,)
    started: Float  # (J,) simulated seconds
    arrived: Float  # (J,)
    staleness: Float  # (J,) rounds
    download: Float  # (J,) seconds; NaN where they were not recorded
    compute: Float  # (J,)
    upload: Float  # (J,)


def section_of(table: Table) -> str:
    """Return the section, empty where neither devices nor delays were simulated."""
    jobs = {group.name: found for group in table.all if (found := read(group.runs[0])) is not None}
    if not jobs:
        return ""
    parts = [
        _timelines(table, jobs), _late_class(table), _errors(table), _histograms(table, jobs), panels_of(table, CURVES),
    ]  # fmt: skip
    text = "Who trains when on the virtual clock, and what comes of replies to older versions of the model."
    return section("delay", "Devices and delay", paragraph(text), *[part for part in parts if part])


def read(run: Run) -> Jobs | None:
    """Read a run's jobs; None where none was timed."""
    path = run.folder / "clients.parquet"
    if not path.is_file():
        return None
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    if "started" not in names:
        return None
    stored = pq.read_table(path, columns=["client", *(name for name in COLUMNS if name in names)])
    known = np.isfinite(stored["started"].to_numpy().astype(np.float64))  # (rows,) False where it did not train
    if not known.any():
        return None
    missing = np.full(int(known.sum()), np.nan)
    values = {n: stored[n].to_numpy().astype(np.float64)[known] if n in names else missing for n in COLUMNS}
    return Jobs(stored["client"].to_numpy()[known].astype(np.int64), *(values[name] for name in COLUMNS))


def _timelines(table: Table, jobs: Mapping[str, Jobs]) -> str:
    """Draw who trains when, once for runs with equal times."""
    timed = {name: found for name, found in jobs.items() if np.isfinite(found.compute).any()}
    drawn = _once(table, timed, _timeline)
    if not drawn:
        return ""
    text = (
        "Each client's jobs from slow (above) to fast, from the beginning: transfer of the model and of the reply, "
        "training, and held back until its round. A dot is a reply that came stale; between jobs a client is idle. Of "
        "several jobs that a client has under way at a time one is drawn, and the dots of all."
    )
    legend = "".join(
        f'<span><svg viewBox="0 0 34 10"><path class="fill {kind}" d="M1 1H33V9H1Z"/></svg>{name}</span>'
        for kind, name in (("f0", "training"), ("f1", "transfer"), ("held", "held back"), ("idle", "idle"))
    )
    legend += '<span><svg viewBox="0 0 34 10"><circle class="late" cx="17" cy="5" r="3.4"/></svg>late</span>'
    return paragraph(text) + f'<div class="keys">{legend}</div>' + figures(drawn, "one")


def _once(table: Table, jobs: Mapping[str, Jobs], draw: Callable[[str, Jobs], str]) -> list[str]:
    """Draw each group's first run, equal pictures once, titled by whose they are."""
    names: dict[str, list[str]] = {}
    for group in table.all:
        if group.name in jobs:
            names.setdefault(draw("", jobs[group.name]), []).append(group.name)
    titles = {own[0]: "" if len(own) == len(table.all) else ", ".join(own) for own in names.values()}
    return [draw(title, jobs[first]) for first, title in list(titles.items())[:_MOST_DRAWN]]


def _timeline(title: str, jobs: Jobs) -> str:
    title = " · ".join(filter(None, ("who trains when", title)))
    ids, at = np.unique(jobs.clients, return_inverse=True)  # (P,), (J,)
    length = jobs.download + jobs.compute + jobs.upload  # (J,)
    own = np.bincount(at, weights=length) / np.bincount(at)  # (P,) a job's mean seconds
    order = np.argsort(-own, kind="stable")
    shown = order[np.unique(np.linspace(0, len(ids) - 1, min(len(ids), _MOST_CLIENTS)).round().astype(np.int64))]
    whole = jobs.arrived - jobs.started  # (J,) what was held back included
    end = min(float(jobs.arrived.max()), max(_SLOW_JOBS * float(whole.max()), _FAST_JOBS * float(np.median(length))))
    row_of = np.full(len(ids), -1)
    row_of[shown] = np.arange(len(shown))
    rows = row_of[at]  # (J,)
    inside = (rows >= 0) & (jobs.started < end)
    rows, mine = rows[inside], Jobs._make(part[inside] for part in jobs)
    # mode=fixed_delay says itself when a reply arrives, be it before the client could have sent it
    begun = np.minimum(mine.started + mine.download, mine.arrived)  # (n,)
    done = np.minimum(begun + mine.compute, mine.arrived)  # (n,)
    sent = np.minimum(done + mine.upload, mine.arrived)  # (n,)
    spans = [
        ("held", rows, sent, mine.arrived), ("f1", rows, mine.started, begun), ("f1", rows, done, sent),
        ("f0", rows, begun, done),
    ]  # fmt: skip
    alone = _apart(rows, mine.started, mine.arrived)  # (n,)
    spans = [(kind, where[alone], low[alone], high[alone]) for kind, where, low, high in spans]
    late = mine.staleness > 0
    names = [str(ids[client]) for client in shown]
    return timeline(title, spans, (rows[late], mine.arrived[late]), names, end)


def _apart(rows: Int, started: Float, arrived: Float) -> npt.NDArray[np.bool_]:
    """Return which jobs (n,) to draw: of each row, from the first, the next that begins when the last one has ended."""
    drawn = np.zeros(len(rows), dtype=bool)
    free: dict[int, float] = {}  # row → when its last drawn job ended
    for job in np.lexsort((started, rows)).tolist():
        if started[job] >= free.get(int(rows[job]), -np.inf):
            drawn[job] = True
            free[int(rows[job])] = float(arrived[job])
    return drawn


def _histograms(table: Table, jobs: Mapping[str, Jobs]) -> str:
    """Draw the share of replies by staleness, once for runs with equal delays."""
    drawn = _once(table, {name: found for name, found in jobs.items() if found.staleness.max() > 0}, _histogram)
    if not drawn:
        return ""
    text = "Share of replies (%) by how many rounds older the model was that they answer."
    return paragraph(text) + figures(drawn)


def _histogram(title: str, jobs: Jobs) -> str:
    ages, counts = np.unique(jobs.staleness.astype(np.int64), return_counts=True)  # (n,)
    named = " · ".join(filter(None, ("staleness of replies", title)))
    return bars(named, ages, counts / counts.sum(), "rounds late")


def _late_class(table: Table) -> str:
    """Draw the recall of the class whose holders are slow, over simulated time."""
    found: dict[str, list[Group]] = {}
    for group in table.all:
        target = group.runs[0].config.get("devices.target_class")
        if target is not None and f"recall_{target}" in group.runs[0].columns:
            found.setdefault(f"recall_{target}", []).append(group)
    parts = [along_time(table, column, groups) for column, groups in found.items()]
    drawn = "".join(part for part in parts if part)
    text = "Test recall (%) of the class whose holders are slow, over simulated time."
    return paragraph(text) + drawn if drawn else ""


def _errors(table: Table) -> str:
    """Draw E1 and E2 of each group that inverts."""
    drawn = []
    for group in table.all:
        run = group.runs[0]
        if all(name in run.columns for name in ERRORS):
            lines = [_bare(run, name, style) for style, name in enumerate(ERRORS)]
            drawn.append(line_chart(f"E1 and E2 · {group.name}", lines, "round"))
    if not drawn:
        return ""
    text = (
        "How far from the clients' true updates, once these arrive, their estimates (E1) and the stale updates (E2) "
        "were, in L1: γ falls from 1 to 0 once E1 > E2, and is drawn below where it does. One seed of each."
    )
    legend = "".join(
        f'<span><svg viewBox="0 0 34 10"><path class="line s{i}" d="M1 5H33"/></svg>{escape(name)}</span>'
        for i, name in enumerate(("E1: estimate − true", "E2: stale − true"))
    )
    return paragraph(text) + f'<div class="keys">{legend}</div>' + figures(drawn[:_MOST_DRAWN])


def _bare(run: Run, name: str, style: int) -> Line:
    rounds, values = run.series(name)
    return Line(name.upper(), style, rounds, values, values, values)
