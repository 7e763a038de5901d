"""What engines are given: the task that all rounds share, and the job of one round."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.contracts import Partition, Phase
from fedsim.engine.store import ClientStore
from fedsim.layout import Layout
from fedsim.local import Floats, Int64, LocalTraining, Schedule, schedule
from fedsim.rng import keyed_bits
from fedsim.shift.replaced import Replacement

LOCAL = "local/"  # prefix of personal parameters in a client's state
BUFFER = "buffer/"  # prefix of personal buffers


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """The federated problem: model, objective, data on the device, who owns which sample.

    The module's own tensors are scratch; the server's weights are the flat vectors of a `Job`.
    """

    module: nn.Module
    shared: Layout  # D parameters that travel
    local: Layout  # parameters that stay with the client
    buffers: Layout  # e.g. running statistics, in floats
    objective: Any
    training: LocalTraining
    x: Tensor  # (N, …) on the device
    y: Tensor  # (N,)
    partition: Partition  # training samples of each client, positions into x
    store: ClientStore
    seed: int = 0
    augment: Callable[[Tensor, Tensor], Tensor] | None = None
    views: Mapping[str, Partition] = field(default_factory=dict)  # named subsets of each client's samples
    told: Mapping[str, Any] = field(default_factory=dict)  # an example of what the rule sends with the model
    shift: Replacement | None = None  # which samples are replaced when
    precision: str = "fp32"  # of the forward's products: fp32 (the dtype's own), tf32 or bf16; engine/precision.py

    @property
    def device(self) -> torch.device:
        """Where everything lives."""
        return self.x.device

    @cached_property  # a walk through the module's parts otherwise, several times a round
    def dtype(self) -> torch.dtype:
        """The run's floating-point type."""
        return next(self.module.parameters()).dtype

    @property
    def phases(self) -> tuple[Phase | None, ...]:
        """Parts of a local round; one whole part unless the objective says otherwise."""
        phases = getattr(self.objective, "phases", None)
        return tuple(phases()) if phases else (None,)

    @property
    def stateful(self) -> bool:
        """Whether clients keep anything between their rounds."""
        return bool(self.store.layouts)

    def samples_of(self, phase: Phase | None) -> Partition:
        """Return the samples that a phase sees."""
        if phase is None or phase.view is None:
            return self.partition
        if phase.view not in self.views:
            raise ValueError(f"the objective asks for the samples named {phase.view!r}; known: {sorted(self.views)}")
        return self.views[phase.view]


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Rows to train: each from its own version of the weights, with its own key."""

    clients: Int64  # (K,) ids, ascending
    received: Int64  # (K,) version of the weights each row starts from
    models: Mapping[int, Tensor]  # version → (D,)
    broadcasts: Mapping[int, Mapping[str, Any]]  # version → what the rule sent with it
    buffers: Tensor  # (size of the buffer layout,)
    state: Mapping[str, Tensor]  # name → (K, …), what the clients kept
    round: int  # of the aggregation that these rows meet
    key: int | Int64  # keys the randomness: the round, or (K,) one number per row
    lr: float
    work: Floats | None = None  # (K,) share of the local steps that each row does, in (0, 1]; None: all
    rates: Mapping[int, float] | None = None  # version → its local rate, where they differ; engines see `lr` alone
    older: Mapping[int, Tensor] | None = None  # version → its buffers, likewise; of others they are `buffers`

    def __len__(self) -> int:
        return len(self.clients)

    def part(self, low: int, high: int) -> Job:
        """Return the job of rows low … high − 1, views of this one's."""
        return self.take(slice(low, high))

    def take(self, rows: slice | Int64) -> Job:
        """Return the job of some rows."""
        chosen = rows if isinstance(rows, slice) else torch.from_numpy(rows)
        return replace(
            self,
            clients=self.clients[rows],
            received=self.received[rows],
            key=self.key[rows] if isinstance(self.key, np.ndarray) else self.key,
            work=None if self.work is None else self.work[rows],
            state={name: value[chosen] for name, value in self.state.items()},
        )


class Block(NamedTuple):
    """What trained rows leave beside their updates."""

    square_norms: Tensor  # (k,) ‖Δ‖²
    weights: Tensor  # (k,) float64
    num_steps: Tensor  # (k,) int64
    extras: dict[str, Tensor]  # name → (k, …); "train_loss" always
    buffers: Tensor  # (k, size of the buffer layout)
    state: dict[str, Tensor]  # name → (k, …), what the clients keep


