r"""NNM, nearest-neighbour mixing before any rule: each update becomes the mean of those nearest to it.

Allouah et al., AISTATS 2023, Algorithm 2. https://arxiv.org/abs/2302.01772
    Δ_k ← 1/(K − f) \sum_{j ∈ N_k} Δ_j,   N_k the K − f nearest to k, itself among them
It takes the differences between honest clients out, which is what attackers hide in where data is heterogeneous. The
neighbours follow from the K×K Gram matrix, the means are one matrix product. Of equally near clients the lower counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fedsim.contracts import Cohort, Metrics
from fedsim.linalg import mapped, square_distances
from fedsim.strategies.preaggregation import PreAggregator


@dataclass(frozen=True, kw_only=True)
class NNM(PreAggregator):
    """A rule on neighbourhood means.

    Args:
        rule: the inner rule.
        num_byzantine: f ≥ 0 attackers, 2f < K. Where rows were dropped and K is too small, the largest f that K
            allows is used.

    Raises:
        ValueError: `num_byzantine` below 0.

    """

    num_byzantine: int = 1

    def __post_init__(self) -> None:
        if self.num_byzantine < 0:
            raise ValueError(f"NNM needs num_byzantine >= 0, got {self.num_byzantine}; 0 makes every update the mean")

    def check(self, num_participants: int) -> None:
        """Refuse a cohort in which attackers could be the majority, or that the inner rule refuses.

        Raises:
            ValueError: K ≤ 2f.

        """
        if num_participants <= 2 * self.num_byzantine:
            raise ValueError(
                f"NNM needs K > 2f clients, got K={num_participants}, f={self.num_byzantine}; "
                "sample more clients or lower num_byzantine"
            )
        inner: Any = self.rule
        if hasattr(inner, "check"):
            inner.check(num_participants)

    def mix(self, cohort: Cohort) -> tuple[Cohort, Metrics]:
        """Return the cohort of neighbourhood means; nothing is measured."""
        kept = len(cohort) - min(self.num_byzantine, (len(cohort) - 1) // 2)
        distances = square_distances(cohort.matrix)  # (K, K)
        nearest = distances.argsort(dim=1, stable=True)[:, :kept]  # (K, K − f)
        matrix = torch.zeros_like(distances).scatter(1, nearest, 1 / kept)  # (K, K)
        return replace(cohort, updates=mapped(matrix, cohort.matrix)), {}
