r"""FedExP: a server rate of at least 1 that grows as the clients' updates cancel.

Jhunjhunwala et al., ICLR 2023, eq. 2 and Algorithm 1. https://arxiv.org/abs/2301.09604
    η = max(1, \sum_k p_k ‖Δ_k‖² / (2 (‖\bar Δ‖² + ε))),   w ← w + η \bar Δ,   \bar Δ = \sum_k p_k Δ_k
with p_k = 1/M in the paper, where clients count alike; here, as in the authors' code, p_k = n_k / n.
Departs from the paper: it reports the mean of the last two iterates; here the model is the last one. Departs from the
code (Divyansh03/FedExP): there ε is multiplied by the size of the cohort, and by 0.998² in each round.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.contracts import LinearRule, Metrics, State, Sums


@dataclass(frozen=True, kw_only=True)
class FedExP(LinearRule):
    """FedAvg with FedExP's extrapolation.

    Args:
        epsilon: ε > 0, in units of ‖Δ‖²: a large one is FedAvg. The authors' code has 0.001, and 0.1 on EMNIST.

    Raises:
        ValueError: an argument out of its range.

    >>> from fedsim.testing import apply_rule
    >>> apply_rule(FedExP(epsilon=1e-9), [[3.0, 1.0], [-1.0, 1.0]]).round(3)  # η = max(1, 6 / (2 · 2)) = 1.5
    array([1.5, 1.5])

    """

    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise ValueError(f"FedExP needs a finite epsilon > 0, got {self.epsilon}; 0.001 as in the authors' code")

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return η times the mean (D,); η is a metric."""
        p = sums.coefficients.double() / sums.coefficients.double().sum()  # (K,)
        spread = p @ sums.square_norms.double()  # ()
        square = mean.double().square().sum()  # ()
        rate = (spread / (2 * (square + self.epsilon))).clamp_min(1)  # ()
        return mean * rate.to(mean.dtype), state, {"server_rate": rate}
