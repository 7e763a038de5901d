r"""Quantity skew: clients of unequal size, all with the pool's label distribution.

Dirichlet: sizes ∝ Dir(α 1_K) (Li et al., ICDE 2022, §4.3). Log-normal: sizes ∝ exp(σ z), z ~ N(0, 1)
(Acar et al., "FedDyn", ICLR 2021, §4, unbalanced data).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition
from fedsim.partition.csr import check_enough, check_integer, check_labels, check_positive, from_counts
from fedsim.partition.repair import repair
from fedsim.partition.rounding import largest_remainder

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Random clients of random size.

    Args:
        num_clients: K ≥ 1.
        law: "dirichlet" or "lognormal".
        spread: α in [1e-6, 1e9] of the Dirichlet (small is unequal), or σ in (0, 10] of the log-normal (large is
            unequal).
        min_size: least samples a client; 0 allows empty clients.

    Raises:
        ValueError: an argument is out of range; when called, min_size · K exceeds the number of samples.

    """

    num_clients: int
    law: Literal["dirichlet", "lognormal"] = "dirichlet"
    spread: float = 0.5
    min_size: int = 1

    def __post_init__(self) -> None:
        check_integer("num_clients", self.num_clients, 1)
        if self.law not in ("dirichlet", "lognormal"):
            raise ValueError(f"law must be dirichlet or lognormal, got {self.law!r}")
        check_positive("spread", self.spread)
        low, high = (1e-6, 1e9) if self.law == "dirichlet" else (0.0, 10.0)
        if not low <= self.spread <= high:
            raise ValueError(f"spread of law={self.law} must be in [{low:g}, {high:g}], got {self.spread!r}")
        check_integer("min_size", self.min_size, 0)

    def __call__(self, labels: Int, rng: np.random.Generator, natural: Int | None = None) -> Partition:
        """Return a partition of range(N); labels (N,) say only how many samples there are."""
        num_samples = len(check_labels(labels))
        check_enough(num_samples, self.num_clients, self.min_size)
        if self.law == "dirichlet":
            shares = rng.dirichlet(np.full(self.num_clients, self.spread))  # (K,)
        else:
            shares = np.exp(self.spread * rng.standard_normal(self.num_clients))  # (K,)
        sizes = largest_remainder([num_samples], shares[None])  # (1, K)
        one_class = np.zeros(num_samples, dtype=np.int64)  # (N,), so that labels don't matter
        return from_counts(one_class, repair(sizes.T, self.min_size), rng)
