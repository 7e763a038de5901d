"""Train/test splits of data that comes without one: keyed, stratified, and never a function of the run's seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.rng import keyed_bits

Int64 = npt.NDArray[np.int64]


def stratified_holdout(
    strata: npt.NDArray[Any], fraction: float, seed: int, purpose: str = "test split"
) -> dict[str, Int64]:
    """Hold out a fraction of every stratum for the test.

    Sample i's rank within its stratum is a hash of (seed, purpose, i); the lowest ranks are the test. Counts
    are rounded by largest remainder, so that ⌊fraction · N + ½⌋ samples are held out in all and no stratum is
    off by one or more from its share. A stratum never loses its last training sample.

    Args:
        strata: (N,) integers, e.g. the class, or the pair of client and class as one number.
        fraction: of the samples to hold out; 0 < fraction < 1.
        seed: of the split, not of the run: results of runs with different seeds share one test set.
        purpose: keeps the draws of two splits of one data set apart.

    Returns:
        {"train": (N − M,), "test": (M,)} int64 positions, ascending.

    Raises:
        ValueError: the fraction is out of range.

    """
    check_fraction("test_fraction", fraction)
    _, codes, sizes = np.unique(strata, return_inverse=True, return_counts=True)  # (N,), (S,)
    quota = fraction * sizes  # (S,)
    counts = np.floor(quota).astype(np.int64)  # (S,)
    missing = int(np.floor(fraction * len(codes) + 0.5)) - int(counts.sum())
    remainder = np.where(sizes > counts + 1, quota - counts, -1.0)  # (S,)
    order = np.argsort(-remainder, kind="stable")[: max(missing, 0)]  # (≤ S,)
    counts[order[remainder[order] > 0]] += 1

    bits = keyed_bits(seed, purpose, np.arange(len(codes)))  # (N,)
    by_rank = np.lexsort((bits, codes))  # (N,)
    starts = np.cumsum(sizes) - sizes  # (S,)
    rank = np.empty(len(codes), dtype=np.int64)  # (N,)
    rank[by_rank] = np.arange(len(codes)) - np.repeat(starts, sizes)
    test = rank < counts[codes]  # (N,)
    return {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be a fraction with 0 < {name} < 1, got {value}")
