r"""FedAsync: mix each client's model into the server's, the less the older it is.

Xie et al., "Asynchronous Federated Optimization", 2019, Algorithm 1. https://arxiv.org/abs/1903.03934
    w ← (1 − α_t) w + α_t (w_received + Δ),   α_t = α s(τ)
With several replies at once, their models are averaged by samples with the weights α s(τ_k): with the shares p_k,
    w ← w + \sum_k p_k α s(τ_k) (w_received,k + Δ_k − w)
which for one reply is the paper's rule. The paper's clients add a proximal term: client=fedprox.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Metrics, State, Sums
from fedsim.strategies.staleness import check_discount, discount, moved


@dataclass(frozen=True, kw_only=True)
class FedAsync(LinearRule):
    """FedAsync with its three discounts.

    Args:
        alpha: mixing weight α in (0, 1] of a fresh model.
        discount: s(τ): "constant", "hinge" or "polynomial".
        a: > 0; the paper takes 10 for the hinge, 0.5 for the polynomial.
        b: rounds ≥ 0 that the hinge lets pass; 4 in the paper.

    Raises:
        ValueError: an argument out of its range.

    >>> from fedsim.testing import apply_rule
    >>> apply_rule(FedAsync(alpha=0.5), [[1.0, 0.0], [0.0, 4.0]], weights=[3, 1])
    array([0.375, 0.5  ])

    """

    alpha: float = 0.6
    discount: str = "polynomial"
    a: float = 0.5
    b: float = 4.0

    for_staleness: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"FedAsync needs 0 < alpha <= 1, got {self.alpha}; 1 takes the clients' models themselves")
        check_discount(self.discount, self.a, self.b)

    def coefficients(self, cohort: Cohort, state: State) -> Tensor:
        """Return n_k s(τ_k) (K,)."""
        return cohort.weights.double() * discount(self.discount, cohort.staleness, self.a, self.b)

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the step (D,); the mean mixing weight is a metric."""
        cohort, n = sums.cohort, sums.cohort.weights.double().sum()
        mixing = self.alpha * sums.coefficients.double() / n  # (K,) p_k α s(τ_k)
        delta = mixing.sum().to(mean) * mean  # (D,)
        since = moved(cohort, mixing, mean)
        return delta if since is None else delta - since, state, {"mixing_weight": mixing.sum()}
