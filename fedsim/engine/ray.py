"""Workers as Ray actors, on this machine or on a cluster.

A round's models go into the object store once, and from there once to every node; updates come back through it. A dead
actor, or a dead node's, is replaced wherever the cluster has room, and its block trains again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fedsim.engine.parcel import Bytes, Parcel, from_bytes, pack, sendable, to_bytes, unpack
from fedsim.engine.pool import Event, Place, Rooms, WorkersLost, refused
from fedsim.engine.task import Block, Job, Task
from fedsim.engine.worker import Runner, Setup
from fedsim.errors import UserError

PATIENCE = 300.0  # seconds for which a cluster without a single worker of ours may find room for one
_STARTS = 3  # times that an actor may end before it is ready
Sent = tuple[bytes, list[Bytes]]


class Cluster:
    """A connection to a cluster: the caller's, a running one, or one that begins and ends with it.

    Args:
        address: of a running one, "auto" or host:port; None: one of this run's own on this machine.
        workers: actors; None: one per GPU of the cluster, without GPUs one per core.
        default: the most workers where nobody says how many.
        threads: cores of an actor.
        kind: "cpu" or "cuda", what actors train on.

    Raises:
        UserError: Ray is not installed, no cluster there, or one that has no room for the workers.

    """

    def __init__(self, address: str | None, workers: int | None, default: int, threads: int, kind: str) -> None:
        self.ray, self.kind, self.threads = _installed(), kind, threads
        self.own = not self.ray.is_initialized()
        if self.own:
            self._connect(address, (workers or default) * threads)
        what, each = ("GPU", 1) if kind == "cuda" else ("CPU", threads)
        room = int(self.ray.cluster_resources().get(what, 0)) // each
        self.workers = workers or min(room, default if kind == "cpu" else room)
        if self.workers > room or not room:
            self.close()
            raise UserError(
                f"engine.workers={self.workers}: the Ray cluster has {what}s for {room} workers of {each}; ask for "
                "fewer, or add nodes"
            )

    def _connect(self, address: str | None, cores: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # spares a warning of what Ray will do
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address is None:
                local = {"num_cpus": cores, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
                self.ray.init(address="local", **local, **quiet)
            else:
                if address != "auto":
                    _answers(address)
                self.ray.init(address=address, **quiet)
        except Exception as error:
            where = "one on this machine could not be started" if address is None else f"none answers at {address}"
            raise UserError(f"engine=ray: no cluster: {where} ({_line(error)})") from error

    def pack(self, value: Any) -> Parcel:
        """Put an object and its arrays apart; a lambda, or a class of a script, is no hindrance."""
        return pack(value, import_module("ray.cloudpickle").CloudPickler)

    def close(self) -> None:
        """Leave the cluster, or end it if it is this run's own."""
        if self.own and self.ray.is_initialized():
            self.ray.shutdown()


