r"""MeaMed: in each coordinate, the mean of the K − f values nearest to the median.

Xie et al., 2018, "mean around median". https://arxiv.org/abs/1802.10116
Nearest values are a window of the sorted ones. Of two values equally near, the lower counts.
Clients count once whatever their samples: an attacker may claim any number.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.order import mean_around_median


@dataclass(frozen=True, kw_only=True)
class MeaMed:
    """The mean around the median of each coordinate.

    Args:
        num_byzantine: f ≥ 0 values left out, 2f < K. Where rows were dropped and K is too small, the largest f
            that K allows is used.

    Raises:
        ValueError: `num_byzantine` below 0.

    """

    num_byzantine: int = 1

    def __post_init__(self) -> None:
        if self.num_byzantine < 0:
            raise ValueError(f"MeaMed needs num_byzantine >= 0, got {self.num_byzantine}; 0 is the mean")

    def check(self, num_participants: int) -> None:
        """Refuse a cohort in which attackers could be the majority.

        Raises:
            ValueError: K ≤ 2f.

        """
        if num_participants <= 2 * self.num_byzantine:
            raise ValueError(
                f"MeaMed needs K > 2f clients, got K={num_participants}, f={self.num_byzantine}; "
                "sample more clients or lower num_byzantine"
            )

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the mean around the median (D,)."""
        kept = len(cohort) - min(self.num_byzantine, (len(cohort) - 1) // 2)
        return mean_around_median(cohort.matrix, kept), state, {}
