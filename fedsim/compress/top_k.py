r"""Top-k: send the k coordinates of largest magnitude.

Aji & Heafield, EMNLP 2017; contraction a = k/D: Stich et al., NeurIPS 2018, Lemma A.1. https://arxiv.org/abs/1809.07599
An encoded update is k numbers and k positions of ⌈log₂ D⌉ bits. Biased; `error_feedback` and `ef21` mend that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.compress.contract import Senders, check_fraction, index_bits, num_kept, packed
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The largest coordinates of each update, over the whole vector; of equal ones any.

    Args:
        fraction: k / D in (0, 1]; at least one coordinate is sent.

    Raises:
        ValueError: `fraction` out of its range.

    """

    fraction: float = 0.01

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def __call__(self, rows: Tensor, senders: Senders, state: State) -> tuple[Tensor, State]:
        """Return the updates with all but k coordinates zero (K, D)."""
        kept = rows.abs().topk(num_kept(self.fraction, rows.shape[1]), dim=1, sorted=False).indices  # (K, k)
        return torch.zeros_like(rows).scatter(1, kept, rows.gather(1, kept)), state

    def num_bytes(self, size: int, itemsize: int) -> int:
        """Return ⌈k (8 itemsize + ⌈log₂ D⌉) / 8⌉."""
        return packed(num_kept(self.fraction, size) * (8 * itemsize + index_bits(size)))

    def contraction(self, size: int) -> float:
        """Return k / D."""
        return num_kept(self.fraction, size) / size
