"""Natural clients: the writer, speaker, hospital or user that each sample comes from.

Caldas et al., "LEAF", 2018. https://arxiv.org/abs/1812.01097
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition
from fedsim.errors import UserError
from fedsim.partition.csr import check_integer, check_labels, from_owners

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Natural:
    """One client for each natural client, in ascending order of its id in the data.

    Samples without a client (−1) belong to nobody. With the default arguments every other sample is given once.

    Args:
        num_clients: keep at most this many natural clients, drawn at random; None keeps all.
        min_size: keep only natural clients with at least this many samples, ≥ 1.
        rest: what becomes of natural clients that are not kept. "drop": their samples are given to nobody. "merge":
            each joins, whole and largest first, the kept client that is then smallest.

    Raises:
        ValueError: an argument is out of range.
        UserError: when called on data without natural clients, or where none has min_size samples, or with fewer
            natural clients than num_clients.

    """

    num_clients: int | None = None
    min_size: int = 1
    rest: Literal["drop", "merge"] = "drop"

    def __post_init__(self) -> None:
        if self.num_clients is not None:
            check_integer("num_clients", self.num_clients, 1)
        check_integer("min_size", self.min_size, 1)
        if self.rest not in ("drop", "merge"):
            raise ValueError(f"rest must be drop or merge, got {self.rest!r}")

    def __call__(self, labels: Int, rng: np.random.Generator, natural: Int | None = None) -> Partition:
        """Return a partition of range(N), or of the samples of the kept clients, by natural (N,)."""
        if natural is None or (natural < 0).all():
            raise UserError(
                "partition=natural needs data with natural clients, and this data has none; "
                "choose such data (e.g. data.client=COLUMN of a CSV) or another partition"
            )
        num_samples = len(check_labels(labels))
        if len(natural) != num_samples:
            raise ValueError(f"natural must have one entry a label, got {len(natural)} for {num_samples}")
        ids, of_sample = np.unique(natural, return_inverse=True)  # (I,), (N,)
        sizes = np.bincount(of_sample)  # (I,)
        kept = self._kept(ids, sizes, rng)  # (I,) bool
        owner = np.where(kept, np.cumsum(kept) - 1, -1)  # (I,) client of each natural client
        if self.rest == "merge":
            owner = _merge(owner, sizes, ids)
        return from_owners(owner[of_sample], int(kept.sum()))

    def _kept(self, ids: Int, sizes: Int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        real = ids >= 0  # (I,)
        candidates = np.flatnonzero(real & (sizes >= self.min_size))
        if len(candidates) == 0:
            raise UserError(
                f"no natural client has min_size={self.min_size} samples, the largest has {sizes[real].max()}"
            )
        if self.num_clients is not None:
            if self.num_clients > len(candidates):
                raise UserError(
                    f"num_clients={self.num_clients} but the data has {len(candidates)} natural clients "
                    f"with at least {self.min_size} samples; lower num_clients or leave it null"
                )
            candidates = rng.permutation(candidates)[: self.num_clients]
        kept = np.zeros(len(ids), dtype=bool)  # (I,)
        kept[candidates] = True
        return kept


def _merge(owner: Int, sizes: Int, ids: Int) -> Int:
    """Give natural clients with owner −1 to clients, largest first, each to the smallest (Graham, 1969)."""
    owner = owner.copy()  # (I,)
    heap = [(int(sizes[i]), int(owner[i])) for i in np.flatnonzero(owner >= 0)]
    heapq.heapify(heap)
    rest = np.flatnonzero((owner < 0) & (ids >= 0))
    for i in rest[np.argsort(-sizes[rest], kind="stable")]:
        size, client = heap[0]
        owner[i] = client
        heapq.heapreplace(heap, (size + int(sizes[i]), client))
    return owner
