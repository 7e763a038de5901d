r"""Samples moved, within a small box, to where a model errs most: what trains and what tests robust models.

Projected gradient ascent, Madry et al., ICLR 2018, eq. 2. https://arxiv.org/abs/1706.06083. From x_0, S times:
    x_{s+1} = Π_{‖x' − x‖_∞ ≤ ε, x' in [low, high]} (x_s + α sign ∇_x L(x_s))
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.rng import uniform_like


def step_of(radius: float, num_steps: int) -> float:
    """Return 2.5 ε / S, with which S steps reach any corner of the box from anywhere in it."""
    return 2.5 * radius / num_steps


def ascend(
    logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *,
    radius: float, step_size: float, num_steps: int, bounds: tuple[float | None, float | None], key: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return x_S (B, …), a constant to whoever differentiates by the model's parameters.

    Args:
        logits: from samples (B, …) to (B, C).
        x: (B, …) samples of a floating-point type.
        y: (B,) int64 their classes.
        radius: ε ≥ 0 in units of the features.
        step_size: α > 0, likewise.
        num_steps: S ≥ 0.
        bounds: least and largest value of a feature; None: no bound.
        key: draws x_0 uniformly from the box; None: x_0 = x.

    """
    low, high = -math.inf if bounds[0] is None else bounds[0], math.inf if bounds[1] is None else bounds[1]
    box = (x - radius).clamp(low, high), (x + radius).clamp(low, high)

    def error(x: Tensor) -> Tensor:  # () a sum: a mean's gradients could underflow, and their signs with them
        return functional.cross_entropy(logits(x), y, reduction="sum")

    moved = x
    with torch.no_grad():
        if key is not None:
            moved = moved + radius * (2 * uniform_like(x, key) - 1)
        moved = moved.clamp(*box)
        for _ in range(num_steps):
            moved = (moved + step_size * torch.func.grad(error)(moved).sign()).clamp(*box)
    return moved.detach()
