"""Times sides in turn and reports ratios of one run, with what they were measured on."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Side = Callable[[int], Any]


def race(sides: Mapping[str, Side], *, rounds: int = 9, warm: int = 2) -> dict[str, list[float]]:
    """Run the sides in turn, A B C A B C …, and return seconds a round, warm-up left out."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, warm + rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side(number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number > warm:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def figures(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median and quartiles of each side, in milliseconds."""
    table = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        table[name] = {"median_ms": 1e3 * middle, "q1_ms": 1e3 * low, "q3_ms": 1e3 * high, "min_ms": 1e3 * min(values)}
    return table


def ratios(seconds: Mapping[str, list[float]], pairs: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Return the speed of the first over the speed of the second, for each pair.

    The ratio is taken round by round, so that what slows the machine for a while slows both sides.
    """
    table = {}
    for fast, slow in pairs:
        if fast in seconds and slow in seconds:
            each = [b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)]
            low, middle, high = statistics.quantiles(each, n=4)
            table[f"{fast}/{slow}"] = {"median": middle, "q1": low, "q3": high}
    return table


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": commit or None,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
