r"""The exact hypergradient of a round, by differentiating through it: what FedHyper-G approximates, for small models.

A round maps w to R(w) = w + \sum_k p_k Δ_k(w), Δ_k the update of client k's local training, and the clients' mean
loss is F = \sum_k p_k f_k. Had the step before, Δᵗ⁻¹, been scaled by α instead of 1,
    L(α) = F(R(wᵗ⁻¹ + α Δᵗ⁻¹)),   dL/dα = ∇F(R(wᵗ))ᵀ ∂R(wᵗ) Δᵗ⁻¹     at α = 1
FedHyper-G (Wang et al., ICLR 2024, eq. 10 to 16; https://arxiv.org/abs/2310.03156) takes ⟨Δᵗ, Δᵗ⁻¹⟩ in its place:
with E full-batch steps at rate η, Δᵗ = −η E ∇F(wᵗ) + O(η²), so that ⟨Δᵗ, Δᵗ⁻¹⟩ = −η E dL/dα (1 + O(η)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.local import LocalTraining, rates_of


class RoundGradient(NamedTuple):
    """A round's loss and its derivatives."""

    loss: Tensor  # F(R(w)) ()
    start: Tensor  # dF(R(w))/dw (D,)
    update: Tensor  # R(w) − w (D,)

    def of_rate(self, previous: Tensor) -> Tensor:
        """Return dL/dα () for the step (D,) that led to w; it is negative where a longer one had been better."""
        return self.start @ previous


def round_gradient(
    training: LocalTraining, losses: Callable[[Tensor], Tensor], weights: Tensor, start: Tensor, *,
    num_steps: Tensor, lr: float,
) -> RoundGradient:  # fmt: skip
    """Differentiate the loss after a round in the model that it starts from.

    Args:
        training: what clients do, on full batches by sgd without weight decay.
        losses: from each client's parameters (S, D) to its loss (S,).
        weights: (S,) of the clients, un-normalised.
        start: w (D,).
        num_steps: (S,) int64 local steps.
        lr: local rate.

    Raises:
        ValueError: weight decay, which acts beside the loss, or an optimiser that cannot be unrolled.

    """
    if training.weight_decay:
        raise ValueError(f"a round is differentiated without weight decay, got {training.weight_decay}; add it to f_k")
    share = (weights / weights.sum()).to(start)  # (S,)
    # `unroll` holds its start fixed; moving it by o moves every loss by o.
    moved = torch.zeros_like(start).requires_grad_()  # (D,)
    updates = training.unroll(
        lambda params, _: losses(params + moved), start.expand(len(share), -1), rates=rates_of(num_steps, lr, start)
    )  # (S, D)
    with torch.enable_grad():
        update = share @ updates  # (D,)
        after = start.detach() + moved + update  # (D,)
        loss = share @ losses(after.expand(len(share), -1))  # ()
        (gradient,) = torch.autograd.grad(loss, moved)  # (D,)
    return RoundGradient(loss.detach(), gradient, update.detach())
