"""What rules share on a (K, D) matrix of updates: Gram matrices, combinations of rows, distances.

Spectral and distance rules need the rows' inner products alone, so they read the matrix twice (Gram, then
combination) whatever they do in between on K×K numbers. Sums run over fixed column blocks in a fixed order, so the
matrix may lie in the host's memory where its device has no room for it: see `fedsim.place`. A rule that goes through
these functions alone then works as it is; what they return is on the device (`beside`), matrices of updates are where
the given ones are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedsim.place import beside as beside
from fedsim.place import blocks, elsewhere

BLOCK = 1 << 16
"""Columns that one matrix product sums in the updates' own precision; blocks are added up in float64."""

SORT_BLOCK = 1 << 13
"""Columns that are transposed and sorted at once, so that a block of fifty clients stays in a core's cache."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Do float32 matrix products in float32: TF32 keeps 10 bits, and a Gram matrix squares the loss."""
    before = torch.get_float32_matmul_precision() if device.type == "cuda" else "highest"
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gram(updates: Tensor, origin: Tensor | None = None) -> Tensor:
    """Return X Xᵀ (K, K) in float64 of updates X (K, D), or of their differences from an origin (D,).

    Products of float32 rows are taken in float32 and, where those would overflow or underflow, in float64.
    """
    inner = _gram(updates, None, origin)  # (K, K)
    if updates.dtype == torch.float64 or updates.shape[1] == 0:
        return inner
    largest = inner.diagonal().amax()
    if bool(torch.isfinite(largest) & (largest > 1e-24)):  # a row of norm 1e-12: its products are still normal
        return inner
    return _gram(updates, torch.float64, origin)


def _gram(updates: Tensor, dtype: torch.dtype | None = None, origin: Tensor | None = None) -> Tensor:
    home = beside(updates)
    total = home.new_zeros(len(updates), len(updates), dtype=torch.float64)  # (K, K)
    with full_precision(home.device):
        for columns, part in blocks(updates, BLOCK):
            block = part.to(dtype or part.dtype)
            if origin is not None:  # a block at a time: all the differences are another matrix
                block = block - origin[columns]
            total += (block @ block.T).double()
    return total


def grams(updates: Tensor, columns: Sequence[slice]) -> Tensor:
    """Return the Gram matrices (L, K, K) in float64 of L column slices of updates (K, D)."""
    return torch.stack([gram(updates[:, part]) for part in columns])  # (L, K, K)


def combine(coefficients: Tensor, updates: Tensor) -> Tensor:
    """Return Σ_k a_k x_k (D,) of coefficients a (K,) and updates (K, D), in the updates' precision."""
    home = beside(updates)
    a = coefficients.to(home)  # (K,)
    with full_precision(home.device):
        if not elsewhere():
            return a @ updates  # (D,)
        total = home.new_empty(updates.shape[1])  # (D,)
        for columns, block in blocks(updates, BLOCK):
            total[columns] = a @ block
        return total


def against(updates: Tensor, vectors: Tensor) -> Tensor:
    """Return X V (K, r) of updates X (K, D) and vectors V (D, r), or X v (K,) of v (D,), in the updates' precision."""
    home = beside(updates)
    with full_precision(home.device):
        if not elsewhere():
            return updates @ vectors  # (K, r)
        total = home.new_zeros(len(updates), *vectors.shape[1:])  # (K, r)
        for columns, block in blocks(updates, BLOCK):
            total += block @ vectors[columns].to(block)
        return total


