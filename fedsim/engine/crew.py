"""How a run's workers are set up: which engine each runs, in blocks of how many clients, on which devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedsim.children import num_cores
from fedsim.engine.auto import make_engine
from fedsim.engine.parcel import Parcel, pack
from fedsim.engine.pool import Pool
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Engine, Task
from fedsim.engine.worker import Setup, numerics
from fedsim.engine.workers import Distributed
from fedsim.errors import UserError

# Blocks of a full cohort: enough that a few workers end at about the same time, few enough that what a block costs
# beside its rows does not count. Batched rows are cheaper together, so there are fewer blocks of them.
NUM_BLOCKS, NUM_BATCHED_BLOCKS = 16, 8
BLOCK_ENTRIES = 1 << 22  # of a block's updates on a CPU, as in a stream of one process


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Workers of one machine, or of a cluster.

    Args:
        workers: how many, ≥ 1; None: one a device, on a CPU one a core. Changes no result.
        devices: where they train, in turn, e.g. (0, 1) for two GPUs; None: all GPUs, or the CPU. Not with Ray.
        inner: "auto", "sequential" or "vectorized", the engine in each.
        inner_arguments: of that engine, where it is not "auto".
        block: rows ≥ 1 that a worker trains at a time; None: from a fixed table of cohort and parameters.
        worker_threads: ≥ 1 of each worker's operations on a CPU.
        address: of a Ray cluster, "auto" or host:port; None: one of this run's own. Not with processes.

    Raises:
        ValueError: an argument is out of range.

    """

    workers: int | None = None
    devices: Sequence[int | str] | None = None
    inner: str = "auto"
    inner_arguments: Mapping[str, Any] = field(default_factory=dict)
    block: int | None = None
    worker_threads: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "block", "worker_threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"engine.{name} must be an integer >= 1, got {value!r}")
        if self.inner not in ("auto", "sequential", "vectorized"):
            raise ValueError(f"engine.inner must be auto, sequential or vectorized, got {self.inner!r}")
        if self.inner == "auto" and self.inner_arguments:
            raise ValueError(f"engine.inner_arguments {dict(self.inner_arguments)} need engine.inner to name an engine")
        listed = isinstance(self.devices, Sequence) and not isinstance(self.devices, str)
        if self.devices is not None and (not listed or not self.devices):
            raise ValueError(f"engine.devices must be a list such as [0,1] or [cpu], got {self.devices!r}")

    def engine(self, task: Task, name: str, cohort: int) -> tuple[Engine, str]:
        """Return the engine of a task, and why its inner one.

        Args:
            task: what all rounds share.
            name: processes or ray.
            cohort: clients a round.

        Raises:
            UserError: no such device, or a task that cannot be sent to workers.

        """
        devices = self._devices(task.device) if name == "processes" else []
        inner, why = make_engine(task, self.inner, cohort=cohort, threads=1, **self.inner_arguments)
        inner.close()
        arguments = dict(inner.plan)
        kind = arguments.pop("engine")
        block = self.block or _block(task, cohort, arguments.get("chunk"))
        setup = Setup({"name": kind, **arguments}, dict(inner.plan), block, self.worker_threads, numerics())
        bare = replace(task, store=ClientStore(1, task.store.first))
        plan = {
            "engine": name, "inner": kind, "inner_arguments": arguments, "block": block,
            "worker_threads": self.worker_threads,
        }  # fmt: skip
        num_blocks = -(-cohort // block)
        pool: Pool
        if name == "processes":
            pool, workers = self._processes(task, bare, setup, num_blocks, devices)
        else:
            pool, workers = self._ray(task, bare, setup, num_blocks)
        return Distributed(task, pool, plan=plan, workers=workers), f"{kind} in each worker: {why}"

    def _processes(self, task: Task, bare: Task, setup: Setup, num_blocks: int, devices: list[str]) -> tuple[Pool, int]:
        from fedsim.engine.processes import Processes

        default = (
            len(devices) if self.devices is not None or task.device.type != "cpu" else min(num_cores(), num_blocks)
        )
        workers = self.workers or default
        each = [devices[k % len(devices)] for k in range(workers)]
        parcel = _packed(bare, "processes", pack)
        return Processes(parcel, setup, devices=each, row=task.shared.size, dtype=task.dtype), workers

    def _ray(self, task: Task, bare: Task, setup: Setup, num_blocks: int) -> tuple[Pool, int]:
        from fedsim.engine.ray import Actors, Cluster

        cluster = Cluster(
            self.address, self.workers, min(num_cores(), num_blocks), self.worker_threads, task.device.type
        )
        try:
            return Actors(cluster, _packed(bare, "ray", cluster.pack), setup, task), cluster.workers
        except UserError:
            cluster.close()
            raise

    def _devices(self, device: torch.device) -> list[str]:
        """Return the devices to train on, all of the run's kind."""
        kind = device.type
        if self.devices is None:
            return [f"cuda:{k}" for k in range(torch.cuda.device_count())] if kind == "cuda" else [str(device)]
        names = [f"cuda:{d}" if isinstance(d, int) else str(d) for d in self.devices]
        for name in names:
            try:
                wanted = torch.device(name)
            except RuntimeError as error:
                raise UserError(f"engine.devices: no device is called {name!r}; e.g. [0,1] or [cpu]") from error
            if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
                raise UserError(
                    f"engine.devices: {name} is not here; this machine has {torch.cuda.device_count()} GPUs"
                )
            if wanted.type != kind:
                raise UserError(f"engine.devices: {name} is not of the run's kind, {kind}; set device={wanted.type}")
        return names


def _block(task: Task, cohort: int, chunk: int | None) -> int:
    """Return the rows of a block by the fixed table: a matter of cohort, parameters, engine and kind of device.

    Args:
        task: what all rounds share.
        cohort: clients a round.
        chunk: rows that a worker's engine trains as one batch; None: it trains them one by one.

    """
    rows = -(-cohort // (NUM_BATCHED_BLOCKS if chunk else NUM_BLOCKS))
    if task.device.type == "cpu":
        rows = min(rows, BLOCK_ENTRIES // max(1, task.shared.size))
    return max(1, min(rows, chunk or rows))


def _packed(task: Task, name: str, how: Callable[[Any], Parcel]) -> Parcel:
    try:
        return how(task)
    except Exception as error:
        for part in ("module", "objective", "augment", "training"):
            try:
                how(getattr(task, part))
            except Exception as reason:
                what = {"module": "model", "objective": "client", "augment": "data's augment"}.get(part, part)
                raise UserError(
                    f"engine={name}: the {what} cannot be sent to workers ({_line(reason)}); define it at the top "
                    "level of a module (no lambda, no local class), or take engine=sequential"
                ) from error
        raise UserError(f"engine={name}: the task cannot be sent to workers ({_line(error)})") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
