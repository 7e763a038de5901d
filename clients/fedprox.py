r"""FedProx: cross-entropy with a proximal term that holds a client near the model it received.

Li et al., MLSys 2020, eq. 2. https://arxiv.org/abs/1812.06127
    L(w) + (μ/2) ‖w − w_received‖²
The engine adds the term's gradient μ (w − w_received) itself, from the attribute `proximal_mu`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.clients.cross_entropy import CrossEntropy


@dataclass(frozen=True, kw_only=True)
class FedProx:
    """FedProx's client objective.

    Args:
        proximal_mu: μ ≥ 0; 0 is FedAvg's client. The paper tunes over 0.001, 0.01, 0.1, 1.

    Raises:
        ValueError: an argument out of its range.

    """

    proximal_mu: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.proximal_mu < float("inf"):
            raise ValueError(f"FedProx needs a finite proximal_mu >= 0, got {self.proximal_mu}; 0 is FedAvg's client")

    def criterion(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the loss (…) without the proximal term, from logits (…, B, C), targets and weights (…, B)."""
        return CrossEntropy().criterion(logits, targets, weights)  # (…)

    def mean_criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the same for one client's logits (B, C) and equal weights."""
        return CrossEntropy().mean_criterion(logits, targets)

    def soft_criterion(self, logits: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
        """Return the same for labels that are probabilities (…, B, C)."""
        return CrossEntropy().soft_criterion(logits, probabilities, weights)  # (…)
