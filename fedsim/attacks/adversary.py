"""The attackers of a run: who they are, what they poison, what they send, and how far they got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.attacks.contract import DataAttack, Knowledge, RowAttack, View
from fedsim.contracts import Cohort, Dataset, Metrics, Partition, State
from fedsim.layout import Layout
from fedsim.linalg import mean_of
from fedsim.metrics.drift import cosine
from fedsim.rng import keyed_bits, keyed_uniform

Int64 = npt.NDArray[np.int64]


class Adversary:
    """An attack and the clients who do it.

    Args:
        attack: what they do.
        clients: all that may train, ids ascending.
        num_clients: ids are below it.
        fraction: share of `clients` that attack, in [0, 1], halves upward; the same ones in every round, and those
            of a smaller fraction are among those of a larger one.
        knowledge: "all" (they see everybody's updates) or "own".
        seed: of who attacks, of what is poisoned and of all else that an attack draws.

    Raises:
        ValueError: an argument out of its range, or an object that is no attack.

    """

    def __init__(
        self, attack: Any, *, clients: Int64, num_clients: int, fraction: float, knowledge: Knowledge = "all",
        seed: int = 0,
    ) -> None:  # fmt: skip
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], the share of the clients that attack, got {fraction}")
        if knowledge not in get_args(Knowledge):
            raise ValueError(f"knowledge must be all or own, got {knowledge!r}")
        if not isinstance(attack, RowAttack | DataAttack):
            raise ValueError(f"an attack has a method rows or poison, {type(attack).__name__} has neither")
        self.attack, self.knowledge, self.seed = attack, knowledge, seed
        self.byzantine = np.zeros(num_clients, dtype=bool)
        self.byzantine[byzantine_clients(seed, clients, fraction)] = True
        self.state: State | None = None

    @property
    def sends_rows(self) -> bool:
        """Whether updates are replaced, so that the engine has to hold them."""
        return isinstance(self.attack, RowAttack) and getattr(self.attack, "sends_rows", True)

    @property
    def knows_rule(self) -> bool:
        """Whether the attack asks the server's rule."""
        return bool(getattr(self.attack, "knows_rule", False))

    def poison(self, dataset: Dataset, train: Partition) -> Dataset:
        """Return the data set with the attackers' training samples poisoned.

        Args:
            dataset: of N samples.
            train: every client's training samples, positions into it.

        """
        if not isinstance(self.attack, DataAttack):
            return dataset
        sizes = np.where(self.byzantine, train.sizes, 0)  # (K,)
        mine = np.repeat(self.byzantine, train.sizes)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        return self.attack.poison(
            dataset, Partition(train.indices[mine], offsets), int(keyed_bits(self.seed, "poison"))
        )

    def among(self, cohort: Cohort) -> Tensor:
        """Return who of a cohort attacks, (K,) bool."""
        return torch.from_numpy(self.byzantine[cohort.clients.cpu().numpy()]).to(cohort.clients.device)

    def rows(self, cohort: Cohort, aggregate: Callable[[Cohort], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the attackers of a cohort (K,) bool and what they send instead, (F, D).

        Args:
            cohort: as everybody would have sent it.
            aggregate: the server's step (D,) on such a cohort, which leaves the rule's memory alone.

        """
        byzantine = self.among(cohort)
        if self.state is None:
            self.state = self._first(cohort.layout)
        if not isinstance(self.attack, RowAttack) or not bool(byzantine.any()):
            return byzantine, cohort.rows[byzantine]
        view = View(
            cohort=replace(cohort, seed=self.seed), byzantine=byzantine, knowledge=self.knowledge,
            aggregate=None if aggregate is None else lambda updates: aggregate(_with(cohort, updates)),
        )  # fmt: skip
        rows, self.state = self.attack.rows(view, self.state)
        return byzantine, rows

    def _first(self, layout: Layout) -> State:
        init = getattr(self.attack, "init", None)
        state: State = init(layout) if init else {}
        return state

    def figures(self, cohort: Cohort, delta: Tensor) -> Metrics:
        """Measure a round: how far the server's step is from what the honest clients wanted.

        Args:
            cohort: as it reached the rule.
            delta: (D,) the server's step.

        Returns:
            `num_byzantine` and `byzantine` (K,), 1 for an attacker; where rows were held and somebody is honest also
            `honest_distance` = ‖delta − μ‖ / ‖μ‖ and `honest_cosine`, with μ the honest mean weighted by samples.

        """
        byzantine = self.among(cohort)
        figures: Metrics = {"num_byzantine": int(byzantine.sum()), "byzantine": byzantine.double()}
        share = torch.where(byzantine, 0, cohort.weights)  # (K,)
        if cohort.updates is None or not bool(share.sum() > 0) or not cohort.layout.size:
            return figures
        mean = mean_of(share, cohort.updates)  # (D,)
        distance = torch.linalg.vector_norm((delta - mean).double())
        figures["honest_distance"] = distance / torch.linalg.vector_norm(mean.double()).clamp_min(1e-300)
        figures["honest_cosine"] = cosine(delta, mean)
        return figures


def byzantine_clients(seed: int, clients: Int64, fraction: float) -> Int64:
    """Return the ids of the attackers among clients (n,), ascending: a function of (seed, "byzantine", client).

    >>> byzantine_clients(0, np.arange(10), 0.3).size
    3
    """
    count = int(np.floor(fraction * len(clients) + 0.5))
    draw = keyed_uniform(seed, "byzantine", clients)  # (n,)
    return np.sort(clients[np.argsort(draw, kind="stable")[:count]])


def _with(cohort: Cohort, updates: Tensor) -> Cohort:
    return replace(cohort, updates=updates)
