r"""FedDyn's client: a regulariser that bends the local optimum towards a stationary point of the global loss.

Acar et al., ICLR 2021, Algorithm 1. https://arxiv.org/abs/2111.04263 (the server is `strategies/feddyn.py`).
    min_θ  L_k(θ) − ⟨g_k, θ⟩ + (α/2) ‖θ − w‖²,   then  g_k ← g_k − α (θ − w)
from g_k = 0. The proximal part is the engine's, from `proximal_mu` = α; g_k joins the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Context
from fedsim.layout import Layout, Params


@dataclass(frozen=True, kw_only=True)
class FedDyn:
    """Cross-entropy with FedDyn's dynamic regulariser.

    Args:
        proximal_mu: α > 0. The paper tunes over 0.001, 0.01, 0.1.

    Raises:
        ValueError: an argument out of its range.

    """

    proximal_mu: float = 0.1

    half_of = "strategy=feddyn client=feddyn"

    def __post_init__(self) -> None:
        if not 0 < self.proximal_mu < float("inf"):
            raise ValueError(f"FedDyn needs a finite proximal_mu > 0, got {self.proximal_mu}; client=sgd has none")

    def criterion(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the loss (…) without the regulariser, from logits (…, B, C), targets and weights (…, B)."""
        return CrossEntropy().criterion(logits, targets, weights)  # (…)

    def init_client(self, layout: Layout) -> dict[str, Tensor]:
        """Return g_k = 0 (D,)."""
        return {"gradient": torch.zeros(layout.size)}

    def direction(
        self, grads: Params, params: Mapping[str, Tensor], context: Context
    ) -> tuple[Params, dict[str, Tensor]]:
        """Return the gradient, in which the proximal part is already, less g_k."""
        parts = context.layout.split(context.client_state["gradient"])
        return {n: g - parts[n] if n in parts else g for n, g in grads.items()}, {}

    def finish(self, params: Params, context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor], None]:
        """Keep g_k − α (θ − w) (D,)."""
        moved = context.layout.join({name: params[name] - w for name, w in context.received.items()})  # (D,)
        return {"gradient": context.client_state["gradient"] - moved.mul_(self.proximal_mu)}, {}, None
