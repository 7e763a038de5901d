r"""Drop: each attacker's update arrives with holes.

Almasi et al., ICLR 2024 (Flag Aggregator), experiments. https://arxiv.org/abs/2302.05865
    Δ_kj = 0 with probability q, else as trained; drawn for each attacker, coordinate and round
Departs from the released code, which discards the masked copy and so sends the update as trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.attacks.contract import View, uniform
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Coordinates lost at random.

    Args:
        probability: q in (0, 1] of losing a coordinate.

    Raises:
        ValueError: `probability` out of its range.

    """

    probability: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must be in (0, 1], got {self.probability}; 1 sends nothing")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return the attackers' own updates with zeros (F, D)."""
        lost = uniform(view, "drop", tuple(view.own.shape)) < self.probability  # (F, D)
        return view.own.masked_fill(lost, 0), state
