"""A table in a CSV file: numbers and categories to features, one column to classes, one to natural clients."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import torch

from fedsim.contracts import Dataset
from fedsim.data.features import Int64, Strings, numbers, one_hot, standardise
from fedsim.data.files import find_file
from fedsim.data.holdout import stratified_holdout
from fedsim.errors import UserError, did_you_mean

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "None")
"""Cells that always mean a missing value, as in pandas' and R's readers."""

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def csv(  # noqa: PLR0913  one argument a key of the config
    *,
    path: str | None = None,
    label: str | None = None,
    root: str | None = None,
    client: str | None = None,
    positive: str | None = None,
    features: Sequence[str] | None = None,
    categorical: Sequence[str] = (),
    missing: Mapping[str, Sequence[float | str]] | None = None,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> Dataset:
    """Load a CSV file with a header.

    Numeric columns: a missing value is the mean of the training rows, then mean 0 and variance 1 over them.
    Categorical columns: one column of 0 and 1 for each category seen in a training row; a missing value is
    the most frequent one, a category seen in test rows only is all zeros. Nothing is fitted on test rows. A
    column that is missing, or the same, in all training rows carries nothing and becomes 0.

    Args:
        path: the file; see `fedsim.data.files.find_file` for where it is looked for.
        label: column of the class. Classes are its distinct values in order, numbers by size.
        root: folder of data sets; null: FEDSIM_DATA, else `data`.
        client: column of the natural client; null: none.
        positive: comparison that makes the label binary, e.g. ">0" or "==yes"; null: as it is.
        features: columns to use; null: all but label and client.
        categorical: numeric columns to take as categories; columns with text are categories anyway.
        missing: column → values that mean a missing value there, e.g. {chol: [0]}.
        test_fraction: 0 < test_fraction < 1, stratified by (client, class).
        split_seed: of the train/test split. It is not the run's seed: all runs share one test set.

    Returns:
        x (N, F) float32, y (N,), client (N,) if there is one (−1 where the cell is empty).

    Raises:
        UserError: no such file or column, an unreadable file, an empty label, a wrong comparison.
        ValueError: the fraction is out of range.

    """
    table = _read(find_file(path, root))
    if label is None:
        raise UserError(f"data.label is needed: the column of the class{did_you_mean('', table)}")
    reserved = [label, *([client] if client is not None else [])]
    names = [name for name in table if name not in reserved] if features is None else list(features)
    missing = missing or {}
    for key, columns in (
        ("label", [label]),
        ("client", reserved[1:]),
        ("features", names),
        ("categorical", categorical),
        ("missing", missing),
    ):
        _check_columns(key, columns, table)
    if label in names:
        raise UserError(f"data.features: {label!r} is the label; a model would read the answer from it")
    if not names:
        raise UserError("data.features: no column is left beside label and client")

    y, class_names = _classes(table[label], label, positive)
    natural, client_names = (None, None) if client is None else _codes(table[client])
    strata = [y] if natural is None else [natural, y]
    splits = stratified_holdout(*strata, fraction=test_fraction, seed=split_seed)
    train = splits["train"]
    blocks = []
    for name in names:
        cells = _blank(table[name], missing.get(name, ()))
        values = None if name in categorical else numbers(cells)
        blocks.append(one_hot(cells, train) if values is None else standardise(values, train))  # (N, f)
    return Dataset(
        x=torch.from_numpy(np.concatenate(blocks, axis=1)),
        y=torch.from_numpy(y),
        splits=splits,
        num_classes=len(class_names),
        client=natural,
        class_names=class_names,
        client_names=client_names,
    )


def _read(path: Path) -> dict[str, Strings]:
    # Every cell as text: one column may hold 1, 1.0 and -.1, which a reader that infers types takes for text.
    try:
        with pyarrow.csv.open_csv(path) as reader:
            names = reader.schema.names
        if len(set(names)) < len(names):
            raise UserError(f"data.path: {path} names a column twice")
        convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        table = pyarrow.csv.read_csv(path, convert_options=convert)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"data.path: {path} is not a CSV file with a header: {error}") from error
    if table.num_rows < 2:
        raise UserError(f"data.path: {path} has {table.num_rows} rows")
    return {name: np.char.strip(np.asarray(table[name].to_pylist(), dtype=str)) for name in names}


def _check_columns(key: str, columns: Sequence[str] | Mapping[str, Any], table: Mapping[str, Any]) -> None:
    for name in columns:
        if name not in table:
            raise UserError(f"data.{key}: the file has no column {name!r}{did_you_mean(name, table)}")


def _blank(cells: Strings, values: Sequence[float | str]) -> Strings:
    """Return the cells (N,), "" where missing."""
    blank = np.isin(cells, MISSING)  # (N,)
    as_numbers = numbers(np.where(blank, "", cells))
    for value in values:
        same = as_numbers == value if as_numbers is not None and not isinstance(value, str) else cells == str(value)
        blank = blank | same  # (N,)
    return np.where(blank, "", cells)


def _classes(cells: Strings, label: str, positive: str | None) -> tuple[Int64, tuple[str, ...]]:
    cells = _blank(cells, ())
    if (cells == "").any():
        row = int((cells == "").argmax())
        raise UserError(f"data.label: row {row + 1} has no {label!r}; every sample needs a class")
    if positive is None:
        y, names = _codes(cells)
        return y, names
    match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*(\S.*?)\s*", str(positive))
    if match is None:
        raise UserError(f"data.positive must be a comparison like '>0' or '==yes', got {positive!r}")
    sign, right = match.groups()
    values, bound = numbers(cells), numbers(np.array([right]))
    if values is None or bound is None:
        if sign not in ("==", "!="):
            raise UserError(f"data.positive: {positive!r} compares numbers, but {label!r} or {right!r} is text")
        hit = _COMPARE[sign](cells, right)  # (N,)
    else:
        hit = _COMPARE[sign](values, bound[0])  # (N,)
    return np.asarray(hit, dtype=np.int64), (f"not {label}{sign}{right}", f"{label}{sign}{right}")


def _codes(cells: Strings) -> tuple[Int64, tuple[str, ...]]:
    """Return the number (N,) of each cell's value among the distinct ones in order, −1 if empty, and their names."""
    values = numbers(cells)
    keys: npt.NDArray[Any] = cells if values is None else values
    present = cells != ""  # (N,)
    distinct, inverse = np.unique(keys[present], return_inverse=True)  # (S,)
    codes = np.full(len(cells), -1, dtype=np.int64)  # (N,)
    codes[present] = inverse
    return codes, tuple(str(value) if values is None else f"{value:.15g}" for value in distinct)
