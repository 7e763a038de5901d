"""A partition from a file: one that a run wrote, or one's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition
from fedsim.data.splits import load_partition
from fedsim.errors import UserError
from fedsim.partition.csr import check_labels

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Read a partition from an `.npz` file with `indices` (M,) and `offsets` (K+1,).

    Indices count the training samples, as every partitioner's do, and none is given twice; samples that the file
    doesn't name belong to nobody. A run folder's `partition.npz` is such a file; its local splits are drawn anew.

    Args:
        path: of the file.

    Raises:
        UserError: there is no such file, it isn't a partition, or it is one of other data.

    """

    path: str

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise UserError(f"path must be that of a partition's .npz file, got {str(self.path)!r}, which is no file")

    @cached_property
    def _partition(self) -> Partition:
        return load_partition(self.path)[0]

    @property
    def num_clients(self) -> int:
        """As the file says."""
        return self._partition.num_clients

    def __call__(self, labels: Int, rng: np.random.Generator, natural: Int | None = None) -> Partition:
        """Return the partition, after checking that it fits labels (N,)."""
        num_samples = len(check_labels(labels))
        largest = int(self._partition.indices.max(initial=-1))
        if largest >= num_samples:
            raise UserError(
                f"partition.path={self.path} names sample {largest}, but the data has {num_samples} training samples; "
                "it was made from other data or another data.validation"
            )
        return self._partition
