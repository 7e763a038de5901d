"""Machines from a table that the user measured."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsim.devices.fleet import Fleet, Floats, Population
from fedsim.errors import UserError, did_you_mean

COLUMNS = ("speed", "down_bandwidth", "up_bandwidth")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Read machines from a CSV file with a header.

    Columns: `speed` (floating-point operations a second), `down_bandwidth` and `up_bandwidth` (bytes a second), all
    > 0; optionally `slow` (0 or 1) and `client`, an id. With `client` every client needs its row; without it rows
    are handed out in turn: client k gets row k modulo their number, so a short trace serves many clients.

    Args:
        path: of the file; None is refused.

    Raises:
        UserError: no file or no such file, a column that is missing, or a value that is none.

    """

    path: Path | None = None

    def __post_init__(self) -> None:
        if self.path is None:
            raise UserError("devices.path is needed: the CSV file of the machines, e.g. devices.path=my/machines.csv")
        if not self.path.is_file():
            raise UserError(f"devices.path={self.path}: no such file")

    def __call__(self, population: Population, seed: int) -> Fleet:
        """Return the fleet (P,)."""
        assert self.path is not None  # refused when built
        with open(self.path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = tuple(name.strip() for name in reader.fieldnames or ())
            reader.fieldnames = names
            rows = list(reader)
        for name in COLUMNS:
            if name not in names:
                raise UserError(f"{self.path} has no column {name!r}{did_you_mean(name, names)}")
        if not rows:
            raise UserError(f"{self.path} has no rows")
        table = {
            name: self._column(rows, name) for name in (*COLUMNS, "slow", "client") if name in names
        }  # name → (R,)
        chosen = self._rows(table.get("client"), len(population), len(rows))  # (P,)
        slow = table.get("slow", np.zeros(len(rows)))[chosen] > 0  # (P,)
        try:
            speed, down, up = (table[name][chosen] for name in COLUMNS)  # (P,) each
            return Fleet(speed, down, up, slow).checked()
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error

    def _column(self, rows: list[dict[str, str]], name: str) -> Floats:
        values = np.empty(len(rows))  # (R,)
        for number, row in enumerate(rows):
            try:
                values[number] = float(row[name])
            except (TypeError, ValueError):
                raise UserError(f"{self.path}, line {number + 2}: {name} must be a number, got {row[name]!r}") from None
        return values

    def _rows(
        self, clients: Floats | None, num_clients: int, num_rows: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if clients is None:
            return np.arange(num_clients) % num_rows
        row_of = {int(client): row for row, client in enumerate(clients.tolist())}
        missing = [k for k in range(num_clients) if k not in row_of]
        if missing:
            raise UserError(f"{self.path} has no row for client {missing[0]} ({len(missing)} clients have none)")
        return np.array([row_of[k] for k in range(num_clients)], dtype=np.int64)
