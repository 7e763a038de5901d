"""`python -m benchmarks [IDS…] [--json FILE] [--threads N] [--peers DIR] [--large] [--rounds N]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import harness

# id → "module:function"; the function takes `harness.Options` and returns, of these, what it has: "title",
# "ratios" {"a/b": {"median", "q1", "q3"}}, "figures" {side: {"median_ms", …} or any numbers}, "seconds" {side: […]},
# "plans" {side: an engine's plan}, "left_out" {side: why}, "notes" [line].
ALL = {
    "B1": "benchmarks.training:b1",
    "B2": "benchmarks.training:b2",
    "B3": "benchmarks.training:b3",
    "B4": "benchmarks.training:b4",
    "B5": "benchmarks.aggregation:b5",
    "B6": "benchmarks.scale:scale",
    "B7": "benchmarks.strategies:b7",
    "hyper": "benchmarks.strategies:hyper",
    "B8": "benchmarks.crossover:b8",
    "B9": "benchmarks.replicas:b9",
    "overhead": "benchmarks.training:overhead",
    "memory": "benchmarks.memory:memory",
    "auto": "benchmarks.auto:auto",
    "unseen": "benchmarks.auto:unseen",
    "gpu": "benchmarks.gpu:gpu",
    "events": "benchmarks.events:events",
    "workers": "benchmarks.workers:workers",
}

ON_REQUEST = ("hyper", "memory", "auto", "unseen", "gpu", "events", "workers")  # minutes, and no figure of the tables


def main() -> None:
    """Run benchmarks, print their tables and write what was measured."""
    given = _arguments()
    options = harness.Options(
        threads=given.threads, rounds=given.rounds, peers=given.peers and given.peers.resolve(), large=given.large
    )
    harness.pin(options.threads)
    results: dict[str, Any] = {"machine": harness.machine()}
    failed = []
    for name in given.ids or [name for name in ALL if name not in ON_REQUEST]:
        module, function = ALL[name].split(":")
        started = time.perf_counter()
        try:
            results[name] = getattr(importlib.import_module(module), function)(options)
        except Exception as error:  # the other tables are still worth having
            failed.append(name)
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["took_s"] = time.perf_counter() - started
        _show(name, results[name])
        results["after"] = {"load": harness.machine()["load"], **harness.peak_memory()}
        if given.json:
            given.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "ids", nargs="*", metavar="ID", help=f"of {', '.join(ALL)}; none: all but {', '.join(ON_REQUEST)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, after every id")
    parser.add_argument("--threads", type=int, default=cores, help="CPU threads of every side; cores are pinned")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds of every side; default 7 to 9")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="other frameworks too: benchmarks/peers/make.sh DIR")
    parser.add_argument("--large", action="store_true", help="sizes that need minutes and gigabytes too")
    given = parser.parse_args()
    unknown = set(given.ids) - set(ALL)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if given.threads < 1 or (given.rounds is not None and given.rounds < 1):
        parser.error("--threads and --rounds must be >= 1")
    return given


def _show(name: str, result: Mapping[str, Any]) -> None:
    print(f"\n{name}" + (f": {result['title']}" if "title" in result else "") + f"  [{result['took_s']:.0f} s]")
    if "error" in result:
        print(f"  failed: {result['error']}")
    for side, row in result.get("figures", {}).items():
        plan = _plan(result.get("plans", {}).get(side, {}))
        print(f"  {side:<28} {_figure(row)}{plan}")
    for pair, row in result.get("ratios", {}).items():
        spread = f"  (quartiles {row['q1']:.3g} – {row['q3']:.3g})" if "q1" in row else ""
        print(f"  {pair:<40} {row['median']:8.3g} ×{spread}")
    for line in result.get("notes", []):
        print(f"  {line}")
    for side, why in result.get("left_out", {}).items():
        print(f"  left out: {side}: {why}")
    sys.stdout.flush()  # an id may take minutes, and the output may be a file


def _figure(row: Mapping[str, Any]) -> str:
    if "median_ms" in row:
        return f"{row['median_ms']:10.2f} ms  (quartiles {row['q1_ms']:.2f} – {row['q3_ms']:.2f})"
    return "  ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float))


def _plan(plan: Mapping[str, Any]) -> str:
    named = [str(plan[key]) for key in ("engine", "kernels") if plan.get(key)]
    return f"  [{' '.join(named)}]" if named else ""


if __name__ == "__main__":
    main()
