r"""ALIE, "a little is enough": hide within the spread of the honest updates.

Baruch, Baruch & Goldberg, NeurIPS 2019, Algorithm 3. https://arxiv.org/abs/1902.06156
    Δ_k = μ − z σ,   z = Φ^{-1}((K − F − s) / (K − F)),   s = ⌊K/2 + 1⌋ − F
coordinate by coordinate, σ the population standard deviation (the authors' code; not the unbiased one). With z as
given, s honest updates are expected to lie farther out than the attackers: together they are a majority.
The paper's attackers estimate μ and σ from their own updates, which is `knowledge=own`; unless told so, all are seen.
Departs from the paper where it has no answer: s is at least 1 and z at least 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.contract import View
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class ALIE:
    """A little is enough.

    Args:
        z: finite deviation in units of σ; None: by the paper's formula from the cohort's K and F.

    Raises:
        ValueError: `z` not finite.

    """

    z: float | None = None

    def __post_init__(self) -> None:
        if self.z is not None and not math.isfinite(self.z):
            raise ValueError(f"z must be finite, got {self.z}; null takes the paper's formula")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return μ − z σ for every attacker, (F, D)."""
        z = largest_z(len(view.cohort), view.num_byzantine) if self.z is None else self.z
        return view.all(view.mean - z * view.std), state


def largest_z(num_clients: int, num_byzantine: int) -> float:
    """Return the paper's z of K clients of which F ≥ 1 are Byzantine; 0 where nobody is honest.

    >>> round(largest_z(50, 12), 4)  # s = 14; Φ⁻¹(24 / 38)
    0.3360
    """
    honest = num_clients - num_byzantine
    supporters = max(1, num_clients // 2 + 1 - num_byzantine)
    share = max(0.5, (honest - supporters) / honest) if honest else 0.5
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
