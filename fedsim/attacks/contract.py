"""What an attack is given and what it gives back.

An attack is a frozen dataclass with one or both of

    poison(dataset, partition, seed) -> Dataset     before round 1: the attackers' training samples, changed
    rows(view, state) -> (rows (F, D), state)       every round: what the attackers send in place of their updates

Optional members, found by name:

    init(layout) -> State         memory before round 1, {} if absent: what a checkpoint can hold
    knows_rule: bool              True: it asks `view.aggregate`, so the run needs a rule of fedsim's own
    sends_rows: bool              False: `rows` is not called, the engine need not hold the updates

Attackers train like everybody else; `view.own` is what they would have sent. They can change no other row: only the
F rows that they return are written. All randomness comes from `view.cohort.rng(purpose)`: of `attack.seed`, the round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Dataset, Partition, State

Knowledge = Literal["all", "own"]


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A round as its attackers see it; at least one attacker is in the cohort."""

    cohort: Cohort  # K honest updates: the attackers' rows are what they would have sent
    byzantine: Tensor  # (K,) bool
    knowledge: Knowledge = "all"  # whose updates are known: everybody's, or the attackers' own alone
    aggregate: Callable[[Tensor], Tensor] | None = None  # updates (K, D) → the server's step (D,); changes nothing

    @property
    def num_byzantine(self) -> int:
        """F ≥ 1."""
        return int(self.byzantine.sum())

    @cached_property
    def own(self) -> Tensor:
        """(F, D) what the attackers would have sent."""
        return self.cohort.rows[self.byzantine]

    @cached_property
    def known(self) -> Tensor:
        """(H, D) honest updates as far as they are known; the attackers' own where that is all there is."""
        blind = self.knowledge == "own" or bool(self.byzantine.all())
        return self.own if blind else self.cohort.rows[~self.byzantine]

    @cached_property
    def mean(self) -> Tensor:
        """(D,) plain mean of the known updates."""
        return self.known.mean(0)

    @cached_property
    def std(self) -> Tensor:
        """(D,) population standard deviation of each coordinate of the known updates."""
        return self.known.std(0, correction=0)

    def all(self, row: Tensor) -> Tensor:
        """Return one row (D,) sent by every attacker, (F, D)."""
        return row.expand(self.num_byzantine, -1)

    def attacked(self, rows: Tensor) -> Tensor:
        """Return the cohort's updates (K, D) with the attackers' rows (F, D) in place; a copy."""
        updates = self.cohort.rows.clone()
        updates[self.byzantine] = rows.to(updates)
        return updates

    def step(self, updates: Tensor) -> Tensor:
        """Return the step (D,) that the server would take on updates (K, D).

        Raises:
            ValueError: the run's strategy is not known to the attackers.

        """
        if self.aggregate is None:
            raise ValueError("this attack has to know the server's rule, and none was given")
        return self.aggregate(updates)


@runtime_checkable
class RowAttack(Protocol):
    """Sends other rows."""

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return what the attackers send (F, D), and the attack's new memory."""
        ...


@runtime_checkable
class DataAttack(Protocol):
    """Trains on other samples."""

    def poison(self, dataset: Dataset, partition: Partition, seed: int) -> Dataset:
        """Return the data set with poisoned training samples.

        Args:
            dataset: of N samples.
            partition: the attackers' training samples alone, positions into the data set; all others own none.
            seed: of everything random.

        """
        ...


def positive(name: str, value: float, cure: str) -> None:
    """Check that a finite argument is above 0.

    Raises:
        ValueError: it is not.

    """
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be > 0 and finite, got {value}; {cure}")


def uniform(view: View, purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Return uniforms in [0, 1) of the round, on the updates' device and in their precision."""
    draws = torch.from_numpy(view.cohort.rng(purpose).random(shape))
    return draws.to(view.cohort.rows)
