"""What is compared of one run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.errors import UserError
from fedsim.study.spec import Study


def figure(study: Study, folder: Path, row: Mapping[str, Any]) -> float:
    """Return what is compared of one run: the worst value, ±∞, where its metric is not finite.

    Raises:
        UserError: runs have no such column, or one on a logarithmic scale is not above 0.

    """
    value = _figure(study, folder, row)
    if study.scale == "linear" or math.isinf(value):
        return value
    if not value > 0:
        raise UserError(f"scale: a logarithm needs what is compared to be > 0, got {value:g} in {row['trial']}")
    return math.log(value)


def _figure(study: Study, folder: Path, row: Mapping[str, Any]) -> float:
    lines = (folder / row["trial"] / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    metric = _of_cell(study.metric, row)
    if study.target is None:
        ends: list[Mapping[str, Any]] = [row, *reversed(rounds)]
        known: Mapping[str, Any] = next((found for found in ends if metric in found), {})
        value = known.get(metric, "")
        if value is None:  # what is not finite is written as null
            return -study.sign * math.inf
        if not isinstance(value, int | float):
            raise UserError(f"metric: runs have no {metric}; they have {', '.join(sorted({*row, *rounds[-1]}))}")
        return float(value)
    if not any(study.along in found for found in rounds):
        raise UserError(f"along: rounds have no {study.along}; they have {', '.join(sorted(rounds[-1]))}")
    along = 0.0
    for found in rounds:
        step = float(found.get(study.along) or 0.0)  # a round in which nobody arrived has no bytes_up
        along = along + step if study.along == "bytes_up" else max(along, step)
        value = found.get(metric)
        reached = value is not None and (value >= study.target if study.better == "higher" else value <= study.target)
        if reached:
            return along
    return along


def _of_cell(metric: str, row: Mapping[str, Any]) -> str:
    """Return a metric's name in a cell.

    >>> _of_cell("recall_{devices.target_class}", {"devices.target_class": 5})
    'recall_5'
    """

    def value(named: re.Match[str]) -> str:
        if named[1] not in row:
            raise UserError(f"metric: {metric} names {named[1]}, which is no setting of the cells")
        return str(row[named[1]])

    return re.sub(r"\{([\w.]+)\}", value, metric)
