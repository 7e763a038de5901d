r"""Ditto's client: the global and the personal model, each on its own loss, in the same steps.

Li et al., ICML 2021, Algorithm 1. https://arxiv.org/abs/2012.04221 (the models are `strategies/ditto.py`'s).
    L_k(w) + L_k(v) + (λ/2) ‖v − w_received‖²
The two have no parameter in common, so that one gradient is both. The reported training loss is the sum, and
`client.clip_norm` bounds both gradients together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Batch, Context, Model
from fedsim.layout import Params


@dataclass(frozen=True, kw_only=True)
class Ditto:
    """Ditto's client objective, for the twin models that `strategy=ditto` makes.

    Args:
        ditto_lambda: λ ≥ 0; 0 trains the personal model alone, a large one holds it at the global model. The authors'
            code (litian96/ditto), where λ is dynamic, picks among 0.1, 1 and 2 in each step.

    Raises:
        ValueError: an argument out of its range.

    """

    ditto_lambda: float = 0.1

    half_of = "strategy=ditto client=ditto"

    def __post_init__(self) -> None:
        if not 0 <= self.ditto_lambda < float("inf"):
            raise ValueError(f"Ditto needs a finite ditto_lambda >= 0, got {self.ditto_lambda}; 0 is local training")

    def loss(self, model: Model, params: Params, batch: Batch, context: Context) -> tuple[Tensor, dict[str, Any]]:
        """Return the sum () of both models' cross-entropies."""
        logits = model(params, batch.x)  # (2, B, C)
        weights = logits.new_full((batch.y.shape[0],), 1 / batch.y.shape[0])  # (B,)
        shared, personal = (CrossEntropy().criterion(z, batch.y, weights) for z in logits)
        return shared + personal, {}

    def direction(
        self, grads: Params, params: Mapping[str, Tensor], context: Context
    ) -> tuple[Params, dict[str, Tensor]]:
        """Return the gradients, the personal model's with λ (v − w_received)."""
        return {name: self._pulled(name, grad, params, context) for name, grad in grads.items()}, {}

    adapt_direction = direction  # who joins late, or adapts for an evaluation, is pulled likewise

    def untrained(self, params: Params) -> Params:
        """Return the global model in the personal one's place, for a client that never trained one."""
        return {f"personal.{name.removeprefix('shared.')}": value for name, value in params.items()}

    def _pulled(self, name: str, grad: Tensor, params: Mapping[str, Tensor], context: Context) -> Tensor:
        prefix, _, rest = name.partition(".")
        if prefix != "personal":
            return grad
        return grad + self.ditto_lambda * (params[name] - context.received[f"shared.{rest}"])
