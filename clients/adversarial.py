r"""Adversarial training: cross-entropy on samples that were moved, within a small box, to where the model errs most.

FAL, Li, Song & Yang, ICML 2023, Algorithm 1. https://arxiv.org/abs/2208.03635. The inner maximum is by projected
gradient ascent, Madry et al., ICLR 2018, eq. 2. https://arxiv.org/abs/1706.06083. From x_0 = x + U(−ε, ε), S times:
    x_{s+1} = Π_{‖x' − x‖_∞ ≤ ε, x' in [low, high]} (x_s + α sign ∇_x L(w; x_s, y)),   then a step on L(w; x_S, y)
Departs from FAL: its analysis has any adversary within an l_2 ball and a network of two layers; the box and its
ascent are what experiments on federated adversarial training take. Its server averages clients alike, FedAvg's by their
samples. Samples are moved under the running statistics of batch norm, which only the step on x_S changes; dropout
drops in both parts.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsim.ascent import Ascent
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Batch, Context, Model
from fedsim.layout import Params
from fedsim.rng import fold_in

_START = 0xAD5E  # tells the draw of the start apart from what else hangs on a step's key


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """Cross-entropy of adversarial samples.

    Args:
        radius: ε ≥ 0 in units of the features as the model sees them; 0 is FedAvg's client.
        step_size: α > 0, likewise; None: 2.5 ε / S, with which S steps reach any corner of the box.
        num_steps: S ≥ 0; 0 is FedAvg's client, 1 with a random start the fast gradient sign method.
        random_start: draw x_0 uniformly from the box; False begins at x.
        low: least value of a feature; None: no bound.
        high: largest, above `low`.

    Raises:
        ValueError: an argument out of its range.

    """

    radius: float = 0.1
    step_size: float | None = None
    num_steps: int = 10
    random_start: bool = True
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.radius < float("inf"):
            raise ValueError(f"Adversarial needs a finite radius >= 0, got {self.radius}; 0 is FedAvg's client")
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"Adversarial needs a finite step_size > 0, got {self.step_size}; null is 2.5 radius / S")
        if self.num_steps < 0:
            raise ValueError(f"Adversarial needs num_steps >= 0, got {self.num_steps}; 0 is FedAvg's client")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"Adversarial needs low < high, got {self.low} and {self.high}; null is no bound")

    def loss(self, model: Model, params: Params, batch: Batch, context: Context) -> tuple[Tensor, dict[str, Any]]:
        """Return the mean cross-entropy () of the moved samples.

        Raises:
            ValueError: the samples are no numbers that could be moved, e.g. tokens.

        """
        x = batch.x  # (B, …)
        if self.radius and self.num_steps:
            x = self._moved(model, params, batch, context)
        return CrossEntropy().mean_criterion(model(params, x), batch.y), {}

    def _moved(self, model: Model, params: Params, batch: Batch, context: Context) -> Tensor:
        """Return x_S (B, …), a constant to whoever differentiates by the parameters."""
        if not batch.x.is_floating_point():
            raise ValueError(f"client=adversarial needs floating-point features, this data has {batch.x.dtype}")
        ascent = Ascent(self.radius, self.num_steps, self.step_size, self.low, self.high)
        key = fold_in(context.key, _START) if self.random_start else None
        with getattr(model, "still", nullcontext)():
            return ascent.moved(lambda x: model(params, x), batch.x, batch.y, key)
