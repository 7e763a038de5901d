r"""How far a classifier's confidence is from its accuracy.

Guo et al., ICML 2017, eq. 3:  ECE = \sum_b (|B_b| / N) |acc(B_b) − conf(B_b)|, over bins B_b of the confidence.
Naeini et al., AAAI 2015, give the bins equal width, here (lo, hi]; Nixon et al., CVPR workshops 2019, equal mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.metrics.classification import Outputs, segment_sums


def expected_calibration_error(outputs: Outputs, num_bins: int = 15) -> Tensor:
    """Return the ECE over bins of equal width, a 0-d float64 in [0, 1]; 0 without samples.

    Args:
        outputs: of N samples.
        num_bins: ≥ 1.

    """
    _check(num_bins)
    confidence = outputs.confidence.double()  # (N,)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)[1:-1]  # (bins − 1,)
    bins = torch.bucketize(confidence, edges)  # (N,), edges[b − 1] < confidence ≤ edges[b]
    order = torch.argsort(bins, stable=True)  # (N,)
    inner = torch.searchsorted(bins[order], torch.arange(1, num_bins, device=bins.device))  # (bins − 1,)
    return _error(outputs, order, inner)


def adaptive_calibration_error(outputs: Outputs, num_bins: int = 15) -> Tensor:
    """Return the ECE over bins of equal mass: samples sorted by confidence, cut into runs of sizes that differ by ≤ 1.

    Peaked models put nearly all samples into the last bin of equal width; here every bin tells as much.
    """
    _check(num_bins)
    order = torch.argsort(outputs.confidence, stable=True)  # (N,)
    inner = torch.arange(1, num_bins, device=order.device) * len(order) // num_bins  # (bins − 1,)
    return _error(outputs, order, inner)


def _error(outputs: Outputs, order: Tensor, inner: Tensor) -> Tensor:
    """Sum |Σ (correct − confidence)| over the runs of the ordered samples that the inner offsets cut."""
    gap = outputs.correct.double() - outputs.confidence.double()  # (N,)
    ends = inner.new_tensor([0, len(order)])  # (2,)
    offsets = torch.cat([ends[:1], inner, ends[1:]])  # (bins + 1,)
    return segment_sums(gap[order], offsets).abs().sum() / max(len(order), 1)


def _check(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")
