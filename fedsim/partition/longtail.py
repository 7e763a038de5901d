r"""A long-tailed data set: class frequencies fall exponentially, then the samples left are partitioned.

.. math:: n_c = \lfloor n_{\max}\, \rho^{\,c / (C-1)} \rfloor, \qquad \rho = n_{C-1} / n_0, \quad n_{\max} = N / C

Cao et al., "LDAM", NeurIPS 2019 (`imbalance_cifar.py`); used for federated learning by Xiao et al., "FedLoGe",
ICLR 2024. The test set stays balanced, since only training samples pass through here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition
from fedsim.partition.around import Around
from fedsim.partition.csr import check_labels

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LongTail(Around):
    """Drop samples so that class sizes form a long tail, then partition by `base`.

    Departs from "every sample is given once": that holds of the kept samples, the others belong to nobody. A class
    that has fewer than n_c samples keeps all it has; every class keeps at least one.

    Args:
        base: partitioner of the kept samples.
        imbalance_factor: ρ = smallest / largest class, in (0, 1]; 0.01 is the usual strong setting. 1 levels classes.

    Raises:
        ValueError: imbalance_factor is out of range; whatever `base` raises.

    """

    imbalance_factor: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.imbalance_factor <= 1:
            raise ValueError(f"imbalance_factor must be in (0, 1], smallest / largest, got {self.imbalance_factor!r}")

    def __call__(self, labels: Int, rng: np.random.Generator, natural: Int | None = None) -> Partition:
        """Return a partition of the kept samples, at their positions in range(N), by labels (N,)."""
        labels = check_labels(labels)
        totals = np.bincount(labels)  # (C,)
        targets = self.class_sizes(len(labels) // len(totals), len(totals))  # (C,)
        shuffled = rng.permutation(len(labels))  # (N,)
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # (N,)
        rank = np.arange(len(labels)) - np.repeat(np.cumsum(totals) - totals, totals)  # (N,) within the class
        kept = np.sort(by_class[rank < np.repeat(targets, totals)])  # (M,)
        part = self.base(labels[kept], rng, None if natural is None else natural[kept])
        return Partition(kept[part.indices], part.offsets)

    def class_sizes(self, largest: int, num_classes: int) -> Int:
        """Return n_c (C,), at least 1 each, for a head class of `largest` samples.

        >>> LongTail(base=None, imbalance_factor=0.01).class_sizes(5000, 10)
        array([5000, 2997, 1796, 1077,  645,  387,  232,  139,   83,   50])

        """
        exponents = np.arange(num_classes) / max(num_classes - 1, 1)  # (C,)
        return np.maximum(np.floor(largest * self.imbalance_factor**exponents), 1).astype(np.int64)
