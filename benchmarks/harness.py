"""Times sides in turn and reports ratios of one run, with what they were measured on."""

from __future__ import annotations

import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Side = Callable[[int], Any]
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person asked of all benchmarks.

    Args:
        threads: CPU threads of every side.
        rounds: timed rounds of every side; None: 9 and, where they are slow, no fewer than 7 with `peers` and 3
            without, so that no id takes two minutes.
        peers: folder of the other frameworks' environments (`benchmarks/peers/make.sh`); None leaves them out.
        large: the sizes that need minutes and gigabytes too.

    """

    threads: int = 1
    rounds: int | None = None
    peers: Path | None = None
    large: bool = False


def race(
    sides: Mapping[str, Side],
    options: Options,
    *,
    least: int | None = None,
    most: int = 9,
    warm: int = 2,
    budget: float = 10.0,
) -> dict[str, list[float]]:
    """Run the sides in turn, A B C A B C …, and return seconds a round, warm-up left out.

    Args:
        sides: name → what does one round, given its number from 1. One with a true attribute `counts` returns the
            seconds that its round took.
        options: `rounds` replaces least and most.
        least: rounds that are timed however long they take; None: 7 with peers, 3 without.
        most: rounds at most.
        warm: rounds before.
        budget: seconds after which no round beyond `least` begins.

    """
    if least is None:
        least = 3 if options.peers is None else 7
    if options.rounds is not None:
        least = most = options.rounds
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    started = time.perf_counter()
    for number in range(1, warm + most + 1):
        if number > warm + least and time.perf_counter() - started > budget:
            break
        for name, side in sides.items():
            began = time.perf_counter()
            given = side(number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number > warm:
                seconds[name].append(given if getattr(side, "counts", False) else time.perf_counter() - began)
    return seconds


def compare(sides: Mapping[str, Side], pairs: Pairs, options: Options, **arguments: Any) -> dict[str, Any]:
    """Race sides; return ratios, figures and the seconds of every round."""
    seconds = race(sides, options, **arguments)
    return {"ratios": ratios(seconds, pairs), "figures": figures(seconds), "seconds": seconds}


def figures(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median and quartiles of each side, in milliseconds."""
    table = {}
    for name, values in seconds.items():
        low, middle, high = _quartiles(values)
        table[name] = {"median_ms": 1e3 * middle, "q1_ms": 1e3 * low, "q3_ms": 1e3 * high, "min_ms": 1e3 * min(values)}
    return table


def ratios(seconds: Mapping[str, list[float]], pairs: Pairs) -> dict[str, dict[str, float]]:
    """Return the speed of the first over the speed of the second, for each pair of which both sides ran.

    The ratio is taken round by round, so that what slows the machine for a while slows both sides. Beside median and
    quartiles stands an interval that holds the median of all such rounds at least 95 times in 100.
    """
    table = {}
    for fast, slow in pairs:
        if fast in seconds and slow in seconds:
            each = [b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)]
            low, middle, high = _quartiles(each)
            bottom, top = median_interval(each)
            table[f"{fast}/{slow}"] = {"median": middle, "q1": low, "q3": high, "low": bottom, "high": top}
    return table


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return order statistics around the median; fewer than six values cannot reach 95 % and give their range.

    The interval of the i-th smallest and i-th largest of n misses the median with probability
    2 · Σ_{j<i} C(n, j) / 2ⁿ, whatever the values' distribution.
    """
    ordered, count = sorted(values), len(values)
    trimmed, tail = 0, 1.0
    while 2 * (tail + math.comb(count, trimmed + 1)) / 2**count <= 1 - level:
        trimmed += 1
        tail += math.comb(count, trimmed)
    return ordered[trimmed], ordered[count - 1 - trimmed]


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def pin(threads: int) -> None:
    """Keep this process and its children on the first cores, one a thread."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    commit = _git("rev-parse", "HEAD")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("fedsim", "torch", "numpy", "flwr", "llvmlite")},
        "commit": commit or None,
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        **peak_memory(),
    }


def peak_memory() -> dict[str, float]:
    """Return the most memory held so far in MiB, of this process, its largest child and the GPU."""
    unit = 1024**2 if sys.platform == "darwin" else 1024
    found = {
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "peak_child_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit,
    }
    if torch.cuda.is_available():
        found["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 1024**2
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
