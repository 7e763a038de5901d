r"""q-FedAvg: the more a client loses, the more it counts, so that accuracies are alike.

Li et al., ICLR 2020, Algorithm 2. https://arxiv.org/abs/1905.10497 (the client is `clients/qfedavg.py`)
    min_w \sum_k p_k F_k(w)^{q+1} / (q + 1)
With L = 1/lr of the round in which k was sent the model, and F_k at that model, Δw_k = −L Δ_k is the gradient that the
update stands for, and
    w ← w − \sum_k p_k F_k^q Δw_k / \sum_k p_k h_k,   h_k = q F_k^{q−1} ‖Δw_k‖² + L F_k^q
h_k estimates the local Lipschitz constant of F_k^{q+1}, so that one rate serves every q; q = 0 is FedAvg.

Departs from the paper: there clients are drawn in proportion to p_k and count alike; here they are drawn by the
run's sampler, and p_k = n_k / \sum n weighs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Metrics, State, Sums

LEAST = 1e-10  # loss below which F^{q−1} is not trusted, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class QFedAvg(LinearRule):
    """q-FedAvg's rule; needs the upload `received_loss` of `client=qfedavg`.

    Args:
        q: ≥ 0; 0 is FedAvg, larger is fairer. The paper tunes over 0.001 … 5.
        client_lr: lr > 0 of the clients, 1/L; None is their own of each round, 1 outside of a run. Factors on it that
            others set (FedHyper-SL, FedHyper-CL) are not seen.

    Raises:
        ValueError: an argument out of its range.

    >>> from fedsim.testing import cohort_of
    >>> import torch
    >>> cohort = cohort_of([[-1.0], [-1.0]], extras={"received_loss": torch.tensor([1.0, 3.0])})
    >>> QFedAvg(q=1.0, client_lr=0.5)(cohort, {})[0]  # −(1 + 3) / ((2 + 1) + (2 + 3))
    tensor([-0.5000], dtype=torch.float64)

    """

    q: float = 1.0
    client_lr: float | None = None

    needs = ("local_training",)
    training: ClassVar[Any] = None  # what clients do locally; `bind` gives an instance its own
    uploads = ("received_loss",)
    half_of = "strategy=qfedavg client=qfedavg"

    def __post_init__(self) -> None:
        if not 0 <= self.q < float("inf"):
            raise ValueError(f"QFedAvg needs a finite q >= 0, got {self.q}; 0 is FedAvg")
        if self.client_lr is not None and not self.client_lr > 0:
            raise ValueError(f"QFedAvg needs client_lr > 0, got {self.client_lr}; null is the clients' own")

    def bind(self, local_training: Any) -> QFedAvg:
        """Return the rule with the clients' rates, for where none was given."""
        bound = replace(self)
        object.__setattr__(bound, "training", local_training)
        return bound

    def _rates(self, cohort: Cohort) -> Tensor:
        """Return 1/L (K,) in float64, each of the round whose model its client was sent."""
        sent = (cohort.round - cohort.staleness).tolist()
        given = self.client_lr or (None if self.training else 1.0)
        rates = [self.training.rate(t) if given is None else given for t in sent]
        return torch.tensor(rates, dtype=torch.float64, device=cohort.weights.device)

    def coefficients(self, cohort: Cohort, state: State) -> Tensor:
        """Return n_k L F_k^q (K,)."""
        return cohort.weights * (_losses(cohort).pow(self.q) / self._rates(cohort)).to(cohort.weights)

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the step (D,); its length over the mean's and the spread of the losses are metrics."""
        losses, weights, rates = _losses(sums.cohort), sums.cohort.weights.double(), self._rates(sums.cohort)  # (K,)
        squares = sums.square_norms.to(weights)  # (K,)
        powers = losses.pow(self.q) / rates  # (K,)
        curved = self.q * losses.pow(self.q - 1) * squares / rates.square() if self.q else torch.zeros_like(losses)
        scale = (weights * powers).sum() / (weights * (curved + powers)).sum()  # ()
        spread = losses.std() if len(losses) > 1 else losses.new_zeros(())
        return mean * scale.to(mean), state, {"server_rate": scale, "received_loss_std": spread}


def _losses(cohort: Cohort) -> Tensor:
    """Return F_k(wᵗ) (K,) in float64."""
    return cohort.extras["received_loss"].double().clamp_min(LEAST)
