r"""Clients' samples are replaced, a few a round, by samples of another domain: data that vary over time.

Huang et al., "Tackling Intertwined Data and Device Heterogeneities in Federated Learning with Unlimited Staleness"
(AAAI 2025; arXiv:2309.13536), variant data: 450 samples of MNIST a client, by and by replaced by SVHN. Before round t

.. math:: m(t) = \lfloor \text{rate} \cdot \max(0, t - 1 - \text{start}) \rfloor

samples of each client are replaced, in a keyed order of its own, each by one of its class, until all are. What is
tested moves with what is trained on: a client's own test and validation samples in its own proportion, the server's in
that of all training samples. A stale client trains on the samples that it had in the round in which it was sent the
model.

Every replacement lies beside its sample, at N plus its position, so that a round's data is a function of positions and
the round, and no engine knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.contracts import Dataset, Partition
from fedsim.data.splits import ClientSplits
from fedsim.errors import UserError
from fedsim.rng import keyed_bits, segment_permutations

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Domain = Callable[[Dataset, Tensor, int], Tensor]

FOLLOWING = ("validation", "test")  # the server's splits that follow; others, such as triggered samples, stay


@dataclass(frozen=True, eq=False)
class Replacement:
    """Which of N samples are replaced when; sample p's replacement is N + p."""

    rate: float  # samples a client and round
    start: int  # rounds before the first
    due: Floats  # (N,) replacements a client up to which a sample stays; ∞: for ever

    def count(self, round: int | Int64) -> Int64:
        """Return m(t), how many samples of a client are replaced before round t ≥ 1; of one that has fewer, all."""
        passed = np.maximum(0, np.asarray(round) - 1 - self.start)
        counts: Int64 = np.floor(self.rate * passed + 1e-9).astype(np.int64)
        return counts

    def __call__(self, positions: Int64, round: int | Int64) -> Int64:
        """Return where positions (M,) of samples lie in a round, or each in its own (M,)."""
        moved: Int64 = positions + len(self.due) * (self.count(round) > self.due[positions])
        return moved

    def share(self, positions: Int64, round: int) -> float:
        """Return how much of some samples (M,) is replaced in a round, in [0, 1]."""
        return float((self.count(round) > self.due[positions]).mean()) if len(positions) else 0.0


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """Replaces every client's samples over time.

    Args:
        domain: called with (data set, true labels (N,), seed), returns replacements of the shape of x (N, …).
        rate: samples > 0 of each client and round; 0.5 is one every other round.
        start: rounds ≥ 0 before replacing begins.

    Raises:
        ValueError: an argument out of its range.

    """

    domain: Domain
    rate: float = 1.0
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be > 0 samples a client and round, got {self.rate}")
        if self.start < 0:
            raise ValueError(f"start must be >= 0 rounds, got {self.start}")

    def __call__(
        self, dataset: Dataset, labels: Tensor, splits: ClientSplits, seed: int
    ) -> tuple[Dataset, Replacement]:
        """Return the data set with its replacements behind it, and when each counts.

        Args:
            dataset: of N samples.
            labels: (N,) of them as they were before anybody changed any.
            splits: whose samples are whose, positions into the data set.
            seed: of the order and of what the domain draws.

        Raises:
            UserError: inputs are no numbers, or the domain does not give one sample for each.

        """
        if not dataset.x.is_floating_point():
            raise UserError(f"shift needs floating-point inputs, this data has {dataset.x.dtype}; use shift=none")
        other = self.domain(dataset, labels, seed)
        if other.shape != dataset.x.shape:
            shapes = tuple(dataset.x.shape), tuple(other.shape)
            raise UserError(f"shift.domain must give one sample for each, of shape {shapes[0]}, got {shapes[1]}")
        both = dataset._replace(
            x=torch.cat([dataset.x, other.to(dataset.x)]), y=torch.cat([dataset.y, dataset.y]),
            client=_twice(dataset.client), domain=_twice(dataset.domain),
        )  # fmt: skip
        return both, Replacement(self.rate, self.start, _due(dataset, splits, seed))


def _twice(column: Int64 | None) -> Int64 | None:
    return None if column is None else np.concatenate([column, column])


def _due(dataset: Dataset, splits: ClientSplits, seed: int) -> Floats:
    """Return how many replacements a client each sample (N,) outlasts."""
    due = np.full(len(dataset.y), np.inf)  # (N,)
    sizes = splits.train.sizes.astype(np.float64)  # (K,)
    for name, part in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        own = part.sizes  # (K,)
        # A held-out client trains on nothing; its test samples go as another's training samples would.
        pace = np.where(sizes > 0, sizes, own) / np.maximum(own, 1)  # (K,) training samples a sample of this part
        due[part.indices] = _ranks(part, seed, name) * np.repeat(pace, own)
    most = np.sort(sizes)  # (K,)
    total = most.sum()
    # Σ_k min(n_k, m) of whole m: a straight line between the clients' sizes.
    ends = np.concatenate([[0.0], most])  # (K+1,)
    replaced = np.concatenate([[0.0], np.cumsum(most) + most * np.arange(len(most) - 1, -1, -1)])  # (K+1,)
    for name in FOLLOWING:
        positions = dataset.splits.get(name)
        if positions is not None and len(positions):
            order = np.argsort(keyed_bits(seed, "shift/server", positions), kind="stable")  # (n,)
            shares = np.arange(len(positions)) / len(positions) * total  # (n,)
            due[positions[order]] = np.interp(shares, replaced, ends)
    return due


def _ranks(part: Partition, seed: int, name: str) -> Floats:
    """Return the place (M,) of each sample in its client's keyed order, from 0."""
    keys = keyed_bits(seed, f"shift/{name}", np.arange(part.num_clients))  # (K,)
    order = segment_permutations(keys, part.sizes)  # (M,)
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order)) - np.repeat(part.offsets[:-1], part.sizes)
    return ranks
