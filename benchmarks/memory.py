"""How much memory a run takes beyond training its model alone: resnet18, a linear rule, one client at a time.

Each side is a process of its own, imports the same modules and holds the same data; what counts is the peak of its
resident memory. `python -m benchmarks.memory SIDE` is one of them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import harness
from fedsim import simulation
from fedsim.config import compose
from fedsim.contracts import Dataset
from fedsim.models.parameters import initialise
from fedsim.models.resnet import resnet18

BATCH, STEPS, CLIENTS, TESTED = 16, 2, 2, 64
SHAPE = (3, 32, 32)
# glibc keeps what is freed below its threshold for itself; neither side is to be charged with that.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
SIDES = {
    "alone": (),
    "sequential": ("engine=sequential",),
    "captured": ("engine=vectorized", "engine.kernels=captured", "threads=1"),
    "generic": ("engine=vectorized", "engine.kernels=generic", "engine.chunk=1", "threads=1"),
    "fused": ("engine=vectorized", "engine.kernels=fused", "engine.chunk=1", "threads=1"),
}


def memory(options: harness.Options) -> dict[str, Any]:
    """Return each side's peak, in MiB and in copies of the model beyond the model alone."""
    figures: dict[str, dict[str, float]] = {}
    for side in SIDES:
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)} | ALLOCATOR
        words = [sys.executable, "-m", "benchmarks.memory", side]
        child = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        if child.returncode:
            raise RuntimeError(f"{side}: {child.stderr.strip().splitlines()[-1]}")
        figures[side] = json.loads(child.stdout.splitlines()[-1])
    alone = figures["alone"]["peak_mib"]
    for row in figures.values():
        row["copies"] = (row["peak_mib"] - alone) / row["model_mib"]
    return {
        "title": f"resnet18, batch {BATCH}, {CLIENTS} clients, one at a time: peak beyond the model alone",
        "figures": figures,
    }


def _data() -> Dataset:
    count = CLIENTS * BATCH * STEPS
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(count + TESTED, *SHAPE, generator=rng)
    y = torch.randint(10, (len(x),), generator=rng)
    at = torch.arange(len(x)).numpy()
    return Dataset(x=x, y=y, splits={"train": at[:count], "test": at[count:]}, num_classes=10)


def _settings(engine: tuple[str, ...]) -> list[str]:
    return [
        *engine, "model=resnet18", "partition=iid", f"partition.num_clients={CLIENTS}", "fraction=1.0",
        "client.lr=0.01", f"client.batch_size={BATCH}", "data.validation=0", "checkpoint.every=1", "num_rounds=2",
    ]  # fmt: skip


def _alone(data: Dataset) -> None:
    compose(_settings(()))  # which loads what reads configs
    model = initialise(lambda: resnet18(input_shape=SHAPE, num_classes=10), 0)
    model = model.to(memory_format=torch.channels_last)
    train, test = (torch.from_numpy(data.splits[name]) for name in ("train", "test"))
    for low in range(0, len(train), BATCH):
        chosen = train[low : low + BATCH]
        x = data.x[chosen].contiguous(memory_format=torch.channels_last)
        nn.functional.cross_entropy(model(x), data.y[chosen]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    with torch.no_grad():
        for chosen in test.split(BATCH):
            model(data.x[chosen])


def _simulated(data: Dataset, engine: tuple[str, ...], folder: Path) -> None:
    simulation.simulate(*_settings(engine), data=data, folder=folder / "run")


def main() -> None:
    """Be one side, and print its peak."""
    side, data = sys.argv[1], _data()
    if side == "alone":
        _alone(data)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _simulated(data, SIDES[side], Path(folder))
    unit = 1024**2 if sys.platform == "darwin" else 1024
    size = sum(p.numel() for p in resnet18(input_shape=SHAPE, num_classes=10).parameters()) * 4 / 1024**2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(json.dumps({"peak_mib": peak, "model_mib": size}))


if __name__ == "__main__":
    main()
