"""Clients one after another inside one native program: a local step is recorded once and runs without Python.

On a CPU a client's weights then stay in the core's own cache from its first step to its last, and neither the
interpreter nor its lock stands between two operations, so that threads scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.blame import users_line
from fedsim.engine.lanes import mixes_samples
from fedsim.engine.native import Lane, Steps
from fedsim.engine.play import Play
from fedsim.engine.step import Step
from fedsim.engine.task import LOCAL, Block, Job, Task, Weighed, local_round, room, row_keys
from fedsim.errors import UserError
from fedsim.local import Int64
from fedsim.scripted import as_written
from fedsim.threads import one_thread, take_threads

MOST = 16  # blocks whose rows are summed before the blocks are
LOSSES = 64  # samples up to which each size of a batch may have a program


class Captured:
    """Trains clients one after another in native loops, one a thread.

    Which thread trains a client, and beside whom, changes none of its operations: bits depend on neither.

    Args:
        task: what all rounds share; on a CPU, with one phase.
        threads: native loops at once, ≥ 1; None: as many as torch has threads.

    Raises:
        ValueError: what a client does cannot be recorded.

    """

    block_rows: int | None = None

    def __init__(self, task: Task, *, threads: int | None = None) -> None:
        _check(task)
        self.task = task
        self.step = Step(task)
        self._plays: dict[Any, Play] = {}
        with contextlib.suppress(KeyError):  # of what a rule has not sent yet: the first round will tell
            self._play(task.told if self.step.situated else {}, pulled=False)
        self._threads = threads or torch.get_num_threads()
        self._lanes: SimpleQueue[Lane] = SimpleQueue()
        self._spare: list[Tensor] = []  # sums of blocks that were added up
        self.step.start = []  # the module's own tensors, which become a lane's
        for lane in range(self._threads):
            self._lanes.put(Lane(task, self.step.names, self.step.apart, self.step.num_slots, bound=lane == 0))
        self._pool = ThreadPoolExecutor(self._threads, initializer=take_threads, initargs=(1,))
        self.plan: Mapping[str, Any] = {"engine": "vectorized", "kernels": "captured"}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)

    def train(self, job: Job, out: Tensor) -> Block:
        """Train the rows of a job and write their updates w_k − w_received into out (K, D)."""
        return self._begin(self.task, job, out, None, here=self._alone())()

    def train_sum(self, job: Job, coefficients: Tensor, total: Tensor) -> Block:
        """Train the rows of a job and add Σ c_k Δ_k over finite rows to total (D,); no row is ever held.

        Rows are summed in blocks by position, and the blocks from the first to the last: the sum depends on neither
        threads nor order.

        Args:
            job: the rows.
            coefficients: (K,) c_k.
            total: (D,), added to.

        Raises:
            Weighed: clients say what they weigh.

        """
        return self._begin(self.task, job, None, (coefficients.tolist(), total), here=self._alone())()

    def _alone(self) -> bool:
        """Whether the caller's thread may do what the one thread of the pool would: the same operations."""
        return self._threads == 1 and torch.get_num_threads() == 1

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
        return self._begin(task, job, out, summed, here=False)

    @one_thread()
    def _begin(
        self, task: Task, job: Job, out: Tensor | None, summed: tuple[list[float], Tensor] | None, *, here: bool
    ) -> Callable[[], Block]:
        step, order = self.step, local_round(task, job, 0, task.phases[0])
        play, starts, common = self._versions(job, summed=summed is not None)
        block = room(task, job, order.num_steps, play.keeps)
        corrections = step.corrections(job.lr, int(order.num_steps.max(initial=0)))
        kept = [block.state[LOCAL + name] for name in task.local.names]
        own = self._own(task, job, order.num_steps)
        left = play.room(block)
        rows = _busy(order.num_steps, job, block, out)
        parts = _blocks(rows) if summed else _shares(rows, order.num_steps, 4 * self._threads)
        steps = Steps(task, job, order, np.concatenate([rows[:0], *parts]), play.sizes)
        loop = play.loop(steps)
        step.start = []
        sums: list[Tensor | None] = [None] * len(parts)
        ends = np.cumsum([0, *map(len, parts)])
        losses = torch.zeros(int(steps.first[-1]), dtype=task.dtype)  # (S,)

        def run(number: int) -> None:
            low, high = int(ends[number]), int(ends[number + 1])
            lane, work, total = self._lanes.get(), steps.part(low, high), None
            if summed:  # the sum of one block alone needs no room of its own
                total = sums[number] = summed[1] if len(parts) == 1 else self._empty(summed[1])
            try:
                with as_written():
                    loop(
                        *work, starts, common, corrections, step.x, task.y, lane.flat, lane.params, lane.slots,
                        lane.apart, lane.apart_views, lane.local, kept, own, left, out,
                        losses if total is None else total, summed[0] if summed else [0.0], len(parts) > 1,
                        block.square_norms, losses[steps.first[low] : steps.first[high]],
                    )  # fmt: skip
            finally:
                self._lanes.put(lane)

        waiting = [] if here else [self._pool.submit(run, number) for number in range(len(parts))]

        def end() -> Block:
            try:
                with one_thread():
                    for number in range(len(parts)):
                        run(number) if here else waiting[number].result()
                        part, sums[number] = sums[number], None
                        if summed and part is not None and part is not summed[1]:
                            summed[1].add_(part)
                            self._spare.append(part)
            finally:
                del self._spare[self._threads :]
                wait(waiting)  # all of them, failed or not: nobody may still write when rows are trained again
            block.extras["train_loss"][torch.from_numpy(steps.rows)] = steps.mean(losses).to(task.dtype)
            return block

        return end

    def _empty(self, like: Tensor) -> Tensor:
        """Return room for a block's sum, where possible in memory that is mapped already."""
        try:
            return self._spare.pop()
        except IndexError:
            return torch.empty_like(like)

    def _versions(self, job: Job, *, summed: bool) -> tuple[Play, list[Tensor], list[list[Tensor]]]:
        """Return the programs of a job, and of each version its weights and what its clients share."""
        step, versions = self.step, sorted(set(job.received.tolist()))
        step.start_from(job.models[versions[0]])
        pulls = [step.pull(job, version) for version in versions]
        told = [job.broadcasts.get(version, {}) if step.situated else {} for version in versions]
        if any(sent.keys() != told[0].keys() for sent in told):
            raise UserError("engine=vectorized: versions came with different broadcasts; engine=sequential runs it")
        try:
            play = self._play(told[0], pulled=any(pulls))
        except ValueError as error:
            raise UserError(f"engine=vectorized: {error}; engine=sequential runs it") from error
        if summed and any(name == "weight" for name, _ in play.leaves):
            raise Weighed
        starts = [job.models[version] for version in versions]
        common = [
            step.common(start, mu, job.lr, sent, pulled=any(pulls))
            for start, mu, sent in zip(starts, pulls, told, strict=True)
        ]
        return play, starts, common

    def _own(self, task: Task, job: Job, num_steps: Int64) -> list[Tensor]:
        """Return what is a client's own in the context of an objective, (K, …) each."""
        if not self.step.situated:
            return []
        numbers = (
            torch.from_numpy(num_steps),
            torch.from_numpy(task.partition.sizes[job.clients]),
            row_keys(task, job),
        )
        return [*(job.state[name] for name in self.step.state), *numbers]

    def _play(self, sent: Mapping[str, Any], *, pulled: bool) -> Play:
        """Return the programs of rounds in which the rule sends what is named and formed like this.

        Raises:
            ValueError: a step cannot be recorded.

        """
        other = [name for name, value in sent.items() if not isinstance(value, (Tensor, bool, int, float))]
        if other:
            raise ValueError(f"the rule sends {', '.join(other)}, which is neither a tensor nor a number")
        key = (pulled, tuple(sorted((name, _form(value)) for name, value in sent.items())))
        if key not in self._plays:
            try:
                self._plays[key] = Play(self.step, sent, pulled=pulled)
            except KeyError:  # of what the rule has not sent: an objective's own affair
                raise
            except Exception as error:  # whatever the user's code says to being recorded, others run it
                raise ValueError(f"a step cannot be recorded: {users_line(error)}") from error
        return self._plays[key]


