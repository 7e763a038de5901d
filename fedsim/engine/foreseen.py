"""Coefficients of a linear rule that are known before anybody has trained: then rows are summed as they end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedsim.contracts import Cohort
from fedsim.engine.task import Block, Job, Task, num_steps, room


class Unforeseen(dict[str, Tensor]):
    """Second uploads before anybody has trained: nothing can be said about them, not even that there are none."""

    def _asked(self, *_: Any) -> Any:
        raise KeyError("second uploads")

    get = __getitem__ = __contains__ = __iter__ = __len__ = items = keys = values = _asked


def before(task: Task, job: Job) -> Block:
    """Return what can be said of a job's rows before they are trained."""
    return room(task, job, num_steps(task, job))._replace(extras=Unforeseen())


def foreseen(coefficients: Callable[[Cohort], Tensor], cohort: Cohort) -> Tensor | None:
    """Return the coefficients (K,) of a cohort that nobody has trained; None where they hang on what it will send."""
    try:
        return coefficients(cohort)
    except KeyError:
        return None
