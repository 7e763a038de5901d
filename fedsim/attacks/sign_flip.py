r"""Sign flip: each attacker sends its own update turned around.

Li et al., AAAI 2019 (RSA), §"Numerical tests". https://arxiv.org/abs/1811.03761
    Δ_k = −s Δ_k^{honest}
s = 10 is the "reverse" attack of the Flag Aggregator's experiments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.attacks.contract import View, positive
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class SignFlip:
    """Each attacker's own update times −s.

    Args:
        scale: s > 0.

    Raises:
        ValueError: `scale` not above 0.

    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("scale", self.scale, "1.0 turns the update around")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return −s times what the attackers would have sent, (F, D)."""
        return -self.scale * view.own, state
