"""Where the rows of a Hugging Face data set come from: parquet files on this machine, a folder, or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet

from fedsim.data import hub
from fedsim.data.files import roots
from fedsim.errors import UserError, did_you_mean


class Table(Protocol):
    """The rows of one split."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types; with the class names in the metadata where the data set has them."""
        ...

    @property
    def num_rows(self) -> int:
        """N."""
        ...

    @property
    def fingerprint(self) -> Any:
        """JSON that changes when the rows do."""
        ...

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Return whole columns (N,)."""
        ...

    def batches(self, name: str) -> Iterator[pa.Array]:
        """Yield a column in parts, in order."""
        ...


def open_split(name: str, config: str | None, split: str, root: str | None) -> Table:
    """Find a split of a data set.

    Looked for in this order: the folders `root/name` and `root/(last part of name)` for each root of
    `fedsim.data.files.roots`, as parquet files whose name says the split, else as whatever `datasets` reads
    in that folder; then, unless `data.root` says where it is, the hub, by `datasets`.

    Args:
        name: of the hub, e.g. "ylecun/mnist", or of a folder.
        config: of a data set that has several.
        split: e.g. "train".
        root: `data.root`.

    Raises:
        UserError: nothing is found, or `datasets` is needed and not installed.

    """
    folders = [folder / part for folder in roots(root) for part in dict.fromkeys((name, name.rsplit("/", 1)[-1]))]
    for folder in folders:
        if folder.is_dir():
            files = _parquet_files(folder, config, split)
            return _Parquet(files) if files else _load(str(folder), None, split, folders)
    if root is not None:
        raise UserError(_absent(name, folders, Path(root).expanduser()))
    return _load(name, config, split, folders)


def _absent(name: str, tried: Sequence[Path], root: Path) -> str:
    """Say that `data.root` has no such data set, and how to come by it."""
    looked = " and ".join(str(folder.absolute()) for folder in tried)
    state = f"looked for {looked}" if root.is_dir() else f"there is no folder {root.absolute()}"
    return (
        f"data.root={root} has no data set {name!r}: {state}; name the folder that holds it, or leave data.root out "
        "and it is fetched from the Hugging Face hub (pip install 'fedsim[data]')"
    )


def class_names(table: Table, label: str) -> tuple[str, ...] | None:
    """Return the names of the classes that the data set's own description gives, if any."""
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = described.get("info", {}).get("features", {}).get(label, {}).get("names")
    return tuple(names) if names else None


def check_columns(table: Table, wanted: Iterable[tuple[str, str | None]]) -> None:
    """Raise UserError for the first column, given as (config key, name), that the table lacks."""
    for key, name in wanted:
        if name is not None and name not in table.schema.names:
            raise UserError(f"data.{key}: the data has no column {name!r}{did_you_mean(name, table.schema.names)}")


def _parquet_files(folder: Path, config: str | None, split: str) -> tuple[Path, ...]:
    files = [
        path for path in sorted(folder.rglob("*.parquet")) if not path.relative_to(folder).parts[0].startswith(".")
    ]
    if config is not None:
        files = [path for path in files if config in path.relative_to(folder).parts] or files
    # The hub's two layouts: train.parquet or train-00000-of-00002.parquet, or a folder train.
    return tuple(path for path in files if path.stem.split("-")[0] == split or path.parent.name == split)


@contextmanager
def _readable(what: object) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"data: {what} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Parquet:
    files: tuple[Path, ...]

    @property
    def schema(self) -> pa.Schema:
        with _readable(self.files[0]):
            return pyarrow.parquet.read_schema(self.files[0])

    @property
    def num_rows(self) -> int:
        with _readable(self.files[0].parent):
            return sum(pyarrow.parquet.read_metadata(path).num_rows for path in self.files)

    @property
    def fingerprint(self) -> Any:
        stats = [(path.resolve(), path.stat()) for path in self.files]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def columns(self, names: Sequence[str]) -> pa.Table:
        with _readable(self.files[0].parent):
            return pa.concat_tables([pyarrow.parquet.ParquetFile(path).read(list(names)) for path in self.files])

    def batches(self, name: str) -> Iterator[pa.Array]:
        with _readable(self.files[0].parent):
            for path in self.files:
                for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000, columns=[name]):
                    yield batch.column(0)


@dataclass(frozen=True)
class _HubSplit:
    dataset: Any  # datasets.Dataset

    @property
    def schema(self) -> pa.Schema:
        return self.dataset.features.arrow_schema

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    @property
    def fingerprint(self) -> Any:
        return self.dataset._fingerprint  # the name that `datasets` gives to these rows in its own cache

    def columns(self, names: Sequence[str]) -> pa.Table:
        return self.dataset.select_columns(list(names)).with_format("arrow")[:]

    def batches(self, name: str) -> Iterator[pa.Array]:
        for batch in self.dataset.select_columns([name]).with_format("arrow").iter(batch_size=1000):
            yield batch.column(0).combine_chunks()


def _load(name: str, config: str | None, split: str, tried: Sequence[Path]) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.name={name!r} is read by Hugging Face datasets, which is not installed: pip install 'fedsim[data]'"
        ) from error
    here = Path(name) in tried
    try:
        return _HubSplit(datasets.load_dataset(name, config, split=split) if here else hub.load(name, config, split))
    except Exception as error:  # datasets raises a dozen kinds, from requests' to its own
        looked = ", ".join(str(folder.absolute()) for folder in tried)
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"data: no split {split!r} of {name!r}: not in {looked}, and not from the hub "
            f"({type(error).__name__}: {first_line}); set data.root to the folder that holds it"
        ) from error
