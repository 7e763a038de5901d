"""Train/test splits of data that comes without one: keyed, stratified, and never a function of the run's seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.rng import keyed_bits

Int64 = npt.NDArray[np.int64]


def stratified_holdout(*strata: npt.NDArray[Any], fraction: float, seed: int) -> dict[str, Int64]:
    """Hold out a fraction of the samples for the test, in proportion within nested strata.

    Systematic sampling: the samples are sorted by strata, outermost first, in keyed random order at every
    level, and position i is held out where ⌊fraction · i + ½⌋ steps up. A stratum of n samples at any level
    is one run of positions, so ⌊fraction · n⌋ or ⌈fraction · n⌉ of it are held out. Largest-remainder
    rounding would hold the innermost level only: 200 writers with 60 classes of 4 samples would drift apart.

    Args:
        strata: arrays (N,), outermost first, e.g. client, class.
        fraction: of the samples to hold out; 0 < fraction < 1.
        seed: of the split, not of the run: runs of different seeds share one test set.

    Returns:
        {"train": (N − M,), "test": (M,)} int64 positions, ascending; M = ⌊fraction · N + ½⌋, less one for each
        outermost stratum that would have lost its last training sample.

    Raises:
        ValueError: the fraction is out of range.

    """
    check_fraction("test_fraction", fraction)
    num_samples = len(strata[0])
    codes = [np.unique(key, return_inverse=True)[1] for key in strata]  # each (N,)
    levels = [keyed_bits(seed, "test split", *codes[: i + 1]) for i in range(len(codes))]  # each (N,)
    levels.append(keyed_bits(seed, "test split", *codes, np.arange(num_samples)))
    order = np.lexsort(levels[::-1])  # (N,)
    steps = np.floor(fraction * np.arange(num_samples + 1) + 0.5)  # (N+1,)
    test = np.zeros(num_samples, dtype=bool)  # (N,)
    test[order] = np.diff(steps) > 0

    kept = np.bincount(codes[0], weights=~test) > 0  # (S,)
    _, first = np.unique(codes[0][order], return_index=True)  # (S,)
    test[order[first[~kept]]] = False
    return {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be a fraction with 0 < {name} < 1, got {value}")
