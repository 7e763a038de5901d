"""Sorting networks: which comparators put the wires of a column in order, whatever the values are.

Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2 M), without the comparators and the halves of
comparators that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

Comparator: TypeAlias = tuple[int, int, bool, bool]  # two wires; whether the smaller, the larger value is read on


class Statistic(NamedTuple):
    """What is made of the values in a column: of `num_rows` values those of the ranks low … high − 1, from 0."""

    num_rows: int
    low: int
    high: int
    ordered: bool  # whether the ranks are told apart
    finish: str  # the function of `fedsim.order` that their rows (d,) are given to: "middle", "mean" or "nearest"
    kept: int = 0  # of "nearest"

    @property
    def comparators(self) -> tuple[Comparator, ...]:
        """The network that finds the ranks."""
        return network(self.num_rows, self.low, self.high, self.ordered)


def merge_exchange(first: int, count: int) -> list[tuple[int, int]]:
    """Return the comparators that put the wires first … first + count − 1 in ascending order."""
    comparators = []
    levels = max(0, (count - 1).bit_length())
    for p in (1 << level for level in reversed(range(levels))):
        q, r, d = 1 << (levels - 1), 0, p
        while True:
            comparators += [(first + i, first + i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
    return comparators


@lru_cache(maxsize=256)
def network(count: int, low: int, high: int, ordered: bool) -> tuple[Comparator, ...]:
    """Return the comparators that bring the values of some ranks to the wires of those numbers.

    Args:
        count: K ≥ 1 wires.
        low: the least rank, from 0.
        high: one more than the largest.
        ordered: whether each value has to be on the wire of its rank, or all of them on those wires in any order.

    Returns:
        Which wires, the smaller value to the first; and which of the two values is read later.

    """
    whole = _read(merge_exchange(0, count), low, high)
    half = count // 2
    if ordered or low != count - high or not 0 < 2 * low <= half:
        return whole
    # Of two halves in order, the f smallest values are the smaller ones of one half's least f against the other's,
    # taken from the other end; so with the largest. Nobody needs the order of the rest.
    parted = merge_exchange(0, half) + merge_exchange(half, count - half)
    parted += [(i, half + low - 1 - i) for i in range(low)]
    parted += [(half - 1 - i, count - low + i) for i in range(low)]
    return min(whole, _read(parted, low, high), key=lambda comparators: sum(a + b for _, _, a, b in comparators))


@lru_cache(maxsize=256)
def walked(statistic: Statistic) -> list[int]:
    """Return a statistic's network as `order` walks it: two wires and 1 (smaller), 2 (larger) or 3 a comparator."""
    return [number for i, j, smaller, larger in statistic.comparators for number in (i, j, smaller + 2 * larger)]


def _read(comparators: Sequence[tuple[int, int]], low: int, high: int) -> tuple[Comparator, ...]:
    """Return the comparators on which the wires low … high − 1 depend."""
    read, found = set(range(low, high)), []
    for i, j in reversed(comparators):
        if i in read or j in read:
            found.append((i, j, i in read, j in read))
            read |= {i, j}
    return tuple(reversed(found))
