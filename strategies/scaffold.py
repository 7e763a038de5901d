r"""SCAFFOLD's server: the mean update, and the mean of the clients' control variates.

Karimireddy et al., ICML 2020, Algorithm 1. https://arxiv.org/abs/1910.06378 (the client is `clients/scaffold.py`).
    w ← w + η (1/|S|) \sum_{k ∈ S} Δ_k,   c ← c + (|S|/N) (1/|S|) \sum_{k ∈ S} (c_k⁺ − c_k)
Clients count alike, as in the paper, whatever their samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Metrics, State, Sums
from fedsim.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Scaffold(LinearRule):
    """SCAFFOLD's rule; needs the upload `control_change` of `client=scaffold`.

    Args:
        server_lr: η > 0, the paper's η_g.

    Raises:
        ValueError: an argument out of its range.

    """

    server_lr: float = 1.0

    reduced_extras = ("control_change",)
    half_of = "strategy=scaffold client=scaffold"

    def __post_init__(self) -> None:
        if not self.server_lr > 0:
            raise ValueError(f"Scaffold needs server_lr > 0, got {self.server_lr}; 1.0 takes the mean itself")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return c = 0 (D,) and N."""
        return {"control": torch.zeros(layout.size), "num_clients": num_clients}

    def broadcast(self, state: State) -> dict[str, Any]:
        """Return c (D,)."""
        return {"control": state["control"]}

    def coefficients(self, cohort: Cohort, state: State) -> Tensor:
        """Return ones (K,)."""
        return torch.ones_like(cohort.weights)

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return η times the mean (D,) and the new c; ‖c‖ is a metric."""
        if "control_change" not in sums.extras:
            raise ValueError("Scaffold needs the clients' control variates; choose client=scaffold")
        share = len(sums.cohort) / state["num_clients"]
        control = state["control"].to(mean) + share * sums.extras["control_change"].to(mean)  # (D,)
        return self.server_lr * mean, {**state, "control": control}, {"control_norm": torch.linalg.vector_norm(control)}
