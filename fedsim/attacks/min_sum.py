r"""Min-sum: summed square distance to the honest updates no larger than that of the outermost honest one.

Shejwalkar & Houmansadr, NDSS 2021, eq. 9. https://doi.org/10.14722/ndss.2021.24498
    Δ_k = μ + γ p,   largest γ with \sum_i ‖μ + γ p − Δ_i‖² ≤ max_i \sum_j ‖Δ_i − Δ_j‖² over honest i, j
The paper searches γ by halving. The cross terms sum to zero, so that over H honest updates
    γ² = (max_i \sum_j ‖Δ_i − Δ_j‖² − \sum_i ‖μ − Δ_i‖²) / (H ‖p‖²)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.contract import View
from fedsim.attacks.perturbation import Perturbation, check_perturbation, direction
from fedsim.contracts import State
from fedsim.linalg import square_distances


@dataclass(frozen=True, kw_only=True)
class MinSum:
    """Min-sum, agnostic to the rule.

    Args:
        perturbation: p: "std" (−σ, the paper's best on average), "sign" (−sign μ) or "unit" (−μ / ‖μ‖).

    Raises:
        ValueError: no such perturbation.

    """

    perturbation: Perturbation = "std"

    def __post_init__(self) -> None:
        check_perturbation(self.perturbation)

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return μ + γ p for every attacker, (F, D)."""
        p = direction(view, self.perturbation)  # (D,)
        distances = square_distances(view.known)  # (H, H)
        spread = distances.sum() / (2 * len(distances))  # Σ_i ‖μ − Δ_i‖², half the mean summed distance
        room = (distances.sum(1).max() - spread).clamp_min(0)
        square = len(distances) * (p @ p).double()
        gamma = torch.where(square > 0, (room / square).sqrt(), 0.0)
        return view.all(view.mean + gamma.to(p) * p), state
