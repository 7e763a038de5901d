"""Columns of text cells to columns of features; everything that is fitted is fitted on training rows only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Strings = npt.NDArray[np.str_]


def numbers(cells: Strings) -> Float64 | None:
    """Return the numbers in the cells (N,), NaN for an empty one; None if some cell is not a finite number."""
    present = cells != ""  # (N,)
    values = np.full(len(cells), np.nan)  # (N,)
    try:
        values[present] = cells[present].astype(np.float64)
    except ValueError:
        return None
    return values if np.isfinite(values[present]).all() else None


def standardise(values: Float64, train: Int64) -> Float32:
    """Return (N, 1): (v − mean) / std of the training rows that have a value; 0 where it is missing."""
    known = values[train]
    known = known[~np.isnan(known)]
    mean, deviation = (known.mean(), known.std()) if len(known) else (0.0, 0.0)
    # A column that is constant up to rounding would otherwise be divided by that rounding.
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        return np.zeros((len(values), 1), dtype=np.float32)
    scaled = (values - mean) / deviation  # (N,)
    filled: Float64 = np.where(np.isnan(scaled), 0.0, scaled)  # (N,)
    return filled.astype(np.float32)[:, None]


def one_hot(cells: Strings, train: Int64) -> Float32:
    """Return (N, S) of 0 and 1 over the S categories of the training rows; a missing cell is the most frequent."""
    values = numbers(cells)
    keys = cells if values is None else np.where(cells == "", "", [f"{v:.15g}" for v in values])  # 1 and 1.0 are one
    known = keys[train]
    known = known[known != ""]
    categories, counts = np.unique(known, return_counts=True)  # (S,)
    if not len(categories):
        return np.zeros((len(cells), 1), dtype=np.float32)
    filled = np.where(keys == "", categories[counts.argmax()], keys)  # (N,)
    hot: Float32 = (filled[:, None] == categories).astype(np.float32)  # (N, S)
    return hot
