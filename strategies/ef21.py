r"""EF21 and EF21-W, the server half: step along the sum of the estimates that compressed messages keep up to date.

EF21: Richtárik, Sokolov & Fatkhullin, NeurIPS 2021, Algorithm 2. https://arxiv.org/abs/2106.05203
EF21-W: Richtárik, Gasanov & Burlachenko, ICLR 2024, Algorithm 2. https://arxiv.org/abs/2402.10774
    G ← G + \sum_k w_k u_k over those who sent,   x ← x + η G;   w_k = 1/n, in EF21-W L_k / \sum_j L_j
    ξ(a) = (1 + \sqrt{1 − a}) / a − 1
    old step γ = 1 / (L + \sqrt{mean L_k²} ξ(a)),   new step γ = 1 / (L + mean(L_k) ξ(a))     (2024, theorems 2 and 3)
u_k is compressor=ef21's, G = \sum_k w_k g_k over all n clients, seen or not. The objective is the plain mean of the
clients' losses, as in the papers. Where a client's round is one full-batch step at its rate lr, η = γ / lr; with more
local work the theory is silent. For compressors that scale with their input (top-k) EF21-W makes the same steps as
EF21: what it adds is the proof of the larger γ, which plain EF21 may take too.

Departs from the papers: g starts at 0, not at the full gradients; skipped clients keep theirs, for which the
contraction is p a if each takes part with probability p: E‖bC(v) − v‖² ≤ (1 − p a)‖v‖² with b ~ Bernoulli(p).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Metrics, State, Sums
from fedsim.layout import Layout
from fedsim.linalg import proportions

STEPS = ("manual", "new", "old")
LEAST_WEIGHT = 1e-6  # as the client half's


def xi(contraction: float) -> float:
    """Return ξ(a) of a contraction a in (0, 1].

    >>> [round(xi(a), 4) for a in (1.0, 0.5, 0.1, 0.01)]
    [0.0, 2.4142, 18.4868, 198.4987]
    """
    return (1 + math.sqrt(1 - contraction)) / contraction - 1


def step_size(smoothness: tuple[float, ...], contraction: float, *, step: str, whole: float | None = None) -> float:
    """Return γ.

    Args:
        smoothness: L_k > 0 of each client.
        contraction: a in (0, 1].
        step: "new" or "old".
        whole: L of the mean of the losses; None: the mean of L_k, which it never exceeds.

    """
    mean = math.fsum(smoothness) / len(smoothness)
    square = math.sqrt(math.fsum(value**2 for value in smoothness) / len(smoothness))
    return 1 / ((mean if whole is None else whole) + (mean if step == "new" else square) * xi(contraction))


@dataclass(frozen=True, kw_only=True)
class EF21(LinearRule):
    """Error feedback by estimates.

    Args:
        server_lr: η > 0; None: 1, or what `step` says.
        step: "manual" (η as given), "new" or "old" (from the smoothness).
        smoothness: L_k > 0 of every client, by id; None: unknown. Held-out clients leave gaps in the ids, which EF21-W
            cannot have.
        global_smoothness: L > 0 of the mean loss; None: the mean of L_k.
        weighted: EF21-W.
        alpha: a in (0, 1], the compressor's contraction: k/D of top-k.
        participation: p in (0, 1], the share of the clients in a round.
        client_lr: lr > 0 of the clients' one step, the same in all rounds.

    Raises:
        ValueError: an argument out of its range, or a step or weights without the smoothness they need.

    """

    server_lr: float | None = None
    step: str = "manual"
    smoothness: tuple[float, ...] | None = None
    global_smoothness: float | None = None
    weighted: bool = False
    alpha: float = 1.0
    participation: float = 1.0
    client_lr: float = 1.0

    half_of = "strategy=ef21 compressor=ef21"
    needs = ("local_training",)

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise ValueError(f"EF21's step is one of {', '.join(STEPS)}, got {self.step!r}")
        if self.server_lr is not None and not self.server_lr > 0:
            raise ValueError(f"EF21 needs server_lr > 0, got {self.server_lr}; null is 1, or what step says")
        if self.step != "manual" and self.server_lr is not None:
            raise ValueError(f"EF21 takes server_lr={self.server_lr} or step={self.step}, not both")
        if self.smoothness is None and (self.weighted or self.step != "manual"):
            raise ValueError("EF21 needs smoothness, L_k of every client, for weighted=true and for step=new or old")
        if self.smoothness is not None and not all(0 < value < math.inf for value in self.smoothness):
            raise ValueError(f"EF21 needs smoothness > 0 and finite for every client, got {self.smoothness}")
        if self.global_smoothness is not None and not self.global_smoothness > 0:
            raise ValueError(f"EF21 needs global_smoothness > 0, got {self.global_smoothness}; null: the mean of L_k")
        for name in ("alpha", "participation"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"EF21 needs {name} in (0, 1], got {getattr(self, name)}")
        if not self.client_lr > 0:
            raise ValueError(f"EF21 needs client_lr > 0, got {self.client_lr}")

    def bind(self, local_training: Any) -> EF21:
        """Return the rule itself.

        Raises:
            ValueError: a step by theory for clients whose rate decays: G holds messages of several rates.

        """
        if self.step != "manual" and local_training.lr_decay != 1:
            raise ValueError(
                f"EF21's step={self.step} is for clients of a constant rate, and client.lr_decay="
                f"{local_training.lr_decay}; choose client.lr_decay=1 or step=manual"
            )
        return self

    @property
    def rate(self) -> float:
        """The server's rate η."""
        if self.step == "manual" or self.smoothness is None:
            return 1.0 if self.server_lr is None else self.server_lr
        a = self.alpha * self.participation
        return step_size(self.smoothness, a, step=self.step, whole=self.global_smoothness) / self.client_lr

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return G = 0 (D,) in float64, and n."""
        if self.smoothness is not None and len(self.smoothness) != num_clients:
            raise ValueError(f"EF21 needs smoothness of all {num_clients} clients, got {len(self.smoothness)}")
        return {"sum": torch.zeros(layout.size, dtype=torch.float64), "num_clients": num_clients}

    def coefficients(self, cohort: Cohort, state: State) -> Tensor:
        """Return w_k (K,)."""
        if self.smoothness is None or not self.weighted:
            return torch.full_like(cohort.weights, 1 / state["num_clients"])
        weights = proportions(
            torch.tensor(self.smoothness, dtype=torch.float64, device=cohort.clients.device), LEAST_WEIGHT
        )  # (n,)
        return weights[cohort.clients].to(cohort.weights)

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return η G (D,)."""
        total = state["sum"].to(mean.device) + mean.double() * sums.coefficients.double().sum()  # (D,)
        metrics = {"server_rate": self.rate, "estimate_norm": torch.linalg.vector_norm(total)}
        return (self.rate * total).to(mean), {**state, "sum": total}, metrics
