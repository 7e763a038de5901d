r"""Coordinate-wise trimmed mean: the mean of what is left without the f smallest and f largest values.

Yin et al., ICML 2018, Algorithm 1, option II. https://arxiv.org/abs/1803.01498
    g_j = 1/(K − 2f) \sum_{i=f+1}^{K−f} Δ_{(i),j}
Clients count once whatever their samples: an attacker may claim any number.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.order import trimmed_mean


@dataclass(frozen=True, kw_only=True)
class TrimmedMean:
    """The trimmed mean of each coordinate.

    Args:
        num_byzantine: f ≥ 0 values trimmed at either end, 2f < K. Where rows were dropped and K is too small,
            the largest f that K allows is used.

    Raises:
        ValueError: `num_byzantine` below 0.

    """

    num_byzantine: int = 1

    def __post_init__(self) -> None:
        if self.num_byzantine < 0:
            raise ValueError(f"TrimmedMean needs num_byzantine >= 0, got {self.num_byzantine}; 0 is the mean")

    def check(self, num_participants: int) -> None:
        """Refuse a cohort that would be trimmed away.

        Raises:
            ValueError: K ≤ 2f.

        """
        if num_participants <= 2 * self.num_byzantine:
            raise ValueError(
                f"TrimmedMean needs K > 2f clients, got K={num_participants}, f={self.num_byzantine}; "
                "sample more clients or lower num_byzantine"
            )

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the trimmed mean (D,)."""
        return trimmed_mean(cohort.matrix, min(self.num_byzantine, (len(cohort) - 1) // 2)), state, {}
