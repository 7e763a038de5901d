"""Shares to whole numbers: the rounding that loses and invents no sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]


def largest_remainder(totals: Any, weights: Any) -> Int:
    r"""Split whole totals in proportion to weights, by the method of largest remainders (Hamilton).

    .. math:: q_{rm} = t_r w_{rm} / \sum_j w_{rj}, \qquad n_{rm} \in \{\lfloor q_{rm} \rfloor, \lceil q_{rm} \rceil\}

    The floors are given first, then one more to the columns with the largest fractions; of equal fractions the
    lower column wins. Unlike `int(cumsum(share) * total)`, no column is favoured by its place.

    Args:
        totals: (R,) integers ≥ 0, what each row shares out; a row of zero weights needs a total of 0.
        weights: (R, M) finite numbers ≥ 0, in any scale.

    Returns:
        (R, M) int64 whose row r sums to totals[r] exactly; a zero weight gets zero.

    Raises:
        ValueError: a weight is negative or not finite, or a row with a positive total has no weight.

    >>> largest_remainder([10], [[1, 1, 1]])
    array([[4, 3, 3]])

    """
    totals = np.asarray(totals, dtype=np.int64)  # (R,)
    weights = np.asarray(weights, dtype=np.float64)  # (R, M)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights must be finite and >= 0 to be shared by, got a negative, NaN or infinite one")
    sums = weights.sum(axis=1)  # (R,)
    if ((sums == 0) & (totals > 0)).any():
        raise ValueError("weights of a row are all 0 although its total is positive; give at least one weight > 0")
    quotas = totals[:, None] * weights / np.where(sums == 0, 1.0, sums)[:, None]  # (R, M)
    counts: Int = np.floor(quotas).astype(np.int64)  # (R, M)
    missing = totals - counts.sum(axis=1)  # (R,)
    if not missing.any():
        return counts
    # Rounded, so that ⅓ and 1⅓ tie as they do in exact arithmetic, whatever their last bits.
    fractions = np.round(quotas - counts, 9)  # (R, M)
    order = np.argsort(-fractions, axis=1, kind="stable")  # (R, M)
    extra = np.arange(weights.shape[1]) < missing[:, None]  # (R, M), in order of fraction
    np.put_along_axis(counts, order, np.take_along_axis(counts, order, axis=1) + extra, axis=1)
    return counts
