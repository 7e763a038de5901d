"""Uniformly random clients of equal size: the homogeneous baseline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition
from fedsim.partition.csr import check_enough, check_integer, check_labels, from_owners


@dataclass(frozen=True, kw_only=True)
class IID:
    """Shuffle the samples and deal them out; sizes differ by at most one.

    Args:
        num_clients: K ≥ 1.

    Raises:
        ValueError: when called with fewer samples than clients.

    >>> IID(num_clients=3)(np.zeros(8, dtype=np.int64), np.random.default_rng(0)).sizes
    array([3, 3, 2])

    """

    num_clients: int

    def __post_init__(self) -> None:
        check_integer("num_clients", self.num_clients, 1)

    def __call__(
        self,
        labels: npt.NDArray[np.int64],
        rng: np.random.Generator,
        natural: npt.NDArray[np.int64] | None = None,
    ) -> Partition:
        """Return the partition; labels (N,) say only how many samples there are."""
        num_samples = len(check_labels(labels))
        check_enough(num_samples, self.num_clients, 1)
        owners = rng.permutation(num_samples)  # (N,)
        owners %= self.num_clients
        return from_owners(owners, self.num_clients)
