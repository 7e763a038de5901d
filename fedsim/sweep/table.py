"""The table of a sweep: what each trial was asked and what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.files import atomic
from fedsim.quantities import flat
from fedsim.report.statistics import mean_of
from fedsim.sweep.plan import Plan, Trial

_LEFT_OUT = ("plan.", "choices.")  # of the summary: they are the same for many trials, and stand there
Row = dict[str, Any]
SHOWN = ("accuracy", "loss", "client_accuracy_mean", "client_accuracy_worst", "seconds.total")
"""What the table on the screen has of each point's figures."""


def summary_of(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run folder; None where the run has not ended."""
    try:
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def row(trial: Trial, folder: Path, error: str | None = None) -> Row:
    """Return the row of a trial: `trial`, `state`, `error`, its swept values, then the figures of its summary.

    `replicas` counts the trials whose rows trained as one program, where there were several.

    The state is "done", "failed" (with an error) or "missing" (not begun, or not ended).
    """
    summary = summary_of(folder / trial.name)
    state = "failed" if error is not None else "missing" if summary is None else "done"
    head: Row = {"trial": trial.name, "state": state, "error": error}
    together = (summary or {}).get("plan", {}).get("replicas", 1)
    if together > 1:
        head["replicas"] = together
    figures = {k: v for k, v in flat(summary or {}) if not k.startswith(_LEFT_OUT) and k not in trial.values}
    return {**head, **trial.values, **({} if error is not None else figures)}


def write(plan: Plan, folder: Path, rows: Sequence[Row], extra: Mapping[str, Any] | None = None) -> None:
    """Write `sweep.json`: how the sweep was asked for, and one row a trial, in their order."""
    tree = {
        "words": plan.words, "config_dir": plan.config_dir, "threads": plan.threads, "swept": plan.keys,
        **(extra or {}), "trials": rows,
    }  # fmt: skip
    with atomic(folder / "sweep.json") as file:
        file.write(json.dumps(tree, indent=1, ensure_ascii=False).encode() + b"\n")


def write_parquet(folder: Path, rows: Sequence[Row]) -> None:
    """Write `sweep.parquet`: the rows of `sweep.json`, a column for each name; values of several kinds as text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    with atomic(folder / "sweep.parquet") as file:
        pq.write_table(pa.table(columns), file)


def _column(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and not kinds & {list, dict}:
        return values
    return [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]


def means(rows: Iterable[Row], keys: Sequence[str], figures: Sequence[str]) -> list[Row]:
    """Average rows that differ in the seed alone.

    Args:
        rows: of a sweep.
        keys: the swept keys.
        figures: columns to average, over trials that are done.

    Returns:
        A row for each point: its values, `trials` (done), `failed`, and for each figure that is known (mean,
        half of Student's 95 % interval or None), as `fedsim report` has them.

    """
    groups: dict[str, list[Row]] = {}
    keys = [key for key in keys if key != "seed"]
    for one in rows:
        groups.setdefault(json.dumps([one[key] for key in keys]), []).append(one)
    table = []
    for members in groups.values():
        mean: Row = {key: members[0][key] for key in keys}
        mean["trials"] = sum(one["state"] == "done" for one in members)
        mean["failed"] = sum(one["state"] == "failed" for one in members)
        for name in figures:
            known = [one[name] for one in members if one["state"] == "done" and one.get(name) is not None]
            if known:
                over = mean_of(known)
                mean[name] = over.mean, over.half
        table.append(mean)
    return table
