"""`python -m benchmarks [IDS…] [--json FILE] [--threads N]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import harness, training

ALL = {"B1": training.b1, "B2": training.b2, "B4": training.b4, "overhead": training.overhead}


def main() -> None:
    """Run benchmarks, print their tables and write what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of {', '.join(ALL)}; none: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every side")
    given = parser.parse_args()
    unknown = set(given.ids) - set(ALL)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    torch.set_num_threads(given.threads)
    results = {"machine": harness.machine()}
    for name in given.ids or ALL:
        results[name] = ALL[name]()
        _show(name, results[name])
    results["load_after"] = harness.machine()["load"]
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


def _show(name: str, result: dict) -> None:
    print(f"\n{name}: median of a round, ms (quartiles)")
    for side, row in result["figures"].items():
        print(f"  {side:<12} {row['median_ms']:9.2f}  ({row['q1_ms']:.2f} – {row['q3_ms']:.2f})")
    for pair, row in result["ratios"].items():
        print(f"  {pair:<26} {row['median']:6.2f} ×  ({row['q1']:.2f} – {row['q3']:.2f})")


if __name__ == "__main__":
    main()
