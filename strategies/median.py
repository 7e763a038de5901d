r"""Coordinate-wise median.

Yin et al., ICML 2018, Algorithm 1, option I. https://arxiv.org/abs/1803.01498
    g_j = median_k Δ_{k,j},   the mean of the middle two for even K
Clients count once whatever their samples: an attacker may claim any number.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.order import median


@dataclass(frozen=True, kw_only=True)
class Median:
    """The median of each coordinate.

    >>> from fedsim.testing import apply_rule
    >>> apply_rule(Median(), [[1.0, 9.0], [2.0, -5.0], [1e9, 4.0]])
    array([2., 4.])

    """

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the median (D,)."""
        return median(cohort.matrix), state, {}
