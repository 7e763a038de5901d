r"""Clipping before any rule: no update is longer than a bound.

    Δ_k ← Δ_k min(1, C / ‖Δ_k‖)
Around FedAvg it is `norm_clipping` (Sun et al., 2019, https://arxiv.org/abs/1911.07963).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.contracts import Cohort, Metrics
from fedsim.linalg import row_norms
from fedsim.strategies.preaggregation import Scaling, clip_factors


@dataclass(frozen=True, kw_only=True)
class Clip(Scaling):
    """A rule on updates of bounded length.

    Args:
        rule: the inner rule.
        max_norm: C > 0, in units of the updates' Euclidean norms.

    Raises:
        ValueError: `max_norm` not above 0.

    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"Clip needs max_norm > 0, got {self.max_norm}")

    def factors(self, cohort: Cohort) -> tuple[Tensor, Metrics]:
        """Return min(1, C / ‖Δ_k‖) (K,); the share of clients clipped is a metric."""
        factors = clip_factors(row_norms(cohort.matrix), self.max_norm)  # (K,)
        return factors, {"pre_clipped_fraction": (factors < 1).double().mean()}
