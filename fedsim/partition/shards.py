"""Shards: sort by label, cut, deal a few pieces to each client.

McMahan et al., AISTATS 2017, §3 ("pathological non-iid"). https://arxiv.org/abs/1602.05629
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition
from fedsim.partition.csr import check_integer, check_labels, from_owners, sort_keys

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Give each client S of the S·K shards of the label-sorted samples.

    A shard may straddle two classes, so a client has at most 2S. Shard sizes differ by at most one.

    Args:
        num_clients: K ≥ 1.
        shards_per_client: S ≥ 1; the paper has 2.

    Raises:
        ValueError: when called with fewer samples than shards.

    """

    num_clients: int
    shards_per_client: int = 2

    def __post_init__(self) -> None:
        check_integer("num_clients", self.num_clients, 1)
        check_integer("shards_per_client", self.shards_per_client, 1)

    def __call__(self, labels: Int, rng: np.random.Generator, natural: Int | None = None) -> Partition:
        """Return a partition of range(N) by labels (N,)."""
        labels = check_labels(labels)
        num_shards = self.num_clients * self.shards_per_client
        if num_shards > len(labels):
            raise ValueError(
                f"num_clients={self.num_clients} x shards_per_client={self.shards_per_client} need {num_shards} "
                f"samples, but there are {len(labels)}; lower one of the two"
            )
        shuffled = rng.permutation(len(labels))  # (N,)
        by_class = shuffled[sort_keys(labels[shuffled], int(labels.max()) + 1)]  # (N,)
        owner_of_shard = rng.permutation(num_shards) // self.shards_per_client  # (S·K,)
        owners = np.empty(len(labels), dtype=np.int64)  # (N,)
        owners[by_class] = owner_of_shard[np.arange(len(labels)) * num_shards // len(labels)]
        return from_owners(owners, self.num_clients)
