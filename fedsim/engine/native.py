"""What the native loop of captured clients walks, and what it works in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.task import Job, Task, row_keys
from fedsim.local import Int64, Schedule
from fedsim.metrics.classification import segment_sums
from fedsim.rng import fold_in

BUCKETS = 8  # sizes of a batch that have a program; a batch of another size is padded to the next
GATHERED = 1 << 17  # input entries that are gathered at once: half a megabyte, beside the weights in a core's cache


class Work(NamedTuple):
    """The steps of some rows, flat: what the native loop walks."""

    steps: list[Tensor]  # rows (R,), each one's first gather (R+1,), each gather's first step (G+1,); samples, program
    # of each step (S,); which of the starts each row starts from (R,)
    samples: Tensor  # (M,) positions into the data; short batches repeat their last sample
    weights: Tensor  # (M,) 1/b, and 0 for repeats; empty where there are none
    keys: Tensor  # (S,) of dropout; empty where there is none
    sample_keys: Tensor  # (M,) of augmentation; empty where there is none


class Sizes(NamedTuple):
    """Which steps have a program of their own."""

    full: int  # samples of a full batch
    buckets: int  # sizes of a batch
    turns: int  # steps at the begin of a round
    gathered: int  # samples gathered at once
    drops: bool  # whether steps have a key of dropout


class Steps:
    """The steps of a job's rows in some order, flat; batches are padded to the sizes that have programs.

    Args:
        task: what all rounds share.
        job: the rows.
        order: their local round.
        rows: (R,) in the order of training.
        layout: which sizes and steps have programs.

    """

    def __init__(self, task: Task, job: Job, order: Schedule, rows: Int64, layout: Sizes) -> None:
        self.rows = rows
        count, sizes = order.num_steps[rows], np.maximum(order.sizes[rows], 1)  # (R,)
        full = layout.full
        self.first = np.concatenate([[0], np.cumsum(count)])  # (R+1,) a row's first step
        row = np.repeat(np.arange(len(rows)), count)  # (S,)
        number = np.arange(len(row)) - self.first[row]  # (S,) step of its row
        batch = np.minimum(sizes, full)[row] if order.batch_size else sizes[row]  # (S,)
        epoch, inside = np.divmod(number, -(-sizes[row] // batch))
        self.length = np.minimum(batch, sizes[row] - inside * batch)  # (S,) samples that count
        self.padded = _bucket(self.length, full, layout.buckets)  # (S,)
        self.begin = np.concatenate([[0], np.cumsum(self.padded)])  # (S+1,)
        step = np.repeat(np.arange(len(row)), self.padded)  # (M,)
        inner = np.arange(len(step)) - self.begin[step]  # (M,)
        offset = epoch * sizes[row] + inside * batch  # (S,) in the row's stream
        stream = offset[step] + np.minimum(inner, self.length[step] - 1)  # (M,)
        self.samples = torch.from_numpy(order.positions[order.starts[rows][row[step]] + stream])
        short = self.padded != self.length  # (S,)
        if short.any():
            self.weights = torch.from_numpy((inner < self.length[step]) / self.length[step]).to(task.dtype)
        else:
            self.weights = torch.empty(0, dtype=task.dtype)
        turns = layout.turns + 1
        codes = (self.padded * 2 + short) * turns + np.minimum(number, layout.turns)  # (S,)
        kinds, self.program = np.unique(codes, return_inverse=True)
        # Size, whether it is padded, and turn: as in `Kind`.
        self.kinds = [(code // (2 * turns), bool(code // turns % 2), code % turns) for code in kinds.tolist()]
        turn = (self.begin[:-1] - self.begin[self.first[row]]) // layout.gathered  # (S,)
        new = np.flatnonzero(np.diff(row, prepend=-1) | np.diff(turn, prepend=-1))  # (G,) first step of each gather
        self.gathers, self.gather_first = np.searchsorted(new, self.first), np.append(new, len(row))
        self.versions = _places(job.received[rows])
        none = torch.empty(0, dtype=torch.int64)
        keys = row_keys(task, job)[torch.from_numpy(rows)]  # (R,)
        self.keys = fold_in(fold_in(keys[row], 0), torch.from_numpy(number)) if layout.drops else none  # (S,)
        augments = task.augment is not None
        self.sample_keys = fold_in(fold_in(keys[row[step]], 1), torch.from_numpy(stream)) if augments else none  # (M,)

    def part(self, low: int, high: int) -> Work:
        """Return the work of rows low … high − 1."""
        steps = slice(self.first[low], self.first[high])
        samples = slice(self.begin[steps.start], self.begin[steps.stop])
        gathers = self.gathers[low : high + 1]
        first = self.gather_first[gathers[0] : gathers[-1] + 1] - steps.start
        walked = (
            self.rows[low:high], gathers - gathers[0], first, self.padded[steps], self.program[steps],
            self.versions[low:high],
        )  # fmt: skip
        return Work(
            steps=list(map(torch.from_numpy, walked)),
            samples=self.samples[samples],
            weights=self.weights[samples],
            keys=self.keys[steps],
            sample_keys=self.sample_keys[samples],
        )

    def mean(self, losses: Tensor) -> Tensor:
        """Return each row's mean loss over its samples (R,) from the steps' (S,)."""
        offsets, sizes = torch.from_numpy(self.first), torch.from_numpy(self.length.astype(np.float64))
        weighed = segment_sums(losses.double() * sizes, offsets)  # (R,)
        return weighed / segment_sums(sizes, offsets).clamp(min=1)


def batches_of(sizes: Int64, layout: Sizes) -> list[tuple[int, bool]]:
    """Return (size with its padding, whether there is any) of every batch that clients of some sizes (K,) have.

    >>> batches_of(np.array([70, 3]), Sizes(full=32, buckets=8, turns=0, gathered=1, drops=False))
    [(4, True), (8, True), (32, False)]
    """
    ends = np.concatenate([np.minimum(sizes, layout.full), sizes % layout.full])
    lengths: Int64 = np.flatnonzero(np.bincount(ends[ends > 0]))
    padded = _bucket(lengths, layout.full, layout.buckets)
    return sorted(set(zip(padded.tolist(), (padded != lengths).tolist(), strict=True)))


def _places(versions: Int64) -> Int64:
    """Return the place of each version among the ascending ones."""
    places: Int64 = np.unique(versions, return_inverse=True)[1]
    return places


def _bucket(lengths: Int64, full: int, buckets: int) -> Int64:
    """Return the sizes that have programs, full · 1/buckets apart."""
    if full <= buckets:
        return lengths
    parts = -(-lengths * buckets // full)  # ≥ 1
    return np.maximum(-(-parts * full // buckets), lengths)


class Lane:
    """The memory of one client in training; each thread has its own.

    Args:
        task: what all rounds share.
        names: of the parameters, shared ones first.
        apart: of those kept channels-last while a client trains, in their own part of the flat memory.
        slots: of the optimiser, each of the parameters' shapes.
        bound: whether the module's own shared parameters lie here too: they are scratch, and a model's size.

    """

    def __init__(self, task: Task, names: list[str], apart: list[str], slots: int, *, bound: bool) -> None:
        own = dict(task.module.named_parameters())
        self.flat = torch.zeros(task.shared.size, dtype=task.dtype)  # (D,)
        views = task.shared.split(self.flat)
        self.apart_views = [views[name] for name in apart]
        last = [torch.empty_like(view, memory_format=torch.channels_last).stride() for view in self.apart_views]
        self.apart = [view.as_strided(view.shape, stride) for view, stride in zip(self.apart_views, last, strict=True)]
        kept = dict(zip(apart, self.apart, strict=True))
        self.local = [own[name].detach().clone() for name in task.local.names]
        mine = {**views, **kept, **dict(zip(task.local.names, self.local, strict=True))}
        self.params = [mine[name] for name in names]
        if bound:
            for name in task.shared.names:
                own[name].data = mine[name].copy_(own[name].detach())
        self.slots = [torch.zeros_like(p) for _ in range(slots) for p in self.params]
