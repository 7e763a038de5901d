"""The steps of a chunk of rows: which samples every row that still has a step sees, laid out as (a, b) arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.local import Int64, Schedule


class Step(NamedTuple):
    """One step of the first a rows of a chunk, rows with most steps first."""

    number: int
    samples: Tensor  # (a, b) positions into the data; short rows repeat their last sample
    offsets: Tensor  # (a, b) place of each sample in its row's stream
    weights: Tensor  # (a, b) 1/b_k, and 0 for repeats
    sizes: Tensor  # (a,) b_k, in the weights' dtype
    lengths: Int64  # (a,) b_k, on the host


def steps(order: Schedule, rows: Int64, device: torch.device, dtype: torch.dtype) -> Iterator[Step]:
    """Lay out the steps of some rows of a schedule.

    All that a chunk needs crosses to the device at once: a copy in every step would make the host wait for it.

    Args:
        order: the job's.
        rows: (R,) of it, in descending number of steps.
        device: where the data is.
        dtype: of the weights.

    """
    counts, sizes, starts = order.num_steps[rows], order.sizes[rows], order.starts[:-1][rows]  # (R,)
    batch = np.full(len(rows), order.batch_size) if order.batch_size else np.maximum(sizes, 1)  # (R,)
    per_pass = np.maximum(-(-sizes // batch), 1)  # (R,)
    active = [int((counts > s).sum()) for s in range(int(counts.max(initial=0)))]
    offsets, lengths = [], []
    for s, a in enumerate(active):
        epoch, inside = np.divmod(s, per_pass[:a])
        length = np.minimum(batch[:a], sizes[:a] - inside * batch[:a])  # (a,)
        first = epoch * sizes[:a] + inside * batch[:a]  # (a,)
        column = np.arange(length.max())  # (b,)
        offsets.append(first[:, None] + np.minimum(column, length[:, None] - 1))  # (a, b)
        lengths.append(length)
    if not active:
        return
    flat = np.concatenate([o.ravel() for o in offsets])
    where = np.concatenate([(o + starts[: len(o), None]).ravel() for o in offsets])
    both = torch.from_numpy(np.stack([order.positions[where], flat])).to(device)  # (2, Σ a·b)
    real = [np.arange(o.shape[1]) < length[:, None] for o, length in zip(offsets, lengths, strict=True)]  # (a, b) each
    shares = [(r / length[:, None]).ravel() for r, length in zip(real, lengths, strict=True)]
    weights = torch.from_numpy(np.concatenate(shares)).to(dtype).to(device)  # (Σ a·b,)
    counted = torch.from_numpy(np.concatenate(lengths)).to(dtype).to(device)  # (Σ a,)
    at = row = 0
    for s, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        span, mine = slice(at, at + offset.size), slice(row, row + len(length))
        at, row = span.stop, mine.stop
        yield Step(
            s,
            both[0, span].view(offset.shape),
            both[1, span].view(offset.shape),
            weights[span].view(offset.shape),
            counted[mine],
            length,
        )
