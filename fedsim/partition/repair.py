"""A least number of samples for every client, by moving as few samples as it takes.

The reference codes draw again until every client has ten samples; at alpha = 0.05 and 100 clients that almost
never ends (Li et al., ICDE 2022, `utils.py`). Here the draw is kept and mended once, in bounded time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsim.partition.rounding import largest_remainder

Int = npt.NDArray[np.int64]


def repair(counts: Int, min_size: int) -> Int:
    """Raise every client to `min_size` samples; exactly the missing samples move, from the largest clients.

    A client that has samples is filled up in its own proportions, each class from the clients that can spare
    most of it, so that its label skew stays. What is then still missing (an empty client has no proportions,
    a class may have no donor) comes from the largest clients, each giving in its own proportions.

    Args:
        counts: (K, C) samples of each client and class.
        min_size: least samples a client, ≥ 0, with min_size · K ≤ N.

    Returns:
        (K, C) int64 with the same class totals and no row sum below `min_size`. No donor falls below it.

    """
    counts = counts.astype(np.int64)  # (K, C), a copy
    sizes = counts.sum(axis=1)  # (K,)
    need = np.maximum(min_size - sizes, 0)  # (K,)
    if not need.any():
        return counts
    wanted = largest_remainder(np.where(sizes > 0, need, 0), counts)  # (K, C)
    for c in np.flatnonzero(wanted.sum(axis=0)):
        spare = np.minimum(counts[:, c], np.maximum(sizes - min_size, 0))  # (K,)
        gifts = _from_largest(spare, int(wanted[:, c].sum()))  # (K,)
        taken = np.diff(np.minimum(np.cumsum(wanted[:, c]), gifts.sum()), prepend=0)  # (K,), first come first served
        counts[:, c] += taken - gifts
        sizes += taken - gifts
    need = np.maximum(min_size - sizes, 0)  # (K,)
    gifts = _from_largest(np.maximum(sizes - min_size, 0), int(need.sum()))  # (K,)
    given = largest_remainder(gifts, counts)  # (K, C)
    receivers = np.repeat(np.arange(len(counts)), need)  # (moved,)
    classes = np.repeat(np.arange(counts.shape[1]), given.sum(axis=0))  # (moved,)
    counts -= given
    np.add.at(counts, (receivers, classes), 1)
    return counts


def _from_largest(spare: Int, amount: int) -> Int:
    """Take `amount` from the largest of `spare` (K,), levelling them: nobody gives while another holds 2 more."""
    if amount >= spare.sum():
        return spare
    low, high = 0, int(spare.max())  # the least level whose excess is at most `amount` lies in [low, high]
    while low < high:
        level = (low + high) // 2
        if np.maximum(spare - level, 0).sum() <= amount:
            high = level
        else:
            low = level + 1
    gifts = np.maximum(spare - high, 0)  # (K,)
    rest = amount - int(gifts.sum())
    gifts[np.flatnonzero(spare >= high)[:rest]] += 1
    return gifts
