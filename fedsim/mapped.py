"""Rows that are a linear map of others, M X: neighbourhood means, buckets, clipped updates.

They are not written. What sums over columns follows from X's own sums (`combine(a, M X)` is `combine(aM, X)`, a Gram
matrix is M G Mᵀ), what goes column by column is mapped a block at a time, in the core's cache. `fedsim.linalg` and
`fedsim.order` take them wherever they take a matrix; `Cohort.rows` writes them out for whoever wants a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from fedsim.place import blocks, each, elsewhere, empty, map_columns, threads_for
from fedsim.products import one_thread_a_product, times

WIDTH = 1 << 15
"""Columns of a block whose rows are written: fifty of them stay in a cache, and a call costs little beside it."""


@dataclass(frozen=True, eq=False)
class Mapped:
    """The matrix M X (M, D) of updates X (K, D).

    Args:
        by: M (M, K), or the factors (K,) of a diagonal one, in float64.
        source: X (K, D).

    """

    by: Tensor
    source: Tensor

    def __len__(self) -> int:
        return len(self.by)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D)."""
        return len(self.by), self.source.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The source's."""
        return self.source.dtype

    @cached_property
    def matrix(self) -> Tensor:
        """M (M, K)."""
        return self.by if self.by.dim() == 2 else self.by.diag()

    def of(self, block: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M B (M, d), a tensor of its own or `out`, of a block B (K, d) of the source's columns.

        On a CPU within `fedsim.products.one_thread_a_product`.
        """
        by = self.by.to(block)
        return torch.mul(block, by[:, None], out=out) if by.dim() == 1 else times(by, block, out)

    @cached_property
    def written(self) -> Tensor:
        """M X (M, D) as a tensor, where the source is."""
        if elsewhere() or self.source.device.type != "cpu":
            return map_columns(self.source, lambda block, _: self.of(block))
        result = empty(len(self), self.source)  # (M, D)
        parts = list(blocks(self.source, WIDTH))
        with one_thread_a_product(self.source.device):
            each(lambda part: self.of(part[1], result[:, part[0]]), parts, threads_for(self.source.device))
        return result


Rows: TypeAlias = Tensor | Mapped
"""A (K, D) matrix of updates, or a map of one."""


def mapped(by: Tensor, rows: Rows) -> Mapped:
    """Return M X of M (M, K), or of the factors (K,) of a diagonal one, and X (K, D), which may be mapped itself."""
    by = by.double()
    if isinstance(rows, Tensor):
        return Mapped(by, rows)
    if rows.by.dim() == 1:
        return Mapped(by * rows.by, rows.source)  # (K,), or the columns of (M, K)
    return Mapped(by[:, None] * rows.by if by.dim() == 1 else by @ rows.by, rows.source)


def source_of(rows: Rows) -> Tensor:
    """Return the tensor (K, D) that rows are read from."""
    return rows.source if isinstance(rows, Mapped) else rows


def taken(rows: Rows, chosen: Tensor) -> Rows:
    """Return some rows: those of an int64 index or of a bool mask (K,)."""
    if isinstance(rows, Tensor):
        return rows[chosen.to(rows.device)]
    return Mapped(rows.matrix[chosen.to(rows.by.device)], rows.source)
