"""What partitioners around another one share: they stand in its place, and change samples before or after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition, Partitioner

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Around:
    """A partitioner that draws as another one does.

    Args:
        base: the other one.

    """

    base: Partitioner

    @property
    def num_clients(self) -> int | None:
        """As `base` says."""
        return self.base.num_clients

    @property
    def natural_from(self) -> str:
        """As `base` says."""
        return getattr(self.base, "natural_from", "client")

    def __call__(self, labels: Int, rng: np.random.Generator, natural: Int | None = None) -> Partition:
        """Return `base`'s partition of range(N) by labels (N,)."""
        return self.base(labels, rng, natural)
