r"""Krum and Multi-Krum: keep the updates that lie closest to their neighbours.

Blanchard et al., NeurIPS 2017, eq. 4. https://arxiv.org/abs/1703.02757
    s_k = \sum_{j ∈ N_k} ‖Δ_k − Δ_j‖²,   N_k the K − f − 2 nearest to k
Krum outputs the update of least score, Multi-Krum the mean of the m best. Acts on updates instead of gradients.
Clients count once whatever their samples: an attacker may claim any number.
Departs from the paper in ties, which two clients with only each other for a neighbour always have: of equal scores
the one nearest to all others wins, and only then the lower client.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import beside, combine, proportions, square_distances
from fedsim.mapped import Mapped


def krum_scores(distances: Tensor, num_byzantine: int) -> Tensor:
    """Return s (K,) of square distances (K, K).

    At least one neighbour counts, so that the rule stays defined on what dropped rows leave.
    """
    num_neighbours = max(1, len(distances) - num_byzantine - 2)
    return distances.sort(1).values[:, 1 : 1 + num_neighbours].sum(1)  # the 0 is the distance to itself


def krum_order(distances: Tensor, scores: Tensor) -> Tensor:
    """Return the clients (K,) from the best score to the worst, ties by their distance to all others."""
    order = distances.sum(1).argsort(stable=True)  # (K,)
    return order[scores[order].argsort(stable=True)]


@dataclass(frozen=True, kw_only=True)
class Krum:
    """The one update closest to its neighbours.

    Args:
        num_byzantine: f ≥ 0 attackers that are withstood, 2f + 2 < K. Where fewer updates arrive, K − f − 2
            neighbours count and at least one.

    Raises:
        ValueError: `num_byzantine` below 0.

    """

    num_byzantine: int = 1

    def __post_init__(self) -> None:
        if self.num_byzantine < 0:
            raise ValueError(f"Krum needs num_byzantine >= 0, got {self.num_byzantine}")

    def check(self, num_participants: int) -> None:
        """Refuse a cohort too small for the guarantee.

        Raises:
            ValueError: K ≤ 2f + 2.

        """
        _check("Krum", num_participants, self.num_byzantine)

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the update (D,) of least score; the scores and the choice are metrics."""
        distances = square_distances(cohort.matrix)  # (K, K)
        scores = krum_scores(distances, self.num_byzantine)  # (K,)
        best = krum_order(distances, scores)[0]
        selected = torch.zeros_like(scores, dtype=torch.bool)
        selected[best] = True
        rows = cohort.matrix
        delta = combine(selected, rows) if isinstance(rows, Mapped) else rows[best].to(beside(rows), copy=True)  # (D,)
        return delta, state, {"krum_score": scores, "selected": selected}


@dataclass(frozen=True, kw_only=True)
class MultiKrum:
    """The mean of the m updates closest to their neighbours.

    Args:
        num_byzantine: f ≥ 0 attackers that are withstood, 2f + 2 < K; as Krum's where fewer updates arrive.
        num_selected: m ≥ 1, at most all that arrive; None is K − f, and at least one.

    Raises:
        ValueError: an argument out of its range.

    """

    num_byzantine: int = 1
    num_selected: int | None = None

    def __post_init__(self) -> None:
        if self.num_byzantine < 0:
            raise ValueError(f"MultiKrum needs num_byzantine >= 0, got {self.num_byzantine}")
        if self.num_selected is not None and self.num_selected < 1:
            raise ValueError(f"MultiKrum needs num_selected >= 1, got {self.num_selected}; null is K - f")

    def check(self, num_participants: int) -> None:
        """Refuse a cohort too small for the guarantee or the selection.

        Raises:
            ValueError: K ≤ 2f + 2 or m > K.

        """
        _check("MultiKrum", num_participants, self.num_byzantine)
        if self.num_selected is not None and self.num_selected > num_participants:
            raise ValueError(f"MultiKrum cannot select {self.num_selected} of K={num_participants} clients")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the mean (D,) of the selected updates; the scores and the choice are metrics."""
        distances = square_distances(cohort.matrix)  # (K, K)
        scores = krum_scores(distances, self.num_byzantine)  # (K,)
        wanted = self.num_selected or len(cohort) - self.num_byzantine
        chosen = krum_order(distances, scores)[: max(1, min(wanted, len(cohort)))].sort().values  # (m,)
        selected = torch.zeros_like(scores, dtype=torch.bool)
        selected[chosen] = True
        return combine(proportions(selected), cohort.matrix), state, {"krum_score": scores, "selected": selected}


def _check(name: str, num_participants: int, num_byzantine: int) -> None:
    if num_participants <= 2 * num_byzantine + 2:
        raise ValueError(
            f"{name} needs K > 2f + 2 clients, got K={num_participants}, f={num_byzantine}; "
            "sample more clients or lower num_byzantine"
        )
