"""A fleet: one machine a client, and what a device model may know of the clients when it hands them out.

A device model is called as `devices(population, seed) -> Fleet`, with the seed of `devices.seed`. Everything that is
drawn is keyed by (seed, purpose, client): a client's machine depends on no other client.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.rng import keyed_uniform

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


class Population(NamedTuple):
    """The clients as a device model sees them."""

    sizes: Int64  # (P,) training samples
    label_counts: Int64  # (P, C) training samples of each class

    def __len__(self) -> int:
        return len(self.sizes)


class Fleet(NamedTuple):
    """The clients' machines."""

    speed: Floats  # (P,) floating-point operations a second > 0
    down: Floats  # (P,) bytes a second > 0 towards the client
    up: Floats  # (P,) bytes a second > 0 from the client
    slow: Bools  # (P,) those that the model names as the slow ones

    def checked(self) -> Fleet:
        """Return itself.

        Raises:
            ValueError: a speed or a bandwidth that is not above 0 and finite.

        """
        for name in ("speed", "down", "up"):
            values = getattr(self, name)
            if not (np.isfinite(values).all() and (values > 0).all()):
                bad = int(np.flatnonzero(~(np.isfinite(values) & (values > 0)))[0])
                raise ValueError(f"a device's {name} must be > 0 and finite, got {values[bad]} for client {bad}")
        return self


def uniforms(seed: int, purpose: str, num: int) -> Floats:
    """Return u (num,) in [0, 1), one a client, keyed by (seed, purpose, client)."""
    return keyed_uniform(seed, purpose, np.arange(num))


def normals(seed: int, purpose: str, num: int) -> Floats:
    """Return standard normals (num,), one a client (Box and Muller, 1958)."""
    first, second = uniforms(seed, f"{purpose}/1", num), uniforms(seed, f"{purpose}/2", num)  # (num,)
    values: Floats = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)  # (num,)
    return values


def nobody(num: int) -> Bools:
    """Return False (num,)."""
    return np.zeros(num, dtype=bool)


def check_positive(who: str, **values: Any) -> None:
    """Refuse values that are not above 0 and finite."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be > 0 and finite in {who}, got {value}")
