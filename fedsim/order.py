"""Order statistics of every column of updates (K, D): medians, trimmed means, means around the median.

Few rows are put in order by a network of comparators, each the minimum and the maximum of two rows, whatever the
values are: Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2 M), without the comparators and
the halves of comparators that nobody reads. It runs on blocks of columns that stay in a core's cache, allocates nothing
and needs no transpose, and does on an accelerator what it does on a CPU. Many rows are sorted, column by column.

A NaN is larger than every number, as in a sort. Minimum and maximum spread it over its column instead; columns of
a block where one shows are sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fedsim.mapped import Mapped, Rows, source_of
from fedsim.place import beside, blocks, each, threads_for
from fedsim.scripted import as_written

WIDTH = 1 << 15
"""Columns of a block on a CPU: rows of 96 KB: a call costs little beside its work, and fifty rows stay cached."""

SORT_WIDTH = 1 << 13
"""Columns of a block that is transposed and sorted."""

DEVICE_WIDTH = 1 << 20
"""Columns of a block on an accelerator."""

NETWORK = 100
"""The most rows that a network puts in order: beyond, NumPy's vectorised sort of transposed columns is faster."""

Comparator: TypeAlias = tuple[int, int, bool, bool]  # two wires; whether the smaller, the larger value is read on


# TorchScript, for two threads that ask Python's lock for each of some hundred small operations are slower than one.
_TEXT = """
def order(wires: List[Tensor], slots: List[Tensor], walked: List[int]) -> List[Tensor]:
    spare = slots[len(slots) - 1]
    for k in range(0, len(walked), 3):
        i = walked[k]
        j = walked[k + 1]
        low = wires[i]
        high = wires[j]
        if walked[k + 2] == 3:
            torch.minimum(low, high, out=spare)
            wires[j] = torch.maximum(low, high, out=slots[j])  # written before, it is `high` itself
            wires[i] = spare
            free = slots[i]
            slots[i] = spare
            spare = free
        elif walked[k + 2] == 1:
            wires[i] = torch.minimum(low, high, out=slots[i])
        else:
            wires[j] = torch.maximum(low, high, out=slots[j])
    return wires


def middle(ascending: List[Tensor]) -> Tensor:
    low = ascending[(len(ascending) - 1) // 2]
    return low / 2 + ascending[len(ascending) // 2] / 2  # the sum itself could overflow


def mean(rows: List[Tensor]) -> Tensor:
    share = 1.0 / len(rows)
    total = rows[0] * share
    for k in range(1, len(rows)):
        total.add_(rows[k], alpha=share)
    return total


def nearest(ascending: List[Tensor], kept: int) -> Tensor:
    # The `kept` rows nearest to the middle are a window of neighbours, which begins as the lowest. Its value of rank i
    # makes room for that of rank i + kept where the latter is nearer, and no sum ever holds a value that does not
    # count: it could be an attacker's.
    center = middle(ascending)
    window = ascending[:kept]
    for rank in range(kept, len(ascending)):
        low = window[rank % kept]
        high = ascending[rank]
        window[rank % kept] = torch.where(high - center < center - low, high, low)
    return mean(window)
"""


@cache
def _native() -> Any:
    return torch.jit.CompilationUnit(_TEXT)


class Statistic(NamedTuple):
    """What is made of a column's values of some ranks."""

    low: int  # the ranks low … high − 1, from 0
    high: int
    ordered: bool  # whether they are told apart
    finish: Callable[[Sequence[Tensor] | Tensor], Tensor]  # their rows (d,), which it must not write, to (d,)


def median(rows: Rows, chosen: Tensor | None = None) -> Tensor:
    """Return the medians (D,) of the columns of rows (K, D): the mean of the middle two for even K.

    Args:
        rows: (K, D).
        chosen: (K,) bool, the rows that count; None: all.

    """
    return _reduce(rows, _median, chosen)


def trimmed_mean(rows: Rows, trimmed: int, chosen: Tensor | None = None) -> Tensor:
    """Return the means (D,) of what is left of the columns of rows (K, D) without their extremes.

    Args:
        rows: (K, D).
        trimmed: f ≥ 0 values left out at either end, 2f < K.
        chosen: (K,) bool, the rows that count; None: all.

    """
    return _reduce(rows, lambda count: Statistic(trimmed, count - trimmed, False, _native().mean), chosen)


