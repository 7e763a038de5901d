r"""How unlike each other the clients of a partition are.

M (K, C) counts the samples of each client and class, n_k = Σ_c M_kc, p_k = M_k / n_k, the pool q = Σ_k M_k / N and
a_k = n_k / N. Logarithms are natural.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition
from fedsim.partition.csr import client_blocks

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]


class SkewRow(NamedTuple):
    """One line of the table that `fedsim partition` prints."""

    name: str
    value: float | int
    meaning: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Skew:
    """Label and size skew. An empty client has no label distribution: NaN in the vectors, left out of means of them."""

    client_tv: Float  # (K,) ½ Σ_c |p_kc − q_c|, in [0, 1); twice this is the L1 or "EMD" of Zhao et al., 2018
    client_js: Float  # (K,) ½ KL(p_k‖m) + ½ KL(q‖m), m = ½ (p_k + q), in [0, ln 2]; its root is a metric
    client_hellinger: Float  # (K,) √(½ Σ_c (√p_kc − √q_c)²), in [0, 1]
    client_effective_classes: Float  # (K,) exp(H(p_k)), in [1, C]
    client_sizes: Int  # (K,) n_k
    mutual_information: float  # Σ_k a_k KL(p_k‖q) = I(client; label) in nats, in [0, min(H(q), H(a))]
    missing_classes: float  # share of zero cells of M over non-empty clients and classes that the pool has, in [0, 1)
    size_gini: float  # Σ_ij |n_i − n_j| / (2 K² n̄), in [0, (K − 1) / K], empty clients included
    size_cv: float  # standard deviation of n_k over their mean, empty clients included

    def rows(self) -> list[SkewRow]:
        """Return what a reader of a partition wants to know, one figure a row."""
        held = self.client_sizes > 0  # (K,)
        share = self.client_sizes[held] / self.client_sizes.sum()  # (K',)

        def label_rows(name: str, values: Float, meaning: str) -> list[SkewRow]:
            values = values[held]  # (K',)
            return [
                SkewRow(f"{name}, mean", float(values.mean()), meaning),
                SkewRow(f"{name}, weighted", float(share @ values), "the same, weighted by samples"),
                SkewRow(f"{name}, max", float(values.max()), "the most skewed client"),
            ]

        return [
            *label_rows("label TV", self.client_tv, "total variation to the pool: 0 iid, 1 disjoint"),
            *label_rows(
                "label JS", self.client_js, "Jensen-Shannon divergence to the pool, nats: 0 iid, at most 0.693"
            ),
            *label_rows("label Hellinger", self.client_hellinger, "Hellinger distance to the pool: 0 iid, 1 disjoint"),
            SkewRow("mutual information", self.mutual_information, "of client and label, nats: 0 iid"),
            SkewRow(
                "effective classes", float(self.client_effective_classes[held].mean()), "exp(entropy), client mean"
            ),
            SkewRow("missing classes", self.missing_classes, "share of (client, class) pairs without a sample"),
            SkewRow("size Gini", self.size_gini, "0 equal sizes, towards 1 one client has all"),
            SkewRow("size CV", self.size_cv, "standard deviation of the sizes over their mean"),
            SkewRow("size, min", int(self.client_sizes.min()), "samples of the smallest client"),
            SkewRow("size, mean", float(self.client_sizes.mean()), "samples a client"),
            SkewRow("size, max", int(self.client_sizes.max()), "samples of the largest client"),
            SkewRow("empty clients", int((~held).sum()), "clients without a sample"),
        ]


def label_counts(labels: npt.ArrayLike, partition: Partition, num_classes: int) -> Int:
    """Count M (K, C), the samples of each client and class.

    Args:
        labels: (N,) integers in [0, num_classes), indexed by the partition.
        partition: K clients.
        num_classes: C.

    Raises:
        ValueError: a label is out of range.

    """
    labels, sizes = np.asarray(labels), partition.sizes
    counts = np.zeros((partition.num_clients, num_classes), dtype=np.int64)  # (K, C)
    for low, high in client_blocks(partition):
        classes = labels[partition.indices[partition.offsets[low] : partition.offsets[high]]]  # (M',)
        if len(classes) and (classes.min() < 0 or classes.max() >= num_classes):
            raise ValueError(f"labels must be in [0, {num_classes}), got {classes.min()} to {classes.max()}")
        cells = np.repeat(np.arange(high - low) * num_classes, sizes[low:high]) + classes  # (M',)
        counts[low:high] = np.bincount(cells, minlength=(high - low) * num_classes).reshape(-1, num_classes)
    return counts


def label_tv(counts: Int) -> Float:
    """Return the total variation ½ Σ_c |p_kc − q_c| of each client (K,) from counts M (K, C); NaN without samples."""
    sizes = counts.sum(axis=1)  # (K,)
    q = counts.sum(axis=0) / counts.sum()  # (C,)
    apart = counts / np.where(sizes > 0, sizes, 1)[:, None]  # (K, C)
    apart -= q
    tv: Float = np.abs(apart, out=apart).sum(axis=1) / 2  # (K,)
    return np.where(sizes > 0, tv, np.nan)


def skew(counts: npt.ArrayLike) -> Skew:
    """Measure the skew of a partition.

    Args:
        counts: M (K, C), at least one sample.

    Raises:
        ValueError: there is no sample, or counts isn't a matrix.

    >>> round(skew([[5, 5], [9, 1]]).mutual_information, 4)
    0.1017

    """
    counts = np.asarray(counts, dtype=np.int64)  # (K, C)
    if counts.ndim != 2 or counts.sum() == 0:
        raise ValueError(f"counts must be a matrix (clients, classes) with a sample, got shape {counts.shape}")
    sizes = counts.sum(axis=1)  # (K,)
    held = sizes > 0  # (K,)
    p = counts / np.where(held, sizes, 1)[:, None]  # (K, C)
    q = counts.sum(axis=0) / counts.sum()  # (C,)
    middle = (p + q) / 2  # (K, C)
    js = (_kl(p, middle) + _kl(np.broadcast_to(q, p.shape), middle)) / 2  # (K,)
    hellinger = np.sqrt(np.square(np.sqrt(p) - np.sqrt(q)).sum(axis=1) / 2)  # (K,)
    entropy = -_kl(p, np.ones_like(p))  # (K,)
    information = float(sizes / sizes.sum() @ _kl(p, np.broadcast_to(q, p.shape)))
    return Skew(
        client_tv=label_tv(counts),
        client_js=np.where(held, np.maximum(js, 0.0), np.nan),
        client_hellinger=np.where(held, hellinger, np.nan),
        client_effective_classes=np.where(held, np.exp(entropy), np.nan),
        client_sizes=sizes,
        mutual_information=max(information, 0.0),
        missing_classes=float((counts[held][:, q > 0] == 0).mean()),
        size_gini=_gini(sizes),
        size_cv=float(sizes.std() / sizes.mean()),
    )


def _kl(p: Float, q: Float) -> Float:
    """Return Σ_c p_c ln(p_c / q_c) of each row of p and q (K, C), with 0 ln 0 = 0."""
    inside = p > 0
    ratio = np.divide(p, q, out=np.ones_like(p), where=inside)  # (K, C)
    sums: Float = (p * np.log(ratio)).sum(axis=1)  # (K,)
    return sums


def _gini(sizes: Int) -> float:
    """Return Σ_ij |n_i − n_j| / (2 K² n̄), from sorted sizes: n_(i) stands above i others and below K − 1 − i."""
    ordered = np.sort(sizes)  # (K,)
    rank = 2 * np.arange(len(sizes)) - len(sizes) + 1  # (K,)
    return float(rank @ ordered / (len(sizes) * ordered.sum()))
