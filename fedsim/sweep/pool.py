"""Warm worker processes: forked from a server that has loaded everything, one trial at a time each."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple, Self

from fedsim import children

PICTURES = ".pictures"  # in the folder of the sweep while it runs: partitions that were drawn already
_PRELOADED = "fedsim.sweep.worker"


class Job(NamedTuple):
    """One trial as a worker is told of it."""

    name: str
    folder: str
    overrides: tuple[str, ...]
    config_dir: str | None


class Batch(NamedTuple):
    """Trials that a worker does side by side, as replicas."""

    jobs: tuple[Job, ...]


class Event(NamedTuple):
    """What a worker tells: "begin", "start", "round", "note", "warn", "done" or "failed", with what belongs to it."""

    kind: str
    name: str  # of the trial
    content: Mapping[str, Any]


class _Worker:
    """A process, the pipe to it, and the trials it does."""

    def __init__(self, context: Any, device: str | None) -> None:
        environ = dict(os.environ)
        if device is not None:
            environ["CUDA_VISIBLE_DEVICES"] = device
        self.device = device
        self.jobs: list[str] = []  # names of those that have not ended
        self.pipe, theirs = context.Pipe()
        # Not a daemon: an engine inside the trial may have processes of its own. The worker watches its parent.
        self.process = context.Process(target=_serve, args=(theirs, environ, os.getcwd()), daemon=False)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.pipe.close()
        children.end(self.process, at_once=bool(self.jobs))  # its checkpoints are whole whenever it is killed


def _serve(pipe: connection.Connection, environ: Mapping[str, str], folder: str) -> None:
    from fedsim.sweep.worker import serve  # here: the process that sweeps needs neither torch nor Flower

    serve(pipe, environ, folder)


class Pool:
    """Workers that do jobs side by side.

    Args:
        devices: what each worker sees as CUDA_VISIBLE_DEVICES; None leaves it as it is.

    """

    def __init__(self, devices: Sequence[str | None]) -> None:
        self._devices = list(devices)
        self._context, self._workers = children.context(_PRELOADED), list[_Worker]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def __len__(self) -> int:
        return len(self._devices)

    def run(self, jobs: Iterable[Job | Batch], told: Callable[[Event], None]) -> None:
        """Do all jobs, in order of their start; a job that fails, or whose process dies, stops no other.

        Args:
            jobs: what to do; those of a batch are one process's.
            told: called with every event, here and in no other thread. Each job has a "begin", and one "done" or
                "failed" at its end.

        """
        waiting = deque(jobs)
        while len(self._workers) < min(len(self._devices), len(waiting)):
            self._workers.append(_Worker(self._context, self._devices[len(self._workers)]))
        for worker in self._workers:
            self._give(worker, waiting, told)
        while any(worker.jobs for worker in self._workers):
            ready = connection.wait([worker.pipe for worker in self._workers if worker.jobs])
            for i, worker in enumerate(self._workers):
                if worker.pipe in ready:
                    self._workers[i] = self._hear(worker, told)
                    if not self._workers[i].jobs:
                        self._give(self._workers[i], waiting, told)

    def _give(self, worker: _Worker, waiting: deque[Job | Batch], told: Callable[[Event], None]) -> None:
        if waiting:
            unit = waiting.popleft()
            jobs = unit.jobs if isinstance(unit, Batch) else (unit,)
            worker.jobs = [job.name for job in jobs]
            for job in jobs:
                told(Event("begin", job.name, {"folder": job.folder}))
            with contextlib.suppress(BrokenPipeError):  # it has died; the next wait says so
                worker.pipe.send(unit)

    def _hear(self, worker: _Worker, told: Callable[[Event], None]) -> _Worker:
        """Pass on one event; return the worker, or a new one in the place of one that died."""
        try:
            event = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            for name in worker.jobs:
                told(Event("failed", name, {"error": children.epitaph(worker.process.exitcode), "seconds": None}))
            worker.pipe.close()
            return _Worker(self._context, worker.device)
        if event.kind in ("done", "failed"):
            worker.jobs.remove(event.name)
        told(event)
        return worker


def start_server() -> None:
    """Begin to load what the workers need, beside what this process does meanwhile."""
    children.start_server(_PRELOADED)
