"""The steps of a chunk replayed as CUDA graphs: the launches of a step are recorded once, and then cost one.

A graph reads and writes the places that it was recorded with. So rows train in buffers that stay, a step's samples are
copied into others, and the number of rows and the length of a batch are rounded up to one of eight sizes each, of
which every one has its graph. What pads them has weight 0; a row that has no step left is taken out right after its
last one, and what its place goes through later is nobody's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.batches import Step
from fedsim.engine.gradients import GenericGradient
from fedsim.engine.laid import Plan
from fedsim.engine.situation import Situation
from fedsim.engine.stepping import Stepping
from fedsim.engine.task import Task
from fedsim.layout import Params

SIZES = 8  # of rows and of batches, up to the largest: a step pads at most an eighth of either
WARM_UPS = 2  # libraries choose and allocate in their first calls, which no graph may record

Body = Callable[[], None]
Capture = Callable[[Callable[[], Body]], Body]  # what makes a step's body → what replays it


def refusal(task: Task) -> str | None:
    """Say why a task's steps cannot be replayed; None where they can."""
    objective = task.objective
    for name in ("loss", "direction", "phases"):
        if hasattr(objective, name):
            return f"the objective has {name} of its own, which may do another thing in every step"
    if task.training.optimizer == "adamw":
        return "AdamW corrects its moments by the step's number, which a recorded step cannot see"
    return None


