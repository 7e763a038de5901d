r"""DP-FedAvg: client-level differential privacy by clipping, a fixed denominator and Gaussian noise.

McMahan et al., ICLR 2018, Algorithm 1 (flat clipping, estimator f̃_f). https://arxiv.org/abs/1710.06963
    Δ = (1 / qN) \sum_{k ∈ S} Δ_k min(1, C / ‖Δ_k‖)  +  N(0, (z C / qN)² I),   each client in S with probability q
One client more or less moves the sum by at most C. What a rule does with Δ afterwards (momentum, Adam, a schedule)
costs no privacy, so any rule may stand inside: it sees Δ as its one update. Clients weigh alike: a weight of n_k
would need a bound of its own.

What is private is the sequence of models. Not what a simulation records beside them (losses, norms, the share of
clipped updates), not buffers, and not the draw of a simulation's noise, which follows from the seed.
ε holds for Poisson sampling alone, or where all take part; else there is none. The sampler draws an empty cohort
again, which the account passes over: its probability is at most exp(−qN).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import combine, row_norms
from fedsim.strategies.preaggregation import PreAggregator, clip_factors


class Accountant(Protocol):
    """Says what has been spent."""

    def __call__(self, *, noise_multiplier: float, sampling: float, num_rounds: int) -> float:
        """Return ε after `num_rounds` noisy sums over clients drawn with probability `sampling` each."""
        ...


@dataclass(frozen=True, kw_only=True)
class DPFedAvg(PreAggregator):
    """A rule on the noisy mean of clipped updates.

    Args:
        rule: the inner rule; FedAvg.
        max_norm: C > 0, in units of the updates' Euclidean norms.
        noise_multiplier: z ≥ 0; 0 is no noise, and no privacy.
        fraction: q in (0, 1] of the clients in a round, in expectation: the run's `fraction`.
        accountant: returns ε; `fedsim.metrics.privacy.RDP`. None: nothing is accounted.

    Raises:
        ValueError: an argument out of its range, or another fraction than the run's.

    """

    max_norm: float = 1.0
    noise_multiplier: float = 1.0
    fraction: float = 1.0
    accountant: Accountant | None = None

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"DPFedAvg needs max_norm > 0, got {self.max_norm}")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"DPFedAvg needs a finite noise_multiplier >= 0, got {self.noise_multiplier}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"DPFedAvg needs 0 < fraction <= 1, got {self.fraction}; it is the run's fraction")
        if self.accountant is not None and not self.noise_multiplier:
            warnings.warn(
                "noise_multiplier=0 is no privacy: epsilon is infinite, and null in what is written", stacklevel=2
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """What a run must bind: why clients are not drawn independently, its fraction, what the inner rule asks for."""
        return ("dependence", "fraction", *getattr(self.rule, "needs", ()))

    def bind(self, *, dependence: str | None = None, fraction: float | None = None, **values: Any) -> DPFedAvg:
        """Return the same around a bound rule, without a bound on ε where clients' participation is not independent."""
        if fraction is not None and fraction != self.fraction:
            raise ValueError(f"DPFedAvg's fraction={self.fraction} is not the run's, {fraction}: sums and ε go by it")
        inner: Any = self.rule
        bound = replace(self, rule=inner.bind(**values)) if values else self
        if dependence is None or self.accountant is None:
            return bound
        warnings.warn(
            f"with {dependence} clients do not take part independently of each other: there is no epsilon, and null "
            "in its place",
            stacklevel=2,
        )
        return replace(bound, accountant=_Unbounded(delta=getattr(self.accountant, "delta", None)))

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return the inner rule's memory and N."""
        return {"rule": self.rule.init(layout, num_clients), "num_clients": num_clients}

    def broadcast(self, state: State) -> dict[str, Any]:
        """Return what the inner rule sends."""
        inner = getattr(self.rule, "broadcast", None)
        return inner(state["rule"]) if inner else {}

    def check(self, num_participants: int) -> None:
        """Refuse nothing: the inner rule sees one update of any number."""

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the inner rule's step (D,) on the private mean; ε after this round and its δ are metrics."""
        population = state["num_clients"]
        expected = max(1, math.floor(self.fraction * population + 0.5))  # qN, as the run counts it
        rows = cohort.rows
        factors = clip_factors(row_norms(rows), self.max_norm)  # (K,)
        scale = self.noise_multiplier * self.max_norm / expected
        drawn = cohort.rng("privacy").standard_normal(rows.shape[1])  # (D,)
        private = combine(factors / expected, rows) + scale * torch.from_numpy(drawn).to(rows)  # (D,)
        delta, kept, metrics = self.rule(_alone(cohort, private), state["rule"])
        known = {name: value for name, value in metrics.items() if not (isinstance(value, Tensor) and value.dim())}
        own: Metrics = {"clipped_fraction": (factors < 1).double().mean(), "noise_std": scale}
        if self.accountant is not None:
            own["epsilon"] = self.accountant(
                noise_multiplier=self.noise_multiplier, sampling=expected / population, num_rounds=max(1, cohort.round)
            )
            own["delta"] = getattr(self.accountant, "delta", None)
        return delta, {**state, "rule": kept}, {**known, **own}


@dataclass(frozen=True, kw_only=True)
class _Unbounded:
    """The account where the assumptions of no account hold."""

    delta: float | None

    def __call__(self, *, noise_multiplier: float, sampling: float, num_rounds: int) -> float:
        return math.inf


def _alone(cohort: Cohort, update: Tensor) -> Cohort:
    """Return a cohort of one update, of which nothing else is any client's."""
    one = replace(cohort, updates=None, extras={}).take(torch.zeros(1, dtype=torch.int64, device=cohort.clients.device))
    return replace(
        one, updates=update[None], clients=torch.zeros_like(one.clients), weights=torch.ones_like(one.weights),
        num_steps=torch.ones_like(one.num_steps),
    )  # fmt: skip
