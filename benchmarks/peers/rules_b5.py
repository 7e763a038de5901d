"""B5 in ByzFL or with Flower's NumPy: one rule on a saved matrix of updates.

    rules_b5.py ROWS.npy byzfl|flower RULE F

RULE may be a pipeline, OUTER+INNER: a pre-aggregator, whose rows the inner aggregator is given; OUTER alone returns
them. ByzFL's package imports torchvision and more, so only its aggregators are loaded; it gets PyTorch tensors, which
is its fast way. Flower gets what its strategies hand on: a list of (arrays, number of samples).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import numpy as np
import protocol

path, framework, name, f = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
rows = np.load(path)  # (K, D)


def byzfl():
    """Return a rule or a pipeline of ByzFL, applied, and what has to be done before each time."""
    import torch

    package = types.ModuleType("byzfl")
    found = importlib.util.find_spec("byzfl")  # the folder; the package itself is not imported
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["byzfl"] = package
    aggregators = importlib.import_module("byzfl.aggregators")
    makers = {
        "fedavg": lambda: aggregators.Average(),
        "median": lambda: aggregators.Median(),
        "trimmed_mean": lambda: aggregators.TrMean(f=f),
        "meamed": lambda: aggregators.Meamed(f=f),
        "krum": lambda: aggregators.Krum(f=f),
        "multi_krum": lambda: aggregators.MultiKrum(f=f),
        "geometric_median": lambda: aggregators.GeometricMedian(),
        "centered_clipping": lambda: aggregators.CenteredClipping(L=3, tau=1.0),  # our defaults, from 0 as ours here
        "centered_clipping_once": lambda: aggregators.CenteredClipping(L=1, tau=1.0),
        "nnm": lambda: aggregators.NNM(f=f),
        "arc": lambda: aggregators.ARC(f=f),
    }
    steps = [makers[step]() for step in name.split("+")]
    updates = torch.from_numpy(rows)
    given = updates.clone()

    def applied():
        found = given
        for step in steps:
            found = step(found)
        return found.numpy()

    # ARC writes into what it is given, which a user may let it do: the rows are put right outside of the time.
    return applied, (lambda: given.copy_(updates)) if "arc" in name else None


def flower():
    """Return a rule of Flower, applied; nothing has to be done before."""
    rules = importlib.import_module("flwr.server.strategy.aggregate")
    results = [([row], 1) for row in rows]
    rule = {
        "fedavg": lambda: rules.aggregate(results)[0],
        "median": lambda: rules.aggregate_median(results)[0],
        "trimmed_mean": lambda: rules.aggregate_trimmed_avg(results, f / len(rows))[0],
        "krum": lambda: rules.aggregate_krum(results, f, 0)[0],
        "multi_krum": lambda: rules.aggregate_krum(results, f, len(rows) - f)[0],
        "bulyan": lambda: rules.aggregate_bulyan(results, f, rules.aggregate_krum, to_keep=0)[0],
    }[name]
    return rule, None


work, before = {"byzfl": byzfl, "flower": flower}[framework]()
protocol.serve(work, framework if framework == "byzfl" else "flwr", "numpy", before=before)
