"""How often a report calls two equal methods different: FedAvg against FedAvg as a plug-in under another name.

    python -m benchmarks.nominal [--repetitions 20] [--rounds 20] [--splits 4000]

1. The plug-in, over equal seeds: equal to the bit, so the report says "no difference" of every metric.
2. Chance alone: accuracies of twice as many seeds are dealt to two names again and again, and tested as a report tests
   them. Equal methods should be told apart in 5 % of the deals; how far from that real accuracies lead is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsim.report.command import report
from fedsim.report.statistics import LEVEL, paired
from fedsim.sweep.board import Board
from fedsim.sweep.drive import sweep
from fedsim.sweep.table import summary_of

_TWIN = "from fedsim.strategies.fedavg import FedAvg\n\n\nclass Twin(FedAvg):\n    pass\n"
_TWIN_YAML = "# FedAvg under another name.\n_target_: twin.Twin\nserver_lr: 1.0\nserver_momentum: 0.0\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run both, and print what a report says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--splits", type=int, default=4000)
    given = parser.parse_args(argv)
    count = given.repetitions
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        place.joinpath("mine/strategy").mkdir(parents=True)
        place.joinpath("mine/strategy/twin.yaml").write_text(_TWIN_YAML)
        place.joinpath("twin.py").write_text(_TWIN)
        sys.path.append(scratch)
        words = [f"num_rounds={given.rounds}", "device=cpu"]
        sweep([*words, "strategy=fedavg,twin", f"seed=range({count})", f"hydra.sweep.dir={place}/twins"],
              place / "mine", Board())  # fmt: skip
        text, _ = report([place / "twins"], format="markdown")
        print(text)
        sweep([*words, "strategy=fedavg", f"seed=range({count},{2 * count})", f"hydra.sweep.dir={place}/more"], None,
              Board())  # fmt: skip
        folders = [*sorted(place.glob("twins/*fedavg*")), *sorted(place.glob("more/*seed*"))]
        found = [summary for folder in folders if (summary := summary_of(folder)) is not None]
        accuracies = np.array([summary["accuracy"] for summary in found])  # (2n,)
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(given.splits):
        dealt = rng.permutation(accuracies).reshape(2, -1)
        test = paired(dealt[0], dealt[1])
        told += test is not None and test.p <= 1 - LEVEL
    rate, expected = told / given.splits, 1 - LEVEL
    error = math.sqrt(expected * LEVEL / given.splits)
    print(f"\n{len(accuracies)} runs of FedAvg, accuracy {accuracies.mean():.4f}, s {accuracies.std(ddof=1):.4f}")
    print(
        f"told apart in {100 * rate:.1f} % of {given.splits} deals; nominal {100 * expected:.1f} ± {100 * error:.1f} %"
    )


if __name__ == "__main__":
    main()
