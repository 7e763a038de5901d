r"""Label noise that differs by client: some clients annotate badly, each at its own rate.

.. math:: r_k \sim U(\text{min\_rate}, \text{max\_rate}) \text{ with probability } \rho, \text{ else } 0

Xu et al., "FedCorr", CVPR 2022, §5.1 (there max_rate = 1).
Departs from the paper: exactly round(r_k n_k) samples are relabelled, and never to the class they had, so that r_k is
the share of wrong labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from fedsim.contracts import Dataset, Partition
from fedsim.errors import UserError
from fedsim.partition.around import Around
from fedsim.partition.csr import check_fraction
from fedsim.rng import keyed_bits, keyed_uniform, segment_permutations

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LabelNoise(Around):
    """Partition by `base`, then give wrong labels to clients' training and validation samples; test labels stay true.

    Args:
        base: partitioner; it sees the true labels.
        noisy_client_fraction: ρ in [0, 1], the probability that a client is noisy.
        min_rate: least share of wrong labels of a noisy client, in [0, 1].
        max_rate: most, in [min_rate, 1].
        kind: "symmetric": uniform over the other classes. "pair": class c becomes c + 1 mod C (Han et al., 2018).

    Raises:
        ValueError: an argument is out of range.

    """

    noisy_client_fraction: float = 1.0
    min_rate: float = 0.2
    max_rate: float = 0.2
    kind: Literal["symmetric", "pair"] = "symmetric"
    corrupts: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __post_init__(self) -> None:
        check_fraction("noisy_client_fraction", self.noisy_client_fraction)
        check_fraction("max_rate", self.max_rate)
        check_fraction("min_rate", self.min_rate)
        if self.min_rate > self.max_rate:
            raise ValueError(f"min_rate must be <= max_rate={self.max_rate!r}, got {self.min_rate!r}")
        if self.kind not in ("symmetric", "pair"):
            raise ValueError(f"kind must be symmetric or pair, got {self.kind!r}")

    def corrupt(self, dataset: Dataset, partition: Partition, rng: np.random.Generator) -> Dataset:
        """Return the data set with wrong labels in `partition`; what is in no client's part is unchanged.

        Args:
            dataset: with y (N,).
            partition: K clients, positions into the data set; without their test parts.
            rng: drawn from once, for a seed; everything else is keyed by it and the client.

        Raises:
            UserError: there is only one class to choose from.

        """
        if dataset.num_classes < 2:
            raise UserError("partition=label_noise needs at least 2 classes")
        seed = int(rng.integers(2**63))
        clients, sizes = np.arange(partition.num_clients), partition.sizes  # (K,), (K,)
        rates = self.min_rate + (self.max_rate - self.min_rate) * keyed_uniform(seed, "rate", clients)  # (K,)
        rates *= keyed_uniform(seed, "noisy_client", clients) < self.noisy_client_fraction
        num_wrong = np.floor(rates * sizes + 0.5).astype(np.int64)  # (K,)
        shuffled = segment_permutations(keyed_bits(seed, "wrong_samples", clients), sizes)  # (M,)
        rank = np.arange(len(shuffled)) - np.repeat(partition.offsets[:-1], sizes)  # (M,) within the client
        wrong = partition.indices[shuffled[rank < np.repeat(num_wrong, sizes)]]  # (W,)
        if self.kind == "pair":
            shift = np.ones(len(wrong), dtype=np.int64)  # (W,)
        else:
            shift = 1 + np.floor(keyed_uniform(seed, "wrong_class", wrong) * (dataset.num_classes - 1)).astype(np.int64)
        y = dataset.y.clone()  # (N,)
        rows = torch.from_numpy(wrong).to(y.device)
        y[rows] = (y[rows] + torch.from_numpy(shift).to(y.device)) % dataset.num_classes
        return dataset._replace(y=y)
