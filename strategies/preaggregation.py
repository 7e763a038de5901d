"""What rules share that change the updates before another rule sees them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Metrics, Rule, State, summed
from fedsim.layout import Layout
from fedsim.linalg import mapped
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class PreAggregator:
    """A rule on other updates, which `mix` makes. Memory, broadcast, wishes and checks are the inner rule's.

    Args:
        rule: the inner rule.

    """

    rule: Rule = field(default_factory=FedAvg)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "rule":  # asked for before there is a rule, e.g. by copy
            raise AttributeError(name)
        return getattr(self.rule, name)

    def bind(self, **values: Any) -> PreAggregator:
        """Return the same around a bound rule."""
        inner: Any = self.rule
        return replace(self, rule=inner.bind(**values))

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return the inner rule's memory."""
        return self.rule.init(layout, num_clients)

    def mix(self, cohort: Cohort) -> tuple[Cohort, Metrics]:
        """Return the cohort that the inner rule sees, and metrics."""
        raise NotImplementedError

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the inner rule's step (D,) on the mixed updates."""
        mixed, own = self.mix(cohort)
        delta, state, metrics = self.rule(mixed, state)
        return delta, state, {**metrics, **own}


@dataclass(frozen=True, kw_only=True)
class Scaling(PreAggregator):
    """A rule on updates that are made shorter or longer, by the factors that `factors` gives.

    Around a rule that needs the weighted mean alone no scaled update is ever written: Σ c_k f_k Δ_k is one product.

    Args:
        rule: the inner rule.

    """

    def factors(self, cohort: Cohort) -> tuple[Tensor, Metrics]:
        """Return f_k (K,) in float64, and metrics."""
        raise NotImplementedError

    def mix(self, cohort: Cohort) -> tuple[Cohort, Metrics]:
        """Return the cohort with row k times factor k, and the factors' metrics."""
        factors, own = self.factors(cohort)
        return replace(cohort, updates=mapped(factors, cohort.matrix)), own

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the inner rule's step (D,) on the scaled updates."""
        if not isinstance(self.rule, LinearRule) or getattr(self.rule, "needs_rows", False):
            return super().__call__(cohort, state)
        factors, own = self.factors(cohort)
        delta, state, metrics = self.rule(summed(cohort, self.rule, state, factors), state)
        return delta, state, {**metrics, **own}


def clip_factors(norms: Tensor, bound: float | Tensor) -> Tensor:
    """Return min(1, C / ‖x_k‖) (K,) of norms (K,) and a bound C; 1 for a zero row."""
    return (bound / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1)
