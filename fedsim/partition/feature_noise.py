r"""Feature skew: the same labels everywhere, but client i sees Gaussian noise that grows with i.

.. math:: x \leftarrow x + \mathcal N(0, s_i^2), \qquad s_i = \sigma\, i / (K - 1), \quad i = 0 … K-1

Li et al., ICDE 2022, §4.2, whose `experiments.py` takes σ i / (K − 1) as the standard deviation, as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from fedsim.contracts import Dataset, Partition
from fedsim.errors import UserError
from fedsim.partition.around import Around
from fedsim.partition.csr import check_fraction
from fedsim.rng import generator

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FeatureNoise(Around):
    """Partition by `base`, then add noise to all of a client's samples, its local test data too.

    Args:
        base: partitioner.
        sigma: standard deviation at the last client, in units of the features as the model sees them; 0 is none.

    Raises:
        ValueError: sigma is out of [0, 1e6].

    """

    sigma: float = 0.1
    corrupts: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    def __post_init__(self) -> None:
        check_fraction("sigma", self.sigma, 1e6)

    def corrupt(self, dataset: Dataset, partition: Partition, rng: np.random.Generator) -> Dataset:
        """Return the data set with noisy x; what is in no client's part is unchanged.

        Args:
            dataset: with floating-point x (N, …).
            partition: K clients, positions into the data set.
            rng: drawn from once, for a seed; client i's noise is a function of that seed, i and its samples' order.

        Raises:
            UserError: x isn't floating-point, e.g. tokens.

        """
        if not dataset.x.is_floating_point():
            raise UserError(f"partition=feature_noise needs floating-point features, this data has {dataset.x.dtype}")
        seed = int(rng.integers(2**63))
        x = dataset.x.clone()  # (N, …)
        for client, std in enumerate(np.linspace(0.0, self.sigma, partition.num_clients)):
            rows = torch.from_numpy(partition.of(client)).to(x.device)  # (n_k,)
            if std == 0 or len(rows) == 0:
                continue
            shape = (len(rows), *x.shape[1:])
            noise = generator(seed, "feature_noise", client).standard_normal(shape, dtype=np.float32)  # (n_k, …)
            x[rows] += torch.from_numpy(noise).to(x) * std
        return dataset._replace(x=x)
