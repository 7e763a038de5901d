"""B2 end to end: 100 rounds from a cold start, fedsim's command line against Flower's simulation."""

from __future__ import annotations

import compileall
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.peer import ROOT, SCRIPTS, PeerError, environment, interpreter

NUM_CLIENTS, NUM_SAMPLES, NUM_ROUNDS, ALPHA = 1000, 60_000, 100, 0.5
PATIENCE = 1800  # seconds
OURS, FLOWER = "fedsim_100_rounds_cold", "flower_100_rounds_cold"
FLOOR = "import_torch_cold"


def whole_runs(result: dict[str, Any], options: harness.Options) -> dict[str, Any]:
    """Add to B2's result what processes take from their start to their end, imports and data included.

    fedsim runs with its defaults, so it evaluates, records and writes checkpoints; Flower trains and aggregates only.
    Flower runs once, between two of fedsim's. What it takes to import torch alone stands beside them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_data(folder / "b2.npz")
        seconds: dict[str, list[float]] = {OURS: [fedsim_run(file, folder / "0", options)]}
        seconds[FLOOR] = [_timed([sys.executable, "-c", "import torch"], options) for _ in range(2)]
        try:
            seconds[FLOWER] = [_flower(file, options)]
            seconds[OURS].append(fedsim_run(file, folder / "1", options))
        except PeerError as error:
            result["left_out"][FLOWER] = str(error)
    result["seconds"] |= seconds
    result["figures"] |= {name: {"s": statistics.median(values)} for name, values in seconds.items()}
    if FLOWER in seconds:
        each = [seconds[FLOWER][0] / value for value in seconds[OURS]]
        result["ratios"][f"{OURS}/{FLOWER}"] = {"median": statistics.median(each), "q1": min(each), "q3": max(each)}
    return result


def write_data(file: Path) -> Path:
    """Write images 28×28 of 10 classes, shared out by Dirichlet(0.5) over 1000 clients, for both sides to read."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, NUM_SAMPLES)
    centres = rng.integers(0, 256, (10, 1, 28, 28))
    x = ((centres[y] + rng.integers(0, 256, (NUM_SAMPLES, 1, 28, 28))) // 2).astype(np.uint8)
    owner = np.empty(NUM_SAMPLES, dtype=np.int64)  # (N,)
    for label in range(10):
        mine = np.flatnonzero(y == label)
        owner[mine] = rng.choice(NUM_CLIENTS, len(mine), p=rng.dirichlet(np.full(NUM_CLIENTS, ALPHA)))
    owner[rng.choice(NUM_SAMPLES, NUM_CLIENTS, replace=False)] = np.arange(NUM_CLIENTS)  # nobody is without samples
    np.savez(file, x_train=x, y_train=y, client_train=owner, x_test=x[:1000], y_test=y[:1000], lr=0.03)
    return file


def fedsim_run(file: Path, folder: Path, options: harness.Options, *more: str) -> float:
    """Return the seconds of `fedsim run` on B2's data, from the start of its process to the end."""
    _compile()
    settings = [
        "data=npz", f"data.path={file}", "data.validation=0", "partition=natural", "partition.local_test=0",
        "model=logreg", "client.lr=0.03", "client.batch_size=10", "client.local_epochs=1",
        f"fraction={10 / NUM_CLIENTS}", f"num_rounds={NUM_ROUNDS}", f"hydra.run.dir={folder}", *more,
    ]  # fmt: skip
    return _timed([sys.executable, "-m", "fedsim", "run", *settings], options)


@functools.cache
def _compile() -> None:
    """Compile a checkout to bytecode, as an installation does and any second run finds it, whatever Python is told."""
    for name in ("fedsim", "strategies", "clients"):
        compileall.compile_dir(ROOT / name, quiet=2)


def _flower(file: Path, options: harness.Options) -> float:
    python = interpreter(options, "flower")
    script = str(SCRIPTS / "flower_sim.py")
    return _timed([str(python), script, "--dataset", str(file), "--rounds", str(NUM_ROUNDS)], options)


def _timed(command: list[str], options: harness.Options) -> float:
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment(options.threads), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{' '.join(command[:4])} … took more than {PATIENCE} s") from error
    if done.returncode:
        raise PeerError(f"{' '.join(command[:4])} … ended with code {done.returncode}: {done.stderr[-1500:]}")
    return time.perf_counter() - began
