r"""Inner-product manipulation: a step against the honest mean.

Xie, Koyejo & Gupta, UAI 2019 ("Fall of Empires"), §4. https://arxiv.org/abs/1903.03936
    Δ_k = −ε μ,   μ the mean of the honest updates
A small ε hides among the honest updates and turns robust rules' inner product with μ negative; a large one turns the
mean itself, for which ε > (K − F) / F is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.attacks.contract import View, positive
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class IPM:
    """Inner-product manipulation.

    Args:
        epsilon: ε > 0, length of the attackers' update over the honest mean's.

    Raises:
        ValueError: `epsilon` not above 0.

    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        positive("epsilon", self.epsilon, "0.1 is as published")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return −ε μ for every attacker, (F, D)."""
        return view.all(-self.epsilon * view.mean), state
