r"""QSGD: round each coordinate at random to one of s levels of its bucket's norm, so that the mean is kept.

Alistarh et al., NeurIPS 2017, eq. 4. https://arxiv.org/abs/1610.02132
    Q(v)_j = ‖v‖ sign(v_j) ξ_j / s,   ξ_j = ⌊s |v_j| / ‖v‖⌋ or one more, with E ξ_j = s |v_j| / ‖v‖
    E‖Q(v) − v‖² ≤ ω ‖v‖²,   ω = min(b/s², √b/s) for buckets of b numbers (Lemma 3.1)
An encoded update is one number a bucket and 1 + ⌈log₂(s + 1)⌉ bits a coordinate: fixed width, where the paper has
Elias codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedsim.compress.contract import Senders, index_bits, packed
from fedsim.contracts import State
from fedsim.rng import uniform_like


@dataclass(frozen=True, kw_only=True)
class QSGD:
    """Random rounding to levels.

    Args:
        num_levels: s ≥ 1, levels above zero.
        bucket_size: b ≥ 1 neighbouring coordinates that share a norm; None: the whole update. The paper takes 512.

    Raises:
        ValueError: an argument out of its range.

    """

    num_levels: int = 15
    bucket_size: int | None = 512

    def __post_init__(self) -> None:
        if self.num_levels < 1:
            raise ValueError(f"num_levels must be >= 1, got {self.num_levels}; 15 makes 5 bits a coordinate")
        if self.bucket_size is not None and self.bucket_size < 1:
            raise ValueError(f"bucket_size must be >= 1, or null for the whole update, got {self.bucket_size}")

    def __call__(self, rows: Tensor, senders: Senders, state: State) -> tuple[Tensor, State]:
        """Return the rounded updates (K, D)."""
        return torch.stack([self._round(row, key) for row, key in zip(rows, senders.keys, strict=True)]), state

    def _round(self, row: Tensor, key: Tensor) -> Tensor:
        size, width = len(row), self._width(len(row))
        buckets = pad(row, (0, -size % width)).view(-1, width)  # (B, b)
        norms = torch.linalg.vector_norm(buckets, dim=1, keepdim=True)  # (B, 1)
        scaled = buckets.abs() / norms.clamp_min(torch.finfo(row.dtype).tiny) * self.num_levels  # (B, b)
        level = torch.floor(scaled + uniform_like(scaled, key))  # one more with the probability of what is beyond
        level = level.clamp_max(self.num_levels)  # a lone coordinate may be longer than its norm, by rounding
        rounded: Tensor = (norms * buckets.sign() * level / self.num_levels).flatten()[:size]
        return rounded

    def _width(self, size: int) -> int:
        return size if self.bucket_size is None else min(self.bucket_size, size)

    def num_bytes(self, size: int, itemsize: int) -> int:
        """Return the bytes of the buckets' norms and the packed signs and levels."""
        buckets = -(-size // self._width(size))
        return buckets * itemsize + packed(size * (1 + index_bits(self.num_levels + 1)))

    def contraction(self, size: int) -> float | None:
        """Return 1 − ω where the bound leaves one."""
        width, s = self._width(size), self.num_levels
        omega = min(width / s**2, width**0.5 / s)
        return 1 - omega if omega < 1 else None
