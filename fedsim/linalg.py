"""What rules share on a (K, D) matrix of updates: Gram matrices, combinations of rows, distances.

Spectral and distance rules need the rows' inner products alone, so they read the matrix twice (Gram, then
combination) whatever they do in between on K×K numbers. Sums run over fixed column blocks in a fixed order, so the
matrix may lie in the host's memory where its device has no room for it: see `fedsim.place`. A rule that goes through
these functions alone then works as it is; what they return is on the device (`beside`), matrices of updates are where
the given ones are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsim import place
from fedsim.mapped import Mapped, Rows, source_of
from fedsim.mapped import mapped as mapped
from fedsim.place import blocks, each, elsewhere, full_precision, threads_for
from fedsim.place import map_columns as map_columns
from fedsim.products import BLOCK, inner_products, square_distances_to

NOISE = 1e-3
"""Share of the squares in a difference of float32 products below which it is rounding noise, not a distance."""


def beside(updates: Rows) -> Tensor:
    """Return an empty tensor (0,) of the updates' dtype, on the device where what is computed of them is left."""
    return place.beside(source_of(updates))


def gram(updates: Rows, origin: Tensor | None = None) -> Tensor:
    """Return X Xᵀ (K, K) in float64 of updates X (K, D), or of their differences from an origin (D,).

    Products of float32 rows are taken in float32 and, where those would overflow or underflow, in float64. Those of
    differences follow from the rows' own and the origin's unless they all but cancel: then the rows are subtracted.
    """
    if origin is not None:
        return _gram_of_differences(updates, origin)
    return _mapped_gram(updates) if isinstance(updates, Mapped) else _gram(updates)


def _gram(updates: Tensor, origin: Tensor | None = None) -> Tensor:
    inner = inner_products(updates, origin=origin).rows  # (K, K)
    if updates.dtype == torch.float64 or updates.shape[1] == 0 or _normal(inner):
        return inner
    return inner_products(updates, torch.float64, origin=origin).rows


def _normal(inner: Tensor) -> bool:
    largest = inner.diagonal().amax()
    return bool(torch.isfinite(largest) & (largest > 1e-24))  # a row of norm 1e-12: its products are still normal


def _gram_of_differences(rows: Rows, origin: Tensor) -> Tensor:
    """Return ⟨x_i − v, x_j − v⟩ (K, K) of rows x (K, D), mapped or not, and v (D,)."""
    inner, cross, square = inner_products(source_of(rows), vector=origin)  # (K, K), (K,), ()
    trusted = rows.shape[1] > 0 and _normal(inner) and bool(torch.isfinite(square))
    reach = inner.diagonal() + square  # (K,)
    if isinstance(rows, Mapped):
        reach = _reach(rows.matrix, inner).square() + square  # (M,)
        inner, cross = rows.matrix @ inner @ rows.matrix.T, rows.matrix @ cross  # (M, M), (M,)
    moved = (inner + inner.T) / 2 - (cross[:, None] + cross) + square  # (M, M)
    if trusted and bool((moved.diagonal() >= NOISE * reach).all()):
        return moved
    return _gram(rows.written if isinstance(rows, Mapped) else rows, origin)


def _mapped_gram(rows: Mapped) -> Tensor:
    """Return M X Xᵀ Mᵀ (M, M). Where a row is far shorter than its terms, float32 products would be rounding noise."""

    def product(inner: Tensor) -> Tensor:
        outer = rows.matrix @ inner @ rows.matrix.T  # (M, M)
        return (outer + outer.T) / 2

    source = gram(rows.source)  # (K, K)
    result = product(source)
    trusted = result.diagonal() >= NOISE * _reach(rows.matrix, source).square()  # (M,)
    if rows.dtype == torch.float64 or bool(trusted.all()):
        return result
    return product(inner_products(rows.source, torch.float64).rows)


def _reach(by: Tensor, inner: Tensor) -> Tensor:
    """Return the norms (M,) that rows of M X had if all their terms pointed one way, of M (M, K) and X Xᵀ (K, K)."""
    return by.abs() @ inner.diagonal().clamp_min(0).sqrt()


def grams(updates: Tensor, columns: Sequence[slice]) -> Tensor:
    """Return the Gram matrices (L, K, K) in float64 of L column slices of updates (K, D)."""
    return torch.stack([gram(updates[:, part]) for part in columns])  # (L, K, K)


def combine(coefficients: Tensor, updates: Rows) -> Tensor:
    """Return Σ_k a_k x_k (D,) of coefficients a (K,) and updates (K, D), in the updates' precision."""
    if isinstance(updates, Mapped):
        return combine(coefficients.double() @ updates.matrix, updates.source)
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


def mean_of(weights: Tensor, updates: Rows) -> Tensor:
    """Return Σ_k p_k x_k (D,) with p = weights / Σ weights (K,)."""
    return combine(proportions(weights), updates)


def proportions(weights: Tensor, least: float = 0.0) -> Tensor:
    """Return weights / Σ weights (K,) in float64, none below `least` before a last normalisation."""
    share = weights.double() / weights.double().sum()  # (K,)
    return share if least == 0 else share.clamp_min(least) / share.clamp_min(least).sum()


