"""What the picture of a partition shows: each client's classes, and its name."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.contracts import Dataset, Partition
from fedsim.data.splits import chosen
from fedsim.local import Int64
from fedsim.metrics.skew import label_counts


def counts(dataset: Dataset, drawn: Partition) -> Int64:
    """Count each client's training, validation and test samples of each class (K, C)."""
    return label_counts(chosen(dataset.y.numpy(), dataset.splits["train"]), drawn, dataset.num_classes)


def names(dataset: Dataset, drawn: Partition) -> Sequence[str] | None:
    """Return the clients' names where the partition is the data's own: no client mixes two natural ones."""
    if dataset.client is None or dataset.client_names is None:
        return None
    owners = dataset.client[dataset.splits["train"]][drawn.indices]
    found = []
    for k in range(drawn.num_clients):
        mine = set(owners[drawn.offsets[k] : drawn.offsets[k + 1]].tolist())
        if len(mine) != 1:
            return None
        found.append(dataset.client_names[mine.pop()])
    return found if len(set(found)) == len(found) else None
