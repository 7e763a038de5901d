"""Loss and accuracy of classifiers: overall, by class and by client.

One pass over the data leaves a few numbers a sample, `Outputs`; every figure is a sum of them over segments.
A class or client without samples has no figure: its entry is NaN here, is skipped by every mean and is null in
the run folder. Sums are in float64: 1e5 float32 losses lose 3 digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Figures = dict[str, Tensor]
"""Name → 0-d or (K,) float64 tensor, left on its device so that a round waits for it once."""


class Outputs(NamedTuple):
    """What evaluation keeps of each of N samples."""

    loss: Tensor  # (N,) cross-entropy, nats
    predicted: Tensor  # (N,) int64 class of the largest logit, the lowest such class in a tie
    confidence: Tensor  # (N,) softmax probability of the predicted class, in [1/C, 1]
    correct: Tensor  # (N,) bool


def outputs(logits: Tensor, labels: Tensor) -> Outputs:
    """Reduce logits to what the metrics need; finite for logits of any finite size.

    Args:
        logits: (N, C).
        labels: (N,) int64 in [0, C).

    """
    log_p = torch.log_softmax(logits, dim=-1)  # (N, C)
    # Not `cross_entropy`: its NLLLoss has no deterministic kernel on CUDA, a gather has.
    loss = -log_p.gather(-1, labels[:, None]).squeeze(-1)  # (N,)
    best, predicted = log_p.max(dim=-1)  # (N,)
    return Outputs(loss, predicted, best.exp(), predicted == labels)


def concatenate(parts: list[Outputs]) -> Outputs:
    """Join the outputs of consecutive batches."""
    return Outputs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def overall(outputs: Outputs) -> Figures:
    """Return mean `loss` and `accuracy` over all samples, 0-d each."""
    return {"loss": outputs.loss.double().mean(), "accuracy": outputs.correct.double().mean()}


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum consecutive segments; an empty one sums to 0.

    Every segment is summed on its own in float64: without atomics, so equal in every run, and, unlike differences
    of a running sum, neither rounded by nor made NaN by the segments before it.

    Args:
        values: (N,) float, int or bool.
        offsets: (K+1,) int64, ascending from 0 to N.

    Returns:
        (K,) float64.

    """
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(values):
        raise ValueError(
            f"offsets must go from 0 to the number of values, {len(values)}, "
            f"got {int(offsets[0])} to {int(offsets[-1])}; order the outputs as the partition's indices"
        )
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0.0)


def segment_means(values: Tensor, offsets: Tensor) -> Tensor:
    """Average consecutive segments, as `segment_sums`: (K,) float64, NaN where a segment is empty."""
    return segment_sums(values, offsets) / offsets.diff()


def per_client(outputs: Outputs, offsets: Tensor) -> Figures:
    """Return each client's `loss`, `accuracy` and `num_samples`, (K,) each, from samples laid out client by client."""
    return {
        "loss": segment_means(outputs.loss, offsets),
        "accuracy": segment_means(outputs.correct, offsets),
        "num_samples": offsets.diff(),
    }


def per_class_recall(outputs: Outputs, labels: Tensor, num_classes: int) -> Tensor:
    """Return the share of each class's samples that are predicted right, (C,) float64; NaN for an absent class.

    Args:
        outputs: of N samples.
        labels: (N,) int64 in [0, num_classes).
        num_classes: C.

    """
    zeros = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)  # (C,)
    # Integers: exact in any order, so atomics could not change a bit.
    support = zeros.index_add(0, labels, torch.ones_like(labels))  # (C,)
    hits = zeros.index_add(0, labels, outputs.correct.long())  # (C,)
    return hits.double() / support


def balanced_accuracy(recall: Tensor) -> Tensor:
    """Return the mean recall over the classes that have samples, 0-d ("macro recall")."""
    return recall.nanmean()


def many_medium_few(recall: Tensor, train_counts: Tensor, many: int = 100, few: int = 20) -> Figures:
    """Average recall over classes with many, medium and few training samples.

    Liu et al., CVPR 2019 (OLTR): many is > 100 samples, few is < 20, medium is between, on data sets of
    about 1e5 samples; scale both thresholds with other sizes or take `head_middle_tail`.

    Args:
        recall: (C,) of `per_class_recall`.
        train_counts: (C,) training samples of each class, over all clients.
        many: a class with more is "many".
        few: a class with fewer is "few"; few ≤ many + 1.

    Returns:
        `accuracy_many`, `accuracy_medium`, `accuracy_few`, 0-d each; NaN for a group without tested classes.

    """
    return group_means(recall, groups_by_count(train_counts, many, few))


def head_middle_tail(recall: Tensor, train_counts: Tensor, head: float = 0.75, middle: float = 0.95) -> Figures:
    """Average recall over head, middle and tail classes, by the share of the training samples they hold.

    Xiao et al., ICLR 2024 (FedLoGe), authors' code: classes sorted by training samples, largest first; head as long
    as the cumulative share is ≤ `head`, then middle as long as it is ≤ `middle`, then tail. Free of data set sizes.

    Args:
        recall: (C,) of `per_class_recall`.
        train_counts: (C,) training samples of each class, over all clients.
        head: cumulative share in [0, 1].
        middle: cumulative share in [head, 1].

    Returns:
        `accuracy_head`, `accuracy_middle`, `accuracy_tail`, 0-d each; NaN for a group without tested classes.

    """
    return group_means(recall, groups_by_share(train_counts, head, middle))


Groups = dict[str, Tensor]
"""Name → (C,) bool, which classes are in it."""


def groups_by_count(train_counts: Tensor, many: int = 100, few: int = 20) -> Groups:
    """Return the classes with many, medium and few training samples, as `many_medium_few` has them."""
    if few > many + 1:
        raise ValueError(f"few must be <= many + 1, or a class is both, got few={few}, many={many}")
    is_many, is_few = train_counts > many, train_counts < few  # (C,)
    return {"many": is_many, "medium": ~(is_many | is_few), "few": is_few}


def groups_by_share(train_counts: Tensor, head: float = 0.75, middle: float = 0.95) -> Groups:
    """Return the head, middle and tail classes, as `head_middle_tail` has them."""
    if not 0 <= head <= middle <= 1:
        raise ValueError(f"head and middle must satisfy 0 <= head <= middle <= 1, got {head}, {middle}")
    order = torch.argsort(train_counts, descending=True, stable=True)  # (C,)
    cumulative = train_counts[order].cumsum(0)  # (C,) integers, exact
    share = torch.empty(len(order), dtype=torch.float64, device=order.device)  # (C,), in the classes' own order
    share[order] = cumulative.double() / cumulative[-1]
    return {"head": share <= head, "middle": (share > head) & (share <= middle), "tail": share > middle}


def group_means(recall: Tensor, groups: Groups) -> Figures:
    """Average recall (C,) over groups of classes: `accuracy_<name>`, 0-d each; NaN for one without tested classes."""
    means = torch.where(torch.stack(list(groups.values())), recall, torch.nan).nanmean(1)  # (G,)
    return {f"accuracy_{name}": mean for name, mean in zip(groups, means.unbind(), strict=True)}
