"""Cross-entropy: what a client minimises unless a method says otherwise.

L = (1/b) Σ_b −log softmax(z_b)[y_b]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, linalg
from torch.nn import functional


def sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return −log softmax(z_b)[y_b] (…, B) of logits (…, B, C) and int64 targets (…, B)."""
    if targets.dim() == 1:  # one client: three operations fewer in each of its steps
        return functional.cross_entropy(logits, targets, reduction="none")  # (B,)
    losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")  # (… · B,)
    return losses.view(targets.shape)  # (…, B)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Mean cross-entropy of a batch."""

    def criterion(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the loss (…) of logits (…, B, C), targets (…, B) and weights (…, B): 1/b, and 0 for padding."""
        loss: Tensor = linalg.vecdot(weights, sample_losses(logits, targets))  # (…)
        return loss

    def mean_criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the same for one client's logits (B, C) and equal weights."""
        return functional.cross_entropy(logits, targets)

    def soft_criterion(self, logits: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
        """Return the loss (…) for labels that are probabilities (…, B, C); `criterion` where they are one-hot."""
        loss: Tensor = linalg.vecdot(weights, -linalg.vecdot(probabilities, logits.log_softmax(-1)))  # (…)
        return loss
