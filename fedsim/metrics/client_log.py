"""The table of rounds × clients of a run: parts that survive a kill, merged into one file when the run ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fedsim.errors import UserError
from fedsim.files import atomic

Column = np.ndarray[Any, Any]

_ROW_GROUP = 1 << 17  # rows that are merged at a time


class ClientLog:
    """Rows of (round, client) as parts in `clients/`, merged into `clients.parquet` when the run ends.

    Rows wait in memory until `flush` writes them as one part; a checkpoint calls it first, so what a kill loses is
    what the resumed run does again. A part is a .safetensors file of columns, named by its first and last round.

    Args:
        folder: the run folder.

    Raises:
        UserError: an earlier version has written parts, as .npz files.

    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "clients.parquet"
        self.parts = Path(folder) / "clients"
        if (old := next(self.parts.glob("*.npz"), None)) is not None:
            raise UserError(
                f"{old} is of an earlier version of fedsim, which this one does not read: go on with that one"
            )
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
        """Write the rows that wait in memory as one part."""
        if self._pending:
            self._write(_joined(self._pending))
        self._pending = []

    def truncate_to(self, round: int) -> None:
        """Drop the rows after a round, as a resume from its checkpoint must."""
        self.flush()
        for first, last, path in self._spans():
            if last > round:
                if first <= round:
                    part = _load(path)
                    kept = part.columns["round"] <= round  # (rows,)
                    self._write(
                        _Part(
                            {name: column[kept] for name, column in part.columns.items()},
                            {name: known[kept] for name, known in part.known.items()},
                        )
                    )
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
            for name, column in _load(path).columns.items():
                schema[name] = np.promote_types(schema[name], column.dtype) if name in schema else column.dtype
        fields = pa.schema([(name, pa.from_numpy_dtype(dtype)) for name, dtype in schema.items()])

        def table(part: _Part) -> Any:
            nulls = len(part.columns["round"])
            columns = [
                _arrow(part.columns[name].astype(dtype), part.known.get(name))
                if name in part.columns
                else pa.nulls(nulls, pa.from_numpy_dtype(dtype))
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
        for path in self.parts.glob("*-*.safetensors"):
            first, last = path.stem.split("-")
            spans.append((int(first), int(last), path))
        return sorted(spans)

    def _write(self, part: _Part) -> None:
        rounds = part.columns["round"]
        # By position: names are a rule's own, and a file's tensors have no order.
        tensors = {str(i): np.ascontiguousarray(column) for i, column in enumerate(part.columns.values())}
        tensors |= {f"{list(part.columns).index(name)}.known": known for name, known in part.known.items()}
        with atomic(self.parts / f"{rounds[0]:08d}-{rounds[-1]:08d}.safetensors") as file:
            file.write(save(tensors, {"columns": json.dumps(list(part.columns))}))


class _Part(NamedTuple):
    columns: dict[str, Column]  # name → (rows,)
    known: dict[str, Column]  # name → (rows,) bool, of columns that some rounds lack


def _joined(rounds: Sequence[Mapping[str, Column]]) -> _Part:
    """Put the rows of rounds below each other; where a round lacks a column its rows are not known."""
    counts = [len(rows["round"]) for rows in rounds]
    columns, known = dict[str, Column](), dict[str, Column]()
    for name in dict.fromkeys(name for rows in rounds for name in rows):
        there = [name in rows for rows in rounds]
        dtype = np.result_type(*(rows[name].dtype for rows in rounds if name in rows))
        pieces = [rows.get(name, np.zeros(count, dtype)) for rows, count in zip(rounds, counts, strict=True)]
        columns[name] = np.concatenate(pieces, dtype=dtype)
        if not all(there):
            known[name] = np.repeat(there, counts)
    return _Part(columns, known)


def _load(path: Path) -> _Part:
    try:
        with safe_open(path, framework="numpy") as file:
            names, stored = json.loads(file.metadata()["columns"]), set(file.keys())
            columns = {name: file.get_tensor(str(i)) for i, name in enumerate(names)}
            known = {n: file.get_tensor(f"{i}.known") for i, n in enumerate(names) if f"{i}.known" in stored}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no part of a run's client log: {error}") from error
    return _Part(columns, known)


def _arrow(column: Column, known: Column | None) -> Any:
    """Return a column of numbers or bools as arrow's, NaN as null; `pyarrow.array` would load pandas where it is."""
    import pyarrow as pa

    if column.dtype.kind == "f" and (unknown := np.isnan(column)).any():
        known = ~unknown if known is None else known & ~unknown
    mask = None if known is None else pa.py_buffer(np.packbits(known, bitorder="little"))
    values = np.packbits(column, bitorder="little") if column.dtype.kind == "b" else np.ascontiguousarray(column)
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [mask, pa.py_buffer(values)])


def _column(values: Tensor | Column) -> Column:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
