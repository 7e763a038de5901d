r"""Optimised attacks: those that know the server's rule and choose their strength by asking it.

Allouah et al., AISTATS 2023 ("Fixing by mixing"), experiments: ALIE and IPM ("FOE") by line search each round.
https://arxiv.org/abs/2302.01772
    t* = argmax_t ‖F(honest updates, attack at strength t) − μ‖,   F the rule with its present memory and its draws
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.attacks.contract import View
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class Optimised:
    """Another attack at the strength that moves the server's step farthest from the honest mean.

    Args:
        attack: an attack without memory; its strength is where the search starts.
        parameter: name of its strength, a number > 0.
        num_evaluations: times ≥ 1 that the rule is asked a round.

    Raises:
        ValueError: an argument out of its range.

    """

    attack: Any
    parameter: str
    num_evaluations: int = 16
    knows_rule = True

    def __post_init__(self) -> None:
        start = getattr(self.attack, self.parameter, None)
        if not isinstance(start, int | float) or not start > 0:
            kind = type(self.attack).__name__
            raise ValueError(f"parameter must name a number > 0 of {kind}, got {self.parameter}={start!r}")
        if self.num_evaluations < 1:
            raise ValueError(f"num_evaluations must be >= 1, got {self.num_evaluations}")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return what the attack at its best strength sends, (F, D)."""

        def at(strength: float) -> Tensor:
            return replace(self.attack, **{self.parameter: strength}).rows(view, {})[0]  # type: ignore[no-any-return]

        def damage(strength: float) -> float:
            step = view.step(view.attacked(at(strength)))  # (D,)
            return float(torch.linalg.vector_norm((step - view.mean).double()))

        start = float(getattr(self.attack, self.parameter))
        return at(line_maximum(damage, start, self.num_evaluations)), state


def line_maximum(value: Callable[[float], float], start: float, num_evaluations: int) -> float:
    """Return where a function of a positive number is largest among the points tried; the first of equals.

    Doubles from `start` while that helps, then tries both sides at ratios √2, ⁴√2, …

    Args:
        value: what is maximised.
        start: > 0.
        num_evaluations: calls of `value`, ≥ 1.

    """
    best, ratio, doubling = start, 2.0, True
    largest, tried = value(start), 1
    while tried < num_evaluations:
        for candidate in (best * ratio, best / ratio)[: 1 if doubling else 2]:
            if tried == num_evaluations:
                return best
            found, tried = value(candidate), tried + 1
            if found > largest:
                best, largest = candidate, found
                break
        else:
            doubling, ratio = False, ratio**0.5
    return best
