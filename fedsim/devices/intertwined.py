"""Slowness that follows the data: those who hold a class are those who answer late.

"Intertwined heterogeneity", Huang et al., "Tackling Intertwined Data and Device Heterogeneities in Federated Learning
with Unlimited Staleness" (AAAI 2025; arXiv:2309.13536). Its two forms, from the authors' released code:
    class     clients of one class each: every client that holds the class is slow (`sampling.py`, lines 26–54)
    most      clients of mixed classes: the `num_slow` clients with most samples of the class are slow (lines 56–87)
Departs in `class`: there the client's first sample decides; here its most frequent class, which is the same where
clients hold one class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedsim.devices.fleet import Fleet, Population, check_positive


@dataclass(frozen=True, kw_only=True)
class Intertwined:
    """Make the clients that hold one class slow.

    Args:
        target_class: whose holders are slow, in 0 … C−1.
        form: "class", or "most", see above.
        num_slow: clients ≥ 1 that "most" makes slow; ties go to the lower id. Not read by "class".
        slowdown: factor ≥ 1 by which their machines and links are slower.
        speed: floating-point operations a second > 0 of the others.
        down_bandwidth: bytes a second > 0 towards the client.
        up_bandwidth: bytes a second > 0 from the client.

    Raises:
        ValueError: an argument out of its range.

    """

    target_class: int = 5
    form: Literal["class", "most"] = "class"
    num_slow: int = 10
    slowdown: float = 10.0
    speed: float = 5e9
    down_bandwidth: float = 5e6
    up_bandwidth: float = 1e6

    def __post_init__(self) -> None:
        if self.form not in ("class", "most"):
            raise ValueError(f"form must be class or most, got {self.form!r}")
        if self.target_class < 0:
            raise ValueError(f"target_class must be >= 0, got {self.target_class}")
        if self.num_slow < 1:
            raise ValueError(f"num_slow must be >= 1, got {self.num_slow}")
        if not 1 <= self.slowdown < float("inf"):
            raise ValueError(f"slowdown must be >= 1 and finite, got {self.slowdown}")
        check_positive(
            "devices=intertwined", speed=self.speed, down_bandwidth=self.down_bandwidth, up_bandwidth=self.up_bandwidth
        )

    def __call__(self, population: Population, seed: int) -> Fleet:
        """Return the fleet (P,); nothing of it is random.

        Raises:
            ValueError: the data has no such class, or nobody holds it.

        """
        counts, num = population.label_counts, len(population)  # (P, C)
        if self.target_class >= counts.shape[1]:
            raise ValueError(
                f"target_class must be below the data's {counts.shape[1]} classes, got {self.target_class}"
            )
        held = counts[:, self.target_class]  # (P,)
        if self.form == "class":
            slow = (counts.argmax(1) == self.target_class) & (held > 0)  # (P,)
        else:
            slow = np.zeros(num, dtype=bool)
            slow[np.argsort(-held, kind="stable")[: self.num_slow]] = True
            slow &= held > 0
        if not slow.any():
            raise ValueError(f"target_class {self.target_class} makes nobody slow: no client holds mostly that class")
        factor = np.where(slow, self.slowdown, 1.0)  # (P,)
        return Fleet(self.speed / factor, self.down_bandwidth / factor, self.up_bandwidth / factor, slow)
