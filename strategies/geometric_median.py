r"""Geometric median (RFA): the point of least summed distance to the updates, by smoothed Weiszfeld steps.

Pillutla et al., IEEE TSP 2022, Algorithm 2. https://arxiv.org/abs/1912.13445
    z ← \sum_k β_k Δ_k / \sum_k β_k,   β_k = 1 / max(ν, ‖z − Δ_k‖),   from the mean
z stays a combination of the updates, so that ‖z − Δ_k‖ follows from the K×K Gram matrix and a step costs nothing
beside the two reads of the updates. The paper takes 3 steps, because there each is a secure aggregation; the share of
F updates that are very far falls by F / (K − F) a step.
Departs from the paper: clients count once whatever their samples, since an attacker may claim any number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import beside, combine, products

STILL = 1e-10  # relative change of all shares below which steps end


@dataclass(frozen=True, kw_only=True)
class GeometricMedian:
    """The smoothed geometric median.

    Args:
        num_iterations: Weiszfeld steps ≥ 1, fewer where the shares stand still.
        smoothing: ν > 0, the distance below which an update pulls no harder.

    Raises:
        ValueError: an argument out of its range.

    """

    num_iterations: int = 1000
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
        inner = products(cohort.matrix).cpu()  # (K, K): many steps of a few numbers each
        norms, share = inner.diagonal(), torch.full_like(inner[0], 1 / len(cohort))  # (K,), (K,)
        for _ in range(self.num_iterations):
            cross = inner @ share  # (K,) ⟨z, Δ_k⟩
            away = (norms - 2 * cross + share @ cross).clamp_min(0).sqrt()  # (K,)
            pull = 1 / away.clamp_min(self.smoothing)  # (K,)
            before, share = share, pull / pull.sum()
            if bool(((share - before).abs() <= STILL * before).all()):
                break
        share = share.to(beside(cohort.matrix).device)  # (K,)
        return combine(share, cohort.matrix), state, {"share": share}