def map_columns(updates: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Return the matrix (M, D) that a function makes of updates (K, D), column by column.

    Args:
        updates: (K, D).
        function: from a block (K, d) and its columns to (M, d).

    Returns:
        (M, D), where the updates are.

    """
    if not elsewhere():
        return function(updates, slice(0, updates.shape[1]))  # (M, D)
    result = updates.new_empty(0)
    for columns, block in blocks(updates, BLOCK):
        part = function(block, columns)  # (M, d)
        if not len(result):
            result = torch.empty(
                len(part), updates.shape[1], dtype=part.dtype, device=updates.device, pin_memory=updates.is_pinned()
            )  # (M, D)
        result[:, columns] = part
    return result


def mean_of(weights: Tensor, updates: Tensor) -> Tensor:
    """Return Σ_k p_k x_k (D,) with p = weights / Σ weights (K,)."""
    return combine(proportions(weights), updates)


def proportions(weights: Tensor, least: float = 0.0) -> Tensor:
    """Return weights / Σ weights (K,) in float64, none below `least` before a last normalisation."""
    share = weights.double() / weights.double().sum()  # (K,)
    return share if least == 0 else share.clamp_min(least) / share.clamp_min(least).sum()


def square_distances(updates: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖² (K, K) in float64 of updates (K, D), through their Gram matrix.

    Where float32 rows lie so close that the difference of their products is rounding noise, the products are
    taken in float64.
    """
    distances, trusted = _distances(gram(updates))
    if updates.dtype != torch.float64 and not bool(trusted):
        distances, _ = _distances(_gram(updates, torch.float64))
    return distances


def _distances(inner: Tensor) -> tuple[Tensor, Tensor]:
    norms = inner.diagonal()  # (K,)
    total = norms[:, None] + norms[None, :]  # (K, K)
    # Symmetric to the bit, which BLAS does not promise of the Gram: Krum breaks exact ties of nearest pairs.
    distances = (total - (inner + inner.T)).clamp_min(0)  # (K, K)
    # 1e-3 of the norms leaves three of float32's seven digits
    trusted = (distances >= 1e-3 * total).fill_diagonal_(True).all()
    return distances.fill_diagonal_(0), trusted


def largest_entry(updates: Tensor) -> Tensor:
    """Return the largest magnitude () of updates (K, D)."""
    return torch.stack([block.abs().amax() for _, block in blocks(updates, BLOCK)]).amax()


def reduce_columns(updates: Tensor, reduce: Callable[[Tensor], Tensor], rows: Tensor | slice = slice(None)) -> Tensor:
    """Apply a function of order statistics to every column of some rows of updates (K, D).

    Blocks of columns go to as many threads as torch has: the same bits for any number.

    Args:
        updates: (K, D).
        reduce: from (d, k), each row one coordinate's k values in ascending order, to (d,).
        rows: which of the K rows count, an index or a bool mask; all.

    Returns:
        (D,).

    """
    result = beside(updates).new_empty(updates.shape[1])  # (D,)
    if elsewhere():
        for columns, block in blocks(updates, SORT_BLOCK):
            result[columns] = reduce(_sorted(block[rows]))
        return result

    def fill(first: int) -> None:
        block = updates[:, first : first + SORT_BLOCK]
        result[first : first + SORT_BLOCK] = reduce(_sorted(block[rows]))

    starts = range(0, len(result), SORT_BLOCK)
    threads = min(len(starts), torch.get_num_threads()) if updates.device.type == "cpu" else 1
    if threads < 2:
        for first in starts:
            fill(first)
        return result
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(fill, starts))  # the list raises what a thread has raised
    return result


def _sorted(block: Tensor) -> Tensor:
    if block.device.type == "cpu" and block.dtype in (torch.float32, torch.float64):
        columns = block.numpy().T.copy()  # (d, k) contiguous
        columns.sort(axis=1)  # NumPy sorts short contiguous rows with SIMD, twenty times torch's speed
        return torch.from_numpy(columns)
    return block.T.contiguous().sort(dim=1).values  # (d, k)


