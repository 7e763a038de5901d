"""Write what ByzFL computes on a few small cohorts, for tests/test_byzfl_values.py, which then needs no ByzFL.

    pip install --no-deps --target FOLDER byzfl==0.0.11
    python -m benchmarks.byzfl_values FOLDER tests/byzfl_values.json

ByzFL's package imports torchvision and more; only its aggregators and attacks are loaded here, on float64 NumPy arrays.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


def load(folder: Path) -> tuple[Any, Any]:
    """Return ByzFL's modules of aggregators and attacks, without the package around them."""
    package = types.ModuleType("byzfl")
    package.__path__ = [str(folder / "byzfl")]
    sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators"), importlib.import_module("byzfl.attacks")


def cases() -> list[dict[str, Any]]:
    """Return cohorts of K rows and the number f of attackers that the rules are told."""
    found = []
    for seed, (count, size, f) in enumerate([(7, 5, 1), (11, 6, 2), (12, 4, 3), (15, 3, 4)]):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(count, size)) * rng.lognormal(size=(count, 1)) + rng.normal(size=size)
        found.append({"f": f, "rows": np.round(rows, 4).tolist()})
    return found


def values(case: dict[str, Any], aggregators: Any, attacks: Any) -> dict[str, Any]:
    """Return name → what ByzFL makes of a case; its clipping writes into its input, so each gets a copy."""
    f = case["f"]
    makers = {
        "average": aggregators.Average(),
        "median": aggregators.Median(),
        "trimmed_mean": aggregators.TrMean(f=f),
        "geometric_median": aggregators.GeometricMedian(nu=1e-6, T=5000),
        "krum": aggregators.Krum(f=f),
        "multi_krum": aggregators.MultiKrum(f=f),
        "centered_clipping": aggregators.CenteredClipping(L=3, tau=1.5),
        "meamed": aggregators.Meamed(f=f),
        "nnm": aggregators.NNM(f=f),
        "clip": aggregators.Clipping(c=2.0),
        "arc": aggregators.ARC(f=f),
        "sign_flipping": attacks.SignFlipping(),
        "ipm": attacks.InnerProductManipulation(tau=2.0),
        "alie": attacks.ALittleIsEnough(tau=1.5),
    }
    return {name: np.asarray(make(np.array(case["rows"]))).tolist() for name, make in makers.items()}


def main() -> None:
    """Write the table."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    aggregators, attacks = load(Path(sys.argv[1]))
    table = [{**case, "values": values(case, aggregators, attacks)} for case in cases()]
    Path(sys.argv[2]).write_text(json.dumps({"byzfl": "0.0.11", "cases": table}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
