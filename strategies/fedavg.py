r"""FedAvg: the weighted mean of the clients' updates, with an optional server rate and momentum.

McMahan et al., AISTATS 2017, Algorithm 1. https://arxiv.org/abs/1602.05629
    w ← w + η \sum_k (n_k / n) Δ_k
With `server_momentum` it is FedAvgM: Hsu et al., 2019. https://arxiv.org/abs/1909.06335
    v ← β v + \sum_k (n_k / n) Δ_k,   w ← w + η v
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import LinearRule, Metrics, State, Sums
from fedsim.layout import Layout


@dataclass(frozen=True, kw_only=True)
class FedAvg(LinearRule):
    """FedAvg, and FedAvgM where `server_momentum` is above 0.

    Args:
        server_lr: η > 0; 1 is the mean itself.
        server_momentum: β in [0, 1); 0 is FedAvg.

    Raises:
        ValueError: an argument out of its range.

    >>> from fedsim.testing import apply_rule
    >>> apply_rule(FedAvg(), [[1.0, 0.0], [0.0, 4.0]], weights=[3, 1])
    array([0.75, 1.  ])

    """

    server_lr: float = 1.0
    server_momentum: float = 0.0

    def __post_init__(self) -> None:
        if not self.server_lr > 0:
            raise ValueError(f"FedAvg needs server_lr > 0, got {self.server_lr}; 1.0 takes the mean itself")
        if not 0 <= self.server_momentum < 1:
            raise ValueError(f"FedAvg needs 0 <= server_momentum < 1, got {self.server_momentum}; 0.0 turns it off")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory without momentum, else v = 0 (D,)."""
        return {"velocity": torch.zeros(layout.size)} if self.server_momentum else {}

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return η v (D,), or η times the mean without momentum."""
        if not self.server_momentum:
            return self.server_lr * mean, state, {}
        velocity = self.server_momentum * state["velocity"].to(mean) + mean  # (D,)
        return self.server_lr * velocity, {"velocity": velocity}, {}
