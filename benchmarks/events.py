"""What an asynchronous run costs beyond training: 10,000 clients, 1000 of them in flight, a buffer of 100.

An event is a reply that arrives, with the dispatch of the client that takes its place: a round has as many as its
buffer. Counted is everything outside the engine: sampling, the clock's events, versions, grid, rule and records; CPU
time of the process, so that other work on the machine does not count.

Memory is counted in copies of the model: when the engine has trained, all arrays of at least D numbers beside the data,
against the versions that somebody has been sent and the buffer. `python -m benchmarks.events` is the run.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Dataset
from fedsim.loop import Loop
from fedsim.study.spec import merged

SAMPLES, FEATURES, CLASSES = 10, 64, 10  # of a client


class Size(NamedTuple):
    """Of an asynchronous run."""

    clients: int = 10_000
    concurrency: int = 1000
    buffer: int = 100
    rounds: int = 60
    hidden: int = 1000  # D = 75,010


def events(options: harness.Options) -> dict[str, Any]:
    """Return the overhead of an event and the memory, measured in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    words = [sys.executable, "-m", "benchmarks.events"]
    child = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if child.returncode:
        raise RuntimeError(child.stderr.strip().splitlines()[-1])
    size = Size()
    return {
        "title": f"{size.clients:,} clients, concurrency {size.concurrency}, buffer {size.buffer}: an event; memory",
        "figures": json.loads(child.stdout.splitlines()[-1]),
        "notes": ["targets: an event <= 100 us outside of training; copies <= versions outstanding + buffer"],
    }


def loop_of(size: Size, folder: Path, *words: str) -> Loop:
    """Build the run."""
    count = size.clients * SAMPLES
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((count + 1000, FEATURES), dtype=np.float32))
    y = torch.from_numpy(rng.integers(0, CLASSES, len(x)))
    data = Dataset(
        x=x, y=y, splits={"train": np.arange(count), "test": np.arange(count, len(x))}, num_classes=CLASSES
    )  # fmt: skip
    settings = [
        "partition=iid", f"partition.num_clients={size.clients}", "partition.local_test=0", "data.validation=0",
        "model=mlp", f"model.hidden=[{size.hidden}]", f"client.batch_size={SAMPLES}", "strategy=fedbuff",
        "mode=async", f"mode.concurrency={size.concurrency}", f"mode.buffer={size.buffer}", "devices=lognormal",
        "metrics.every=1000", "metrics.clients_every=0", "checkpoint.every=1000", f"num_rounds={size.rounds}",
        "threads=1",
    ]  # fmt: skip
    return Loop(build(compose(merged(settings, words)), {"data": data}), folder, Observer())


def copies(loop: Loop) -> float:
    """Return how many models' sizes the arrays of at least D numbers have that live now, beside the data."""
    gc.collect()
    size = loop.task.shared.size
    known = {loop.task.x.untyped_storage().data_ptr(), loop.task.y.untyped_storage().data_ptr()}
    held: dict[int, int] = {}
    for value in gc.get_objects():
        if type(value) is Tensor and value.device.type != "meta":
            held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    unit = size * loop.task.dtype.itemsize
    return sum(n for at, n in held.items() if at not in known and n >= unit) / unit


def watched(loop: Loop, look: Callable[[], None]) -> None:
    """Have something done after every job of the engine, when most is held."""
    engine = loop.experiment.engine
    for name in ("train", "train_sum"):
        inner = getattr(engine, name, None)
        if inner is not None:
            setattr(engine, name, _then(inner, look))


def _then(inner: Callable[..., Any], look: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        result = inner(*args)
        look()
        return result

    return call


def held(loop: Loop, rounds: int) -> list[tuple[float, int]]:
    """Run rounds and return, at the worst moment of each, (copies of the model, versions that somebody was sent)."""
    found: list[tuple[float, int]] = []
    now: list[float] = []
    watched(loop, lambda: now.append(copies(loop)))
    for round in range(1, rounds + 1):
        now.clear()
        loop.step(round)
        assert loop.dispatcher.arrivals is not None
        sent = {*loop.dispatcher.flight.versions.tolist(), *loop.dispatcher.arrivals.received.tolist()}
        found.append((max(now), len(sent)))
    return found


def measure(size: Size, folder: Path) -> dict[str, dict[str, float]]:
    """Count what a run holds, then time the events of another."""
    (folder / "timed").mkdir()
    (folder / "held").mkdir()
    most = _held(size, folder / "held")
    loop = loop_of(size, folder / "timed")
    trained = [0.0]
    engine = loop.experiment.engine
    for name in ("train", "train_sum"):
        if hasattr(engine, name):
            setattr(engine, name, _timed(getattr(engine, name), trained))
    outside = []
    for round in range(1, size.rounds + 1):
        began, before = time.process_time(), trained[0]
        loop.step(round)
        outside.append(time.process_time() - began - (trained[0] - before))
    _close(loop)
    warm = np.array(outside[5:]) / size.buffer * 1e6
    return {
        "an event": {"us": float(np.median(warm)), "q1_us": float(np.quantile(warm, 0.25)),
                     "q3_us": float(np.quantile(warm, 0.75))},
        "memory": {"copies": most[0], "versions": most[1], "versions + buffer": most[1] + size.buffer},
    }  # fmt: skip


def _held(size: Size, folder: Path) -> tuple[float, int]:
    """Return what `held` does, of the round that holds most."""
    loop = loop_of(size, folder)
    memory = held(loop, min(30, size.rounds))
    _close(loop)
    return max(memory)


def _close(loop: Loop) -> None:
    loop.rounds.close()
    loop.times.close()
    loop.experiment.engine.close()


def _timed(inner: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        began = time.process_time()
        result = inner(*args)
        spent[0] += time.process_time() - began
        return result

    return call


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Size(), Path(folder))))


if __name__ == "__main__":
    main()
