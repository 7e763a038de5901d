r"""Random directions: another rule's step lengths, along directions that are drawn.

A control for rules that choose a direction among the clients' updates, such as FedLD's principal ones: would any
direction in their span do, at the same length? For each tensor ("layer") with updates X (K, d) and the rule's step g:
    v = Xᵀ z,   z ~ N(0, I_K),   turned so that ⟨v, \bar Δ⟩ ≥ 0,   step ‖g‖ v / ‖v‖
`space="full"` draws v ~ N(0, I_d) instead: of D parameters, almost all of such a step is orthogonal to every update.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, Rule, State
from fedsim.linalg import beside, combine, largest_entry, map_columns, mean_of
from fedsim.strategies.fedld import FedLD
from fedsim.strategies.wrapper import Wrapper

SPACES = ("span", "full")


@dataclass(frozen=True, kw_only=True)
class RandomDirection(Wrapper):
    """Steps as long as another rule's, in random directions.

    Args:
        rule: the rule whose lengths are taken; FedLD.
        space: "span" of the updates, or "full".
        per_layer: a direction and a length for each tensor; False: of the whole vector.
        oriented: turn a direction that has a negative product with the mean update; False keeps its sign.

    Raises:
        ValueError: an argument out of its range.

    """

    rule: Rule = field(default_factory=FedLD)
    space: str = "span"
    per_layer: bool = True
    oriented: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs_rows", True)
        if self.space not in SPACES:
            raise ValueError(f"RandomDirection's space is one of {', '.join(SPACES)}, got {self.space!r}")

    def turn(self, delta: Tensor, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return a step as long as delta (D,); its cosine to the mean update is a metric."""
        updates, rng = cohort.rows, cohort.rng("random_direction")
        mean = mean_of(cohort.weights, updates)  # (D,)
        columns = list(cohort.layout.slices.values()) if self.per_layer else [slice(0, updates.shape[1])]
        parts = [self._drawn(updates[:, part], mean[part], delta[part], rng) for part in columns]
        step = torch.cat(parts)  # (D,)
        a, b = step.double(), mean.double()  # (D,) each
        norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)  # ()
        return step, {}, {"mean_cosine": torch.where(norms > 0, a @ b / norms, 0.0)}

    def _drawn(self, updates: Tensor, mean: Tensor, wanted: Tensor, rng: np.random.Generator) -> Tensor:
        """Return a random vector (d,) of the length of `wanted` (d,)."""
        count = len(updates) if self.space == "span" else updates.shape[1]
        drawn = torch.from_numpy(rng.standard_normal(count)).to(beside(updates))  # (K,) or (d,)
        # Rows of a common scale: squares of huge or tiny updates would leave their precision.
        size = largest_entry(updates).clamp_min(torch.finfo(updates.dtype).tiny)  # ()
        v = combine(drawn, map_columns(updates, lambda x, _: x / size)) if self.space == "span" else drawn  # (d,)
        if self.oriented:
            v = torch.where(v @ (mean / size) < 0, -v, v)
        norm = torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)  # ()
        length = torch.linalg.vector_norm(wanted, dtype=torch.float64)  # ()
        scaled: Tensor = v / norm * length.to(v)  # (d,)
        return scaled
