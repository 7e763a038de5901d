"""What rules share on a (K, D) matrix of updates: Gram matrices, combinations of rows, distances.

Spectral and distance rules need the rows' inner products alone, so they read the matrix twice (Gram, then
combination) whatever they do in between on K×K numbers. Sums run over fixed column blocks in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 1 << 16
"""Columns that one matrix product sums in the updates' own precision; blocks are added up in float64."""


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


def gram(updates: Tensor) -> Tensor:
    """Return X Xᵀ (K, K) in float64 of updates X (K, D).

    Products of float32 rows are taken in float32 and, where those would overflow or underflow, in float64.
    """
    inner = _gram(updates)  # (K, K)
    if updates.dtype == torch.float64 or updates.shape[1] == 0:
        return inner
    largest = inner.diagonal().amax()
    if bool(torch.isfinite(largest) & (largest > 1e-24)):  # a row of norm 1e-12: its products are still normal
        return inner
    return _gram(updates.double())


def _gram(updates: Tensor) -> Tensor:
    total = updates.new_zeros(len(updates), len(updates), dtype=torch.float64)  # (K, K)
    with full_precision(updates.device):
        for block in torch.split(updates, BLOCK, dim=1):
            total += (block @ block.T).double()
    return total


def grams(updates: Tensor, columns: Sequence[slice]) -> Tensor:
    """Return the Gram matrices (L, K, K) in float64 of L column slices of updates (K, D)."""
    return torch.stack([gram(updates[:, part]) for part in columns])  # (L, K, K)


def combine(coefficients: Tensor, updates: Tensor) -> Tensor:
    """Return Σ_k a_k x_k (D,) of coefficients a (K,) and updates (K, D), in the updates' precision."""
    with full_precision(updates.device):
        return coefficients.to(updates) @ updates  # (D,)


def mean_of(weights: Tensor, updates: Tensor) -> Tensor:
    """Return Σ_k p_k x_k (D,) with p = weights / Σ weights (K,)."""
    return combine(proportions(weights), updates)


def proportions(weights: Tensor) -> Tensor:
    """Return weights / Σ weights (K,) in float64."""
    return weights.double() / weights.double().sum()


def square_distances(inner: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖² (K, K) from a Gram matrix (K, K); ≥ 0, symmetric, with a diagonal of zeros."""
    norms = inner.diagonal()  # (K,)
    distances = (norms[:, None] + norms[None, :] - 2 * inner).clamp_min(0)  # (K, K)
    # eigh and BLAS leave the Gram symmetric only up to the order of their sums.
    return ((distances + distances.T) / 2).fill_diagonal_(0)


def finite_rows(updates: Tensor) -> Tensor:
    """Return which rows of updates (K, D) hold neither a NaN nor an infinity, (K,) bool.

    Row norms answer for all but overflowing rows: `isfinite` of the matrix costs three Gram products.
    """
    finite = torch.isfinite(torch.linalg.vecdot(updates, updates))  # (K,)
    for row in torch.nonzero(~finite).flatten().tolist():
        finite[row] = torch.isfinite(updates[row]).all()
    return finite
