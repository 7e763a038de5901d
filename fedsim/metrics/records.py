"""The files of a run folder: rows that survive a kill in mid-line, and whole files that appear at once or not at all.

Nothing is lost by a kill of the process: what is appended is with the operating system before the round goes on.
`sync` makes it survive a loss of power too; a checkpoint calls it before it says that it is complete.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import UserError
from fedsim.files import atomic

Column = np.ndarray[Any, Any]

_ROW_GROUP = 1 << 17  # rows that are merged at a time


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


class ClientLog:
    """Rows of (round, client) as parts in `clients/`, merged into `clients.parquet` when the run ends.

    Rows wait in memory until `flush` writes them as one part; a checkpoint calls it first, so what a kill loses is
    what the resumed run does again. A part is an .npz of columns, named by its first and last round.

    Args:
        folder: the run folder.

    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "clients.parquet"
        self.parts = Path(folder) / "clients"
        self._pending: list[dict[str, Column]] = []
        self.last_round = max((last for _, last, _ in self._spans()), default=0)

    def append(self, round: int, clients: Tensor | Column, columns: Mapping[str, Any]) -> None:
        """Add the rows of a round.

        Args:
            round: after every earlier one.
            clients: (K,) integer ids.
            columns: name → (K,) numbers or bools; NaN becomes null. Names may differ from round to round.

        """
        if round <= self.last_round:
            raise ValueError(f"rounds of a log ascend: got round {round} after round {self.last_round}")
        ids = _column(clients)  # (K,)
        rows = {"round": np.full(len(ids), round, dtype=np.int64), "client": ids.astype(np.int64)}
        for name, values in columns.items():
            if name in rows:
                raise ValueError(f"the column {name!r} is the log's own; name the metric otherwise")
            rows[name] = _column(values)
            if rows[name].shape != ids.shape or rows[name].dtype.kind not in "fiub":
                raise ValueError(
                    f"column {name!r} must have one number for each of {len(ids)} clients, "
                    f"got {rows[name].dtype} {rows[name].shape}"
                )
        self.last_round = round
        if len(ids):
            self._pending.append(rows)

    def flush(self) -> None:
        """Write the rows that wait in memory: one part for each run of rounds that have the same columns."""
        for names, group in groupby(self._pending, key=tuple):
            rounds = list(group)
            self._write({name: np.concatenate([rows[name] for rows in rounds]) for name in names})
        self._pending = []

    def truncate_to(self, round: int) -> None:
        """Drop the rows after a round, as a resume from its checkpoint must."""
        self.flush()
        for first, last, path in self._spans():
            if last > round:
                if first <= round:
                    rows = _load(path)
                    kept = rows["round"] <= round  # (rows,)
                    self._write({name: column[kept] for name, column in rows.items()})
                path.unlink()
        self.last_round = max((last for _, last, _ in self._spans()), default=0)

    def merge(self) -> None:
        """Write `clients.parquet` from all parts, atomically; columns that a part lacks are null in its rows.

        The parts stay: a run that goes on for more rounds merges again.
        """
        import pyarrow as pa  # here: a run needs it once, at its end, and it takes long to import
        import pyarrow.parquet as pq

        self.flush()
        schema: dict[str, np.dtype[Any]] = {"round": np.dtype(np.int64), "client": np.dtype(np.int64)}
        for _, _, path in self._spans():
            for name, column in _load(path).items():
                schema[name] = np.promote_types(schema[name], column.dtype) if name in schema else column.dtype
        fields = pa.schema([(name, pa.from_numpy_dtype(dtype)) for name, dtype in schema.items()])

        def table(rows: dict[str, Column]) -> Any:
            nulls = len(rows["round"])
            columns = [
                _arrow(rows[name].astype(dtype)) if name in rows else pa.nulls(nulls, pa.from_numpy_dtype(dtype))
                for name, dtype in schema.items()
            ]
            return pa.table(columns, schema=fields)

        with atomic(self.path) as file, pq.ParquetWriter(file, fields) as writer:
            waiting: list[Any] = []
            for _, _, path in self._spans():
                waiting.append(table(_load(path)))
                if sum(len(part) for part in waiting) >= _ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))

    def _spans(self) -> list[tuple[int, int, Path]]:
        """Return (first round, last round, path) of each part, ascending."""
        spans = []
        for path in self.parts.glob("*-*.npz"):
            first, last = path.stem.split("-")
            spans.append((int(first), int(last), path))
        return sorted(spans)

    def _write(self, rows: dict[str, Column]) -> None:
        first, last = int(rows["round"][0]), int(rows["round"][-1])
        with atomic(self.parts / f"{first:08d}-{last:08d}.npz") as file:
            # By position, the names in front: as keywords, a column "file" would be savez's own argument.
            np.savez(file, np.array(list(rows)), *rows.values())


def _load(path: Path) -> dict[str, Column]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {str(name): stored[f"arr_{i}"] for i, name in enumerate(stored["arr_0"], start=1)}
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is no part of a run's client log: {error}") from error


def _arrow(column: Column) -> Any:
    """Return a column of numbers or bools as arrow's, NaN as null; `pyarrow.array` would load pandas where it is."""
    import pyarrow as pa

    known = None
    if column.dtype.kind == "f" and (unknown := np.isnan(column)).any():
        known = pa.py_buffer(np.packbits(~unknown, bitorder="little"))
    values = np.packbits(column, bitorder="little") if column.dtype.kind == "b" else np.ascontiguousarray(column)
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [known, pa.py_buffer(values)])


def _column(values: Tensor | Column) -> Column:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
