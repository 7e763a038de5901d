r"""Samples moved, within a small box, to where a model errs most: what trains and what tests robust models.

Projected gradient ascent, Madry et al., ICLR 2018, eq. 2. https://arxiv.org/abs/1706.06083. From x_0, S times:
    x_{s+1} = Π_{‖x' − x‖_∞ ≤ ε, x' in [low, high]} (x_s + α sign ∇_x L(x_s))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.rng import uniform_like


class Ascent(NamedTuple):
    """How samples are moved."""

    radius: float  # ε ≥ 0 in units of the features
    num_steps: int  # S ≥ 0
    step_size: float | None = None  # α > 0, likewise; None: 2.5 ε / S, with which S steps reach any corner of the box
    low: float | None = None  # least value of a feature; None: no bound
    high: float | None = None  # largest, likewise

    def moved(self, logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, key: Tensor | None) -> Tensor:
        """Return x_S (B, …), a constant to whoever differentiates by the model's parameters.

        Args:
            logits: from samples (B, …) to (B, C).
            x: (B, …) samples of a floating-point type.
            y: (B,) int64 their classes.
            key: draws x_0 uniformly from the box, one of the batch () or one a sample (B,); None: x_0 = x.

        """
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        box = (x - self.radius).clamp(low, high), (x + self.radius).clamp(low, high)
        step = self.step_size or 2.5 * self.radius / max(1, self.num_steps)

        def error(x: Tensor) -> Tensor:  # () a sum: a mean's gradients could underflow, and their signs with them
            return functional.cross_entropy(logits(x), y, reduction="sum")

        moved = x
        with torch.no_grad():
            if key is not None:
                moved = moved + self.radius * (2 * _uniforms(x, key) - 1)
            moved = moved.clamp(*box)
            for _ in range(self.num_steps):
                moved = (moved + step * torch.func.grad(error)(moved).sign()).clamp(*box)
        return moved.detach()


def _uniforms(x: Tensor, key: Tensor) -> Tensor:
    """Return uniforms in [0, 1) (B, …) of a key () or, sample by sample, of keys (B,)."""
    if not key.dim():
        return uniform_like(x, key)
    return uniform_like(x[:1], key.view(-1, *(1,) * (x.dim() - 1)))
