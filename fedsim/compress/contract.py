"""What a compressor is given and what it gives back.

A compressor is a frozen dataclass, called once a round on all updates of a cohort; it returns them as the server
decodes them, and says what an encoded one weighs. Optional members, found by name:

    init_client(layout) -> {name: Tensor}     what a client keeps between its rounds, before its first; {} if absent
    contraction(size) -> float | None         a in (0, 1] with E‖C(v) − v‖² ≤ (1 − a) ‖v‖² for v (size,); None: there
                                              is none, and feedback of the error would diverge
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from fedsim.contracts import State


class Senders(NamedTuple):
    """Whose updates are compressed."""

    clients: Tensor  # (K,) int64 ids, ascending
    keys: Tensor  # (K,) int64: randomness of (seed, round, client)
    num_clients: int  # all that can be sampled


class Compressor(Protocol):
    """Makes updates lighter."""

    def __call__(self, rows: Tensor, senders: Senders, state: State) -> tuple[Tensor, State]:
        """Return the updates as they are decoded (K, D), and what the senders keep, name → (K, …).

        Args:
            rows: (K, D) updates; not written to.
            senders: whose they are.
            state: name → (K, …) what they kept.

        """
        ...

    def num_bytes(self, size: int, itemsize: int) -> int:
        """Return the bytes of one encoded update of `size` numbers of `itemsize` bytes."""
        ...


def packed(bits: int) -> int:
    """Return the bytes that hold so many bits."""
    return (bits + 7) // 8


def index_bits(size: int) -> int:
    """Return the bits of a position in range(size), ⌈log₂ size⌉."""
    return (size - 1).bit_length()


def num_kept(fraction: float, size: int) -> int:
    """Return how many of `size` numbers a fraction keeps, halves upward, at least one."""
    return max(1, min(size, int(fraction * size + 0.5)))


def check_fraction(fraction: float) -> None:
    """Refuse a share outside (0, 1].

    Raises:
        ValueError: it is.

    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], the share of the coordinates sent, got {fraction}")


def contraction(compressor: Compressor, size: int) -> float | None:
    """Return a compressor's contraction for vectors (size,), None where it has none or does not say."""
    own = getattr(compressor, "contraction", None)
    return None if own is None else own(size)
