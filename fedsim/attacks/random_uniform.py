r"""Random: uniform numbers in place of an update.

Almasi et al., ICLR 2024 (Flag Aggregator), experiments: U[0, 1). https://arxiv.org/abs/2302.05865
    Δ_kj ~ U[low, high), independently for each attacker, coordinate and round
With both bounds of one sign the attackers are correlated (cosine about 3/4 for [0, 1)), unlike Gaussian noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fedsim.attacks.contract import View, uniform
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class Random:
    """Independent uniform numbers.

    Args:
        low: least value.
        high: bound above, > low.

    Raises:
        ValueError: the interval is empty or infinite.

    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low must be < high and both finite, got low={self.low}, high={self.high}")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return uniforms (F, D)."""
        return self.low + (self.high - self.low) * uniform(view, "random_uniform", tuple(view.own.shape)), state