def _form(value: Any) -> tuple[Any, ...]:
    """Return what a program hangs on in a value that the rule sends."""
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else (type(value).__name__,)


def _busy(num_steps: Int64, job: Job, block: Block, out: Tensor | None) -> Int64:
    """Return the rows that have a step; the others' updates and uploads are zero, and their state is what it was."""
    idle = torch.from_numpy(np.flatnonzero(num_steps == 0))
    block.square_norms[idle] = 0
    for value in block.extras.values():
        value[idle] = 0
    for name, value in block.state.items():
        value[idle] = job.state[name][idle]
    if out is not None:
        out[idle] = 0
    return np.flatnonzero(num_steps)


def _shares(rows: Int64, num_steps: Int64, count: int) -> list[Int64]:
    """Split rows into shares of about equal work, longest first."""
    order = rows[np.argsort(-num_steps[rows], kind="stable")]
    return [part for part in (order[k::count] for k in range(count)) if len(part)]


def _blocks(rows: Int64) -> list[Int64]:
    """Split rows into blocks of neighbours: of two rows or more, and as many as usual numbers of threads share."""
    count = 1
    while count < MOST and 5 * count <= len(rows):
        count *= 2
    return [part for part in np.array_split(rows, count) if len(part)]


def _check(task: Task) -> None:
    """Refuse what the native loop does not do.

    Raises:
        ValueError: it says what.

    """
    if task.device.type != "cpu":
        raise ValueError("captured steps are for a CPU")
    if task.precision != "fp32":
        raise ValueError(f"captured steps compute in the run's own dtype; precision={task.precision} is for others")
    if task.buffers.size:
        raise ValueError("the model has running statistics (batch norm?)")
    if hasattr(task.objective, "phases"):
        raise ValueError("the objective has phases")
    if not hasattr(task.objective, "loss") and not hasattr(task.objective, "criterion"):
        raise ValueError("the objective has neither criterion nor loss")
    if hasattr(task.objective, "loss"):
        most = task.training.batch_size
        if most is None or most > LOSSES:
            raise ValueError(f"a loss of a whole batch is recorded once a size, for batches of up to {LOSSES}")
    elif mixes_samples(task):
        raise ValueError("the model's logits of a sample depend on who else is in its batch")
