r"""Min-max: as far from the honest mean as the honest updates are from one another.

Shejwalkar & Houmansadr, NDSS 2021, eq. 8. https://doi.org/10.14722/ndss.2021.24498
    Δ_k = μ + γ p,   largest γ with max_i ‖μ + γ p − Δ_i‖ ≤ max_{i,j} ‖Δ_i − Δ_j‖ over honest i, j
The paper searches γ by halving; here it is the least root of one quadratic an honest client:
    γ² ‖p‖² + 2 γ ⟨p, μ − Δ_i⟩ + ‖μ − Δ_i‖² = R²
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
class MinMax:
    """Min-max, agnostic to the rule.

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
        offset = view.mean - view.known  # (H, D)
        radius = square_distances(view.known).max()  # R²
        square = (p @ p).double()
        half = (offset @ p).double()  # (H,)
        rest = radius - torch.linalg.vecdot(offset, offset).double()  # (H,) ≥ 0 but for rounding
        roots = (half.square() + square * rest.clamp_min(0)).sqrt() - half  # (H,)
        gamma = torch.where(square > 0, roots.min() / square, 0.0)
        return view.all(view.mean + gamma.to(p) * p), state
