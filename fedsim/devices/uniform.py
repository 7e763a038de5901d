"""Machines whose speed and bandwidth are uniform in a range."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.devices.fleet import Fleet, Floats, Population, check_positive, nobody, uniforms


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Draw each client's speed and bandwidths uniformly from low … high; equal bounds make all clients alike.

    Args:
        speed: (low, high) floating-point operations a second, 0 < low ≤ high.
        down_bandwidth: (low, high) bytes a second towards the client.
        up_bandwidth: (low, high) bytes a second from the client.

    Raises:
        ValueError: a range that is empty or not above 0.

    """

    speed: tuple[float, float] = (1e9, 1e10)
    down_bandwidth: tuple[float, float] = (1e6, 1e7)
    up_bandwidth: tuple[float, float] = (2.5e5, 2.5e6)

    def __post_init__(self) -> None:
        for name in ("speed", "down_bandwidth", "up_bandwidth"):
            low, high = getattr(self, name)
            check_positive("devices=uniform", **{name: low})
            if not low <= high < float("inf"):
                raise ValueError(f"{name} must be [low, high] with low <= high, got [{low}, {high}]")

    def __call__(self, population: Population, seed: int) -> Fleet:
        """Return the fleet (P,)."""

        def draw(name: str) -> Floats:
            low, high = getattr(self, name)
            values: Floats = low + (high - low) * uniforms(seed, f"device/{name}", len(population))  # (P,)
            return values

        return Fleet(draw("speed"), draw("down_bandwidth"), draw("up_bandwidth"), nobody(len(population)))
