"""The sections behind the results: all figures, what strategies record, time, differences of config, the runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fedsim.errors import UserError
from fedsim.metrics.records import RoundLog
from fedsim.quantities import duration, show
from fedsim.report import delay, tables
from fedsim.report.groups import Group, Table, differing, value_of, written
from fedsim.report.page import html_table, paragraph, section
from fedsim.report.runs import Run
from fedsim.report.sections import against_rounds
from fedsim.report.statistics import mean_of

# Columns that another section shows, or that are the run's own; what is left a strategy or a plug-in recorded.
_STANDARD = (
    "accuracy", "loss", "validation_", "train_loss", "recall_", "balanced_accuracy", "ece", "client_", "held_out_",
    "drift_", "dissimilarity", "update_norm", "mean_norm", "cosine_", "decomposition_", "bytes_", "simulated_seconds",
    "num_participants", "num_dropped", "honest_", "num_byzantine", "backdoor_", *delay.CURVES, *delay.ERRORS,
)  # fmt: skip
_PHASES = ("train", "aggregate", "evaluate", "record")


def recorded(table: Table) -> str:
    """Return curves of what strategies record: rates, scores, lengths."""
    columns = dict.fromkeys(
        column
        for group in table.all
        for column in group.runs[0].columns
        if not column.startswith(_STANDARD) and _changes(group, column)
    )
    text = "Local rates, and what strategies and clients record of themselves."
    return against_rounds(table, "recorded", "Recorded by the strategies", text, list(columns))


def _changes(group: Group, column: str) -> bool:
    """Say whether a column is more than one constant: a constant rate stands in the config."""
    return len(set(group.runs[0].series(column)[1].tolist())) > 1


def figures_table(table: Table) -> str:
    """Return mean and interval of every result of every group."""
    names = [name for name in tables.metrics(table) if not name.startswith(("recall_", "best_validation.round"))]
    rows = [["figure", *(escape(group.name) for group in table.all)]]
    for name in names:
        cells = [[run.results[name] for run in group.runs if name in run.results] for group in table.all]
        texts = [tables.plus_minus(name, mean_of(values)) if values else "–" for values in cells]
        rows.append([escape(tables.heading(name)), *texts])
    text = "Every figure of the summaries: mean ± half of the 95 % interval over seeds. docs/metrics.md defines them."
    inside = f"<details><summary>All {len(names)} figures</summary>{html_table(rows)}</details>"
    return section("figures", "All figures", paragraph(text), inside)


def seconds(table: Table) -> str:
    """Return the real time of a round by phase."""
    rows = [["", *_PHASES, "a round", "a run"]]
    for group in table.all:
        times = [_phase_seconds(run) for run in group.runs]
        known = [time for time in times if time is not None]
        totals = [run.results["seconds.total"] for run in group.runs if "seconds.total" in run.results]
        if known:
            means = [sum(time[i] for time in known) / len(known) for i in range(len(_PHASES))]
            whole = duration(sum(totals) / len(totals)) if totals else "–"
            rows.append([escape(group.name), *map(duration, [*means, sum(means)]), whole])
    if len(rows) == 1:
        return ""
    text = "Real seconds, mean over rounds and seeds. They depend on the machine and on what else it does."
    return section("seconds", "Time", paragraph(text), html_table(rows))


def _phase_seconds(run: Run) -> list[float] | None:
    """Return the mean seconds a round of each phase, from timings.jsonl."""
    try:
        rows = RoundLog.read(run.folder / "timings.jsonl")
    except (OSError, UserError):
        return None
    return [sum(row.get(f"seconds_{phase}") or 0.0 for row in rows) / len(rows) for phase in _PHASES] if rows else None


def configs(table: Table) -> str:
    """Return the keys in which the groups' configs differ."""
    runs = [group.runs[0] for group in table.all]
    keys = differing(runs)
    if not keys:
        return section("config", "Config", paragraph("All runs have one config but for their seeds."))
    rows = [["key", *(escape(group.name) for group in table.all)]]
    rows += [[escape(key), *(_shown(run, key) for run in runs)] for key in keys]
    text = "Where the configs differ, but for seeds. A run folder's config.yaml has all of it."
    return section("config", "Differences of config", paragraph(text), html_table(rows))


def _shown(run: Run, key: str) -> str:
    if key not in run.config and key not in run.choices:
        return "–"
    return escape(written(value_of(run, key)))


def run_list(runs: Sequence[Run], table: Table) -> str:
    """Return one row a run: where it is, how it ended, its seed and its results."""
    names = [name for name in ("accuracy", "loss", "validation_accuracy") if name in tables.metrics(table)]
    owner = {run.folder: group.name for group in table.all for run in group.runs}
    rows = [["folder", "what", "state", "seed", "rounds", *(escape(tables.heading(name)) for name in names), "time"]]
    for run in runs:
        state = str((run.summary or {}).get("status", "unfinished"))
        figures = [tables.number(name, run.results[name]) if name in run.results else "–" for name in names]
        last = run.rows[-1]["round"] if run.rows else 0
        took = show("seconds", run.results.get("seconds.total"))
        seed = str(run.config.get("seed", "–"))
        what = escape(owner.get(run.folder, "not in the tables"))
        rows.append([escape(run.name), what, escape(state), seed, f"{last:,}", *figures, took])
    inside = f"<details><summary>All {len(runs)} runs</summary>{html_table(rows)}</details>"
    return section("runs", "Runs", inside)
