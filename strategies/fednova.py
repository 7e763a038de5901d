r"""FedNova: updates divided by the length of the local run that made them, so that no client counts for its steps.

Wang et al., NeurIPS 2020, eq. 6–8. https://arxiv.org/abs/2007.07481. With p_k = n_k / n and τ_k local steps:
    w ← w + η τ_eff \sum_k p_k Δ_k / ‖a_k‖₁,   τ_eff = \sum_k p_k ‖a_k‖₁
    ‖a_k‖₁ = τ_k for SGD,   (τ_k − ρ (1 − ρ^{τ_k}) / (1 − ρ)) / (1 − ρ) for SGD with momentum ρ
where a_k weighs the gradients that Δ_k adds up. With equal τ_k it is FedAvg. The paper's ‖a_k‖₁ of proximal local
solvers and its momentum on the server are not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Metrics, State, Sums


@dataclass(frozen=True, kw_only=True)
class FedNova(LinearRule):
    """FedNova's rule for clients that run SGD.

    Args:
        server_lr: η > 0.
        momentum: ρ in [0, 1) of the clients' SGD; None is what the clients' training says, 0 outside of a run.

    Raises:
        ValueError: an argument out of its range, or clients that do not run SGD.

    >>> from fedsim.laws import cohort_of
    >>> import torch
    >>> cohort = cohort_of([[4.0], [1.0]], num_steps=torch.tensor([4, 1]))
    >>> FedNova()(cohort, {})[0]  # each moves 1 a step, and τ_eff = 2.5
    tensor([2.5000], dtype=torch.float64)

    """

    server_lr: float = 1.0
    momentum: float | None = None

    needs = ("local_training",)

    def __post_init__(self) -> None:
        if not self.server_lr > 0:
            raise ValueError(f"FedNova needs server_lr > 0, got {self.server_lr}; 1.0 takes the mean itself")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"FedNova needs 0 <= momentum < 1, got {self.momentum}; null is the clients' own")

    def bind(self, local_training: Any) -> FedNova:
        """Return the rule with the clients' momentum, where none was given."""
        if local_training.optimizer != "sgd":
            raise ValueError(f"FedNova counts the steps of SGD, got client.optimizer={local_training.optimizer}")
        return self if self.momentum is not None else replace(self, momentum=local_training.momentum)

    def lengths(self, num_steps: Tensor) -> Tensor:
        """Return ‖a_k‖₁ (K,) in float64 of τ_k (K,)."""
        steps, rho = num_steps.double(), self.momentum or 0.0  # (K,)
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)  # (K,)

    def coefficients(self, cohort: Cohort, state: State) -> Tensor:
        """Return n_k / ‖a_k‖₁ (K,)."""
        lengths = self.lengths(cohort.num_steps).to(cohort.weights.device)  # (K,)
        return cohort.weights / lengths.to(cohort.weights.dtype)  # (K,)

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        r"""Return η τ_eff \sum_k p_k Δ_k / ‖a_k‖₁ (D,); τ_eff is a metric."""
        n = sums.cohort.weights.double()  # (K,)
        lengths = self.lengths(sums.cohort.num_steps).to(n.device)  # (K,)
        effective = (n @ lengths) / n.sum()  # ()
        # `mean` is divided by Σ c_k, where the rule wants Σ n_k.
        factor = self.server_lr * effective * (n / lengths).sum() / n.sum()  # ()
        return mean * factor.to(mean.dtype), state, {"effective_steps": effective}
