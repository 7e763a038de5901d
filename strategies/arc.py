r"""ARC, adaptive robust clipping before any rule: the longest updates are cut to the length of the next one.

Allouah et al., ICLR 2025, Algorithm 2. https://arxiv.org/abs/2405.14432
    k = ⌊2 f (K − f) / K⌋,   C = the (k + 1)-th largest norm,   Δ_i ← Δ_i min(1, C / ‖Δ_i‖)
Unlike a fixed bound it leaves the guarantee of the inner rule as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.contracts import Cohort, Metrics
from fedsim.linalg import row_norms
from fedsim.strategies.preaggregation import Scaling, clip_factors


@dataclass(frozen=True, kw_only=True)
class ARC(Scaling):
    """A rule on updates clipped by their own norms.

    Args:
        rule: the inner rule.
        num_byzantine: f ≥ 0 attackers; 0 clips nobody.

    Raises:
        ValueError: `num_byzantine` below 0.

    """

    num_byzantine: int = 1

    def __post_init__(self) -> None:
        if self.num_byzantine < 0:
            raise ValueError(f"ARC needs num_byzantine >= 0, got {self.num_byzantine}; 0 clips nobody")

    def factors(self, cohort: Cohort) -> tuple[Tensor, Metrics]:
        """Return min(1, C / ‖Δ_k‖) (K,); the bound is a metric."""
        norms, count = row_norms(cohort.matrix), len(cohort)  # (K,)
        f = min(self.num_byzantine, count // 2)  # where rows were dropped and K is too small
        bound = norms.sort(descending=True).values[2 * f * (count - f) // count]
        return clip_factors(norms, bound), {"clipping_bound": bound}
