r"""Bucketing before any rule: the updates are thrown into buckets at random, and the rule sees the buckets' means.

Karimireddy, He & Jaggi, ICLR 2022, Algorithm 1. https://arxiv.org/abs/2006.09365
    π a random permutation of the clients;   Δ_i ← 1/s \sum_{j=(i−1)s+1}^{min(is, K)} Δ_{π(j)},   i = 1 … ⌈K/s⌉
Means of s updates differ less from one another, but a bucket with one attacker is an attacker: the inner rule's
number of attackers stays, of s times fewer rows. The last bucket may be smaller; a bucket weighs what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.linalg import beside, mapped
from fedsim.strategies.preaggregation import PreAggregator


@dataclass(frozen=True, kw_only=True)
class Bucketing(PreAggregator):
    """A rule on means of random buckets.

    Args:
        rule: the inner rule.
        bucket_size: s ≥ 1 updates a bucket; 1 is the inner rule. The paper takes 2.

    Raises:
        ValueError: `bucket_size` below 1.

    """

    bucket_size: int = 2

    def __post_init__(self) -> None:
        if self.bucket_size < 1:
            raise ValueError(f"Bucketing needs bucket_size >= 1, got {self.bucket_size}; 1 is the inner rule")

    def check(self, num_participants: int) -> None:
        """Refuse a cohort whose buckets are too few for the inner rule."""
        inner: Any = self.rule
        if hasattr(inner, "check"):
            inner.check(-(-num_participants // self.bucket_size))

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the inner rule's step (D,); what it says of a bucket is said of the clients in it."""
        bucket = self.buckets(cohort)  # (K,)
        inner = _averaged(cohort, bucket)
        delta, state, metrics = self.rule(inner, state)
        return delta, state, {name: _spread(value, bucket, len(inner)) for name, value in metrics.items()}

    def buckets(self, cohort: Cohort) -> Tensor:
        """Return the bucket of each client (K,), drawn for the round; buckets are numbered by their lowest client."""
        order = cohort.rng("buckets").permutation(len(cohort))  # (K,)
        drawn = np.empty(len(cohort), dtype=np.int64)
        drawn[order] = np.arange(len(cohort)) // self.bucket_size
        _, first = np.unique(drawn, return_index=True)
        return torch.from_numpy(first.argsort().argsort()[drawn]).to(beside(cohort.matrix).device)


def _averaged(cohort: Cohort, bucket: Tensor) -> Cohort:
    """Return the cohort of the buckets' means, each under its lowest client."""
    member = torch.nn.functional.one_hot(bucket).T.to(torch.float64)  # (B, K)
    sizes = member.sum(1)  # (B,)
    share = member / sizes[:, None]  # (B, K)
    extras = {
        name: (share.to(value) @ value.flatten(1)).view(-1, *value.shape[1:])
        if value.dim() > 1
        else share.to(value) @ value
        for name, value in cohort.extras.items()
        if value.is_floating_point()
    }
    lowest = member.argmax(1)  # (B,)
    described = replace(cohort, updates=None, extras={}).take(lowest)
    return replace(described, updates=mapped(share, cohort.matrix), weights=sizes.to(cohort.weights), extras=extras)


def _spread(value: Any, bucket: Tensor, count: int) -> Any:
    if isinstance(value, Tensor) and value.shape == (count,):
        return value[bucket.to(value.device)]  # (K,)
    return value
