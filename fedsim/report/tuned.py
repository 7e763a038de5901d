"""What a report says of a search that came before its runs: every method's budget, and what was chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedsim.errors import UserError
from fedsim.quantities import counted, score
from fedsim.report.page import html_table, paragraph, section

Tree = Mapping[str, Any]
"""What `tune.json` holds."""


def tunings(folders: Sequence[Path]) -> list[Tree]:
    """Return what is known of the searches in some folders, and in folders in them.

    Raises:
        UserError: a file cannot be read.

    """
    places = [place for folder in folders for place in (folder, *folder.iterdir()) if place.is_dir()]
    places += [folder.parent for folder in folders if folder.name == "report"]
    found = dict.fromkeys(path.resolve() for place in places if (path := place / "tune.json").is_file())
    trees = []
    for path in found:
        try:
            trees.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    return trees


def budget(trees: Sequence[Tree]) -> str:
    """Return in a sentence what each method was given before the runs of a report; "" where nothing was tuned."""
    given = dict.fromkeys(_given(tree) for tree in trees)
    return f"Each method was tuned before, on other seeds: {'; '.join(given)}." if given else ""


def _given(tree: Tree) -> str:
    spent, tuning = tree["budget"], tree["tuning"]
    trials, seeds = counted(spent["points"], "trial"), counted(len(spent["seeds"]), "seed")
    return f"{trials} × {seeds} by {tuning['search']} search, chosen by {tuning['metric'].replace('_', ' ')}"


def chosen(trees: Sequence[Tree]) -> str:
    """Return the section that says what was chosen for each method, and what lies on the edge of what was tried."""
    if not trees:
        return ""
    rows = [["method", "chosen", "its validation figure", "failed trials", "on the edge"]]
    for tree in trees:
        metric = tree["tuning"]["metric"]
        for one in tree["methods"]:
            best = ", ".join(f"{key}={value}" for key, value in one["best"].items())
            figure = "–" if one["score"] is None else score(metric, one["score"])
            edges = "; ".join(line.partition(": ")[2] if ": " in line else line for line in one["edges"])
            rows.append(
                [escape(text) for text in (_named(one["values"]), best, figure, str(one["failed"]), edges or "–")]
            )
    note = f"{budget(trees)} No test sample was read for it. A choice on the edge: the best may lie beyond."
    return section("tuning", "Tuning", paragraph(note), html_table(rows, "left"))


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if key == "strategy" else f"{key}={value}" for key, value in values.items()) or "–"
