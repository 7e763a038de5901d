"""Order statistics of every column of updates (K, D): medians, trimmed means, means around the median.

Few rows are put in order by a network of comparators (`fedsim.networks`), each the minimum and the maximum of two
rows. It runs on blocks of columns that stay in a core's cache, allocates nothing and needs no transpose, and does on an
accelerator what it does on a CPU, where `fedsim.compiled` may have made machine code of it, with the same bits. Many
rows are sorted, column by column.

A NaN is larger than every number, as in a sort. Minimum and maximum spread it over its column instead; columns of
a block where one shows are sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedsim.compiled import Machine, machine, shares
from fedsim.mapped import Mapped, Rows, source_of
from fedsim.networks import Statistic, walked
from fedsim.place import beside, blocks, each, threads_for
from fedsim.products import one_thread_a_product
from fedsim.scripted import as_written

WIDTH = 1 << 15
"""Columns of a block on a CPU: rows of 96 KB: a call costs little beside its work, and fifty rows stay cached."""

SORT_WIDTH = 1 << 13
"""Columns of a block that is transposed and sorted."""

DEVICE_WIDTH = 1 << 20
"""Columns of a block on an accelerator."""

NETWORK = 100
"""The most rows that a network puts in order: beyond, NumPy's vectorised sort of transposed columns is faster."""


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
    return (low / 2 + ascending[len(ascending) // 2] / 2).add_(0.0)  # the sum itself could overflow; no −0


def mean(rows: List[Tensor], scale: float, rest: float) -> Tensor:
    total = rows[0] * scale
    for k in range(1, len(rows)):
        total.add_(rows[k], alpha=scale)
    return total.mul_(rest).add_(0.0)


def nearest(ascending: List[Tensor], kept: int, scale: float, rest: float) -> Tensor:
    # The `kept` rows nearest to the middle are a window of neighbours, which begins as the lowest. Its value of rank i
    # makes room for that of rank i + kept where the latter is nearer, and no sum ever holds a value that does not
    # count: it could be an attacker's.
    center = middle(ascending)
    window = ascending[:kept]
    for rank in range(kept, len(ascending)):
        low = window[rank % kept]
        high = ascending[rank]
        window[rank % kept] = torch.where(high - center < center - low, high, low)
    return mean(window, scale, rest)
"""


@cache
def _native() -> Any:
    return torch.jit.CompilationUnit(_TEXT)


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
    return _reduce(rows, lambda count: Statistic(count, trimmed, count - trimmed, False, "mean"), chosen)


def mean_around_median(rows: Rows, kept: int, chosen: Tensor | None = None) -> Tensor:
    """Return the means (D,) of the values nearest to the medians of the columns of rows (K, D).

    Of two values that are equally near the lower counts.

    Args:
        rows: (K, D).
        kept: values that count, from 1 to K.
        chosen: (K,) bool, the rows that count; None: all.

    """
    return _reduce(rows, lambda count: Statistic(count, 0, count, True, "nearest", kept), chosen)


def _median(count: int) -> Statistic:
    return Statistic(count, (count - 1) // 2, count // 2 + 1, True, "middle")


# --- how they are put in order --------------------------------------------------------------------------------------


def _reduce(rows: Rows, statistic: Callable[[int], Statistic], chosen: Tensor | None) -> Tensor:
    """Return a statistic (D,) of the columns of rows (K, D): the same bits for any number of threads."""
    source = source_of(rows)
    result = beside(source).new_empty(source.shape[1])  # (D,)
    index = None if chosen is None else torch.nonzero(chosen.to(result.device)).flatten()  # (k,)
    wanted = statistic(len(rows) if index is None else len(index))
    few, on_cpu = wanted.num_rows <= NETWORK, result.device.type == "cpu"
    width = (WIDTH if few else SORT_WIDTH) if on_cpu else DEVICE_WIDTH
    code = machine(wanted, result.dtype, len(result)) if few and on_cpu and source.stride(1) == 1 else None

    def fill(parts: Iterable[tuple[slice, Tensor]]) -> None:
        work = _Workspace(wanted, width, code)
        for columns, block in parts:
            work.reduce(work.mapped(rows, block), index, result[columns])

    threads = threads_for(result.device)
    parts = blocks(source, width)
    multiplied = isinstance(rows, Mapped) and rows.by.dim() == 2
    with one_thread_a_product(result.device) if multiplied else nullcontext():
        if threads < 2:
            fill(parts)
        else:
            listed = list(parts)
            each(fill, [listed[first::threads] for first in range(min(threads, len(listed)))], threads)
    return result


class _Workspace:
    """The memory in which one thread makes a statistic of block after block."""

    def __init__(self, statistic: Statistic, width: int, code: Machine | None) -> None:
        self.statistic, self.width, self.code = statistic, width, code
        self.written: Tensor | None = None  # (M, d) mapped rows
        self.wires: Tensor | None = None  # (K+1, d)

    def mapped(self, rows: Rows, block: Tensor) -> Tensor:
        """Return the rows (M, d) of a block (K, d) of their source."""
        if not isinstance(rows, Mapped):
            return block
        if self.written is None:
            self.written = block.new_empty(len(rows), min(self.width, block.shape[1]))
        return rows.of(block, out=self.written[:, : block.shape[1]])

    def reduce(self, values: Tensor, index: Tensor | None, out: Tensor) -> None:
        """Write the statistic of values (K, d), or of some rows (k,), to `out` (d,)."""
        with as_written():
            if self.code is not None and len(out) >= self.code.lanes:
                rows = torch.arange(len(values)) if index is None else index  # (k,)
                self.code(values, rows * values.stride(0), out)
                if not bool(out.sum().isnan()):
                    return
                values = values if index is None else values[index]
            else:
                values = values if index is None else values[index]
                if self.statistic.num_rows <= NETWORK:
                    out.copy_(self.finished(self.ordered(values)))
                    if not bool(out.sum().isnan()):
                        return
            ascending = sort_columns(values, self.statistic.low, self.statistic.high)  # (k, d)
            out.copy_(self.finished(list(ascending.contiguous() if self.statistic.ordered else ascending)))

    def ordered(self, values: Tensor) -> list[Tensor]:
        """Return the rows (d,) of the wanted ranks of values (K, d)."""
        if self.wires is None:
            self.wires = values.new_empty(len(values) + 1, min(self.width, values.shape[1]))
        slots = list(self.wires[:, : values.shape[1]])
        wires: list[Tensor] = _native().order(list(values), slots, walked(self.statistic))
        return wires[self.statistic.low : self.statistic.high]

    def finished(self, rows: list[Tensor]) -> Tensor:
        """Return what is made (d,) of the rows (d,) of the wanted ranks."""
        if self.statistic.finish == "middle":
            result: Tensor = _native().middle(rows)
        elif self.statistic.finish == "mean":
            result = _native().mean(rows, *shares(len(rows)))
        else:
            kept = self.statistic.kept
            result = _native().nearest(rows, kept, *shares(kept))
        return result


def sort_columns(values: Tensor, low: int, high: int) -> Tensor:
    """Return the rows (k, d) of the ranks low … high − 1 of the columns of values (K, d), a NaN above all numbers."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        columns = values.numpy().T.copy()  # (d, K) contiguous
        columns.sort(axis=1)  # NumPy sorts short contiguous rows with SIMD, twenty times torch's speed
        return torch.from_numpy(columns).T[low:high]
    return values.sort(dim=0).values[low:high]
