"""What a run is made of, once its config has become objects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.clock import UNIT, Clock
from fedsim.contracts import Dataset, Partition
from fedsim.data.splits import ClientSplits
from fedsim.engine.mimic import Mimic
from fedsim.engine.task import Engine, Task
from fedsim.local import Int64
from fedsim.metrics.budget import Evaluation
from fedsim.settings import Run
from fedsim.uplink import Uplink


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """Everything that a run needs, and nothing that changes while it goes on."""

    settings: Run
    dataset: Dataset
    partition: Partition  # as drawn, positions into the training split
    local: ClientSplits  # its parts, likewise
    splits: ClientSplits  # the same as positions into the data
    task: Task
    engine: Engine
    strategy: Any  # a fedsim rule, or a Flower strategy
    sampler: Any
    mode: Any  # when the server waits for whom
    evaluation: Evaluation
    initial: Tensor  # (D,) weights before round 1
    initial_buffers: Tensor
    sampler_seed: int
    plan: Mapping[str, Any]
    config: Mapping[str, Any]  # plain, as written to config.yaml
    uplink: Uplink | None = None  # compression and attacks, between clients and rule
    clock: Clock = UNIT  # how long jobs take
    tracker: Any = None  # told of the rounds beside the console, if there is one
    mimic: Mimic | None = None  # of its clients, where the strategy has asked for it
    foreign: Any = None  # a Flower ClientApp's backend, where clients are not fedsim's
    notes: list[str] = field(default_factory=list)

    @property
    def participants(self) -> Int64:
        """Clients that may train: those with training samples; held-out ones have none. Ascending ids."""
        return np.flatnonzero(self.task.partition.sizes > 0)

    @property
    def cohort_size(self) -> int:
        """Clients drawn a round."""
        return cohort_size(self.settings.fraction, len(self.participants))

    @property
    def num_participants(self) -> int:
        """Replies that a round aggregates when none is lost."""
        return int(self.mode.num_participants(self.cohort_size))


def cohort_size(fraction: float, num_clients: int) -> int:
    """Return the clients drawn a round: `fraction` of those that may train, halves upward, at least one."""
    return max(1, math.floor(fraction * num_clients + 0.5))
