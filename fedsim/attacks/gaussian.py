r"""Gaussian: noise in place of an update.

Blanchard et al., NeurIPS 2017, §6 (there with a standard deviation of 200). https://arxiv.org/abs/1703.02757
    Δ_k ~ N(m, s² I), independently for each attacker and round
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.contract import View, positive
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Independent normal noise.

    Args:
        std: s > 0, of each coordinate; the noise's norm is about s √D.
        mean: m, of each coordinate.

    Raises:
        ValueError: an argument out of its range.

    """

    std: float = 1.0
    mean: float = 0.0

    def __post_init__(self) -> None:
        positive("std", self.std, "Blanchard et al. take 200")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return noise (F, D)."""
        noise = view.cohort.rng("gaussian").normal(self.mean, self.std, tuple(view.own.shape))
        return torch.from_numpy(noise).to(view.own), state
