"""What a worker does: holds the task, resolves the same engine as all others, trains blocks.

Loaded by the fork server before the first worker is forked; nothing here may touch a GPU or start a thread at import.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim.children import obey_parent
from fedsim.engine.auto import make_engine
from fedsim.engine.parcel import Bytes, Parcel, from_bytes, sendable, to_bytes, unpack, view
from fedsim.engine.shared import Memory
from fedsim.engine.task import Block, Engine, Job, Task
from fedsim.threads import take_threads


class Setup(NamedTuple):
    """What all workers of a run are told beside the task."""

    engine: dict[str, Any]  # of the config group `engine`, "auto" resolved
    plan: dict[str, Any]  # what the engine must resolve to here, too
    block: int
    threads: int
    numerics: dict[str, Any]


def numerics() -> dict[str, Any]:
    """Return what torch has been told about the numbers that kernels give."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "matmul": {"allow_tf32": matmul.allow_tf32},
        "cudnn": {name: getattr(cudnn, name) for name in ("deterministic", "benchmark", "allow_tf32")},
    }


def _apply(known: Mapping[str, Any]) -> None:
    if known == numerics():  # asking torch for what is so already takes it seconds: it loads its compiler
        return
    torch.use_deterministic_algorithms(known["deterministic"], warn_only=known["warn_only"])
    torch.set_float32_matmul_precision(known["matmul_precision"])
    for name, value in known["matmul"].items():
        setattr(torch.backends.cuda.matmul, name, value)
    for name, value in known["cudnn"].items():
        setattr(torch.backends.cudnn, name, value)


class Runner:
    """A worker's task and engine.

    Args:
        parcel: of the task.
        setup: what all workers are told.
        device: where this one trains.

    """

    def __init__(self, parcel: Parcel, setup: Setup, device: torch.device) -> None:
        take_threads(setup.threads)
        _apply(setup.numerics)
        self.device = device
        task: Task = unpack(parcel, device)
        self.task = replace(task, module=copy.deepcopy(task.module).to(device))  # its tensors are the parcel's
        self.engine: Engine = make_engine(self.task, cohort=setup.block, threads=1, **setup.engine)[0]
        if dict(self.engine.plan) != setup.plan:
            raise RuntimeError(f"a worker resolved the plan {self.engine.plan}, the run {setup.plan}")

    def train(self, job: Job, shares: Tensor | None, out: Tensor | None = None) -> tuple[Block, Tensor]:
        """Train a block; return it and its updates (k, D), or with shares (k,) their sum (1, D).

        Where `out` is given, they are written there.
        """
        rows, count = out, len(job) if shares is None else 1
        if rows is None or rows.device != self.device:
            rows = torch.empty(count, self.task.shared.size, dtype=self.task.dtype, device=self.device)
        try:
            block = train_block(self.engine, job, shares, rows)
        except torch.OutOfMemoryError:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the run tries smaller blocks
            raise
        if out is not None and rows is not out:
            out.copy_(rows)
        return block, rows if out is None else out


def train_block(engine: Engine, job: Job, shares: Tensor | None, out: Tensor) -> Block:
    """Write the updates of a block's rows into out (k, D), or with shares (k,) Σ c_k Δ_k of finite ones (1, D)."""
    if shares is None:
        return engine.train(job, out)
    shares = shares.to(out.device)
    train_sum = getattr(engine, "train_sum", None)
    if train_sum is not None:
        block: Block = train_sum(job, shares, out.zero_()[0])
        return block
    rows = out.new_empty(len(job), out.shape[1])
    block = engine.train(job, rows)
    good = torch.isfinite(block.square_norms)  # (k,)
    torch.mv(rows[good].T, shares[good].to(out.dtype), out=out[0])
    return block


class Told(NamedTuple):
    """A block to train, as a process is told of it: where its arrays are."""

    job: Job  # without models, broadcasts, buffers and state
    low: int  # first row of each field
    shares: Bytes | None  # (k,), where the rows' sum is wanted
    updates: tuple[str, tuple[int, ...]]  # memory and shape of the rows (R, D)
    fields: dict[str, tuple[str, tuple[int, ...], torch.dtype]]  # "given/…", "state/…", "extras/…"


def serve(pipe: connection.Connection, environ: Mapping[str, str], folder: str) -> None:
    """Do what comes through a pipe until it closes.

    Args:
        pipe: gives ("map", name, size) before a handle, ("task", …), ("shared", …), ("train", Told).
        environ: of the run's process; the fork server's may be older.
        folder: the run's working directory.

    """
    os.environ.update(environ)
    os.chdir(folder)
    obey_parent()
    desk = _Desk(pipe)
    while True:
        try:
            kind, *content = pipe.recv()
            answer = getattr(desk, kind)(*content)
        except (EOFError, ConnectionResetError, BrokenPipeError):
            return
        except BaseException as error:
            answer = ("broken" if desk.runner is None else "failed", sendable(error))
        if answer is not None:
            pipe.send(answer)


class _Desk:
    """What a process of the pool knows. Its methods are the messages it takes."""

    def __init__(self, pipe: connection.Connection) -> None:
        self.pipe = pipe
        self.memories: dict[str, Tensor] = {}  # name → (B,) uint8
        self.runner: Runner | None = None
        self.common: dict[str, Any] = {}  # models, broadcasts, buffers

    def map(self, name: str, size: int) -> None:
        self.memories[name] = Memory.receive(self.pipe, size).tensor()

    def task(self, text: bytes, arrays: list[Any], setup: Setup, device: str) -> tuple[str, None]:
        self.runner = Runner(self._parcel(text, arrays), setup, torch.device(device))
        return "ready", None

    def shared(self, text: bytes, arrays: list[Any]) -> None:
        assert self.runner is not None  # the task comes first
        self.common = unpack(self._parcel(text, arrays), self.runner.device)

    def train(self, told: Told) -> tuple[str, Any]:
        runner, count = self.runner, len(told.job)
        assert runner is not None  # the task comes first
        rows = slice(told.low, told.low + (count if told.shares is None else 1))
        fields = {
            name: _field(self.memories[memory], shape, dtype)[rows]
            for name, (memory, shape, dtype) in told.fields.items()
        }
        given = {n.removeprefix("given/"): v.to(runner.device) for n, v in fields.items() if n.startswith("given/")}
        out = _field(self.memories[told.updates[0]], told.updates[1], runner.task.dtype)[rows]
        shares = None if told.shares is None else from_bytes(told.shares)
        block, _ = runner.train(replace(told.job, state=given, **self.common), shares, out)
        kept = _put("state/", block.state, fields)
        extras = _put("extras/", block.extras, fields)
        small = [to_bytes(v) for v in (block.square_norms, block.weights, block.num_steps, block.buffers)]
        return "done", (small, extras, kept)

    def _parcel(self, text: bytes, arrays: list[Any]) -> Parcel:
        return Parcel(text, [view(self.memories[name], spec) for name, spec in arrays])


def _field(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = dtype.itemsize
    for length in shape:
        count *= length
    return memory[:count].view(dtype).view(shape)


def _put(prefix: str, values: Mapping[str, Tensor], fields: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write values where there is room for them; return name → None, or the value where there is none."""
    left: dict[str, Any] = {}
    for name, value in values.items():
        room = fields.get(prefix + name)
        left[name] = None
        if room is not None and room.shape == value.shape and room.dtype == value.dtype:
            room.copy_(value)
        else:
            left[name] = to_bytes(value)
    return left
