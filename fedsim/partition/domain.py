"""Domain skew: every client's samples come from one domain (a camera, a style, a digit data set).

Li et al., "FedBN", ICLR 2021 (one client a domain); several clients a domain share its samples by `base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition, Partitioner
from fedsim.errors import UserError
from fedsim.partition.csr import check_labels

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Partition each domain by `base`; the clients of a domain stand side by side, domains in ascending order.

    Samples without a domain (−1) belong to nobody.

    Args:
        base: partitioner of one domain; `IID(num_clients=1)` is one client a domain.

    """

    base: Partitioner
    natural_from: ClassVar[str] = "domain"

    @property
    def num_clients(self) -> None:
        """None: the number of domains times that of `base`."""
        return

    def __call__(self, labels: Int, rng: np.random.Generator, natural: Int | None = None) -> Partition:
        """Return a partition of the samples that have a domain.

        Args:
            labels: (N,) classes.
            rng: drawn from once per domain, in order.
            natural: (N,) domain of each sample.

        Raises:
            UserError: the data has no domains, or a domain can't be partitioned by `base`.

        """
        labels = check_labels(labels)
        if natural is None or (natural < 0).all():
            raise UserError(
                "partition=domain needs data with domains, and this data has none; choose another partition"
            )
        indices: list[Int] = []
        sizes: list[Int] = []
        for domain in np.unique(natural[natural >= 0]):
            members = np.flatnonzero(natural == domain)  # (n_d,)
            try:
                part = self.base(labels[members], rng, members)
            except ValueError as error:
                raise UserError(f"domain {domain}: {error}") from error
            indices.append(members[part.indices])
            sizes.append(part.sizes)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)  # (K+1,)
        return Partition(np.concatenate(indices), offsets)
