r"""Geometric median (RFA): the point of least summed distance to the updates, by smoothed Weiszfeld steps.

Pillutla et al., IEEE TSP 2022, Algorithm 2. https://arxiv.org/abs/1912.13445
    z ← \sum_k β_k Δ_k / \sum_k β_k,   β_k = 1 / max(ν, ‖z − Δ_k‖),   from the mean
z stays a combination of the updates, so that ‖z − Δ_k‖ follows from the K×K distances and a step costs nothing
beside the two reads of the updates. The paper takes 3 steps, because there each is a secure aggregation.
Departs from the paper: clients count once whatever their samples, since an attacker may claim any number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import combine, square_distances


@dataclass(frozen=True, kw_only=True)
class GeometricMedian:
    """The smoothed geometric median.

    Args:
        num_iterations: Weiszfeld steps ≥ 1.
        smoothing: ν > 0, the distance below which an update pulls no harder.

    Raises:
        ValueError: an argument out of its range.

    """

    num_iterations: int = 100
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"GeometricMedian needs num_iterations >= 1, got {self.num_iterations}; 3 is as published")
        if not self.smoothing > 0:
            raise ValueError(f"GeometricMedian needs smoothing > 0, got {self.smoothing}; 1e-6 is as published")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the geometric median (D,); the clients' shares in it are a metric."""
        distances = square_distances(cohort.matrix)  # (K, K)
        share = torch.full_like(distances[0], 1 / len(cohort))  # (K,)
        for _ in range(self.num_iterations):
            cross = distances @ share  # (K,)
            # ‖Σ_j a_j Δ_j − Δ_k‖² = Σ_j a_j d_jk − ½ Σ_ij a_i a_j d_ij, where Σ a = 1
            away = (cross - share @ cross / 2).clamp_min(0).sqrt()  # (K,)
            pull = 1 / away.clamp_min(self.smoothing)  # (K,)
            share = pull / pull.sum()
        return combine(share, cohort.matrix), state, {"share": share}
