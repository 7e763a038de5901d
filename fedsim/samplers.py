"""Who trains in a round.

A sampler is called as `sampler(pool, num, rng, round) -> ids`, with `rng` keyed by (sampler.seed, "cohort", round):
    pool     the clients that can be drawn this round, and what may bias the draw
    num      cohort size ≥ 1, at most the pool's (`Poisson`: its expectation)
    round    from 1
    ids      int64, ascending, without repeats
An own sampler is any callable of that form, named by `sampler._target_`. All here are O(P) or better in the P
clients of the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


class Pool(NamedTuple):
    """The clients that can be drawn in a round."""

    clients: Ids  # (P,) available this round, ascending
    sizes: Ids  # (P,) training samples of each
    availability: Floats  # (P,) probability in [0, 1] that each is available; ones where no device model says
    losses: Callable[[Ids], Floats]  # ids (n,) → (n,) mean training loss of the current global model on each


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Draw `num` clients uniformly without replacement. McMahan et al. (AISTATS 2017), algorithm 1."""

    def __call__(self, pool: Pool, num: int, rng: np.random.Generator, round: int) -> Ids:
        """Return the cohort's ids."""
        _check(num, len(pool.clients))
        return _uniform(pool.clients, num, rng)


@dataclass(frozen=True, kw_only=True)
class SizeWeighted:
    """Draw without replacement, each draw with probability ∝ n_k among those that are left.

    The biased cohort of Li et al. (ICLR 2020, scheme I), there with replacement. Inclusion probabilities grow with
    n_k but less than in proportion, and a rule that weights by n_k counts large clients twice. Clients without
    samples are never drawn. One pass of exponential keys: Efraimidis and Spirakis (2006), algorithm A.
    """

    def __call__(self, pool: Pool, num: int, rng: np.random.Generator, round: int) -> Ids:
        """Return the cohort's ids."""
        _check(num, len(pool.clients))
        return np.sort(pool.clients[_weighted(pool.sizes.astype(np.float64), num, rng, "samples")])  # (num,)


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Include each client independently with probability q = num / P; the cohort's size is random.

    What privacy amplification by subsampling assumes. McMahan et al. (ICLR 2018), algorithm 1. Departs from it in
    one case: an empty cohort, of probability (1 − q)^P ≤ e^(−num), is drawn again from the same generator.
    """

    def __call__(self, pool: Pool, num: int, rng: np.random.Generator, round: int) -> Ids:
        """Return the cohort's ids, `num` in expectation, at least one."""
        population = len(pool.clients)
        _check(num, population)
        # Given its size, a Poisson cohort is a uniform one: O(size), not O(P) coins. The loop ends, as q > 0.
        size = 0
        while size == 0:
            size = int(rng.binomial(population, num / population))
        return _uniform(pool.clients, size, rng)


@dataclass(frozen=True, kw_only=True)
class Cyclic:
    """Take clients in turn: everyone trains once before anyone trains twice.

    Round t takes positions (t − 1)·num … t·num − 1 of the pool, modulo P. With `num_groups` it is cyclic
    participation, Cho et al. (ICML 2023): clients belong to groups (id modulo num_groups) that take turns, and the
    cohort is uniform within the group whose turn it is.

    Args:
        num_groups: ≥ 1, or None for plain turns.

    """

    num_groups: int | None = None

    def __post_init__(self) -> None:
        if self.num_groups is not None and self.num_groups < 1:
            raise ValueError(f"num_groups must be >= 1 or null, got {self.num_groups}")

    def check(self, num: int, clients: Ids) -> None:
        """Refuse cohorts that a group is too small for.

        Raises:
            ValueError: the smallest group has fewer clients than a cohort.

        """
        groups = self.num_groups or 1
        for turn, size in enumerate(np.bincount(clients % groups, minlength=groups).tolist()):
            if size < num:
                group = f"{size} clients of group {turn} (num_groups={self.num_groups})"
                raise ValueError(f"a cohort of {num} is larger than the {group}; lower fraction or num_groups")

    def __call__(self, pool: Pool, num: int, rng: np.random.Generator, round: int) -> Ids:
        """Return the cohort's ids."""
        population = len(pool.clients)
        if self.num_groups is None:
            _check(num, population)
            return np.sort(pool.clients[((round - 1) * num + np.arange(num)) % population])  # (num,)
        turn = (round - 1) % self.num_groups
        group = pool.clients[pool.clients % self.num_groups == turn]  # (G,)
        _check(num, len(group), what=f"clients of group {turn} (num_groups={self.num_groups})")
        return _uniform(group, num, rng)


