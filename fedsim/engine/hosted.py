"""Held updates in the host's memory, for want of room on the device: trained block by block, stored as they come."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim.contracts import Cohort
from fedsim.engine.blocks import concatenate, merge
from fedsim.engine.failing import none_left
from fedsim.engine.task import Block, Job, Task

if TYPE_CHECKING:
    from fedsim.engine.rounds import Trainer


class Hosted:
    """The matrix of a run's updates on the host, allocated once, pinned where an accelerator copies from it.

    Args:
        task: what all rounds share.

    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._rows = torch.empty(0, task.shared.size, dtype=task.dtype)

    def collect(self, trainer: Trainer, job: Job) -> tuple[Cohort, Tensor]:
        """Train a job on a trainer's engine; return (its cohort with rows on the host, mean buffers).

        Raises:
            AllUpdatesBad: no good row is left.

        """
        trainer.bad, trainer.failures = [], {}
        if len(self._rows) < len(job):
            pin = self.task.device.type == "cuda"
            self._rows = torch.empty(len(job), self.task.shared.size, dtype=self.task.dtype, pin_memory=pin)
        size = trainer.halving.block_rows
        folded: dict[int, tuple[Cohort, Block]] = {}  # by position, in whatever order blocks come
        for number, trained in trainer._blocks(
            [job.part(k, min(k + size, len(job))) for k in range(0, len(job), size)]
        ):
            if trained is None:
                continue
            part, block, out = trained
            good, kept = trainer._judge(part, block)
            cohort = replace(trainer._cohort(part, block, out), updates=None)
            if good is not None:
                cohort, out = cohort.take(good), out[good]
            self._rows[number * size : number * size + len(out)] = out
            folded[number] = (cohort, kept)
        if not any(len(cohort) for cohort, _ in folded.values()):
            raise none_left(job, trainer.bad, trainer.failures)
        parts, blocks = zip(*(folded[number] for number in sorted(folded)), strict=True)
        rows = np.concatenate([number * size + np.arange(len(folded[number][0])) for number in sorted(folded)])  # (k,)
        whole = bool((rows == np.arange(len(rows))).all())
        cohort = replace(concatenate(list(parts)), updates=self._rows[: len(rows)] if whole else self._rows[rows])
        return cohort, trainer._buffers(job, merge(list(blocks), stored=True))