class Actors:
    """A pool of Ray actors; `pool.Pool`.

    Args:
        cluster: where they live.
        parcel: of the task.
        setup: what all workers are told.
        task: whose updates come back.

    """

    def __init__(self, cluster: Cluster, parcel: Parcel, setup: Setup, task: Task) -> None:
        self.cluster, self._ray, self._setup = cluster, cluster.ray, setup
        width, dtype = task.shared.size, task.dtype
        self.rooms = Rooms(lambda _, count: torch.empty(count, width, dtype=dtype))
        device = {"num_gpus": 1} if cluster.kind == "cuda" else {}
        self._make = self._ray.remote(_Actor).options(num_cpus=cluster.threads, max_restarts=0, **device)
        self._task = self._ray.put(_sent(parcel))
        self._actors: list[Any] = []
        self._refs: dict[Any, int] = {}  # what is awaited → worker
        self._told: dict[int, tuple[Place, int]] = {}  # worker → where its block goes, rows
        self._starts: list[int] = []  # of each worker since one was ready
        self._ready: set[int] = set()
        self._common: tuple[int, Any] = (0, None)

    def publish(self, job: Job) -> None:
        """Put what all blocks share into the object store."""
        common = {"models": job.models, "broadcasts": job.broadcasts, "buffers": job.buffers}
        self._common = (self._common[0] + 1, self._ray.put(_sent(pack(common))))

    def give(self, worker: int, part: Job, place: Place, shares: Tensor | None) -> None:
        """Let a worker train a block."""
        self._told[worker] = (place, len(part) if shares is None else 1)
        bare = replace(part, models={}, broadcasts={}, buffers=part.buffers[:0])
        number, common = self._common
        # In a list, the store's reference stays one: the actor fetches what it stands for once a round.
        ref = self._actors[worker].train.remote(number, [common], _sent(pack((bare, shares))))
        self._refs[ref] = worker

    def wait(self) -> list[Event]:
        """Wait until a worker says something or ends."""
        while len(self._actors) < self.cluster.workers:
            self._actors.append(None)
            self._starts.append(0)
            self._start(len(self._actors) - 1)
        done, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=None if self._ready else PATIENCE)
        if not done:
            return [Event("broken", 0, WorkersLost("engine=ray: no node of the cluster has room for a worker"))]
        return [self._hear(self._refs.pop(ref), ref) for ref in done]

    def close(self) -> None:
        """End the actors, and the cluster if it is the run's own."""
        if self._ray.is_initialized():
            for actor in self._actors:
                self._kill(actor)
        self._actors, self._refs = [], {}
        self._ready.clear()
        self.cluster.close()

    def _start(self, worker: int) -> None:
        actor = self._actors[worker] = self._make.remote(list(sys.path))
        ref = actor.task.remote([self._task], self._setup, self.cluster.kind)
        self._refs[ref] = worker

    def _hear(self, worker: int, ref: Any) -> Event:
        try:
            kind, content = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._buried(worker, error)
        if kind == "ready":
            self._ready.add(worker)
            self._starts[worker] = 0
        elif kind == "broken":
            content = refused(content)
        elif kind == "done":
            content = self._block(*self._told[worker], content)
        return Event(kind, worker, content)

    def _buried(self, worker: int, error: Exception) -> Event:
        why = _line(error)
        if worker not in self._ready:
            self._starts[worker] += 1
            if self._starts[worker] == _STARTS:
                return Event("broken", worker, WorkersLost(f"engine=ray: actors end as they start: {why}"))
        self._ready.discard(worker)
        self._kill(self._actors[worker])  # where only its answer was lost
        self._start(worker)
        return Event("lost", worker, why)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it is dead, or its node is
            self._ray.kill(actor, no_restart=True)

    def _block(self, place: Place, count: int, content: list[Any]) -> Block:
        norms, weights, num_steps, extras, buffers, state, updates = content
        self.rooms[place.room][place.low : place.low + count] = from_bytes(updates)
        return Block(
            from_bytes(norms),
            from_bytes(weights),
            from_bytes(num_steps),
            {name: from_bytes(value) for name, value in extras.items()},
            from_bytes(buffers),
            {name: from_bytes(value) for name, value in state.items()},
        )


class _Actor:
    """A worker in a process of Ray's."""

    def __init__(self, path: list[str]) -> None:
        sys.path.extend(folder for folder in path if folder not in sys.path)  # the user's modules, on this machine
        self.number = 0
        self.runner: Runner | None = None
        self.common: dict[str, Any] = {}

    def task(self, refs: list[Any], setup: Setup, kind: str) -> tuple[str, Any]:
        """Take the task."""
        try:
            self.runner = Runner(self._get(refs[0]), setup, torch.device(kind))
        except Exception as error:
            return "broken", sendable(error)
        return "ready", None

    def train(self, number: int, refs: list[Any], sent: Sent) -> tuple[str, Any]:
        """Train a block; what all blocks share is fetched when its number is new."""
        runner = self.runner
        assert runner is not None  # the task comes first
        try:
            if number != self.number:
                self.common, self.number = unpack(self._get(refs[0]), runner.device), number
            bare, shares = unpack(_parcel(sent), runner.device)
            block, updates = runner.train(replace(bare, **self.common), shares)
        except Exception as error:
            return "failed", sendable(error)
        return "done", [
            {name: to_bytes(each) for name, each in value.items()} if isinstance(value, dict) else to_bytes(value)
            for value in (*block, updates)
        ]

    def _get(self, ref: Any) -> Parcel:
        return _parcel(import_module("ray").get(ref))


def _sent(parcel: Parcel) -> Sent:
    return parcel.text, [to_bytes(array) for array in parcel.arrays]


def _parcel(sent: Sent) -> Parcel:
    return Parcel(sent[0], [from_bytes(array) for array in sent[1]])


def _installed() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise UserError("engine=ray needs Ray: pip install 'fedsim[ray]'") from error


def _answers(address: str) -> None:
    """Raise an OSError if nobody listens at host:port: Ray itself would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        raise OSError("an address is auto or host:port")
    socket.create_connection((host, int(port)), timeout=10).close()


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
