r"""Bulyan: select by Krum one after another, then average around the median of what was selected.

El Mhamdi et al., ICML 2018. https://arxiv.org/abs/1802.07927
    S: θ = K − 2f times, Krum's choice among the updates that are left
    g_j = mean of the θ − 2f values of S nearest to their median in coordinate j
Clients count once whatever their samples: an attacker may claim any number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import square_distances
from fedsim.order import mean_around_median
from fedsim.strategies.krum import krum_order, krum_scores


@dataclass(frozen=True, kw_only=True)
class Bulyan:
    """Bulyan on Krum.

    Args:
        num_byzantine: f ≥ 0 attackers that are withstood, 4f + 3 ≤ K. Where rows were dropped and K is too
            small, the largest f that K allows is used.

    Raises:
        ValueError: `num_byzantine` below 0.

    """

    num_byzantine: int = 1

    def __post_init__(self) -> None:
        if self.num_byzantine < 0:
            raise ValueError(f"Bulyan needs num_byzantine >= 0, got {self.num_byzantine}")

    def check(self, num_participants: int) -> None:
        """Refuse a cohort too small for the guarantee.

        Raises:
            ValueError: K < 4f + 3.

        """
        if num_participants < 4 * self.num_byzantine + 3:
            raise ValueError(
                f"Bulyan needs K >= 4f + 3 clients, got K={num_participants}, f={self.num_byzantine}; "
                "sample more clients or lower num_byzantine"
            )

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the step (D,); who was selected is a metric."""
        count = len(cohort)
        f = min(self.num_byzantine, max(0, (count - 3) // 4))
        left = torch.arange(count)
        distances = square_distances(cohort.matrix).cpu()  # (K, K): θ selections of a few numbers each
        for _ in range(count - 2 * f):
            among = distances[left][:, left]  # (k, k)
            best = int(krum_order(among, krum_scores(among, f))[0])
            left = torch.cat([left[:best], left[best + 1 :]])
        selected = torch.ones(count, dtype=torch.bool)
        selected[left] = False
        delta = mean_around_median(cohort.matrix, count - 4 * f, selected)  # (D,)
        selected = selected.to(delta.device)  # (K,)
        return delta, state, {"selected": selected}
