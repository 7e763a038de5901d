r"""FedRep's client: the head alone until it fits the representation, then the representation alone.

Collins et al., ICML 2021, Algorithm 1. https://arxiv.org/abs/2102.07078 (the server is `strategies/fedper.py`).
    h_k ← GRD(L_k(φ, ·), h_k) for `head_epochs`,   then φ_k ← GRD(L_k(·, h_k), φ) for `body_epochs`
Its experiments take 10 epochs for the head and 1 to 5 for the representation.
Departs from the paper: there the server takes the plain mean of the φ_k, here one weighted by samples, as FedPer's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Phase


@dataclass(frozen=True, kw_only=True)
class FedRep:
    r"""Cross-entropy in two phases.

    Args:
        head_epochs: passes ≥ 1 over the client's samples with all but the head held.
        body_epochs: passes ≥ 1 with the head held.
        head: regular expression of the head's parameters; what it does not match is the representation.

    Raises:
        ValueError: an argument out of its range.

    """

    head_epochs: int = 10
    body_epochs: int = 1
    head: str = r"^head\."

    def __post_init__(self) -> None:
        for name in ("head_epochs", "body_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"FedRep needs {name} >= 1, got {getattr(self, name)}; client=sgd trains both at once")

    def criterion(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the loss (…) of logits (…, B, C), targets and weights (…, B)."""
        return CrossEntropy().criterion(logits, targets, weights)  # (…)

    def phases(self) -> tuple[Phase, ...]:
        """Return the head's phase and the representation's."""
        body = rf"^(?!.*(?:{self.head}))"  # the names in which the head's pattern is found nowhere
        return (
            Phase(local_epochs=self.head_epochs, params=self.head),
            Phase(local_epochs=self.body_epochs, params=body),
        )
