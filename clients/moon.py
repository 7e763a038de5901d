r"""MOON: a client's features are drawn to the received model's and away from those of its own last model.

Li et al., CVPR 2021, eq. 3 and 4. https://arxiv.org/abs/2103.16257. With z, z_g, z_p (F,) the features of a sample
under the client's, the received and the client's previous model, and sim the cosine:
    L = CE + μ · mean_b −log[ e^{sim(z, z_g)/τ} / (e^{sim(z, z_g)/τ} + e^{sim(z, z_p)/τ}) ]
Departs from the paper: its network has a projection head of two layers, on whose output z is taken; here z is what
the model's `head` is applied to. In a client's first round the previous model is the received one, as if it had
taken part before the first round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, linalg
from torch.nn import functional

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Batch, Context, Model
from fedsim.layout import Layout, Params

EPS = 1e-8  # least length that features are divided by, as torch's own cosine


@dataclass(frozen=True, kw_only=True)
class Moon:
    """MOON's client objective, for models with `features` and `head`.

    Args:
        contrastive_mu: μ ≥ 0; 0 is FedAvg's client. The paper tunes over 0.1, 1, 5, 10.
        temperature: τ > 0; 0.5 as in the paper.

    Raises:
        ValueError: an argument out of its range.

    """

    contrastive_mu: float = 1.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.contrastive_mu < float("inf"):
            raise ValueError(
                f"Moon needs a finite contrastive_mu >= 0, got {self.contrastive_mu}; 0 is FedAvg's client"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"Moon needs a finite temperature > 0, got {self.temperature}; 0.5 as in the paper")

    def init_client(self, layout: Layout) -> dict[str, Tensor]:
        """Return no previous model yet: zeros (D,), and that it was never seen."""
        return {"previous": torch.zeros(layout.size), "seen": torch.zeros(())}

    def loss(self, model: Model, params: Params, batch: Batch, context: Context) -> tuple[Tensor, dict[str, Any]]:
        """Return cross-entropy and the contrast of a batch, ()."""
        z = model.features(params, batch.x)  # (B, F)
        weights = z.new_full((z.shape[0],), 1 / z.shape[0])  # (B,)
        loss = CrossEntropy().criterion(model.head(params, z), batch.y, weights)
        if self.contrastive_mu == 0:
            return loss, {}
        kept, seen = context.layout.split(context.client_state["previous"]), context.client_state["seen"] > 0
        previous = {name: torch.where(seen, kept[name], w) for name, w in context.received.items()}
        with torch.no_grad():
            z_global = model.features(dict(context.received), batch.x)  # (B, F)
            z_previous = model.features(previous, batch.x)  # (B, F)
            away = _unit(z_previous) - _unit(z_global)  # (B, F)
        closer = linalg.vecdot(_unit(z), away)  # (B,) the difference of the cosines, of one z
        # −log(e^a / (e^a + e^b)) = softplus(b − a)
        return loss + self.contrastive_mu * functional.softplus(closer / self.temperature).mean(), {}

    def finish(self, params: Params, context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor], None]:
        """Keep the model (D,) as the previous one."""
        return {"previous": context.layout.join(params), "seen": context.client_state["seen"] * 0 + 1}, {}, None


def _unit(z: Tensor) -> Tensor:
    """Return features (B, F) of length 1; 0 stays 0."""
    return functional.normalize(z, dim=-1, eps=EPS)
