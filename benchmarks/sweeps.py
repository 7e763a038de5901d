"""Wall-clock of sweeps and reports, against their bounds.

    python -m benchmarks.sweeps [--trials 100] [--seconds 2] [--bare] [--folder FOLDER]

A sweep of trials of about so many seconds each: what it takes a trial beyond the run itself, once the first has ended,
bound 0.5 s; and the report of all its runs, bounds 10 s and 10 MB.

The run itself is, strictly, the seconds of its summary, taken on the same worker in the same sweep: set-up and rounds.
Beside it are then composing, folders, checkpoints, the client table, the picture, pipes and the sweep's table, of which
a run alone has most too. `--bare` measures that other reading: as many processes as workers do the same runs in a bare
loop of `fedsim.simulate`, with as many threads, and what a sweep takes beyond them is printed beside.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedsim.children import num_cores
from fedsim.report.command import report
from fedsim.sweep.board import Board, Row
from fedsim.sweep.drive import sweep

STRATEGIES = ("fedavg", "fedld")
_ROUNDS_A_SECOND = 100  # of the setting below on one core; the trial's own time is measured, not assumed
_BEYOND, _REPORT_SECONDS, _REPORT_MB = 0.5, 10.0, 10.0


class Clock(Board):
    """Keeps when trials ended, and the time that each took in its worker."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []
        self.runs: list[float] = []

    def ended(self, row: Row, seconds: float | None) -> None:
        """Note the time."""
        super().ended(row, seconds)
        self.ends.append(time.perf_counter())
        self.runs.append(row["seconds.total"])


def bare(words: Sequence[str], seeds: Sequence[int], folder: Path) -> list[float]:
    """Return the wall seconds of each run of a bare loop but the first, in a process of its own."""
    import fedsim  # here: the process that sweeps does not load torch

    seconds = []
    for number, (strategy, seed) in enumerate((strategy, seed) for strategy in STRATEGIES for seed in seeds):
        began = time.perf_counter()
        fedsim.simulate(*words, f"strategy={strategy}", f"seed={seed}", folder=folder / str(number))
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def bare_seconds(words: Sequence[str], count: int, workers: int, folder: Path) -> float:
    """Return what a run takes in bare loops side by side, which share out the seeds of a sweep."""
    shares = [list(range(count))[k::workers] for k in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        given = [(words, share, folder / f"bare-{k}") for k, share in enumerate(shares)]
        return statistics.fmean(second for seconds in pool.starmap(bare, given) for second in seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sweep, then its report, and print both against their bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a trial is")
    parser.add_argument("--workers", type=int, default=None, help="default: one a core")
    parser.add_argument("--bare", action="store_true", help="the same runs in bare loops too")
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch, "sweep")
        clock, began = Clock(), time.perf_counter()
        workers, count = given.workers or num_cores(), given.trials // len(STRATEGIES)
        shared = [f"num_rounds={max(1, round(given.seconds * _ROUNDS_A_SECOND))}", "device=cpu"]
        shared.append(f"threads={max(1, num_cores() // workers)}")
        words = [
            *shared, f"strategy={','.join(STRATEGIES)}", f"seed=range({count})", f"hydra.sweep.dir={folder}",
            f"sweep.workers={workers}",
        ]  # fmt: skip
        sweep(words, None, clock)
        took = time.perf_counter() - began
        # From the first trial's end to the last's, each worker does its share of the others, one after another.
        spans = (clock.ends[-1] - clock.ends[0]) * workers
        beyond = spans / (len(clock.ends) - 1) - statistics.fmean(clock.runs[1:])
        print(f"load average {os.getloadavg()[0]:.1f}, {workers} workers, {len(clock.runs)} trials in {took:.1f} s")
        print(
            f"a run: median {statistics.median(clock.runs):.2f} s; the first ended after {clock.ends[0] - began:.1f} s"
        )
        print(f"beyond the run, a trial: {beyond:.2f} s (bound {_BEYOND} s)")
        if given.bare:
            alone = bare_seconds(shared, count, workers, Path(scratch))
            print(
                f"in bare loops a run takes {alone:.2f} s; beyond that: {spans / (len(clock.ends) - 1) - alone:.2f} s"
            )
        began = time.perf_counter()
        _, page = report([folder], out=Path(scratch, "report.html"))
        assert page is not None  # html is written to a file
        size = page.stat().st_size / 1e6
        print(f"report of {len(clock.runs)} runs: {time.perf_counter() - began:.1f} s (bound {_REPORT_SECONDS:.0f} s), "
              f"{size:.2f} MB (bound {_REPORT_MB:.0f} MB)")  # fmt: skip


if __name__ == "__main__":
    main()
