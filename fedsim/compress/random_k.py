r"""Random-k: send k coordinates drawn at random.

Konečný et al., 2016 ("random mask"); Stich et al., NeurIPS 2018. https://arxiv.org/abs/1610.05492
Positions follow from a key that server and client share, so that an encoded update is k numbers and 8 bytes. Scaled by
D/k it is unbiased; as drawn it is a contraction with a = k/D, which `error_feedback` and `ef21` need.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.compress.contract import Senders, check_fraction, num_kept
from fedsim.contracts import State

KEY_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class RandomK:
    """Random coordinates of each update, drawn for each client and round.

    Args:
        fraction: k / D in (0, 1]; at least one coordinate is sent.
        unbiased: scale what is sent by D/k.

    Raises:
        ValueError: `fraction` out of its range.

    """

    fraction: float = 0.01
    unbiased: bool = True

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def __call__(self, rows: Tensor, senders: Senders, state: State) -> tuple[Tensor, State]:
        """Return the updates with all but k coordinates zero (K, D)."""
        size = rows.shape[1]
        kept = num_kept(self.fraction, size)
        draws = [np.random.default_rng(key).choice(size, kept, replace=False, shuffle=False) for key in _list(senders)]
        chosen = torch.from_numpy(np.stack(draws)).to(rows.device)  # (K, k)
        sent = torch.zeros_like(rows).scatter(1, chosen, rows.gather(1, chosen))
        return sent * (size / kept) if self.unbiased else sent, state

    def num_bytes(self, size: int, itemsize: int) -> int:
        """Return k itemsize + 8."""
        return num_kept(self.fraction, size) * itemsize + KEY_BYTES

    def contraction(self, size: int) -> float | None:
        """Return k / D without the scaling; None with it."""
        kept = num_kept(self.fraction, size)
        return kept / size if kept == size or not self.unbiased else None


def _list(senders: Senders) -> list[int]:
    keys: list[int] = senders.keys.tolist()
    return keys
