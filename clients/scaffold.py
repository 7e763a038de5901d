r"""SCAFFOLD's client: steps corrected by the difference of the server's and its own control variate.

Karimireddy et al., ICML 2020, Algorithm 1, option II. https://arxiv.org/abs/1910.06378 (`strategies/scaffold.py`).
    y ← y − lr (g(y) − c_k + c),   c_k⁺ = c_k − c + (w − y) / (T lr) after T steps
c_k⁺ is the mean of the round's gradients if the local optimiser is plain SGD, for which the paper writes it.
Personal parameters, of which the server knows nothing, take their own gradient.
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
class Scaffold:
    """Cross-entropy with SCAFFOLD's correction; with c = c_k = 0 it is FedAvg's client."""

    def criterion(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the loss (…) of logits (…, B, C), targets and weights (…, B)."""
        return CrossEntropy().criterion(logits, targets, weights)  # (…)

    def init_client(self, layout: Layout) -> dict[str, Tensor]:
        """Return c_k = 0 (D,)."""
        return {"control": torch.zeros(layout.size)}

    def direction(
        self, grads: Params, params: Mapping[str, Tensor], context: Context
    ) -> tuple[Params, dict[str, Tensor]]:
        """Return g − c_k + c; the difference, the same in all steps of a round, is kept between them."""
        drift = context.step_state.get("drift")
        if drift is None:
            drift = context.broadcast["control"] - context.client_state["control"]  # (D,)
        parts = context.layout.split(drift)
        return {n: g + parts[n] if n in parts else g for n, g in grads.items()}, {"drift": drift}

    def finish(self, params: Params, context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor], None]:
        """Keep c_k⁺ (D,) and upload c_k⁺ − c_k (D,)."""
        layout = context.layout
        moved = layout.join(context.received) - layout.join(params)  # (D,)
        # One after the other: a batched engine's num_steps is an integer tensor, which times lr would be float32.
        change = moved / context.num_steps / context.lr - context.broadcast["control"]  # (D,)
        return {"control": context.client_state["control"] + change}, {"control_change": change}, None
