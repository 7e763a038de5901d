"""B9: ten seeds side by side against one, whole runs of B2 and B4."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import fedsim
from benchmarks import harness, workloads
from benchmarks.rounds import dataset
from benchmarks.whole import NUM_CLIENTS, NUM_ROUNDS, fedsim_run, write_data
from benchmarks.workloads import Workload

SEEDS = 10
B4_ROUNDS = 10


def b9(options: harness.Options) -> dict[str, Any]:
    """Ten seeds against one; "one/ten" is the price of ten in runs, 10 where nothing is gained."""
    cases = {
        "B2": (workloads.b2(NUM_CLIENTS), 10 / NUM_CLIENTS, NUM_ROUNDS),
        "B4": (workloads.b4(), 1.0, B4_ROUNDS),
    }
    result: dict[str, Any] = {
        "title": f"{SEEDS} seeds against one, whole runs: B2 of {NUM_ROUNDS} rounds, B4 of {B4_ROUNDS}",
        "figures": {}, "ratios": {}, "seconds": {}, "notes": [],
    }  # fmt: skip
    for name, (work, fraction, rounds) in cases.items():
        one, ten = f"{name} one seed", f"{name} ten seeds"
        sides: dict[str, harness.Side] = {
            one: Runs(work, fraction, rounds, 1, options), ten: Runs(work, fraction, rounds, SEEDS, options),
        }  # fmt: skip
        measured = harness.compare(sides, [(one, ten)], options, least=2, most=5, warm=1, budget=15.0)
        for key, rows in measured.items():
            result[key] |= rows
    _cold(result, options)
    return result


class Runs:
    """Whole runs of a workload in this process: built, trained, evaluated, recorded, each into a folder of its own.

    Args:
        work: data, clients, model and local training.
        fraction: of clients a round.
        rounds: of each run.
        seeds: how many runs, side by side.
        options: threads.

    """

    def __init__(self, work: Workload, fraction: float, rounds: int, seeds: int, options: harness.Options) -> None:
        self.data, self.work, self.seeds = dataset(work), work, seeds
        self.settings = [
            "partition=natural", "partition.local_test=0", "data.validation=0", f"fraction={fraction}",
            f"num_rounds={rounds}", f"threads={options.threads}",
        ]  # fmt: skip

    def __call__(self, number: int) -> None:
        """Run them."""
        with tempfile.TemporaryDirectory() as folder:
            parts = {"data": self.data, "model": self.work.module, "training": self.work.training}
            given = {**parts, "folder": Path(folder) / "runs"}
            if self.seeds == 1:
                fedsim.simulate(*self.settings, **given)
            else:
                fedsim.simulate(*self.settings, replicas=self.seeds, **given)


def _cold(result: dict[str, Any], options: harness.Options, repeats: int = 2) -> None:
    """Add B2 from the start of a process to its end, imports and data included, one after the other."""
    one, ten = "B2 one seed, cold", "B2 ten seeds, cold"
    seconds: dict[str, list[float]] = {one: [], ten: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_data(folder / "b2.npz")
        for number in range(repeats):
            seconds[one].append(fedsim_run(file, folder / f"{number}-one", options))
            seconds[ten].append(fedsim_run(file, folder / f"{number}-ten", options, f"replicas={SEEDS}"))
    result["seconds"] |= seconds
    result["figures"] |= {side: {"s": statistics.median(values)} for side, values in seconds.items()}
    result["ratios"] |= harness.ratios(seconds, [(one, ten)])
