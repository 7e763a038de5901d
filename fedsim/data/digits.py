"""The digits that ship with scikit-learn: real data for a first run, with no network and no file to fetch."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from fedsim.contracts import Dataset
from fedsim.data.holdout import stratified_holdout
from fedsim.errors import UserError


def digits(*, test_fraction: float = 0.2, split_seed: int = 0) -> Dataset:
    """Load 1797 handwritten digits.

    E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).

    Args:
        test_fraction: of each class, kept for the test; 0 < test_fraction < 1.
        split_seed: of the train/test split. It is not the run's seed: all runs share one test set.

    Returns:
        x (1797, 1, 8, 8) float32 in [0, 1], y (1797,) in 0 … 9.

    Raises:
        ValueError: the fraction is out of range.
        UserError: scikit-learn, or the digits in it, cannot be found.

    """
    with gzip.open(_file(), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)  # (1797, 65)
    y = table[:, -1].astype(np.int64)  # (1797,)
    x = (table[:, :-1] / np.float32(16)).reshape(-1, 1, 8, 8)  # (1797, 1, 8, 8)
    return Dataset(
        x=torch.from_numpy(x),
        y=torch.from_numpy(y),
        splits=stratified_holdout(y, fraction=test_fraction, seed=split_seed),
        num_classes=10,
        class_names=tuple("0123456789"),
    )


def _file() -> Path:
    # Importing sklearn costs a second and importlib.resources imports the package; its place is enough.
    spec = find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return path
    raise UserError("data=digits reads a file of scikit-learn, which is not installed: pip install scikit-learn")