def rounded(count: int, most: int) -> int:
    """Return the smallest of at most eight sizes up to `most` that holds `count`, 1 ≤ count ≤ most."""
    grain = -(-most // SIZES)
    return min(-(-count // grain) * grain, most)


class _Places(NamedTuple):
    """The buffers that graphs read and write, R rows of batches of up to B samples."""

    params: Params  # name → (R, *shape)
    moments: list[Tensor]  # of what moves, where there is momentum
    start: Params  # name → (*shape), what rows are pulled to
    samples: Tensor  # (R, B)
    offsets: Tensor  # (R, B)
    weights: Tensor  # (R, B)
    sizes: Tensor  # (R,)
    number: Tensor  # () of the step

    def step(self, rows: int, batch: int) -> Step:
        """Return the step of the first rows and samples; its number is a tensor, so that keys are drawn anew."""
        number: Any = self.number
        samples, offsets = self.samples[:rows, :batch], self.offsets[:rows, :batch]
        return Step(
            number, samples, offsets, self.weights[:rows, :batch], self.sizes[:rows], np.full(rows, batch)
        )  # fmt: skip


class Graphs:
    """Records and replays the steps of an engine's chunks.

    Args:
        task: what all rounds share.
        capture: what records a step; on a CPU tests have one of their own.

    """

    def __init__(self, task: Task, capture: Capture | None = None) -> None:
        self.task, self.capture = task, capture or CudaGraphs(task.device)
        self.refused: str | None = None  # why recording failed
        self.forget()

    def forget(self) -> None:
        """Let go of graphs and their memory."""
        self.key: tuple[Any, ...] = ()
        self.rows = self.batch = 0
        self.places: _Places | None = None
        self.programs: dict[tuple[int, int], Body] = {}

    def run(self, stepping: Stepping, plan: Plan, params: Params, steps: Sequence[Step]) -> bool:
        """Take steps in place in params (R, *shape); return whether that was done: otherwise nothing was.

        Rows pulled to versions of their own, and gradients of whole batches, are left to the steps as they are.
        """
        pulled = stepping.mu and any(value.stride(0) for value in stepping.received.values())
        whole = isinstance(stepping.gradient, GenericGradient) and stepping.gradient.whole
        if not steps or self.refused or pulled or whole:
            return False
        try:
            own = self._record(stepping, plan, params, steps)
        except torch.OutOfMemoryError:
            self.forget()
            raise
        except RuntimeError as error:
            self.forget()
            self.refused = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"engine.graphs: a step cannot be recorded, so steps are launched: {self.refused}", stacklevel=2
            )
            return False
        self._replay(own, stepping, params, steps)
        return True

    def _record(self, stepping: Stepping, plan: Plan, params: Params, steps: Sequence[Step]) -> Stepping:
        """Record what these steps need and has not been recorded; return the stepping that graphs belong to."""
        rows, batch = len(stepping.keys), max(step.samples.shape[1] for step in steps)
        key = (stepping.gradient, plan.moving, stepping.lr, stepping.mu)
        if key != self.key or rows > self.rows or batch > self.batch:
            largest = max(rows, self.rows), max(batch, self.batch)
            self.forget()
            self.key, (self.rows, self.batch) = key, largest
            self.places = self._places(plan, params)
            places = self.places
            received = {name: value.expand(self.rows, *value.shape) for name, value in places.start.items()}
            keys = torch.zeros(self.rows, dtype=torch.int64, device=self.task.device)
            self.own = Stepping(self.task, stepping.gradient, keys, received, stepping.lr, stepping.mu)
        for size in {self._size(step) for step in steps} - self.programs.keys():
            self.programs[size] = self.capture(lambda size=size: self._body(plan, *size))  # type: ignore[misc]
        return self.own

    def _size(self, step: Step) -> tuple[int, int]:
        rows, batch = step.samples.shape
        return rounded(rows, self.rows), rounded(batch, self.batch)

    def _places(self, plan: Plan, params: Params) -> _Places:
        task, rows, batch = self.task, self.rows, self.batch
        like = {name: value.new_zeros(rows, *value.shape[1:]) for name, value in params.items()}
        positions = torch.zeros(2, rows, batch, dtype=torch.int64, device=task.device)
        return _Places(
            params=like,
            moments=[torch.zeros_like(like[name]) for name in plan.moving] if task.training.momentum else [],
            start={name: torch.zeros_like(like[name][0]) for name in task.shared.names},
            samples=positions[0], offsets=positions[1],
            weights=torch.zeros(rows, batch, dtype=task.dtype, device=task.device),
            sizes=torch.zeros(rows, dtype=task.dtype, device=task.device),
            number=torch.zeros((), dtype=torch.int64, device=task.device),
        )  # fmt: skip

    def _body(self, plan: Plan, rows: int, batch: int) -> Body:
        assert self.places is not None  # made before anything is recorded
        places = self.places
        take = self.own.begin(
            plan, places.params, Situation(self.task, plan.number, self.own.lr, {}, {}), places.moments
        )
        return lambda: take(places.step(rows, batch))

    def _replay(self, own: Stepping, stepping: Stepping, params: Params, steps: Sequence[Step]) -> None:
        assert self.places is not None
        places, count = self.places, len(stepping.keys)
        for name, value in params.items():
            places.params[name][:count].copy_(value)
        for name, value in places.start.items():
            value.copy_(stepping.received[name][0])
        own.keys[:count].copy_(stepping.keys)
        for value in (*places.moments, own.losses, own.seen):
            value.zero_()
        left = [len(step.sizes) for step in steps[1:]] + [0]
        for step, stay in zip(steps, left, strict=True):
            self._feed(step)
            self.programs[self._size(step)]()
            done = slice(stay, len(step.sizes))  # rows whose last step this was
            if stay < len(step.sizes):
                for name, value in params.items():
                    value[done].copy_(places.params[name][done])
                stepping.losses[done].copy_(own.losses[done])
                stepping.seen[done].copy_(own.seen[done])

    def _feed(self, step: Step) -> None:
        assert self.places is not None
        places, (rows, batch), (most, longest) = self.places, step.samples.shape, self._size(step)
        if (rows, batch) != (most, longest):
            places.weights[:most, :longest].zero_()
            places.sizes[:most].zero_()
        places.samples[:rows, :batch].copy_(step.samples)
        places.weights[:rows, :batch].copy_(step.weights)
        places.sizes[:rows].copy_(step.sizes)
        places.number.fill_(step.number)
        if self.task.augment is not None:
            places.offsets[:rows, :batch].copy_(step.offsets)


class CudaGraphs:
    """Records bodies as CUDA graphs, which share their memory: one runs after the other, and none leaves anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None

    def __call__(self, make: Callable[[], Body]) -> Body:
        """Return what replays a body."""
        with torch.cuda.device(self.device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    make()()
            torch.cuda.current_stream().wait_stream(aside)
            graph, body = torch.cuda.CUDAGraph(), make()
            with torch.cuda.graph(graph, pool=self.pool):
                body()
            self.pool = self.pool or graph.pool()
        return graph.replay
