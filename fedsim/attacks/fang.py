r"""Fang's attack on trimmed mean and median: just beyond the honest extremes, against the direction of change.

Fang et al., USENIX Security 2020, §4.3, full knowledge. https://arxiv.org/abs/1911.11815
    s_j = sign of μ_j, the honest direction.   With b > 1, uniformly and for each attacker apart:
    s_j < 0:  Δ_kj in [max_j, b max_j] if max_j > 0, else [max_j, max_j / b]
    s_j ≥ 0:  Δ_kj in [min_j / b, min_j] if min_j > 0, else [b min_j, min_j]
The paper states it on parameters; on updates the received model is the origin.
Departs from the paper with `knowledge=own`: μ and the extremes are those of the attackers' own updates, where the paper
draws from three to four of their standard deviations beyond their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.contract import View, uniform
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class Fang:
    """Fang's attack on coordinate-wise rules.

    Args:
        b: > 1, how far beyond the extremes; the paper finds no effect of it and takes 2.

    Raises:
        ValueError: `b` not above 1.

    """

    b: float = 2.0

    def __post_init__(self) -> None:
        if not 1 < self.b < float("inf"):
            raise ValueError(f"b must be > 1 and finite, got {self.b}; 2.0 is as published")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return values beyond the extremes (F, D)."""
        largest, least = view.known.amax(0), view.known.amin(0)  # (D,)
        above = torch.where(largest > 0, largest * self.b, largest / self.b)  # (D,)
        below = torch.where(least > 0, least / self.b, least * self.b)  # (D,)
        falling = view.mean < 0  # (D,)
        near, far = torch.where(falling, largest, least), torch.where(falling, above, below)  # (D,)
        return near + (far - near) * uniform(view, "fang", tuple(view.own.shape)), state
