r"""Centered clipping: move from a guess by the mean of the clipped differences.

Karimireddy et al., ICML 2021, Algorithm 2. https://arxiv.org/abs/2012.10333
    v ← v + (1/K) \sum_k (Δ_k − v) min(1, τ / ‖Δ_k − v‖)
v stays a combination of its start and the updates, so that the steps run on their Gram matrix and one mean, whatever
their number. Few steps on many clients cost less as they are written: two reads of the updates each.
The paper starts at the previous aggregate. Clients count once whatever their samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import beside, combine, distances_to, gram
from fedsim.mapped import Rows
from fedsim.order import median
from fedsim.strategies.preaggregation import clip_factors

STARTS = ("state", "median", "zero")

GRAM = 32
"""Clients whose Gram matrix costs what a step does on the updates themselves."""


@dataclass(frozen=True, kw_only=True)
class CenteredClipping:
    """Centered clipping.

    Args:
        radius: τ > 0 in units of the updates' norms; what an attacker can move v by is at most τ/K a step.
        num_iterations: steps ≥ 1.
        start: "state" (the previous aggregate, 0 before the first), "median" (of each coordinate) or "zero".

    Raises:
        ValueError: an argument out of its range.

    """

    radius: float = 1.0
    num_iterations: int = 3
    start: str = "state"

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"CenteredClipping needs radius > 0, got {self.radius}")
        if self.num_iterations < 1:
            raise ValueError(f"CenteredClipping needs num_iterations >= 1, got {self.num_iterations}")
        if self.start not in STARTS:
            raise ValueError(f"CenteredClipping's start is one of {', '.join(STARTS)}, got {self.start!r}")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return the previous aggregate: 0 (D,), where it is the start."""
        return {"previous": torch.zeros(layout.size)} if self.start == "state" else {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return v (D,); the share of clients that the last step clipped is a metric."""
        rows, origin = cohort.matrix, self._origin(cohort, state)  # (K, D), (D,)
        if isinstance(rows, Tensor) and len(rows) > GRAM * (self.num_iterations - 1):
            delta, factor = self._direct(rows, origin)  # (D,), (K,)
        else:
            delta, factor = self._by_gram(rows, origin)
        memory = {"previous": delta} if self.start == "state" else state
        return delta, memory, {"clipped_fraction": (factor < 1).double().mean()}

    def _direct(self, rows: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.num_iterations):
            factor = clip_factors(distances_to(v, rows), self.radius)  # (K,)
            a = factor / len(rows)  # (K,)
            v = combine(a, rows) + (1 - a.sum()).to(v) * v  # (D,)
        return v, factor

    def _by_gram(self, rows: Rows, origin: Tensor) -> tuple[Tensor, Tensor]:
        inner = gram(rows, origin)  # (K, K)
        a = torch.zeros_like(inner[0])  # (K,) v = start + Σ a_k (Δ_k − start)
        for _ in range(self.num_iterations):
            cross = inner @ a  # (K,)
            away = (inner.diagonal() - 2 * cross + a @ cross).clamp_min(0).sqrt()  # (K,) ‖Δ_k − v‖
            factor = clip_factors(away, self.radius)  # (K,)
            a = a * (1 - factor.mean()) + factor / len(rows)
        return combine(a, rows) + (1 - a.sum()).to(origin) * origin, factor

    def _origin(self, cohort: Cohort, state: State) -> Tensor:
        if self.start == "median":
            return median(cohort.matrix)
        if self.start == "state":
            previous: Tensor = state["previous"]
            return previous.to(beside(cohort.matrix))
        return beside(cohort.matrix).new_zeros(cohort.layout.size)
