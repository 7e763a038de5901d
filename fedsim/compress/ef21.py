r"""EF21's client half: send the compressed change of an estimate that server and client both keep.

EF21: Richtárik, Sokolov & Fatkhullin, NeurIPS 2021, Algorithm 2. https://arxiv.org/abs/2106.05203
EF21-W: Richtárik, Gasanov & Burlachenko, ICLR 2024, Algorithm 2. https://arxiv.org/abs/2402.10774
    sent: u_k = C(Δ_k / (n w_k) − g_k),   g_k ← g_k + u_k,   w_k = L_k / \sum_j L_j   (EF21: 1/n)
The server half is strategy=ef21. Δ_k stands for −lr ∇f_k(x), which it is where a round is one full-batch step; with
more local work it is a pseudo-gradient and the theory is silent. A client that does not take part keeps its g_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.compress.contract import Compressor, Senders
from fedsim.compress.error_feedback import need_contraction
from fedsim.contracts import State
from fedsim.layout import Layout
from fedsim.linalg import proportions

ESTIMATE = "estimate"
LEAST_WEIGHT = 1e-6  # of w_k: far flatter clients would be scaled beyond what float32 holds


@dataclass(frozen=True, kw_only=True)
class EF21:
    """Compressed changes of the clients' estimates g, from g = 0.

    Args:
        compressor: C, a contraction without memory of its own.
        smoothness: L_k > 0 of each client by id; None: unknown. As the strategy's.
        weighted: whether this is EF21-W, which needs them. As the strategy's.

    Raises:
        ValueError: a smoothness not above 0, or EF21-W without any.

    """

    compressor: Compressor
    smoothness: tuple[float, ...] | None = None
    weighted: bool = False

    half_of = "strategy=ef21 compressor=ef21"

    def __post_init__(self) -> None:
        if self.smoothness is not None and not all(0 < value < float("inf") for value in self.smoothness):
            raise ValueError(f"smoothness must be > 0 and finite for every client, got {self.smoothness}")
        if self.weighted and self.smoothness is None:
            raise ValueError("weighted needs the clients' smoothness; weighted=false is EF21")

    def init_client(self, layout: Layout) -> dict[str, Tensor]:
        """Return g = 0 (D,).

        Raises:
            ValueError: the compressor is no contraction.

        """
        need_contraction("ef21", self.compressor, layout.size)
        return {ESTIMATE: torch.zeros(layout.size)}

    def __call__(self, rows: Tensor, senders: Senders, state: State) -> tuple[Tensor, State]:
        """Return u (K, D) and g + u."""
        estimate = state[ESTIMATE].to(rows)  # (K, D)
        sent, _ = self.compressor(rows * self._scale(senders).to(rows)[:, None] - estimate, senders, {})
        return sent, {ESTIMATE: estimate + sent}

    def _scale(self, senders: Senders) -> Tensor:
        """Return 1 / (n w_k), (K,) float64."""
        if self.smoothness is None or not self.weighted:
            return torch.ones(len(senders.clients), dtype=torch.float64, device=senders.clients.device)
        weights = proportions(
            torch.tensor(self.smoothness, dtype=torch.float64, device=senders.clients.device), LEAST_WEIGHT
        )  # (n,)
        return 1 / (senders.num_clients * weights[senders.clients])

    def num_bytes(self, size: int, itemsize: int) -> int:
        """Return the compressor's."""
        return self.compressor.num_bytes(size, itemsize)