def mean_around_median(rows: Rows, kept: int, chosen: Tensor | None = None) -> Tensor:
    """Return the means (D,) of the values nearest to the medians of the columns of rows (K, D).

    Of two values that are equally near the lower counts.

    Args:
        rows: (K, D).
        kept: values that count, from 1 to K.
        chosen: (K,) bool, the rows that count; None: all.

    """
    return _reduce(rows, lambda count: Statistic(0, count, True, lambda x: _native().nearest(x, kept)), chosen)


def _median(count: int) -> Statistic:
    return Statistic((count - 1) // 2, count // 2 + 1, True, _native().middle)


# --- how they are put in order --------------------------------------------------------------------------------------


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
def flat_network(count: int, low: int, high: int, ordered: bool) -> list[int]:
    """Return a network as `order` walks it: two wires and 1 (smaller), 2 (larger) or 3 of each comparator."""
    comparators = network(count, low, high, ordered)
    return [number for i, j, smaller, larger in comparators for number in (i, j, smaller + 2 * larger)]


def _read(comparators: Sequence[tuple[int, int]], low: int, high: int) -> tuple[Comparator, ...]:
    """Return the comparators on which the wires low … high − 1 depend."""
    read, found = set(range(low, high)), []
    for i, j in reversed(comparators):
        if i in read or j in read:
            found.append((i, j, i in read, j in read))
            read |= {i, j}
    return tuple(reversed(found))


def _reduce(rows: Rows, statistic: Callable[[int], Statistic], chosen: Tensor | None) -> Tensor:
    """Return a statistic (D,) of the columns of rows (K, D): the same bits for any number of threads."""
    source = source_of(rows)
    result = beside(source).new_empty(source.shape[1])  # (D,)
    index = None if chosen is None else torch.nonzero(chosen.to(result.device)).flatten()  # (k,)
    count = len(rows) if index is None else len(index)
    ranks = statistic(count)
    on_cpu = result.device.type == "cpu"
    width = (WIDTH if count <= NETWORK else SORT_WIDTH) if on_cpu else DEVICE_WIDTH

    def fill(parts: Iterable[tuple[slice, Tensor]]) -> None:
        work = _Workspace(count, width, result)
        for columns, block in parts:
            values = rows.of(block) if isinstance(rows, Mapped) else block  # (K, d)
            result[columns] = work.statistic(values if index is None else values[index], ranks)

    threads = threads_for(result.device)
    parts = blocks(source, width)
    if threads < 2:
        fill(parts)
    else:
        listed = list(parts)
        each(fill, [listed[first::threads] for first in range(min(threads, len(listed)))], threads)
    return result


class _Workspace:
    """The memory in which one thread puts block after block in order."""

    def __init__(self, count: int, width: int, like: Tensor) -> None:
        self.memory = like.new_empty(0)
        self.count, self.width = count, width

    def statistic(self, values: Tensor, ranks: Statistic) -> Tensor:
        """Return a statistic (d,) of values (K, d)."""
        with as_written():
            if self.count <= NETWORK:
                result = ranks.finish(self.ordered(values, ranks))
                if not bool(result.sum().isnan()):
                    return result
            ascending = sort_columns(values, ranks.low, ranks.high)  # (k, d)
            return ranks.finish(list(ascending.contiguous() if ranks.ordered else ascending))

    def ordered(self, values: Tensor, ranks: Statistic) -> list[Tensor]:
        """Return the rows (d,) of the wanted ranks of values (K, d)."""
        if not len(self.memory):
            self.memory = self.memory.new_empty(self.count + 1, min(self.width, values.shape[1]))  # (K+1, d)
        walked = flat_network(self.count, ranks.low, ranks.high, ranks.ordered)
        wires: list[Tensor] = _native().order(list(values), list(self.memory[:, : values.shape[1]]), walked)
        return wires[ranks.low : ranks.high]


def sort_columns(values: Tensor, low: int, high: int) -> Tensor:
    """Return the rows (k, d) of the ranks low … high − 1 of the columns of values (K, d), a NaN above all numbers."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        columns = values.numpy().T.copy()  # (d, K) contiguous
        columns.sort(axis=1)  # NumPy sorts short contiguous rows with SIMD, twenty times torch's speed
        return torch.from_numpy(columns).T[low:high]
    return values.sort(dim=0).values[low:high]
