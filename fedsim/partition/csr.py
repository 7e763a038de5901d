"""What partitioners share: checks of the request, and owners or counts turned into a `Partition`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition

Int = npt.NDArray[np.int64]

BLOCK_SAMPLES = 1 << 20  # whose working arrays are held at once, where a million clients' would be gigabytes


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is an integer ≥ `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_positive(name: str, value: Any, hint: str = "") -> None:
    """Raise ValueError unless `value` is a finite number > 0; `hint` is the cure."""
    if not (_is_number(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}{hint and f'; {hint}'}")


def check_fraction(name: str, value: Any, most: float = 1.0) -> None:
    """Raise ValueError unless `value` is a number in [0, most]."""
    if not (_is_number(value) and 0 <= value <= most):
        raise ValueError(f"{name} must be a number in [0, {most:g}], got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def check_labels(labels: Any) -> Int:
    """Return labels (N,) as int64.

    Raises:
        ValueError: they are not a vector of whole numbers ≥ 0, or there are none.

    """
    labels = np.asarray(labels)  # (N,)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"labels must be a vector of at least one class, got an array of shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integer classes, got {labels.dtype}; a partition by label needs classes")
    if labels.min() < 0:
        raise ValueError(f"labels must be >= 0, got {labels.min()}")
    classes: Int = labels.astype(np.int64, copy=False)  # (N,)
    return classes


def check_enough(num_samples: int, num_clients: int, min_size: int) -> None:
    """Raise ValueError if `num_samples` can't give `min_size` to each of `num_clients`."""
    if min_size * num_clients > num_samples:
        raise ValueError(
            f"num_clients={num_clients} with at least {min_size} samples each need {num_clients * min_size} samples, "
            f"but there are {num_samples}; lower num_clients{' or min_size' if min_size > 1 else ''}"
        )


def client_blocks(partition: Partition) -> Iterator[tuple[int, int]]:
    """Yield ranges low … high − 1 of clients with at most `BLOCK_SAMPLES` samples, or of one that has more."""
    low, offsets = 0, partition.offsets
    while low < partition.num_clients:
        high = int(np.searchsorted(offsets, offsets[low] + BLOCK_SAMPLES, side="right")) - 1
        high = min(max(high, low + 1), low + BLOCK_SAMPLES, partition.num_clients)
        yield low, high
        low = high


def sort_keys(keys: Int, num_keys: int) -> Int:
    """Return the stable argsort of integers in [0, num_keys): 16 bits are sorted by radix, ten times as fast."""
    return np.argsort(keys.astype(np.uint16) if num_keys <= 1 << 16 else keys, kind="stable")


def from_owners(owners: Int, num_clients: int) -> Partition:
    """Return the partition in which sample i belongs to owners[i], −1 for nobody; ascending within a client."""
    keys = np.where(owners < 0, num_clients, owners) if owners.min(initial=0) < 0 else owners  # (N,)
    sizes = np.bincount(keys, minlength=num_clients + 1)[:num_clients]  # (K,)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)  # (K+1,)
    return Partition(sort_keys(keys, num_clients + 1)[: offsets[-1]], offsets)


def from_counts(labels: Int, counts: Int, rng: np.random.Generator) -> Partition:
    """Deal samples at random such that client k gets counts[k, c] of class c.

    Args:
        labels: (N,) classes.
        counts: (K, C) whose column sums are the class totals.
        rng: decides which samples of a class go where.

    """
    num_clients, num_classes = counts.shape
    shuffled = rng.permutation(len(labels))  # (N,)
    by_class = shuffled[sort_keys(labels[shuffled], num_classes)]  # (N,) positions, class by class
    owners = np.empty(len(labels), dtype=np.int64)  # (N,)
    owners[by_class] = np.repeat(np.tile(np.arange(num_clients), num_classes), counts.T.ravel())
    return from_owners(owners, num_clients)
