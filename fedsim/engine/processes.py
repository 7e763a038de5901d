"""Workers as processes of this machine, over memory that all of them map."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing import connection
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor

from fedsim import children
from fedsim.engine.parcel import Parcel, Spec, from_bytes, pack, specify, to_bytes, view
from fedsim.engine.pool import Event, Place, Rooms, WorkersLost, refused
from fedsim.engine.shared import Memory, memory_of
from fedsim.engine.task import Block, Job
from fedsim.engine.worker import Setup, Told

_PRELOADED = "fedsim.engine.worker"
_STARTS = 3  # times that a worker may end before it is ready
SMALL = 1 << 10  # bytes a row of what is sent through the pipe; more goes through shared memory


class _Worker:
    """A process, the pipe to it, and what it has been told."""

    def __init__(self, context: Any, device: str) -> None:
        self.device, self.ready, self.busy = device, False, False
        self.known: dict[str, Tensor] = {}  # memories it maps
        self.shared = 0  # the last common message that it got
        self.told: tuple[Place, int] | None = None  # where its block goes, rows
        self.pipe, theirs = context.Pipe()
        # A daemon: one that nobody closed must not keep the run from exiting.
        self.process = context.Process(target=_serve, args=(theirs, dict(os.environ), os.getcwd()), daemon=True)
        self.process.start()
        # It heeds no SIGTERM, which is how multiprocessing ends daemons, after these.
        Finalize(self, self.process.kill, exitpriority=0)
        theirs.close()

    def map(self, name: str, whole: Tensor) -> None:
        """Let the process map a memory unless it has."""
        if self.known.get(name) is not whole:
            memory = memory_of(whole)
            assert memory is not None  # only memories are sent
            self.pipe.send(("map", name, len(memory)))
            memory.send(self.pipe, self.process.pid)
            self.known[name] = whole

    def end(self) -> None:
        self.pipe.close()
        children.end(self.process, at_once=self.busy or not self.ready)


def _serve(pipe: connection.Connection, environ: Mapping[str, str], folder: str) -> None:
    from fedsim.engine.worker import serve

    serve(pipe, environ, folder)


class Processes:
    """A pool of processes; `pool.Pool`.

    Args:
        parcel: of the task.
        setup: what all workers are told.
        devices: where each worker trains.
        row: entries of an update, D.
        dtype: of updates.

    """

    def __init__(
        self, parcel: Parcel, setup: Setup, *, devices: Sequence[str], row: int, dtype: torch.dtype
    ) -> None:  # fmt: skip
        self._setup, self._devices = setup, list(devices)
        self._memories: dict[str, Tensor] = {}  # name → (B,) uint8
        self.rooms = Rooms(lambda name, count: self._field(f"{name}/updates", count, (row,), dtype))
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}  # field → of one row
        self._workers: list[_Worker] = []
        self._starts = [0] * len(self._devices)
        self._text, self._arrays = parcel.text, self._store("task", parcel.arrays)
        self._common: tuple[Any, ...] = ()
        self._number = 0

    def publish(self, job: Job) -> None:
        """Write what all blocks share where the workers read it."""
        common = {"models": job.models, "broadcasts": job.broadcasts, "buffers": job.buffers}
        parcel = pack(common)
        self._common = (parcel.text, self._store("common", parcel.arrays))
        self._number += 1

    def give(self, worker: int, part: Job, place: Place, shares: Tensor | None) -> None:
        """Let a worker train a block."""
        mine = self._workers[worker]
        mine.busy, mine.told = True, (place, len(part))
        rows = slice(place.low, place.low + len(part))
        fields = {}
        for name, value in part.state.items():
            self._shapes[f"state/{name}"] = self._shapes[f"given/{name}"] = (tuple(value.shape[1:]), value.dtype)
        count = len(self.rooms[place.room])
        for name, (shape, dtype) in self._shapes.items():
            whole = self._field(f"{place.room}/{name}", count, shape, dtype)
            fields[name] = (f"{place.room}/{name}", tuple(whole.shape), dtype)
            if name.startswith("given/"):
                whole[rows] = part.state[name.removeprefix("given/")].cpu()
        updates = f"{place.room}/updates"
        bare = replace(part, models={}, broadcasts={}, buffers=part.buffers[:0].cpu(), state={})
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died; the next wait says so
            if mine.shared != self._number:
                self._send(mine, "shared", *self._common)
                mine.shared = self._number
            for name in (updates, *(memory for memory, _, _ in fields.values())):
                mine.map(name, self._memories[name])
            share = None if shares is None else to_bytes(shares)
            told = Told(bare, place.low, share, (updates, tuple(self.rooms[place.room].shape)), fields)
            mine.pipe.send(("train", told))

    def wait(self) -> list[Event]:
        """Wait until a worker says something or ends."""
        while len(self._workers) < len(self._devices):
            self._workers.append(self._start(len(self._workers)))
        ready = connection.wait([worker.pipe for worker in self._workers])
        return [self._hear(k, worker) for k, worker in enumerate(self._workers) if worker.pipe in ready]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _start(self, number: int) -> _Worker:
        worker = _Worker(children.context(_PRELOADED), self._devices[number])
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._send(worker, "task", self._text, self._arrays, self._setup, worker.device)
        return worker

    def _send(self, worker: _Worker, kind: str, text: bytes, arrays: list[tuple[str, Spec]], *more: Any) -> None:
        for name, _ in arrays:
            worker.map(name, self._memories[name])
        worker.pipe.send((kind, text, arrays, *more))

    def _hear(self, number: int, worker: _Worker) -> Event:
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            return self._buried(number, worker)
        if kind == "ready":
            worker.ready, self._starts[number] = True, 0
            return Event("ready", number)
        worker.busy = False
        if kind == "broken":
            return Event("broken", number, refused(content))
        if kind == "done":
            assert worker.told is not None  # it answers what it was given
            content = self._block(*worker.told, *content)
        return Event(kind, number, content)

    def _buried(self, number: int, worker: _Worker) -> Event:
        worker.pipe.close()
        worker.process.join(children.GRACE)
        worker.process.kill()
        worker.process.join()
        why = children.epitaph(worker.process.exitcode)
        if not worker.ready:
            self._starts[number] += 1
            if self._starts[number] == _STARTS:
                hint = 'a script that starts a run needs `if __name__ == "__main__":` around it'
                return Event("broken", number, WorkersLost(f"workers end as they start ({why}); {hint}"))
        self._workers[number] = self._start(number)
        return Event("lost", number, why)

    def _block(self, place: Place, count: int, small: list[Any], extras: Any, state: Any) -> Block:
        rows = slice(place.low, place.low + count)

        def read(prefix: str, left: Mapping[str, Any]) -> dict[str, Tensor]:
            found = {}
            for name, value in left.items():
                key = f"{prefix}/{name}"
                if value is None:
                    shape, dtype = self._shapes[key]
                    whole = self._field(f"{place.room}/{key}", len(self.rooms[place.room]), shape, dtype)
                    found[name] = whole[rows]
                    continue
                found[name] = row = from_bytes(value)
                if row.numel() * row.element_size() >= SMALL * count:
                    self._shapes[key] = (tuple(row.shape[1:]), row.dtype)
            return found

        norms, weights, num_steps, buffers = map(from_bytes, small)
        return Block(norms, weights, num_steps, read("extras", extras), buffers, read("state", state))

    def _store(self, name: str, arrays: list[Tensor]) -> list[tuple[str, Spec]]:
        """Write arrays into one memory, but for those that are one themselves; return where each is."""
        own = [memory_of(array) is not None for array in arrays]
        specs, size = specify([array for array, alone in zip(arrays, own, strict=True) if not alone])
        if name not in self._memories or len(self._memories[name]) < size:
            self._memories[name] = Memory.new(size).tensor()
        inside = iter(specs)
        places = []
        for number, (array, alone) in enumerate(zip(arrays, own, strict=True)):
            if alone:
                key = f"{name}/{number}"
                self._memories[key] = array.view(-1).view(torch.uint8)
                places.append((key, Spec(0, tuple(array.shape), array.dtype)))
            else:
                spec = next(inside)
                view(self._memories[name], spec).copy_(array)
                places.append((name, spec))
        return places

    def _field(self, name: str, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return (≥ count, *shape) of a memory of that name, a new one where the old one is too short."""
        spec = Spec(0, (count, *shape), dtype)
        size = torch.Size(spec.shape).numel() * dtype.itemsize
        if name not in self._memories or len(self._memories[name]) < size:
            self._memories[name] = Memory.new(size).tensor()
        return view(self._memories[name], spec)


def start_server() -> None:
    """Begin to load what workers need, beside what this process does meanwhile."""
    children.start_server(_PRELOADED)
