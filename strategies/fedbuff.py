r"""FedBuff: the mean of a buffer of updates, each the smaller the older it is.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, Algorithm 1.
https://arxiv.org/abs/2106.06639
    w ← w + η_g (1/K) \sum_k s(τ_k) Δ_k,   s(τ) = 1 / sqrt(1 + τ)
The divisor is K, not Σ s: a buffer of old updates takes a small step. Run it with mode=async.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Metrics, State, Sums
from fedsim.strategies.staleness import check_discount, discount


@dataclass(frozen=True, kw_only=True)
class FedBuff(LinearRule):
    """FedBuff's server step.

    Args:
        server_lr: η_g > 0.
        discount: s(τ): "constant", "hinge" or "polynomial".
        a: > 0; 0.5 with the polynomial is the paper's 1 / sqrt(1 + τ).
        b: rounds ≥ 0 that the hinge lets pass.
        weighted: clients count by their samples instead of equally; not in the paper.

    Raises:
        ValueError: an argument out of its range.

    >>> from fedsim.testing import apply_rule
    >>> apply_rule(FedBuff(), [[1.0, 0.0], [0.0, 4.0]])
    array([0.5, 2. ])

    """

    server_lr: float = 1.0
    discount: str = "polynomial"
    a: float = 0.5
    b: float = 4.0
    weighted: bool = False

    for_staleness: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.server_lr > 0:
            raise ValueError(f"FedBuff needs server_lr > 0, got {self.server_lr}; 1.0 takes the mean itself")
        check_discount(self.discount, self.a, self.b)

    def coefficients(self, cohort: Cohort, state: State) -> Tensor:
        """Return s(τ_k) (K,), times n_k where they are weighted."""
        return self._base(cohort) * discount(self.discount, cohort.staleness, self.a, self.b)

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return η_g times the sum (D,) over K, or over Σ n_k."""
        kept = sums.coefficients.double().sum() / self._base(sums.cohort).sum()  # 1 without staleness
        return self.server_lr * kept.to(mean) * mean, state, {"staleness_discount": kept}

    def _base(self, cohort: Cohort) -> Tensor:
        weights = cohort.weights.double()
        return weights if self.weighted else torch.ones_like(weights)
