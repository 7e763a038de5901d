"""Machines whose speed and bandwidth are log-normal: many alike, a long tail of slow and fast ones.

What measured fleets look like: Lai et al., ICML 2022 (FedScale), report inference times and throughputs of phones that
spread over an order of magnitude and more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.devices.fleet import Fleet, Floats, Population, check_positive, nobody, normals


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Draw each client's speed and bandwidths as median · exp(σ z), z standard normal.

    A client's two directions share one z: a bad link is bad both ways.

    Args:
        speed: median floating-point operations a second > 0.
        speed_sigma: σ ≥ 0 of speed; 0 makes all alike, 0.7 a factor of 10 between the 5th and the 95th percentile.
        down_bandwidth: median bytes a second > 0 towards the client.
        up_bandwidth: median bytes a second > 0 from the client.
        bandwidth_sigma: σ ≥ 0 of both bandwidths.

    Raises:
        ValueError: an argument out of its range.

    """

    speed: float = 5e9
    speed_sigma: float = 0.7
    down_bandwidth: float = 5e6
    up_bandwidth: float = 1e6
    bandwidth_sigma: float = 0.7

    def __post_init__(self) -> None:
        check_positive(
            "devices=lognormal", speed=self.speed, down_bandwidth=self.down_bandwidth, up_bandwidth=self.up_bandwidth
        )
        for name in ("speed_sigma", "bandwidth_sigma"):
            if not 0 <= getattr(self, name) < 20:  # e^20 is past what any fleet spreads over
                raise ValueError(f"{name} must be in [0, 20), got {getattr(self, name)}; 0 makes all clients alike")

    def __call__(self, population: Population, seed: int) -> Fleet:
        """Return the fleet (P,)."""
        num = len(population)
        speed: Floats = self.speed * np.exp(self.speed_sigma * normals(seed, "device/speed", num))  # (P,)
        link: Floats = np.exp(self.bandwidth_sigma * normals(seed, "device/bandwidth", num))  # (P,)
        return Fleet(speed, self.down_bandwidth * link, self.up_bandwidth * link, nobody(num))