def square_distances(updates: Rows) -> Tensor:
    """Return ‖x_i − x_j‖² (K, K) in float64 of updates (K, D), through their Gram matrix.

    Where float32 rows lie so close that the difference of their products is rounding noise, the products are
    taken in float64.
    """
    return _distances(*_products(updates))[0]


def products(updates: Rows) -> Tensor:
    """Return X Xᵀ (K, K) in float64 of updates X (K, D), of whose differences as much is left as of square distances.

    Of a point near a few short rows, what is far away is told in these: as a difference of square distances it would
    be rounding noise beside one row that is very long.
    """
    inner, by = _products(updates)
    return inner if by is None else by @ inner @ by.T


def _products(updates: Rows) -> tuple[Tensor, Tensor | None]:
    """Return the products (K, K) of the rows that are read, and the map of them, if there is one."""
    source, by = source_of(updates), updates.matrix if isinstance(updates, Mapped) else None
    inner = gram(source)
    if updates.dtype != torch.float64 and not bool(_distances(inner, by)[1]):
        inner = inner_products(source, torch.float64).rows
    return inner, by


def _distances(inner: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if by is not None:
        return _mapped_distances(inner, by)
    norms = inner.diagonal()  # (K,)
    total = norms[:, None] + norms[None, :]  # (K, K)
    # Symmetric to the bit, which BLAS does not promise of the Gram: Krum breaks exact ties of nearest pairs.
    distances = (total - (inner + inner.T)).clamp_min(0)  # (K, K)
    # which leaves three of float32's seven digits
    trusted = (distances >= NOISE * total).fill_diagonal_(True).all()
    return distances.fill_diagonal_(0), trusted


def _mapped_distances(inner: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of M X from X Xᵀ (K, K) and M (M, K): equal rows of M are at no distance, to the bit."""
    squares, _ = _distances(by @ inner @ by.T)  # (M, M)
    reach = _reach(by, inner)  # (M,)
    total = reach.square()[:, None] + reach.square()  # (M, M)
    kind = torch.unique(by, dim=0, return_inverse=True)[1]  # (M,)
    alike = kind[:, None] == kind  # (M, M)
    return squares.masked_fill(alike, 0), ((squares >= NOISE * total) | alike).all()


def distances_to(vector: Tensor, updates: Tensor) -> Tensor:
    """Return ‖x_k − v‖ (K,) in float64 of updates (K, D) and v (D,), whose squares may overflow or underflow."""
    squares = square_distances_to(vector, updates)  # (K,)
    for row in torch.nonzero(~(torch.isfinite(squares) & (squares > 1e-24))).flatten().tolist():
        squares[row] = square_distances_to(vector, updates[row : row + 1], torch.float64)[0]
    return squares.sqrt()


def largest_entry(updates: Tensor) -> Tensor:
    """Return the largest magnitude () of updates (K, D)."""
    return torch.stack([block.abs().amax() for _, block in blocks(updates, BLOCK)]).amax()


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


def row_norms(updates: Rows) -> Tensor:
    """Return ‖x_k‖ (K,) in float64 of updates (K, D), whose squares may overflow or underflow their precision."""
    if isinstance(updates, Mapped):
        if updates.by.dim() == 1:
            return updates.by.abs() * row_norms(updates.source)
        return gram(updates).diagonal().clamp_min(0).sqrt()
    squares = square_norms(updates).double()  # (K,)
    for row in torch.nonzero(~(torch.isfinite(squares) & (squares > 1e-24))).flatten().tolist():
        squares[row] = sum(block.double().square().sum() for _, block in blocks(updates[row : row + 1], BLOCK))
    return squares.sqrt()


def _squares(rows: Tensor) -> Tensor:
    return torch.stack([torch.dot(row, row) for row in rows])  # (k,)


def square_norms(updates: Rows) -> Tensor:
    """Return ‖x_k‖² (K,) of updates (K, D) in their own precision."""
    if isinstance(updates, Mapped):
        return row_norms(updates).square().to(updates.dtype)
    if elsewhere():
        total = beside(updates).new_zeros(len(updates))  # (K,)
        for _, block in blocks(updates, BLOCK):
            total += torch.linalg.vecdot(block, block)
        return total
    if updates.device.type == "cpu" and len(updates):  # vecdot writes all products first
        threads = threads_for(updates.device) if updates.shape[1] >= BLOCK else 1
        if threads < 2:
            return _squares(updates)  # (K,)
        some = -(-len(updates) // threads)  # whole rows: no sum hangs on how many threads there are
        return torch.cat(each(_squares, [updates[k : k + some] for k in range(0, len(updates), some)], threads))
    squares: Tensor = torch.linalg.vecdot(updates, updates)  # (K,)
    return squares


def finite_rows(updates: Tensor) -> Tensor:
    """Return which rows of updates (K, D) hold neither a NaN nor an infinity, (K,) bool.

    Row norms answer for all but overflowing rows: `isfinite` of the matrix costs three Gram products. A float64 row
    whose square norm overflows counts as infinite: no product or distance of it would be a number.
    """
    finite = torch.isfinite(square_norms(updates))  # (K,)
    if updates.dtype == torch.float64:
        return finite
    for row in torch.nonzero(~finite).flatten().tolist():
        finite[row] = all(bool(torch.isfinite(block).all()) for _, block in blocks(updates[row : row + 1], BLOCK))
    return finite
