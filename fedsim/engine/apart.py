"""A job whose rows differ in what engines take to be one for all: the local rate, and the names of what was sent.

Replies of several versions of the model train together; with a rate that decays, or a rule that sends more from its
second round on, the rows of each kind train as a job of their own. Rows do not depend on one another, so that which of
them share a job is a matter of speed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.blocks import merge, select
from fedsim.engine.task import Block, Engine, Job
from fedsim.local import Int64


def kinds(job: Job) -> list[tuple[float, Int64]]:
    """Return the rate and the rows of each kind; one kind where nothing differs."""
    rates, sent = job.rates or {}, {id(one): one for one in job.broadcasts.values()}.values()
    if len({tuple(sorted(one)) for one in sent}) < 2 and not rates:
        return [(job.lr, np.arange(len(job)))]
    versions, version_of = np.unique(job.received, return_inverse=True)  # (V,), (K,)
    each = [(rates.get(v, job.lr), tuple(sorted(job.broadcasts.get(v, {})))) for v in versions.tolist()]
    found = sorted(set(each))
    kind_of = np.array([found.index(kind) for kind in each])[version_of]  # (K,)
    return [(kind[0], np.flatnonzero(kind_of == k)) for k, kind in enumerate(found)]


def settled(job: Job) -> Job | None:
    """Return a job as engines take it, at the rate of its rows; None where they are of several kinds."""
    found = kinds(job)
    return replace(job, lr=found[0][0], rates=None) if len(found) == 1 else None


def train(engine: Engine, job: Job, out: Tensor) -> Block:
    """Train the rows of a job, each kind as a job of its own, and write their updates into out (K, D)."""
    plain = settled(job)
    if plain is not None:
        return engine.train(plain, out)
    blocks, low, parts = [], 0, kinds(job)
    for lr, rows in parts:
        part, high = replace(job.take(rows), lr=lr, rates=None), low + len(rows)
        block = engine.train(part, out[low:high])
        blocks.append(merge([block]))  # an engine may write the next job's rows over this one's
        low = high
    back = torch.from_numpy(np.argsort(np.concatenate([rows for _, rows in parts]), kind="stable"))  # (K,)
    out.copy_(out[back.to(out.device)])
    return select(merge(blocks), back)
