"""A job's rows laid out for a batched program: what each does, and where its update goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.task import Job, Task, local_round, row_keys
from fedsim.local import Int64, Schedule, moving


class Plan(NamedTuple):
    """One phase of a job: who moves, and which samples every row sees."""

    number: int
    moving: tuple[str, ...]
    schedule: Schedule


class Laid(NamedTuple):
    """All that rows do, whatever they start from: a function of (seed, round, client) of each."""

    plans: list[Plan]  # a phase each
    keys: Tensor  # (K,) of `row_keys`

    @property
    def num_steps(self) -> Int64:
        """Local steps of each row over all phases (K,)."""
        steps: Int64 = np.sum([plan.schedule.num_steps for plan in self.plans], axis=0)
        return steps


def lay_out(task: Task, job: Job) -> Laid:
    """Lay out the rows of one job."""
    names = (*task.shared.names, *task.local.names)
    plans = [
        Plan(number, moving(names, phase), local_round(task, job, number, phase))
        for number, phase in enumerate(task.phases)
    ]
    return Laid(plans, row_keys(task, job))


class Target:
    """Where updates go: the rows of one array, or of several, one after the other.

    Args:
        outs: (K_i, D) each.

    """

    def __init__(self, outs: Sequence[Tensor]) -> None:
        self.outs = list(outs)
        self.starts = np.cumsum([0, *map(len, outs)])  # (parts + 1,)

    def room(self, rows: Int64) -> Tensor:
        """Return (R, D) to train some rows in: their own place where they are neighbours there."""
        part = int(np.searchsorted(self.starts, rows[0], side="right")) - 1
        out, low = self.outs[part], int(rows[0] - self.starts[part])
        if bool((np.diff(rows) == 1).all()) and rows[-1] < self.starts[part + 1]:
            return out[low : low + len(rows)]
        return out.new_empty(len(rows), out.shape[1])

    def put(self, rows: Int64, room: Tensor) -> None:
        """Bring what was trained in a room to its place."""
        parts = np.searchsorted(self.starts, rows, side="right") - 1  # (R,)
        for part in np.unique(parts).tolist():
            out, mine = self.outs[part], np.flatnonzero(parts == part)
            place = torch.from_numpy(rows[mine] - self.starts[part]).to(out.device)
            if len(mine) == len(rows):
                if room.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
                    out[place] = room
            else:
                out[place] = room[torch.from_numpy(mine).to(room.device)]
