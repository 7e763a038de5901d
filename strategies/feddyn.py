r"""FedDyn's server: the mean of the clients' models, less the sum of all that clients ever drifted.

Acar et al., ICLR 2021, Algorithm 1. https://arxiv.org/abs/2111.04263 (the client is `clients/feddyn.py`).
    h ← h − α (1/m) \sum_{k ∈ P} Δ_k,   w ← (1/|P|) \sum_{k ∈ P} w_k − h / α
for m clients. Kept here is h / α, in which α cancels: the server needs none. Clients count alike, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Metrics, State, Sums
from fedsim.layout import Layout


@dataclass(frozen=True)
class FedDyn(LinearRule):
    """FedDyn's rule, for `client=feddyn`."""

    half_of = "strategy=feddyn client=feddyn"

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return h / α = 0 (D,) and m."""
        return {"drift": torch.zeros(layout.size), "num_clients": num_clients}

    def coefficients(self, cohort: Cohort, state: State) -> Tensor:
        """Return ones (K,)."""
        return torch.ones_like(cohort.weights)

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the mean less h / α (D,); ‖h / α‖ is a metric."""
        share = len(sums.cohort) / state["num_clients"]
        drift = state["drift"].to(mean) - share * mean  # (D,)
        return mean - drift, {**state, "drift": drift}, {"drift_norm": torch.linalg.vector_norm(drift)}
