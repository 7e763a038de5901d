r"""q-FedAvg's client: local training as usual, and the loss of the received model on all of its samples.

Li et al., ICLR 2020, Algorithm 2. https://arxiv.org/abs/1905.10497 (the server is `strategies/qfedavg.py`)
    uploads F_k(wᵗ) = (1/n_k) \sum_i ℓ(wᵗ; x_i)
A last phase passes over the samples once, forward alone, and goes nowhere; it counts as steps, in time and in
train_loss.
Departs from the paper: that pass is one of training, so that dropout and augmentation are on in it; and a client that
does part of its local steps (`devices.partial_work`) passes over part of its samples, whose mean F_k then is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Batch, Context, Model, Phase
from fedsim.layout import Params


@dataclass(frozen=True)
class QFedAvg:
    """Cross-entropy, and its value at the received model as the upload `received_loss`."""

    half_of = "strategy=qfedavg client=qfedavg"

    def phases(self) -> tuple[Phase, ...]:
        """Return the local steps, and the pass at the received model."""
        return Phase(), Phase(local_epochs=1)

    def loss(self, model: Model, params: Params, batch: Batch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss () of a batch; in the last phase at w, and so that its gradient is its value.

        Directions see gradients alone: that of f + f (y − y₀) in y is the number f. A third number, 1, says by how
        much clipping has shrunk them.
        """
        size = len(batch.y)
        even = batch.x.new_full((size,), 1 / size, dtype=next(iter(params.values())).dtype)  # (B,)
        if context.phase == 0:
            return CrossEntropy().criterion(model(params, batch.x), batch.y, even), {}
        at = {name: context.received.get(name, value).detach() for name, value in params.items()}
        value = CrossEntropy().criterion(model(at, batch.x), batch.y, even).detach()  # ()
        told = context.layout.join(params)[:3]  # (3,)
        part = value * size / context.num_samples  # in this order: integers alone would be divided in float32
        share = value.new_full((), size) / context.num_samples
        return value + torch.stack([part, share, torch.ones_like(value)]) @ (told - told.detach()), {}

    def direction(
        self, grads: Params, params: Mapping[str, Tensor], context: Context
    ) -> tuple[Params, dict[str, Tensor]]:
        """Return the gradient; in the last phase its numbers are added up, and nothing moves."""
        if context.phase == 0:
            return grads, {}
        part, share, one = context.layout.join(grads)[:3]  # () each
        zero = torch.zeros_like(part)
        before = context.step_state or {"loss": zero, "share": zero}
        now = {"loss": before["loss"] + part / one, "share": before["share"] + share / one}
        return grads, {**now, "lr_scale": zero}

    def finish(self, params: Params, context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor], None]:
        """Upload F_k(wᵗ) ()."""
        return {}, {"received_loss": context.step_state["loss"] / context.step_state["share"]}, None
