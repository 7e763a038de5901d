"""What a round costs outside of training, and how much memory a run takes, from a thousand clients to a million.

Ten samples of four features a client, logistic regression, one local step: almost nothing is trained, so what is left
is the frame's own. Each size is a process of its own. `python -m benchmarks.scale CASE CLIENTS COHORT` is one of them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Dataset
from fedsim.loop import Loop
from fedsim.shards import Shards

SAMPLES, FEATURES, ROUNDS = 10, 4, 12
STATEFUL = 100_000  # SCAFFOLD clients of the case "state", of 31 kB each
CASES = [("rounds", n, k) for n in (1_000, 100_000, 1_000_000) for k in (10, 1_000)] + [("state", STATEFUL, 50)]
SMALL = [("rounds", 1_000, 10), ("rounds", 10_000, 100), ("state", 2_000, 50)]


def scale(options: harness.Options) -> dict[str, Any]:
    """Return figures of each size; without `--large` those that take seconds."""
    figures: dict[str, dict[str, float]] = {}
    cases = CASES if options.large else SMALL
    for case, clients, cohort in cases:
        words = [sys.executable, "-m", "benchmarks.scale", case, str(clients), str(cohort)]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        child = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        if child.returncode:
            raise RuntimeError(f"{case} {clients}: {child.stderr.strip().splitlines()[-1]}")
        figures[f"{case} {clients:,} cohort {cohort:,}"] = json.loads(child.stdout.splitlines()[-1])
    notes = [] if options.large else ["up to a million clients: --large"]
    return {"title": "a round outside of training, by registered clients", "figures": figures, "notes": notes}


def _rounds(clients: int, cohort: int, folder: Path) -> dict[str, float]:
    """Time the rounds of a streamed FedAvg, less what the engine took."""
    count = clients * SAMPLES
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((count + 1000, FEATURES), dtype=np.float32))
    y = torch.from_numpy(rng.integers(0, 2, len(x)))
    data = Dataset(
        x=x, y=y, splits={"train": np.arange(count), "test": np.arange(count, len(x))}, num_classes=2
    )  # fmt: skip
    settings = [
        "partition=iid", f"partition.num_clients={clients}", f"fraction={cohort / clients}", "model=logreg",
        f"client.batch_size={SAMPLES}", "data.validation=0", "metrics.every=1000", "metrics.clients_every=0",
        "partition.local_test=0", f"num_rounds={ROUNDS + 1}",
    ]  # fmt: skip
    began = time.perf_counter()
    experiment = build(compose(settings), {"data": data})
    built = time.perf_counter() - began
    loop = Loop(experiment, folder, Observer())
    outside = []
    for round in range(1, ROUNDS + 1):
        before = dict(loop.seconds)
        loop.step(round)
        spent = {name: loop.seconds[name] - before[name] for name in before}
        outside.append(spent["aggregate"] + spent["record"] + (spent["evaluate"] if round > 1 else 0))
    experiment.engine.close()
    return {"outside_ms": 1e3 * float(np.median(outside[1:])), "build_s": built, "peak_mib": _peak()}


def _state(clients: int, cohort: int, folder: Path) -> dict[str, float]:
    """Run SCAFFOLD until all clients have state; then time checkpoints of which one cohort changed."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((clients + 100, 784), dtype=np.float32))
    y = torch.from_numpy(rng.integers(0, 10, len(x)))
    data = Dataset(
        x=x, y=y, splits={"train": np.arange(clients), "test": np.arange(clients, len(x))}, num_classes=10
    )  # fmt: skip
    settings = [
        "partition=iid", f"partition.num_clients={clients}", f"fraction={cohort / clients}", "model=logreg",
        "strategy=scaffold", "data.validation=0", "metrics.every=1000", "metrics.clients_every=0", "num_rounds=1000",
        f"client_state_bytes={1 << 20}",
    ]  # fmt: skip
    experiment = build(compose(settings), {"data": data})
    loop = Loop(experiment, folder, Observer())
    loop.step(1)
    store = experiment.task.store
    began = time.perf_counter()
    for low in range(0, clients, 1000):  # as if everybody had trained
        ids = np.arange(low, min(low + 1000, clients))
        store.put(ids, {name: value.expand(len(ids), *value.shape) + 1 for name, value in store.first.items()})
    filled = time.perf_counter() - began
    began = time.perf_counter()
    loop.save()
    first = time.perf_counter() - began
    seconds = []
    for round in range(2, 8):
        loop.step(round)
        began = time.perf_counter()
        loop.save()
        seconds.append(time.perf_counter() - began)
    shards: Shards = loop.shards["clients"]
    began = time.perf_counter()
    loop.load()
    return {
        "state_mib": clients * store.record / 1024**2, "fill_s": filled, "first_checkpoint_s": first,
        "checkpoint_ms": 1e3 * float(np.median(seconds)), "shards": len(shards.rounds),
        "resume_s": time.perf_counter() - began, "peak_mib": _peak(),
    }  # fmt: skip


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Be one size, and print its figures."""
    case, clients, cohort = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"rounds": _rounds, "state": _state}[case](clients, cohort, Path(folder))))


if __name__ == "__main__":
    main()
