r"""Asynchronous tiers: clients of one delay are averaged together, and the tiers' models apart, the rarer the heavier.

FedAT, Chai et al., SC 2021, Algorithm 1 (https://arxiv.org/abs/2010.05958), the baseline "Asyn-Tiers" of Huang et al.
(AAAI 2025), whose settings are not published. With M tiers from the fastest on, T_m the updates of tier m so far and
T their sum,
    w_tier(m) = \sum_{k in m} (n_k / n) (w_received,k + Δ_k),   w = \sum_m (T_{M+1−m} / T) w_tier(m)
Departs from the paper: a client's tier follows from the staleness of its reply, not from profiling, and only tiers
that have answered count.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import beside, combine, proportions
from fedsim.strategies.staleness import moved, version


@dataclass(frozen=True, kw_only=True)
class AsynTiers:
    """FedAT's cross-tier average.

    Args:
        bounds: rounds ≥ 0, ascending: tier m holds replies of staleness above bounds[m − 1] and up to bounds[m]; one
            more tier holds the rest.

    Raises:
        ValueError: bounds that do not ascend.

    """

    bounds: tuple[int, ...] = (0, 20)

    for_staleness: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.bounds or self.bounds[0] < 0 or sorted(set(self.bounds)) != list(self.bounds):
            raise ValueError(f"AsynTiers needs bounds >= 0 that ascend, got {list(self.bounds)}")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no tiers: none has answered."""
        return {"models": {}, "counts": {}}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the step (D,) to the mean of the tiers' models; the number of tiers is a metric."""
        zero = beside(cohort.rows).new_zeros(cohort.layout.size)  # (D,)
        newest = version(cohort, cohort.round - 1, zero) if cohort.models else zero
        tier_of = [bisect_left(self.bounds, age) for age in cohort.staleness.tolist()]
        models = {name: model.to(newest) for name, model in state["models"].items()}
        counts = dict(state["counts"])
        for tier in sorted(set(tier_of)):
            mine = cohort.weights.new_tensor([own == tier for own in tier_of])  # (K,)
            p = proportions(mine * cohort.weights)  # (K,) zero outside the tier
            towards, since = combine(p, cohort.rows), moved(cohort, p, zero)  # (D,) the tier's model less the server's
            models[str(tier)] = newest + (towards if since is None else towards - since)
            counts[str(tier)] = counts.get(str(tier), 0) + 1
        known = sorted(models, key=int)
        total = sum(counts.values())
        shares = [counts[other] / total for other in reversed(known)]  # the rarest tier's updates weigh the fastest one
        delta = sum((p * (models[tier] - newest) for p, tier in zip(shares, known, strict=True)), 0 * newest)
        return delta, {"models": models, "counts": counts}, {"num_tiers": len(known)}
