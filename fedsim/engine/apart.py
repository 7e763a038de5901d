"""A job whose rows differ in what engines take to be one for all: rate, running statistics, names of what was sent.

Replies of several versions of the model train together; with a rate that decays, a model that keeps running statistics,
or a rule that sends more from its second round on, the rows of each kind train as a job of their own. Rows do not
depend on one another, so that which of them share a job is a matter of speed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.blocks import merge, select
from fedsim.engine.task import Block, Engine, Job
from fedsim.local import Int64


class Kind(NamedTuple):
    """Rows that train as one job."""

    lr: float
    buffers: Tensor  # that they start from
    rows: Int64


def kinds(job: Job) -> list[Kind]:
    """Return what each kind of rows has; one kind where nothing differs."""
    rates, older = job.rates or {}, job.older or {}
    sent = {id(one): one for one in job.broadcasts.values()}.values()
    if len({tuple(sorted(one)) for one in sent}) < 2 and not rates and not older:
        return [Kind(job.lr, job.buffers, np.arange(len(job)))]
    versions, version_of = np.unique(job.received, return_inverse=True)  # (V,), (K,)
    buffers = [job.buffers]  # the different ones, by value: after a resume equal ones are no longer the same tensor
    each = []
    for v in versions.tolist():
        mine = older.get(v, job.buffers)
        known = next((i for i, one in enumerate(buffers) if torch.equal(one, mine)), len(buffers))
        buffers += [mine] if known == len(buffers) else []
        each.append((rates.get(v, job.lr), tuple(sorted(job.broadcasts.get(v, {}))), known))
    found = sorted(set(each))
    kind_of = np.array([found.index(kind) for kind in each])[version_of]  # (K,)
    return [Kind(lr, buffers[i], np.flatnonzero(kind_of == k)) for k, (lr, _, i) in enumerate(found)]


def settled(job: Job) -> Job | None:
    """Return a job as engines take it, with its rows' rate and buffers; None where they are of several kinds."""
    found = kinds(job)
    return _plain(job, found[0]) if len(found) == 1 else None


def _plain(job: Job, kind: Kind) -> Job:
    return replace(job, lr=kind.lr, buffers=kind.buffers, rates=None, older=None)


def train(engine: Engine, job: Job, out: Tensor) -> Block:
    """Train the rows of a job, each kind as a job of its own, and write their updates into out (K, D)."""
    plain = settled(job)
    if plain is not None:
        return engine.train(plain, out)
    blocks, low, parts = [], 0, kinds(job)
    for kind in parts:
        part, high = _plain(job.take(kind.rows), kind), low + len(kind.rows)
        block = engine.train(part, out[low:high])
        blocks.append(merge([block]))  # an engine may write the next job's rows over this one's
        low = high
    back = torch.from_numpy(np.argsort(np.concatenate([kind.rows for kind in parts]), kind="stable"))  # (K,)
    out.copy_(out[back.to(out.device)])
    return select(merge(blocks), back)