class Weighed(Exception):
    """A client says itself what it weighs: updates cannot be summed as they come."""


class Engine(Protocol):
    """Trains rows. Everything above it (streaming, dropped rows, client state) is shared by all engines.

    Optional, found by name:
        chunk                                    rows trained at once, an int that may be set between two jobs
        train_sum(job, c (K,), total (D,)) -> Block        adds Σ c_k Δ_k of finite rows to total, and holds no row;
                                                           raises `Weighed` if a client says what it weighs
        fold(total (D,), updates (k, D), c (k,))           adds Σ c_k Δ_k as `train_sum` does, to the bit
    """

    task: Task
    plan: Mapping[str, Any]  # "engine", its name, and the arguments that decided the bits, resolved: a resumed run
    # makes the engine from them again
    block_rows: int | None  # rows of a streamed block; None: from a table of shapes

    def train(self, job: Job, out: Tensor) -> Block:
        """Train the rows of a job and write their updates w_k − w_received into out (K, D)."""
        ...

    def close(self) -> None:
        """Let go of workers."""
        ...


def clock_of(engine: Engine) -> Callable[[], float]:
    """Return the clock of a run, in seconds: an engine's own `now` stands still while the run waits for others."""
    now: Callable[[], float] = getattr(engine, "now", time.perf_counter)
    return now


def local_round(task: Task, job: Job, number: int, phase: Phase | None) -> Schedule:
    """Lay out one phase of a job's local rounds, with no more steps than each row does."""
    order = schedule(
        task.training, task.samples_of(phase), job.clients, seed=task.seed, round=job.key, phase=(number, phase)
    )
    if task.shift is not None:  # a row's samples are those of the round in which its client was sent the model
        begun = np.where(job.received < 0, job.round, job.received + 1)  # (K,)
        positions = task.shift(order.positions, np.repeat(begun, np.diff(order.starts)))
        order = order._replace(positions=positions)
    return order._replace(num_steps=_worked(job, order.num_steps))


def num_steps(task: Task, job: Job) -> Int64:
    """Return the local steps of a job's rows over all phases (K,), without laying them out."""
    sizes = [task.samples_of(phase).sizes[job.clients] for phase in task.phases]
    each = [_worked(job, task.training.num_steps(s, p)) for s, p in zip(sizes, task.phases, strict=True)]
    total: Int64 = np.sum(each, axis=0)
    return total


def _worked(job: Job, steps: Int64) -> Int64:
    return steps if job.work is None else np.ceil(job.work * steps - 1e-9).astype(np.int64)


def row_keys(task: Task, job: Job) -> Tensor:
    """Return the key of each row's local round (K,) int64, a function of (seed, round, client)."""
    bits = keyed_bits(task.seed, "client", job.key, job.clients) >> np.uint64(32)  # (K,)
    return torch.from_numpy(bits.astype(np.int64)).to(task.device)


def room(task: Task, job: Job, num_steps: Int64, written: Collection[str] = ()) -> Block:
    """Return the block that chunks write into; state that is `written` for every row has no value yet."""
    count, device = len(job), task.device
    return Block(
        square_norms=torch.empty(count, dtype=task.dtype, device=device),
        weights=torch.from_numpy(task.partition.sizes[job.clients].astype(np.float64)).to(device),
        num_steps=torch.from_numpy(num_steps),
        extras={"train_loss": torch.zeros(count, dtype=task.dtype, device=device)},
        buffers=torch.zeros(count, 0, dtype=task.dtype, device=device),
        state={n: torch.empty_like(v) if n in written else v.clone() for n, v in job.state.items()},
    )


def mean_criterion(objective: Any) -> Any:
    """Return an objective's cheaper form, unless a class that derives from its own redefines the criterion alone."""
    for kind in type(objective).__mro__:
        if "mean_criterion" in vars(kind):
            return objective.mean_criterion
        if "criterion" in vars(kind):
            return None
    return getattr(objective, "mean_criterion", None)  # of what it wraps


def placed(task: Task, sent: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a rule sends, tensors at the run's device and dtype: a rule's first state knows neither."""
    return {
        name: value.to(task.device, task.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor) else value
        for name, value in sent.items()
    }  # fmt: skip
