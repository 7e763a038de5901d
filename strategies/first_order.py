r"""First-order correction of stale updates, in front of any rule.

DC-ASGD, Zheng et al., ICML 2017 (https://arxiv.org/abs/1609.08326), on updates, as the baseline of Huang et al.
(AAAI 2025; arXiv:2309.13536):
    Δ_k ← Δ_k − λ Δ_k ⊙ Δ_k ⊙ (w − w_received,k)
The paper's has gradients: with Δ = −η g its coefficient is λ' = η λ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedsim.contracts import Cohort, Metrics
from fedsim.linalg import map_columns
from fedsim.strategies.preaggregation import PreAggregator
from fedsim.strategies.staleness import since_received


@dataclass(frozen=True, kw_only=True)
class FirstOrder(PreAggregator):
    """A rule on updates that are corrected by the diagonal of the gradients' outer product.

    Args:
        rule: the inner rule.
        compensation: λ ≥ 0; 0 changes nothing, 4 is the baseline's.

    Raises:
        ValueError: `compensation` below 0.

    """

    compensation: float = 4.0

    for_staleness: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.compensation >= 0:
            raise ValueError(f"FirstOrder needs compensation >= 0, got {self.compensation}; 0 changes nothing")

    def mix(self, cohort: Cohort) -> tuple[Cohort, Metrics]:
        """Return the cohort with corrected stale updates."""
        if not bool((cohort.staleness > 0).any()):
            return cohort, {}

        def compensated(block: Tensor, columns: slice) -> Tensor:
            return block - self.compensation * block.square() * since_received(cohort, block, columns)  # (K, d)

        return replace(cohort, updates=map_columns(cohort.rows, compensated)), {}
