"""Curves of a run as a picture: `Result.plot()`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fedsim.errors import UserError, did_you_mean
from fedsim.quantities import label

_PERCENT = ("accuracy", "recall", "ece")
_WIDTH, _HEIGHT = 4.2, 2.8  # inches of a panel


class Picture(Figure):
    """A figure that a notebook shows as it is, with no backend chosen."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=120)
        return file.getvalue()


def plot(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Picture:
    """Draw columns against rounds, a panel each; a validation column lies in the panel of the one it belongs to.

    Args:
        rows: of rounds.jsonl.
        columns: names; values that a row only repeats, because it did not evaluate, are left out.

    Raises:
        UserError: no row has such a number.

    """
    known = sorted({n for row in rows for n, v in row.items() if isinstance(v, int | float) and n != "round"})
    for name in columns:
        if name not in known:
            raise UserError(f"plot: no row has a number {name!r}{did_you_mean(name, known)}")
    figure = Picture(figsize=(_WIDTH * len(columns), _HEIGHT), layout="constrained")
    for i, name in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), i + 1)
        for column in (name, f"validation_{name}"):
            if column in known:
                x, y = _points(rows, column)
                axes.plot(x, [100 * v for v in y] if _is_percent(name) else y, label=label(column), marker=_marker(x))
        axes.set_xlabel("round")
        axes.set_ylabel(label(name) + (" (%)" if _is_percent(name) else ""))
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    return figure


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[list[int], list[float]]:
    repeated = column in ("accuracy", "loss")
    kept = [row for row in rows if row.get(column) is not None and not (repeated and row.get("evaluated") is False)]
    return [row["round"] for row in kept], [float(row[column]) for row in kept]


def _marker(x: Sequence[int]) -> str:
    return "." if len(x) < 30 else ""


def _is_percent(name: str) -> bool:
    return any(word in _PERCENT for word in name.split("_"))
