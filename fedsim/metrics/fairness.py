r"""How evenly accuracy is spread over clients.

Li et al., ICLR 2020 (q-FFL), §4: mean, spread, worst and best 10 % of the clients' accuracies.
Jain, Chiu, Hawe, DEC-TR-301, 1984:  J = (\sum_k a_k)² / (K \sum_k a_k²), 1 if all are equal, 1/K if one has all.
Which model (global or personal) on which data (a client's own test split) is the caller's to say.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from fedsim.metrics.classification import Figures


def fairness(accuracies: Tensor, sizes: Tensor, share: float = 0.1) -> Figures:
    """Summarise the clients' accuracies; clients without samples count nowhere.

    Args:
        accuracies: (K,) in [0, 1]; may be NaN where `sizes` is 0.
        sizes: (K,) samples behind each, ≥ 0.
        share: of the clients that are "worst" and "best", in (0, 1]: their number is rounded up, so at least one.

    Returns:
        0-d float64 each, NaN if no client has samples: `accuracy_mean`, `accuracy_weighted_mean` (by samples),
        `accuracy_std` (population, of clients), `accuracy_min`, `accuracy_worst` and `accuracy_best` (means of the
        ⌈share · K⌉ lowest and highest), `accuracy_jain` (1 if all are 0: all are equal).

    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    held = sizes > 0  # (K,)
    values, weights = accuracies[held].double(), sizes[held].double()  # (K',)
    if not len(values):
        names = ("mean", "weighted_mean", "std", "min", "worst", "best", "jain")
        return {f"accuracy_{name}": values.new_tensor(torch.nan) for name in names}
    ranked = values.sort().values  # (K',) ascending
    tail = math.ceil(Fraction(str(share)) * len(ranked))  # of the decimal that was written: 0.1 of 10 is 1
    squares = values.square().sum()
    return {
        "accuracy_mean": values.mean(),
        "accuracy_weighted_mean": (weights @ values) / weights.sum(),
        "accuracy_std": values.std(correction=0),
        "accuracy_min": ranked[0],
        "accuracy_worst": ranked[:tail].mean(),
        "accuracy_best": ranked[-tail:].mean(),
        "accuracy_jain": torch.where(squares > 0, values.sum().square() / (len(values) * squares), 1.0),
    }


def accuracy_by_skew_quartile(accuracies: Tensor, skew: Tensor) -> Figures:
    """Average accuracy over the quarters of the clients from least to most skewed labels.

    Clients that have an accuracy are ranked by skew, ties by position, and cut into four runs whose lengths differ by
    at most one: run q holds the ranks from ⌊qK/4⌋ up to ⌊(q+1)K/4⌋.

    Args:
        accuracies: (K,) in [0, 1], NaN for a client without samples.
        skew: (K,) distance of each client's labels to the pool's, larger is more skewed.

    Returns:
        `accuracy_skew_q1` (least skewed) to `accuracy_skew_q4`, 0-d float64 plain means; NaN for a quarter without
        clients (there are fewer than four).

    """
    held = ~accuracies.isnan()  # (K,)
    order = torch.argsort(skew[held], stable=True)  # (K',)
    ranked = accuracies[held][order].double()  # (K',)
    cuts = [quarter * len(ranked) // 4 for quarter in range(5)]
    return {f"accuracy_skew_q{q + 1}": ranked[cuts[q] : cuts[q + 1]].mean() for q in range(4)}
