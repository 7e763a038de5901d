r"""Stale updates count exponentially less, in front of any rule.

The "weighted" baseline of Huang et al. (AAAI 2025; arXiv:2309.13536), as the authors' code has it:
    Δ_k ← Δ_k 2^{−τ_k / h},   h = 20 rounds
The weights stay: the mean's divisor is that of fresh updates. Around FedAvg without staleness it is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.contracts import Cohort, Metrics
from fedsim.strategies.preaggregation import Scaling


@dataclass(frozen=True, kw_only=True)
class StaleWeighted(Scaling):
    """A rule on updates that shrink with their staleness.

    Args:
        rule: the inner rule.
        half_life: rounds h > 0 in which an update loses half of its length.

    Raises:
        ValueError: `half_life` not above 0.

    """

    half_life: float = 20.0

    for_staleness: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise ValueError(f"StaleWeighted needs half_life > 0 rounds, got {self.half_life}")

    def factors(self, cohort: Cohort) -> tuple[Tensor, Metrics]:
        """Return 2^{−τ_k / h} (K,); their mean is a metric."""
        factors = 2.0 ** (-cohort.staleness.double() / self.half_life)  # (K,)
        return factors, {"staleness_discount": factors.mean()}
