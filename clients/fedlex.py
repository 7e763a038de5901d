r"""FedLEx's client: it explores once, and from then on its gradients are multiplied by what was found.

Internò et al., IJCNN 2024. https://arxiv.org/abs/2506.18640 (the server is `strategies/fedlex.py`)
    exploring     uploads (θ_k − θ₀)²: how far each parameter went, without where to
    afterwards    g ← G ⊙ g
Departs from the code: where `clip_norm` is set, gradients are clipped before G; what weight decay adds is not guided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsim.clients.wrapper import Wrapper
from fedsim.contracts import Context
from fedsim.layout import Params


@dataclass(frozen=True, kw_only=True)
class FedLEx(Wrapper):
    """Any objective, its direction guided.

    Args:
        objective: what is minimised; cross-entropy.

    """

    half_of = "strategy=fedlex client=fedlex"

    def direction(
        self, grads: Params, params: Mapping[str, Tensor], context: Context
    ) -> tuple[Params, dict[str, Tensor]]:
        """Return G times the objective's own direction."""
        grads, state = self.inner_direction(grads, params, context)
        guidance = context.broadcast.get("guidance")
        if guidance is None:
            return grads, state
        parts = context.layout.split(guidance)
        return {name: g * parts[name] if name in parts else g for name, g in grads.items()}, state

    def finish(self, params: Params, context: Context) -> tuple[Mapping[str, Tensor], dict[str, Tensor], Any]:
        """Return what the objective returns, and upload the squared deviation (D,) while there is no guidance."""
        state, extras, weight = self.inner_finish(params, context)
        if "guidance" in context.broadcast:
            return state, extras, weight
        moved = context.layout.join(params) - context.layout.join(context.received)  # (D,)
        return state, {**extras, "deviation": moved.square()}, weight
