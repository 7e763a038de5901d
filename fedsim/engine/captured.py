"""Clients one after another inside one native program: a local step is recorded once and runs without Python.

On a CPU a client's weights then stay in the core's own cache from its first step to its last, and neither the
interpreter nor its lock stands between two operations, so that threads scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.lanes import mixes_samples
from fedsim.engine.native import BUCKETS, Lane, Steps, compiled
from fedsim.engine.record import NotRecordable, Program, record
from fedsim.engine.step import Step
from fedsim.engine.task import LOCAL, Block, Job, Task, local_round, room
from fedsim.local import Int64

# The optimising executor runs other products in its first calls than later: bits would depend on a resume.
_as_written: Any = partial(getattr(torch.jit, "optimized_execution"), False)  # noqa: B009  (not among torch's typed names)

SUMMED, MOST = 8, 16  # rows of a block that is summed before the blocks are, at least; and blocks, at most
LONG = 1000  # operations of a step from which on one costs little more with a few samples than with many


class Captured:
    """Trains clients one after another in native loops, one a thread.

    Which thread trains a client, and beside whom, changes none of its operations: bits depend on neither.

    Args:
        task: what all rounds share; on a CPU, with one phase and an objective that is a criterion.
        threads: native loops at once, ≥ 1; None: as many as torch has threads.

    Raises:
        ValueError: what a client does cannot be recorded.

    """

    block_rows: int | None = None

    def __init__(self, task: Task, *, threads: int | None = None) -> None:
        _check(task)
        self.task = task
        self.step = Step(task)
        self._programs: dict[tuple[int, bool, bool], Program] = {}
        self._known: dict[bool, list[tuple[int, bool]]] = {}  # pulled → kinds of steps that the loop has
        self._loops: dict[bool, Callable[..., None]] = {}
        self._buckets = 1 if self._prove().body.count("\n") > LONG else BUCKETS
        self._threads = threads or torch.get_num_threads()
        self._lanes: SimpleQueue[Lane] = SimpleQueue()
        for _ in range(self._threads):
            self._lanes.put(Lane(task, self.step.names, self.step.apart, self.step.num_slots))
        self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
        self.plan: Mapping[str, Any] = {"engine": "vectorized", "kernels": "captured"}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)

    def train(self, job: Job, out: Tensor) -> Block:
        """Train the rows of a job and write their updates w_k − w_received into out (K, D)."""
        return self.begin(self.task, job, out)()

    def train_sum(self, job: Job, coefficients: Tensor, total: Tensor) -> Block:
        """Train the rows of a job and add Σ c_k Δ_k over finite rows to total (D,); no row is ever held.

        Rows are summed in blocks by position, and the blocks from the first to the last: the sum depends on neither
        threads nor order.

        Args:
            job: the rows.
            coefficients: (K,) c_k.
            total: (D,), added to.

        """
        return self.begin(self.task, job, None, (coefficients.tolist(), total))()

    def begin(
        self, task: Task, job: Job, out: Tensor | None, summed: tuple[list[float], Tensor] | None = None
    ) -> Callable[[], Block]:
        """Begin to train, and return what waits for the end.

        Args:
            task: this engine's, or one that differs from it in partition, seed and rates alone.
            job: the rows.
            out: (K, D) for the updates; None where they are summed.
            summed: c_k of each row and the total (D,), added to.

        """
        order = local_round(task, job, 0, task.phases[0])
        block = room(task, job, order.num_steps)
        versions = sorted(set(job.received.tolist()))
        pulls = [self.step.pull(job, version) for version in versions]
        pulled = any(pulls)
        starts = [job.models[version] for version in versions]
        shared = [self.step.common(start, mu, job.lr, pulled=pulled) for start, mu in zip(starts, pulls, strict=True)]
        corrections = self.step.corrections(job.lr, int(order.num_steps.max(initial=0)))
        state = [block.state[LOCAL + name] for name in task.local.names]
        parts = _blocks(len(job)) if summed else _shares(order.num_steps, 4 * self._threads)
        steps = Steps(task, job, order, np.concatenate(parts), self._buckets)
        loop = self._loop(steps, pulled=pulled)
        sums: list[Tensor | None] = [None] * len(parts)
        ends = np.cumsum([0, *map(len, parts)])

        def run(number: int) -> None:
            lane, work = self._lanes.get(), steps.part(int(ends[number]), int(ends[number + 1]))
            losses = torch.zeros(len(work.length), dtype=task.dtype)  # (S,)
            total = sums[number] = torch.zeros_like(summed[1]) if summed else None
            try:
                with torch.no_grad(), _as_written():
                    loop(
                        *work[:6], starts, shared, corrections, self.step.x, task.y, *work[6:10],
                        lane.flat, lane.params, lane.slots, lane.apart, lane.apart_views, lane.local, state,
                        out, losses if total is None else total, summed[0] if summed else [0.0], block.square_norms,
                        losses,
                    )  # fmt: skip
                block.extras["train_loss"][torch.from_numpy(parts[number])] = work.mean(losses).to(task.dtype)
            finally:
                self._lanes.put(lane)

        waiting = [self._pool.submit(run, number) for number in range(len(parts))]

        def end() -> Block:
            try:
                for number, future in enumerate(waiting):
                    future.result()
                    part, sums[number] = sums[number], None
                    if summed and part is not None:
                        summed[1].add_(part)
            finally:
                wait(waiting)  # all of them, failed or not: nobody may still write when rows are trained again
            return block

        return end

    def _program(self, size: int, *, padded: bool, pulled: bool) -> Program:
        key = (size, padded, pulled)
        if key not in self._programs:
            step = self.step
            self._programs[key] = record(
                partial(step, padded=padded, pulled=pulled), step.example(size, padded=padded, pulled=pulled)
            )
        return self._programs[key]

    def _loop(self, steps: Steps, *, pulled: bool) -> Callable[..., None]:
        """Return the loop over all kinds of steps met so far, and number the steps by it: compiling takes 20 ms."""
        known = self._known.setdefault(pulled, [])
        new = [kind for kind in steps.kinds if kind not in known]
        if new:
            known += new
            programs = [self._program(size, padded=padded, pulled=pulled) for size, padded in known]
            self._loops[pulled] = compiled(programs, [padded for _, padded in known])
        steps.program = np.array([known.index(kind) for kind in steps.kinds], dtype=np.int64)[steps.program]
        return self._loops[pulled]

    def _prove(self) -> Program:
        """Record a step, and hold it against the step itself on other samples and other weights."""
        step = self.step
        size = min(self.task.training.batch_size or int(self.task.partition.sizes.max(initial=1)), len(self.task.x))
        try:
            program = self._program(size, padded=False, pulled=False)
        except NotRecordable as error:
            raise ValueError(f"a step cannot be recorded: {error}") from error
        given = step.example(size, padded=False, pulled=False, number=1)
        again = [tensor.clone() for tensor in given]
        with torch.no_grad():
            pairs = [(program(given), step(again, padded=False, pulled=False)), *zip(given, again, strict=True)]
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs):
            raise ValueError("a recorded step differs from the step itself: the model depends on more than its inputs")
        return program


def _shares(num_steps: Int64, count: int) -> list[Int64]:
    """Split rows into shares of about equal work, longest first."""
    order = np.argsort(-num_steps, kind="stable")  # (K,)
    return [part for part in (order[k::count] for k in range(count)) if len(part)]


def _check(task: Task) -> None:
    """Refuse what the native loop does not do.

    Raises:
        ValueError: it says what.

    """
    if task.device.type != "cpu":
        raise ValueError("captured steps are for a CPU")
    if task.precision != "fp32":
        raise ValueError(f"captured steps compute in the run's dtype; precision={task.precision} is for other kernels")
    if task.buffers.size:
        raise ValueError("the model has running statistics (batch norm?)")
    own = [name for name in ("loss", "direction", "finish", "phases") if hasattr(task.objective, name)]
    if own or not hasattr(task.objective, "criterion"):
        raise ValueError(f"the objective is more than a criterion: {', '.join(own)}")
    if mixes_samples(task):
        raise ValueError("the model's logits of a sample depend on who else is in its batch")


def _blocks(count: int) -> list[Int64]:
    """Split rows into blocks of neighbours: few, for each has a sum of its own for a while."""
    size = max(SUMMED, -(-count // MOST))
    return [np.arange(low, min(low + size, count)) for low in range(0, count, size)]
