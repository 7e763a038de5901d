r"""FedAsync: mix each client's model into the server's, the less the older it is.

Xie et al., "Asynchronous Federated Optimization", 2019, Algorithm 1. https://arxiv.org/abs/1903.03934
    w ← (1 − α_t) w + α_t (w_received + Δ),   α_t = α s(τ)
With several replies at once, their models are averaged by samples with the weights α s(τ_k): with the shares p_k,
    w ← w + \sum_k p_k α s(τ_k) (w_received,k + Δ_k − w)
which for one reply is the paper's rule. The paper's clients add a proximal term: client=fedprox.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import combine, map_columns, proportions
from fedsim.strategies.staleness import check_discount, discount, since_received


@dataclass(frozen=True, kw_only=True)
class FedAsync:
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

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"FedAsync needs 0 < alpha <= 1, got {self.alpha}; 1 takes the clients' models themselves")
        check_discount(self.discount, self.a, self.b)

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the step (D,); the mean mixing weight is a metric."""
        mixing = self.alpha * discount(self.discount, cohort.staleness, self.a, self.b)  # (K,)
        share = proportions(cohort.weights).to(mixing.device)  # (K,)
        # (K, D) each client's model less the server's
        towards = map_columns(cohort.rows, lambda block, at: block - since_received(cohort, block, at))
        return combine(share * mixing, towards), state, {"mixing_weight": (share * mixing).sum()}
