"""Products of a (K, D) matrix of updates by column blocks: inner products of rows, and linear maps of a block.

On a CPU NumPy's BLAS does them: it takes half of a product with itself, torch's all, and a block's products are one
call, since threads that come back to Python for each wait for one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from fedsim.place import beside, blocks, each, full_precision, threads_for

BLOCK = 1 << 16
"""Columns of a block, whose sums are added up in float64."""

PRODUCT = 1 << 12
"""Columns that one product sums in the updates' own precision on a CPU: fifty rows of them are nearly cached."""


class Inner(NamedTuple):
    """Inner products in float64."""

    rows: Tensor  # (K, K) of rows with one another
    cross: Tensor  # (K,) of rows with a vector
    square: Tensor  # () of the vector with itself


def by_numpy(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether NumPy does products of a device's tensors."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)


def inner_products(
    updates: Tensor, dtype: torch.dtype | None = None, *, vector: Tensor | None = None, origin: Tensor | None = None
) -> Inner:
    """Return the inner products of rows (K, D) with one another and with a vector, summed in fixed blocks.

    Args:
        updates: (K, D).
        dtype: of the products; None: the updates'.
        vector: (D,) on the device; None: 0.
        origin: (D,) on the device, which is taken from the rows first; None: 0.

    """
    home = beside(updates)
    dtype = dtype or updates.dtype
    products = _by_numpy if by_numpy(home.device, dtype) else _by_torch

    def part(given: tuple[slice, Tensor]) -> Tensor:
        columns, block = given
        rows = block.to(dtype)  # (K, d)
        if origin is not None:
            rows = rows - origin[columns].to(dtype)
        return products(rows, None if vector is None else vector[columns].to(dtype))

    total = home.new_zeros(len(updates) + 1, len(updates) + 1, dtype=torch.float64)  # (K + 1, K + 1)
    with full_precision(home.device), one_thread_a_product(home.device):
        threads = threads_for(home.device)
        parts = blocks(updates, BLOCK)
        for found in each(part, list(parts), threads) if threads > 1 else map(part, parts):
            total += found
    return Inner(total[:-1, :-1], total[:-1, -1], total[-1, -1])


def _by_torch(rows: Tensor, vector: Tensor | None) -> Tensor:
    total = rows.new_zeros(len(rows) + 1, len(rows) + 1)
    total[:-1, :-1] = rows @ rows.T
    if vector is not None:
        total[:-1, -1], total[-1, -1] = rows @ vector, vector @ vector
    return total.double()  # (K + 1, K + 1)


def _by_numpy(rows: Tensor, vector: Tensor | None) -> Tensor:
    x, v = rows.numpy(), None if vector is None else vector.numpy()  # (K, d), (d,)
    total = np.zeros((len(x) + 1, len(x) + 1))
    number = x.shape[1] // PRODUCT
    first = number * PRODUCT
    with np.errstate(all="ignore"):  # what overflows is infinite, as in torch
        if number:
            row, column = x.strides
            parts = as_strided(x, (number, len(x), PRODUCT), (PRODUCT * column, row, column))  # (n, K, w)
            total[:-1, :-1] = np.matmul(parts, parts.transpose(0, 2, 1)).sum(0, dtype=np.float64)
            if v is not None:
                of_v = v[:first].reshape(number, PRODUCT, 1)
                total[:-1, -1] = np.matmul(parts, of_v).sum(0, dtype=np.float64)[:, 0]
                total[-1, -1] = np.matmul(of_v.transpose(0, 2, 1), of_v).sum(dtype=np.float64)
        if first < x.shape[1]:
            rest = x[:, first:]
            total[:-1, :-1] += rest @ rest.T
            if v is not None:
                total[:-1, -1] += rest @ v[first:]
                total[-1, -1] += v[first:] @ v[first:]
    return torch.from_numpy(total)


def square_distances_to(vector: Tensor, updates: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ‖x_k − v‖² (K,) in float64 of rows (K, D) and v (D,) on the device, in one read.

    Args:
        vector: (D,) on the device.
        updates: (K, D).
        dtype: of the differences; None: the updates'.

    """
    home = beside(updates)
    dtype = dtype or updates.dtype

    def part(given: tuple[slice, Tensor]) -> Tensor:
        columns, block = given
        total = home.new_zeros(len(updates), dtype=torch.float64)  # (K,)
        memory = home.new_empty(len(updates), min(PRODUCT, block.shape[1]), dtype=dtype)
        for first in range(0, block.shape[1], PRODUCT):
            x, v = block[:, first : first + PRODUCT].to(dtype), vector[columns][first : first + PRODUCT].to(dtype)
            away = torch.sub(x, v, out=memory[:, : len(v)])  # (K, d)
            if not by_numpy(home.device, dtype):
                total += torch.linalg.vecdot(away, away)
                continue
            values = away.numpy()
            with np.errstate(all="ignore"):
                total += torch.from_numpy(np.matmul(values[:, None, :], values[:, :, None])[:, 0, 0])
        return total

    with one_thread_a_product(home.device):
        parts = list(blocks(updates, BLOCK))
        return sum(each(part, parts, threads_for(home.device)), home.new_zeros(len(updates), dtype=torch.float64))


def times(matrix: Tensor, block: Tensor, out: Tensor | None = None) -> Tensor:
    """Return M B (M, d) of M (M, K) and a block B (K, d), within `one_thread_a_product`."""
    if not by_numpy(block.device, block.dtype):
        with full_precision(block.device):
            return torch.mm(matrix, block, out=out)
    with np.errstate(all="ignore"):
        product = np.matmul(matrix.numpy(), block.numpy(), out=None if out is None else out.numpy())
    return torch.from_numpy(product) if out is None else out


_threads = Lock()


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController  # looks through the libraries that are loaded: a dozen milliseconds

    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_thread_a_product(device: torch.device) -> Iterator[None]:
    """Have NumPy's products done by the thread that asks, so that no sum hangs on how many there are."""
    with _threads, _blas().limit(limits=1) if device.type == "cpu" else nullcontext():
        yield
