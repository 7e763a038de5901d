"""#C=k: every client holds k classes, each class is split evenly among its holders.

Li et al., "Federated Learning on Non-IID Data Silos", ICDE 2022, §4.1. https://arxiv.org/abs/2102.02079
Departs from the reference code: that needs K ≥ C, and crashes on a class which nobody holds; here client i has
the classes c ≡ i (mod K), or the one class i mod C if K ≥ C, before the rest is drawn, so K·k ≥ C is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition
from fedsim.partition.csr import check_enough, check_integer, check_labels, from_counts
from fedsim.partition.repair import repair
from fedsim.partition.rounding import largest_remainder

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Clients with exactly k classes each, sizes as they come.

    Args:
        num_clients: K ≥ 1.
        classes_per_client: k ≥ 1, at most the number of classes.
        min_size: least samples a client; 0 allows empty clients. Only where a class has fewer samples than
            holders can this give a client another class than its k.

    Raises:
        ValueError: an argument is out of range; when called, k exceeds the classes, K·k is less than the classes,
            or min_size·K exceeds the samples.

    """

    num_clients: int
    classes_per_client: int = 2
    min_size: int = 1

    def __post_init__(self) -> None:
        check_integer("num_clients", self.num_clients, 1)
        check_integer("classes_per_client", self.classes_per_client, 1)
        check_integer("min_size", self.min_size, 0)

    def __call__(self, labels: Int, rng: np.random.Generator, natural: Int | None = None) -> Partition:
        """Return a partition of range(N) by labels (N,)."""
        labels = check_labels(labels)
        check_enough(len(labels), self.num_clients, self.min_size)
        totals = np.bincount(labels)  # (C,)
        present = np.flatnonzero(totals)  # (C',)
        holders = self._holders(len(present), rng)  # (K, C')
        counts = np.zeros((self.num_clients, len(totals)), dtype=np.int64)  # (K, C)
        counts[:, present] = largest_remainder(totals[present], holders.T).T
        return from_counts(labels, repair(counts, self.min_size), rng)

    def _holders(self, num_classes: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Return who holds which class, (K, C) bool with k true in each row and at least one in each column."""
        num_clients, k = self.num_clients, self.classes_per_client
        if k > num_classes:
            raise ValueError(f"classes_per_client={k} but the data has {num_classes} classes; lower classes_per_client")
        if num_clients * k < num_classes:
            raise ValueError(
                f"num_clients={num_clients} x classes_per_client={k} leave some of the {num_classes} classes to "
                "nobody; raise one of the two"
            )
        client, label = np.arange(num_clients)[:, None], np.arange(num_classes)  # (K, 1), (C,)
        fixed = (label % num_clients == client) | (client % num_classes == label)  # (K, C), at most k in a row
        score = rng.random((num_clients, num_classes)) + fixed  # (K, C)
        holders = np.zeros((num_clients, num_classes), dtype=bool)  # (K, C)
        np.put_along_axis(holders, np.argsort(-score, axis=1)[:, :k], True, axis=1)
        return holders
