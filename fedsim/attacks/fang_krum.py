r"""Fang's attack on Krum: the largest step against the honest direction that the server's rule still takes.

Fang et al., USENIX Security 2020, §4.2, full knowledge. https://arxiv.org/abs/1911.11815
    Δ_k = −λ s for every attacker,   s = sign of μ,   largest λ of λ_0, λ_0/2, λ_0/4, … for which Krum picks it
    λ_0 = (\min_l \sum_{i ∈ N_l} ‖Δ_l − Δ_i‖² / ((K − 2F − 1) D))^{1/2} + \max_l ‖Δ_l‖ / D^{1/2}     (theorem 1)
N_l: the K − F − 2 honest updates nearest to the honest l (at least one). The rule itself is asked whom it picks, so
that the attack fits every rule whose step is one of the updates. Where it picks the attackers at no λ ≥ `least`, the
last one is sent.
Departs from the paper, which lets the attackers differ by a small ε: here they are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.contract import View, positive
from fedsim.contracts import State
from fedsim.linalg import row_norms, square_distances


@dataclass(frozen=True, kw_only=True)
class FangKrum:
    """Fang's attack on Krum.

    Args:
        least: λ > 0 at which the search ends.

    Raises:
        ValueError: `least` not above 0.

    """

    least: float = 1e-5
    knows_rule = True

    def __post_init__(self) -> None:
        positive("least", self.least, "1e-5 is as published")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return −λ s for every attacker, (F, D)."""
        sign = view.mean.sign()  # (D,)
        scale = largest_scale(view.known, len(view.cohort), view.num_byzantine)
        while True:
            row = -scale * sign  # (D,)
            taken = view.step(view.attacked(view.all(row)))
            if scale / 2 < self.least or torch.equal(taken, row.to(taken)):
                return view.all(row), state
            scale /= 2


def largest_scale(known: Tensor, num_clients: int, num_byzantine: int) -> float:
    """Return λ_0 of known updates (H, D) in a cohort of K with F attackers."""
    distances = square_distances(known)  # (H, H)
    neighbours = max(1, num_clients - num_byzantine - 2)
    nearest = distances.sort(1).values[:, 1 : 1 + neighbours].sum(1)  # (H,) the 0 is the distance to itself
    size = known.shape[1]
    within = float(nearest.min()) / (max(1, num_clients - 2 * num_byzantine - 1) * size)
    largest = float(row_norms(known).max()) / size**0.5
    return float(within**0.5 + largest)
