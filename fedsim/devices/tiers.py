"""Machines of a few kinds: phones of three generations, sensors and servers.

Chai et al., HPDC 2020 (TiFL), assign clients to five groups of equal size by CPU share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.devices.fleet import Fleet, Floats, Population, check_positive, uniforms


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """Give each client one of a few kinds of machine.

    Args:
        speeds: floating-point operations a second > 0 of each tier.
        fractions: share ≥ 0 of the clients in each tier; they sum to 1. Shares are probabilities: a client's tier
            depends on no other client's.
        down_bandwidths: bytes a second > 0 towards the client, one a tier.
        up_bandwidths: bytes a second > 0 from the client, one a tier.

    The clients of the tier of lowest speed are the slow ones.

    Raises:
        ValueError: lists of different lengths, or a value out of its range.

    """

    speeds: tuple[float, ...] = (1e10, 3e9, 5e8)
    fractions: tuple[float, ...] = (0.3, 0.5, 0.2)
    down_bandwidths: tuple[float, ...] = (1e7, 5e6, 1e6)
    up_bandwidths: tuple[float, ...] = (2.5e6, 1e6, 2.5e5)

    def __post_init__(self) -> None:
        for name in ("fractions", "down_bandwidths", "up_bandwidths"):
            if len(getattr(self, name)) != len(self.speeds) or not self.speeds:
                raise ValueError(
                    f"{name} must have one value a tier, as speeds has ({len(self.speeds)}), got {getattr(self, name)}"
                )
        for name in ("speeds", "down_bandwidths", "up_bandwidths"):
            for value in getattr(self, name):
                check_positive("devices=tiers", **{name: value})
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be >= 0 and sum to 1, got {list(self.fractions)}")

    def __call__(self, population: Population, seed: int) -> Fleet:
        """Return the fleet (P,)."""
        bounds = np.cumsum(self.fractions)[:-1]  # (T−1,)
        tier = np.searchsorted(bounds, uniforms(seed, "device/tier", len(population)), side="right")  # (P,)

        def of(values: tuple[float, ...]) -> Floats:
            return np.asarray(values, dtype=np.float64)[tier]  # (P,)

        return Fleet(
            of(self.speeds), of(self.down_bandwidths), of(self.up_bandwidths), tier == int(np.argmin(self.speeds))
        )
