"""Label flip: attackers train honestly on wrong labels.

Fang et al., USENIX Security 2020, §5.1: class c of C becomes C − 1 − c. https://arxiv.org/abs/1911.11815
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedsim.contracts import Dataset, Partition


@dataclass(frozen=True, kw_only=True)
class LabelFlip:
    """Every training sample of an attacker under another class.

    Args:
        kind: "reverse": c becomes C − 1 − c, which leaves the middle one of an odd number of classes alone;
            "next": c becomes c + 1 mod C.

    Raises:
        ValueError: another kind.

    """

    kind: Literal["reverse", "next"] = "reverse"

    def __post_init__(self) -> None:
        if self.kind not in ("reverse", "next"):
            raise ValueError(f"kind must be reverse or next, got {self.kind!r}")

    def poison(self, dataset: Dataset, partition: Partition, seed: int) -> Dataset:
        """Return the data set with the attackers' labels flipped; nothing is drawn."""
        mine = torch.from_numpy(partition.indices).to(dataset.y.device)  # (M,)
        y, last = dataset.y.clone(), dataset.num_classes - 1  # (N,)
        y[mine] = last - y[mine] if self.kind == "reverse" else (y[mine] + 1) % (last + 1)
        return dataset._replace(y=y)
