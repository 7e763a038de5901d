"""Clients as rows of one batched program: chunks of them, by fused kernels or `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.blame import batching, users_line
from fedsim.engine.chunk import Chunk
from fedsim.engine.graphs import Graphs, refusal
from fedsim.engine.laid import Laid, Target, lay_out
from fedsim.engine.lanes import lanes
from fedsim.engine.task import Block, Job, Task, room
from fedsim.errors import UserError
from fedsim.local import Int64
from fedsim.threads import take_threads

CHUNK_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 28}  # of a chunk's weights; measured on B4, 25 to 50 rows win
BLOCK_ENTRIES = 1 << 24
CHUNK_ROWS = {"cpu": 256, "cuda": 1024}


class Vectorized:
    """Trains chunks of clients as rows of one batched program.

    On a CPU each thread trains chunks of its own (the kernels of a chunk run on one thread, so none waits for
    another). Which rows make up a chunk depends on the cohort alone, so the number of threads changes no bit.

    Args:
        task: what all rounds share.
        chunk: rows of a chunk, ≥ 1; None: from a fixed table of parameters and device.
        kernels: "fused", "generic", or "auto": fused where every layer has a kernel and the objective is a criterion.
        threads: on a CPU, chunks in training at once, ≥ 1; None: as many as torch has threads.
        graphs: on CUDA, replay steps as CUDA graphs where they can be recorded; `no_graphs` says why not.

    Raises:
        ValueError: an argument is out of range, or what a client does cannot be batched that way.

    """

    def __init__(
        self, task: Task, *, chunk: int | None = None, kernels: str = "auto", threads: int | None = None,
        graphs: bool = False,
    ) -> None:  # fmt: skip
        if kernels not in {"auto", "fused", "generic"}:
            raise ValueError(f"engine.kernels must be auto, fused or generic, got {kernels!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"engine.chunk must be >= 1, got {chunk}")
        self.task = task
        kind = "cuda" if task.device.type == "cuda" else "cpu"
        size = max(1, task.shared.size + task.local.size)
        self.chunk = chunk or chunk_rows(task)
        # Of a streamed block: enough chunks to keep the threads busy, unless each row is a large model.
        self.block_rows: int | None = max(self.chunk, min(4 * self.chunk, BLOCK_ENTRIES // size))
        self._threads = (threads or torch.get_num_threads()) if kind == "cpu" else 1
        self._lanes: SimpleQueue[Any] = SimpleQueue()
        for lane in lanes(task, kernels, self._threads, self.chunk):
            self._lanes.put(lane)
            fused = lane.fused
        on_host = f"CUDA graphs are for CUDA devices, and device is {task.device.type}"
        self.no_graphs = None if not graphs else refusal(task) if kind == "cuda" else on_host
        self.graphs = Graphs(task) if graphs and not self.no_graphs else None
        self._pool = ThreadPoolExecutor(self._threads, initializer=take_threads, initargs=(1,))
        self.plan: Mapping[str, Any] = {
            "engine": "vectorized", "kernels": "fused" if fused else "generic", "chunk": self.chunk,
            **({"graphs": True} if self.graphs else {}),
        }  # fmt: skip

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)

    def room(self, count: int) -> Tensor:
        """Return (count, D) for updates.

        Where one is enough the model is large: the module's own shared parameters, whose values nobody reads while an
        engine trains, lie in it.
        """
        task = self.task
        rows = torch.empty(count, task.shared.size, dtype=task.dtype, device=task.device)
        if count == 1:
            own = dict(task.module.named_parameters())
            for name, view in task.shared.split(rows[0]).items():
                own[name].data = view.copy_(own[name].detach())
        return rows

    def train(self, job: Job, out: Tensor) -> Block:
        """Train the rows of a job and write their updates w_k − w_received into out (K, D)."""
        laid = lay_out(self.task, job)
        block = room(self.task, job, laid.num_steps)
        # Longest rows first, so that the rows with a step left are always a chunk's first ones.
        order = np.argsort(-laid.num_steps, kind="stable")  # (K,)
        chunks = [order[low : low + self.chunk] for low in range(0, len(order), self.chunk)]
        self.run(self.trainings(job, laid, chunks, Target([out]), block))
        return block

    def trainings(
        self, job: Job, laid: Laid, chunks: Sequence[Int64], target: Target, block: Block
    ) -> list[Callable[[], None]]:
        """Return what trains each of some chunks of rows, longest first, into a target and a block."""

        def train(rows: Int64) -> None:
            gradient = self._lanes.get()
            try:
                with torch.no_grad():
                    out = target.room(rows)
                    Chunk(self.task, job, laid, rows, gradient, self.graphs).train(out, block)
                    target.put(rows, out)
            except (torch.OutOfMemoryError, UserError):
                raise
            except Exception as error:
                if batching(error):
                    raise UserError(f"engine=vectorized: {users_line(error)}; engine=sequential runs it") from error
                raise RuntimeError(users_line(error)) from error  # of a client: it may be dropped
            finally:
                self._lanes.put(gradient)

        return [partial(train, rows) for chunk in chunks for rows in _by_pull(self.task, job, chunk)]

    def run(self, trainings: Sequence[Callable[[], None]]) -> None:
        """Do trainings of chunks, side by side on a CPU."""
        if self.task.device.type == "cpu":
            waiting = [self._pool.submit(training) for training in trainings]
            wait(waiting)  # all of them, failed or not: nobody may still write when rows are trained again
            for future in waiting:
                future.result()
        else:
            for training in trainings:
                training()


def chunk_rows(task: Task) -> int:
    """Return the rows of a chunk where nobody says: from a fixed table of parameters and device."""
    kind = "cuda" if task.device.type == "cuda" else "cpu"
    return max(1, min(CHUNK_ROWS[kind], CHUNK_ENTRIES[kind] // max(1, task.shared.size + task.local.size)))


def _by_pull(task: Task, job: Job, rows: Int64) -> list[Int64]:
    """Split rows whose versions came with different proximal strengths: one program has one."""
    mine = getattr(task.objective, "proximal_mu", 0.0)
    pulls = np.array([float(job.broadcasts.get(int(v), {}).get("proximal_mu", mine)) for v in job.received[rows]])
    return [rows[pulls == pull] for pull in np.unique(pulls)]