@dataclass(frozen=True, kw_only=True)
class PowerOfChoice:
    """Draw candidates by size, then keep the `num` on which the global model's loss is highest.

    Cho, Wang and Joshi (2020, arXiv:2010.01243), π_pow-d. Biased towards hard clients: faster, and not to the
    minimum of the average loss. Ties go to the lower id; a loss that is not a number counts as lowest. The paper
    averages the cohort without weights; here that is the rule's affair.

    Args:
        num_candidates: d ≥ num, cut at the pool's size; num itself is size-weighted sampling. None: 2·num.

    """

    num_candidates: int | None = None

    def __post_init__(self) -> None:
        if self.num_candidates is not None and self.num_candidates < 1:
            raise ValueError(f"num_candidates must be >= 1 or null, got {self.num_candidates}")

    def check(self, num: int, clients: Ids) -> None:
        """Refuse fewer candidates than the cohort takes.

        Raises:
            ValueError: d below the cohort's size.

        """
        if self.num_candidates is not None and self.num_candidates < num:
            raise ValueError(
                f"power of choice needs num_candidates >= the cohort's size {num}, got {self.num_candidates}; "
                "raise num_candidates or lower fraction"
            )

    def __call__(self, pool: Pool, num: int, rng: np.random.Generator, round: int) -> Ids:
        """Return the cohort's ids."""
        _check(num, len(pool.clients))
        self.check(num, pool.clients)
        wanted = 2 * num if self.num_candidates is None else self.num_candidates
        wanted = max(num, min(wanted, int(np.count_nonzero(pool.sizes))))
        drawn = _weighted(pool.sizes.astype(np.float64), wanted, rng, "samples")  # (d,)
        candidates = np.sort(pool.clients[drawn])  # (d,)
        hardest = np.argsort(-pool.losses(candidates), kind="stable")[:num]  # (num,) nan sorts last
        return np.sort(candidates[hardest])  # (num,)


@dataclass(frozen=True, kw_only=True)
class AvailabilityBiased:
    """Draw without replacement, each draw with probability ∝ (client's availability)^exponent.

    Cohorts over-represent devices that are often online, the bias that Rodio et al. (INFOCOM 2023) analyse.
    Clients of availability 0 are never drawn.

    Args:
        exponent: 1 is the plain bias, 0 is uniform over clients that are ever available, negative favours the
            rarely available.

    """

    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not np.isfinite(self.exponent):
            raise ValueError(f"exponent must be finite, got {self.exponent}")

    def __call__(self, pool: Pool, num: int, rng: np.random.Generator, round: int) -> Ids:
        """Return the cohort's ids."""
        _check(num, len(pool.clients))
        present = pool.availability > 0  # (P,)
        weights = np.zeros(len(pool.clients))  # (P,)
        weights[present] = pool.availability[present] ** self.exponent
        return np.sort(pool.clients[_weighted(weights, num, rng, "availability")])  # (num,)


def _check(num: int, population: int, what: str = "available clients") -> None:
    if num < 1:
        raise ValueError(f"a cohort needs at least 1 client, got {num}; raise fraction")
    if num > population:
        raise ValueError(f"a cohort of {num} is larger than the {population} {what}; lower fraction")


def _uniform(clients: Ids, num: int, rng: np.random.Generator) -> Ids:
    """Draw `num` of (P,) ids without replacement, ascending; O(num log num) for small cohorts."""
    return np.sort(clients[rng.choice(len(clients), size=num, replace=False, shuffle=False)])  # (num,)


def _weighted(weights: Floats, num: int, rng: np.random.Generator, what: str) -> Ids:
    """Draw `num` positions without replacement, in no order, successively ∝ weights ≥ 0 (P,)."""
    positive = np.flatnonzero(weights > 0)  # (Q,)
    if len(positive) < num:
        raise ValueError(f"a cohort of {num} is larger than the {len(positive)} clients with {what} > 0")
    # The first `num` arrivals of independent exponential clocks of these rates are such a draw.
    arrival = rng.exponential(size=len(positive)) / weights[positive]  # (Q,)
    return positive[np.argpartition(arrival, num - 1)[:num]]  # (num,)
