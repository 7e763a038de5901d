"""Wall-clock of sweeps and reports, against their bounds.

    python -m benchmarks.sweeps [--trials 100] [--seconds 2] [--folder FOLDER]

A sweep of trials of about so many seconds each: what it takes a trial beyond the run itself, once the first has ended,
bound 0.5 s; and the report of all its runs, bounds 10 s and 10 MB. A trial's own time is that of its summary, which is
taken on the same worker in the same sweep: what is beside it is composing, folders, pictures, pipes and the table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedsim.report.command import report
from fedsim.sweep.board import Board, Row
from fedsim.sweep.drive import sweep

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


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sweep, then its report, and print both against their bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a trial is")
    parser.add_argument("--workers", type=int, default=None, help="default: one a core")
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch, "sweep")
        clock, began = Clock(), time.perf_counter()
        words = [
            f"num_rounds={max(1, round(given.seconds * _ROUNDS_A_SECOND))}", "strategy=fedavg,fedld",
            f"seed=range({given.trials // 2})", f"hydra.sweep.dir={folder}", "device=cpu",
            *([f"sweep.workers={given.workers}"] if given.workers else []),
        ]  # fmt: skip
        sweep(words, None, clock)
        took = time.perf_counter() - began
        workers = given.workers or len(os.sched_getaffinity(0))
        # From the first trial's end to the last's, each worker does its share of the others, one after another.
        spans = (clock.ends[-1] - clock.ends[0]) * workers
        beyond = spans / (len(clock.ends) - 1) - statistics.fmean(clock.runs[1:])
        print(f"load average {os.getloadavg()[0]:.1f}, {workers} workers, {len(clock.runs)} trials in {took:.1f} s")
        print(
            f"a run: median {statistics.median(clock.runs):.2f} s; the first ended after {clock.ends[0] - began:.1f} s"
        )
        print(f"beyond the run, a trial: {beyond:.2f} s (bound {_BEYOND} s)")
        began = time.perf_counter()
        _, page = report([folder], out=Path(scratch, "report.html"))
        assert page is not None  # html is written to a file
        size = page.stat().st_size / 1e6
        print(f"report of {len(clock.runs)} runs: {time.perf_counter() - began:.1f} s (bound {_REPORT_SECONDS:.0f} s), "
              f"{size:.2f} MB (bound {_REPORT_MB:.0f} MB)")  # fmt: skip


if __name__ == "__main__":
    main()
