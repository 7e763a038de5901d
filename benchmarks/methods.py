"""The figures of the README's table: every method on the default setting, seeds 0-4.

    python benchmarks/methods.py [--folder FOLDER] [--only NAME,NAME] [override ...]

An override holds for all methods, e.g. partition.alpha=0.1; --only scaffold,fednova takes some strategies alone.
One line of Markdown a method: mean ± standard deviation
(of the sample, n − 1) of the last round's figures, in per cent, on the test split and on the clients' own test data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fedsim

SEEDS = range(5)
METHODS = (
    ["strategy=fedavg"],
    ["strategy=fedavgm"],
    ["strategy=fedprox"],
    ["strategy=fedadam"],
    ["strategy=fedyogi"],
    ["strategy=fedadagrad"],
    ["strategy=fedld"],
    ["strategy=fedavg", "client=margin"],
    ["strategy=fedld", "client=sgd"],
    ["strategy=krum"],
    ["strategy=multi_krum"],
    ["strategy=bulyan"],
    ["strategy=median"],
    ["strategy=trimmed_mean"],
    ["strategy=meamed"],
    ["strategy=geometric_median"],
    ["strategy=norm_clipping"],
    ["strategy=centered_clipping"],
    ["strategy=dnc"],
    ["strategy=flag"],
    ["strategy=scaffold"],
    ["strategy=fednova"],
    ["strategy=feddyn"],
    ["strategy=moon"],
    ["strategy=fal"],
    ["strategy=qfedavg"],
    ["strategy=fedexp"],
    ["strategy=fedlex"],
    ["strategy=fedlex", "strategy.even=true"],
    ["strategy=fedlex", "strategy.even=true", "strategy.guide=permuted"],
    ["strategy=fedhyper_g"],
    ["strategy=fedhyper_sl"],
    ["strategy=fedhyper_cl"],
    ["strategy=ef21"],
    ["strategy=nnm"],
    ["strategy=dp_fedavg"],
    ["strategy=ditto"],
    ["strategy=fedper"],
    ["strategy=fedrep"],
    ["strategy=local"],
    ["strategy=centralized"],
)


def measure(method: Sequence[str], overrides: Sequence[str], folder: Path) -> list[dict[str, float]]:
    """Return the last figures of each seed's run."""
    results = []
    for seed in SEEDS:
        place = folder / "_".join(method).replace("=", "-") / str(seed)
        result = fedsim.simulate(*method, *overrides, seed=seed, threads=1, folder=place)
        results.append(dict(result.summary))
    return results


def cell(values: Sequence[float | None]) -> str:
    """Return mean ± standard deviation in per cent; a dash where a method has no such figure."""
    figures = [100 * value for value in values if value is not None]
    if not figures:
        return "–"
    return f"{statistics.mean(figures):.1f} ± {statistics.stdev(figures):.1f}"


def main(folder: Path, overrides: Sequence[str], methods: Sequence[Sequence[str]] = METHODS) -> None:
    """Print the table."""
    print("| overrides | accuracy, % | clients' mean accuracy, % |\n|---|---|---|")
    for method in methods:
        results = measure(method, overrides, folder)
        columns = [cell([r.get(name) for r in results]) for name in ("accuracy", "client_accuracy_mean")]
        print(f"| `{' '.join(method)}` | {columns[0]} | {columns[1]} |", flush=True)
    print(f"\n{' '.join(overrides) or 'defaults'}; seeds {SEEDS[0]}-{SEEDS[-1]}; {sys.argv[0]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--folder", type=Path, help="keeps the run folders; a temporary one if absent")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), metavar="NAME,NAME", help="strategies; all if absent"
    )
    given = parser.parse_intermixed_args()
    names = [method[0].removeprefix("strategy=") for method in METHODS]
    if unknown := sorted(set(given.only or ()) - set(names)):
        parser.error(f"no method {unknown[0]} in the table; it has {', '.join(dict.fromkeys(names))}")
    chosen = [method for method, name in zip(METHODS, names, strict=True) if given.only is None or name in given.only]
    with tempfile.TemporaryDirectory() as temporary:
        main(given.folder or Path(temporary), given.overrides, chosen)
