"""The files of a run folder: rows that survive a kill in mid-line, and whole files that appear at once or not at all.

Nothing is lost by a kill of the process: what is appended is with the operating system before the round goes on.
`sync` makes it survive a loss of power too; a checkpoint calls it before it says that it is complete.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import UserError
from fedsim.files import atomic


def plain(value: Any) -> Any:
    """Return what JSON can hold: tensors and arrays as numbers or lists, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a record holds numbers, strings, lists and mappings, got {type(value).__name__}: {value!r}")


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON file atomically; NaN and infinities become null."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic(Path(path)) as file:
        file.write(text.encode() + b"\n")


class RoundLog:
    """`rounds.jsonl`: one flat JSON object a line, `round` first, rounds ascending.

    Floats are written with `repr`, so they come back to the bit. A row is complete when its newline is there; opening
    the file drops an incomplete one, which only a kill in mid-write leaves.

    Args:
        path: of the file, created when the first row is appended.

    Raises:
        UserError: the file holds lines that are no rows of such a log.

    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last_round = 0
        self._file: BinaryIO | None = None
        if self.path.exists():
            self.truncate_to(None)

    def append(self, round: int, row: Mapping[str, Any]) -> None:
        """Add the row of a round: name → number, 0-d tensor, string, bool or None.

        Raises:
            ValueError: the round is not after the last one, or a value is not flat.

        """
        if round <= self.last_round:
            raise ValueError(f"rounds of a log ascend: got round {round} after round {self.last_round}")
        flat = plain(_on_host(row))
        if "round" in flat:
            raise ValueError("the column 'round' is the log's own; name the metric otherwise")
        nested = [name for name, value in flat.items() if isinstance(value, list | dict)]
        if nested:
            raise ValueError(f"rows of rounds.jsonl are flat, got several values for {', '.join(nested)}")
        line = json.dumps({"round": round, **flat}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open from the first row to `close`)
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            while written < len(line):  # an unbuffered write may be short
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(end)
            raise
        self.last_round = round

    def truncate_to(self, round: int | None) -> None:
        """Drop the rows after a round (None: only an incomplete last line), as a resume from its checkpoint must."""
        self.close()
        keep, self.last_round = 0, 0
        if not self.path.exists():
            return
        for row, end in _rows(self.path):
            if round is not None and row["round"] > round:
                break
            keep, self.last_round = end, row["round"]
        if keep < self.path.stat().st_size:
            os.truncate(self.path, keep)

    def sync(self) -> None:
        """Force the rows to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force the rows to the disk and close the file; a later `append` opens it again."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """Return the complete rows of a log, in order.

        Raises:
            UserError: a complete line is no row.

        """
        return [row for row, _ in _rows(Path(path))]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (row, offset of its end) for each complete line."""
    end, last = 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
                ascends = row["round"] > last
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}, line {number}, is no row of a run's log: {error}") from error
            if not ascends:
                raise UserError(f"{path}, line {number}: round {row['round']} comes after round {last}")
            last = row["round"]
            yield row, end


def _on_host(row: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the floating 0-d tensors of a row to the host in one copy a device: each copy waits for the device."""
    values = dict(row)
    devices: dict[torch.device, list[str]] = {}
    for name, value in row.items():
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
            devices.setdefault(value.device, []).append(name)
    for names in devices.values():
        numbers = torch.stack([values[name].detach().double() for name in names]).tolist()
        values.update(zip(names, numbers, strict=True))
    return values
