r"""Divide and conquer: drop the clients that stick out along the first principal direction of random coordinates.

Shejwalkar & Houmansadr, NDSS 2021, Algorithm 2. https://doi.org/10.14722/ndss.2021.24498
    repeat: S: b random coordinates;  v: first right singular vector of the centred Δ_{k,S}
            s_k = ⟨Δ_{k,S} − mean, v⟩²;  G_i: the K − c f clients of least s_k
    output the mean over the clients in every G_i
s_k is read off the first eigenvector of the centred K×K Gram matrix. Where no client is in every G_i, which the
paper does not speak of, those in the most are taken. Clients count once whatever their samples. Beside one update that
is 10^16 times as long the scores of all others are equal but for rounding: put `clip` or `arc` before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import beside, combine, products, proportions


@dataclass(frozen=True, kw_only=True)
class DnC:
    """Divide and conquer.

    Args:
        num_byzantine: f ≥ 0 attackers.
        num_iterations: draws of coordinates ≥ 1.
        subsample: b ≥ 1 coordinates a draw; all where there are fewer.
        filter: c > 0; each draw drops ⌈c f⌉ clients.

    Raises:
        ValueError: an argument out of its range.

    """

    num_byzantine: int = 1
    num_iterations: int = 1
    subsample: int = 10000
    filter: float = 1.0

    def __post_init__(self) -> None:
        if self.num_byzantine < 0:
            raise ValueError(f"DnC needs num_byzantine >= 0, got {self.num_byzantine}; 0 is the mean")
        for name in ("num_iterations", "subsample"):
            if getattr(self, name) < 1:
                raise ValueError(f"DnC needs {name} >= 1, got {getattr(self, name)}")
        if not self.filter > 0:
            raise ValueError(f"DnC needs filter > 0, got {self.filter}; 1.0 drops as many as there are attackers")

    @property
    def num_dropped(self) -> int:
        """Clients that a draw drops, ⌈c f⌉."""
        return math.ceil(self.filter * self.num_byzantine)

    def check(self, num_participants: int) -> None:
        """Refuse a cohort of which nothing would be left.

        Raises:
            ValueError: K ≤ ⌈c f⌉ or K ≤ 2f.

        """
        if num_participants <= max(self.num_dropped, 2 * self.num_byzantine):
            raise ValueError(
                f"DnC needs K > max(2f, filter * f) clients, got K={num_participants}, f={self.num_byzantine}; "
                "sample more clients or lower num_byzantine"
            )

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the mean (D,) of those kept; who they are is a metric."""
        updates, count = cohort.rows, len(cohort)
        rng = cohort.rng("dnc")
        times_kept = torch.zeros(count, dtype=torch.int64, device=beside(updates).device)
        for _ in range(self.num_iterations):
            drawn = updates
            if self.subsample < updates.shape[1]:
                columns = rng.choice(updates.shape[1], self.subsample, replace=False, shuffle=False)
                drawn = updates[:, torch.from_numpy(columns).to(updates.device)]  # (K, b)
            scores = outlier_scores(drawn)  # (K,)
            times_kept[scores.argsort(stable=True)[: max(1, count - self.num_dropped)]] += 1
        selected = times_kept == times_kept.max()  # (K,)
        return combine(proportions(selected), updates), state, {"selected": selected}


def outlier_scores(updates: Tensor) -> Tensor:
    """Return ⟨x_k − mean, v⟩² (K,) of rows (K, D), v their first principal direction."""
    inner = products(updates)  # (K, K)
    inner = inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()  # of the centred rows
    values, vectors = torch.linalg.eigh(inner)
    scores: Tensor = values[-1].clamp_min(0) * vectors[:, -1].square()  # (K,)
    return scores
