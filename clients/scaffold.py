r"""SCAFFOLD's client: steps corrected by the difference of the server's and its own control variate.

Karimireddy et al., ICML 2020, Algorithm 1 and eq. 4. https://arxiv.org/abs/1910.06378 (`strategies/scaffold.py`).
    y ← y − lr (g(y) − c_k + c)   for T steps
    option I    c_k⁺ = ∇L_k(w), from one more pass over the client's samples at the received model w
    option II   c_k⁺ = c_k − c + (w − y) / (T lr)
Option II's c_k⁺ is the mean of the round's gradients if the local optimiser is plain SGD at one rate, for which the
paper writes it, and costs nothing. Under momentum or a rate that moves within the round (client=fedhyper) it is off by
their factor; option I's holds for any optimiser, and its pass counts as steps, in time and in train_loss.
Personal parameters, of which the server knows nothing, take their own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Batch, Context, Model, Phase
from fedsim.layout import Layout, Params


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """Cross-entropy with SCAFFOLD's correction, option II; with c = c_k = 0 it is FedAvg's client."""

    half_of = "strategy=scaffold client=scaffold"

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
        return _corrected(grads, context)

    def finish(self, params: Params, context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor], None]:
        """Keep c_k⁺ (D,) and upload c_k⁺ − c_k (D,)."""
        layout = context.layout
        moved = layout.join({name: w - params[name] for name, w in context.received.items()})  # (D,)
        # One after the other: a batched engine's num_steps is an integer tensor, which times lr would be float32.
        change = moved.div_(context.num_steps).div_(context.lr).sub_(context.broadcast["control"])  # (D,)
        return {"control": context.client_state["control"] + change}, {"control_change": change}, None


@dataclass(frozen=True, kw_only=True)
class ScaffoldI:
    """Cross-entropy with SCAFFOLD's correction, option I.

    A last phase passes over the samples once and goes nowhere: its gradients are taken at the received model, each
    batch's in proportion to its samples, and summed up to ∇L_k(w). Where `clip_norm` is set, that is of clipped ones.
    Personal parameters are in it as the steps left them.
    """

    half_of = Scaffold.half_of

    def phases(self) -> tuple[Phase, ...]:
        """Return the local steps, and the pass at the received model."""
        return Phase(), Phase(local_epochs=1)

    def init_client(self, layout: Layout) -> dict[str, Tensor]:
        """Return c_k = 0 (D,)."""
        return {"control": torch.zeros(layout.size)}

    def loss(self, model: Model, params: Params, batch: Batch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss () of a batch; in the last phase at w, with b/n of its gradient for b of n samples."""
        size = len(batch.y)
        even = batch.x.new_full((size,), 1 / size, dtype=next(iter(params.values())).dtype)  # (B,)
        if context.phase == 0:
            return CrossEntropy().criterion(model(params, batch.x), batch.y, even), {}
        # w + (y − y) has w's value and y's gradient.
        at = {n: context.received[n] + (y - y.detach()) if n in context.received else y for n, y in params.items()}
        loss = CrossEntropy().criterion(model(at, batch.x), batch.y, even)
        part = loss * size / context.num_samples
        return loss.detach() + (part - part.detach()), {}

    def direction(
        self, grads: Params, params: Mapping[str, Tensor], context: Context
    ) -> tuple[Params, dict[str, Tensor]]:
        """Return g − c_k + c; in the last phase the gradient so far is kept, and nothing moves."""
        if context.phase == 0:
            return _corrected(grads, context)
        gradient = context.layout.join(grads)  # (D,)
        before = context.step_state.get("gradient")
        kept = gradient if before is None else before + gradient
        return grads, {"gradient": kept, "lr_scale": gradient.new_zeros(())}

    def finish(self, params: Params, context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor], None]:
        """Keep c_k⁺ (D,) and upload c_k⁺ − c_k (D,)."""
        control = context.step_state["gradient"]
        return {"control": control}, {"control_change": control - context.client_state["control"]}, None


def _corrected(grads: Params, context: Context) -> tuple[Params, dict[str, Tensor]]:
    drift = context.step_state.get("drift")
    if drift is None:
        drift = context.broadcast["control"] - context.client_state["control"]  # (D,)
    parts = context.layout.split(drift)
    return {n: g + parts[n] if n in parts else g for n, g in grads.items()}, {"drift": drift}
