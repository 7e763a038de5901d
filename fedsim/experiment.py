"""What a run is made of, once its config has become objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.contracts import Dataset, Partition
from fedsim.data.splits import ClientSplits
from fedsim.engine.task import Engine, Task
from fedsim.local import Int64
from fedsim.metrics.budget import Evaluation
from fedsim.settings import Run


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """Everything that a run needs, and nothing that changes while it goes on."""

    settings: Run
    dataset: Dataset
    partition: Partition  # of the training samples, before it is split
    splits: ClientSplits
    task: Task
    engine: Engine
    strategy: Any  # a fedsim rule, or a Flower strategy
    sampler: Any
    evaluation: Evaluation
    initial: Tensor  # (D,) weights before round 1
    initial_buffers: Tensor
    sampler_seed: int
    plan: Mapping[str, Any]
    config: Mapping[str, Any]  # plain, as written to config.yaml
    foreign: Any = None  # a Flower ClientApp's backend, where clients are not fedsim's
    notes: list[str] = field(default_factory=list)

    @property
    def participants(self) -> Int64:
        """Clients that may train: not held out, and with samples. Ascending ids."""
        return np.flatnonzero(~self.splits.held_out & (self.task.partition.sizes > 0))

    @property
    def cohort_size(self) -> int:
        """Clients drawn a round: `fraction` of those that may train, at least one."""
        return max(1, round(self.settings.fraction * len(self.participants)))