class _Dot(torch.autograd.Function):
    """The inner product as one that `vmap` hands over row by row; its own rule for `@` is twenty times slower."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.dot(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grads[0] * b, grads[0] * a

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        a, b = (x if dim is None else x.movedim(dim, 0) for x, dim in zip((a, b), in_dims, strict=True))
        if a.dim() != b.dim():
            return (a @ b if a.dim() == 2 else b @ a), 0  # (R,)
        if a.device.type == "cpu":
            return torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)]), 0  # (R,)
        return torch.linalg.vecdot(a, b), 0  # (R,)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ⟨a, b⟩ () of two tensors of one shape; as fast under `torch.func.vmap` as alone."""
    if not torch._C._are_functorch_transforms_active():  # `apply` costs more than a layer's product
        return torch.dot(a, b) if a.dim() == b.dim() == 1 else torch.dot(a.flatten(), b.flatten())
    product: Tensor = _Dot.apply(a.flatten(), b.flatten())  # type: ignore[no-untyped-call]
    return product


def row_norms(updates: Tensor) -> Tensor:
    """Return ‖x_k‖ (K,) in float64 of updates (K, D), whose squares may overflow or underflow their precision."""
    squares = square_norms(updates).double()  # (K,)
    for row in torch.nonzero(~(torch.isfinite(squares) & (squares > 1e-24))).flatten().tolist():
        squares[row] = sum(block.double().square().sum() for _, block in blocks(updates[row : row + 1], BLOCK))
    return squares.sqrt()


def square_norms(updates: Tensor) -> Tensor:
    """Return ‖x_k‖² (K,) of updates (K, D) in their own precision."""
    if elsewhere():
        total = beside(updates).new_zeros(len(updates))  # (K,)
        for _, block in blocks(updates, BLOCK):
            total += torch.linalg.vecdot(block, block)
        return total
    if updates.device.type == "cpu" and len(updates):
        return torch.stack([torch.dot(row, row) for row in updates])  # (K,) vecdot writes all products first
    squares: Tensor = torch.linalg.vecdot(updates, updates)  # (K,)
    return squares


def finite_rows(updates: Tensor) -> Tensor:
    """Return which rows of updates (K, D) hold neither a NaN nor an infinity, (K,) bool.

    Row norms answer for all but overflowing rows: `isfinite` of the matrix costs three Gram products.
    """
    finite = torch.isfinite(square_norms(updates))  # (K,)
    for row in torch.nonzero(~finite).flatten().tolist():
        finite[row] = all(bool(torch.isfinite(block).all()) for _, block in blocks(updates[row : row + 1], BLOCK))
    return finite


def middle(columns: Tensor) -> Tensor:
    """Return the medians (d,) of sorted columns (d, K): the mean of the middle two for even K."""
    count = columns.shape[1]
    low, high = columns[:, (count - 1) // 2], columns[:, count // 2]  # (d,)
    return low / 2 + high / 2  # the sum itself could overflow


def mean_around_median(columns: Tensor, kept: int) -> Tensor:
    """Return the means (d,) of the `kept` values nearest to the median, of sorted columns (d, K).

    Those values are a window of the sorted ones: that whose farther end is nearest, the lower of two such.
    """
    count = columns.shape[1]
    median = middle(columns)[:, None]  # (d, 1)
    below = median - columns[:, : count - kept + 1]  # (d, f+1) distance of each window's lower end
    above = columns[:, kept - 1 :] - median  # (d, f+1) and of its upper end
    first = below.maximum(above).argmin(1, keepdim=True)  # (d, 1)
    return window_means(columns, kept).gather(1, first)[:, 0]


def window_means(columns: Tensor, length: int) -> Tensor:
    """Return the means (d, K − length + 1) of all runs of `length` neighbours in columns (d, K).

    One product with a banded matrix: running sums would carry an attacker's huge value into every later window.
    """
    count = columns.shape[1]
    position = torch.arange(count, device=columns.device)  # (K,)
    start = position[: count - length + 1]  # (K − length + 1,)
    band = (position[:, None] >= start) & (position[:, None] < start + length)  # (K, K − length + 1)
    with full_precision(columns.device):
        return columns @ (band.to(columns) / length)
