"""Rows of several runs of one shape as one program: what keeps them apart, and how they are joined and cut again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.alike import alike_modules
from fedsim.engine.laid import Laid, Plan, Target, lay_out
from fedsim.engine.task import Block, Job, Task, room
from fedsim.engine.vectorized import Vectorized
from fedsim.local import Int64, Schedule

RATES = ("lr", "lr_decay", "lr_decay_every")  # of `LocalTraining`: what may differ between replicas
PIECES = 4  # chunks on a CPU that the rows of small cohorts are shared out over: enough to keep threads busy
FEWEST = 16  # rows of such a chunk, and ENTRIES of all its rows: fewer would cost more in calls than they save
ENTRIES = 400_000


class Part(NamedTuple):
    """What one replica wants trained."""

    task: Task
    job: Job
    out: Tensor | None  # (K, D); None where rows are summed
    chunk: int = 1  # rows at once, of a batched program
    summed: tuple[list[float], Tensor] | None = None  # c_k of each row and the total (D,)


def outcomes(engine: Vectorized, parts: Sequence[Part]) -> list[Block | BaseException]:
    """Train parts together; where that fails each by itself, so that a failure is of those it belongs to."""
    try:
        return list(train_together(engine, parts))
    except Exception as error:
        if len(parts) == 1:
            return [error]
    return [outcome for part in parts for outcome in outcomes(engine, [part])]


def train_together(engine: Vectorized, parts: Sequence[Part]) -> list[Block]:
    """Train the rows of several replicas as one program, and return the block of each.

    Rows keep their own weights, schedule and keys. Those of different local rates are in different chunks.
    """
    blocks: list[Block | None] = [None] * len(parts)
    trainings, merged = [], []
    for rate in sorted({part.job.lr for part in parts}):
        mine = [i for i, part in enumerate(parts) if part.job.lr == rate]
        chosen = [parts[i] for i in mine]
        laid = [lay_out(part.task, part.job) for part in chosen]
        block = _joined([room(p.task, p.job, one.num_steps) for p, one in zip(chosen, laid, strict=True)])
        job, target = _job([part.job for part in chosen]), Target([part.out for part in chosen if part.out is not None])
        size = min(part.chunk for part in chosen)
        chunks = chunks_of([one.num_steps for one in laid], size, _fewest(engine.task))
        trainings += engine.trainings(job, _laid(laid), chunks, target, block)
        merged.append((mine, block))
    engine.run(trainings)
    for mine, block in merged:
        ends = np.cumsum([len(parts[i].job) for i in mine]).tolist()
        for i, high in zip(mine, ends, strict=True):
            blocks[i] = _part(block, high - len(parts[i].job), high)
    return [block for block in blocks if block is not None]


def chunks_of(num_steps: Sequence[Int64], size: int, fewest: int | None) -> list[Int64]:
    """Share out the rows of all parts over chunks: a part's own full chunks as it has them alone, the rest together.

    Args:
        num_steps: of each part's rows, (K_i,) each.
        size: rows of a full chunk.
        fewest: rows of a chunk where chunks train side by side, at least; None: they do not.

    Returns:
        (R,) positions among the rows of all parts each, in descending number of steps.

    """
    chunks, rest, low = [], [], 0
    for steps in num_steps:
        order = low + np.argsort(-steps, kind="stable")  # (K_i,)
        full = len(order) - len(order) % size
        chunks += [order[i : i + size] for i in range(0, full, size)]
        rest.append(order[full:])
        low += len(order)
    together = np.concatenate(rest)
    if len(together):
        steps = np.concatenate(num_steps)
        together = together[np.argsort(-steps[together], kind="stable")]
        size = _piece(len(together), size, fewest)
        chunks += [together[i : i + size] for i in range(0, len(together), size)]
    return chunks


def rows_together(task: Task, count: int, size: int) -> int:
    """Return the rows of a chunk of `count` rows of several parts, none of which fills one of `size` rows."""
    return _piece(count, size, _fewest(task))


def _fewest(task: Task) -> int | None:
    return max(FEWEST, ENTRIES // max(1, task.shared.size)) if task.device.type == "cpu" else None


def _piece(count: int, size: int, fewest: int | None) -> int:
    return size if fewest is None else min(size, max(fewest, -(-count // PIECES)))


def _job(jobs: Sequence[Job]) -> Job:
    """Return one job of all rows; versions are numbered anew, since replicas count theirs from 0 each."""
    received, models, broadcasts = list[Int64](), dict[int, Tensor](), dict[int, Mapping[str, Any]]()
    for job in jobs:
        versions, where = np.unique(job.received, return_inverse=True)  # (V,), (K,)
        received.append(len(models) + where)
        for version in versions.tolist():
            broadcasts[len(models)] = job.broadcasts.get(version, {})
            models[len(models)] = job.models[version]
    return replace(
        jobs[0],
        clients=np.concatenate([job.clients for job in jobs]),
        received=np.concatenate(received),
        models=models,
        broadcasts=broadcasts,
        state={name: torch.cat([job.state[name] for job in jobs]) for name in jobs[0].state},
        work=None,  # it stands in the schedules
    )


def _laid(all_laid: Sequence[Laid]) -> Laid:
    if len(all_laid) == 1:
        return all_laid[0]
    plans = []
    for same in zip(*(laid.plans for laid in all_laid), strict=True):
        orders = [plan.schedule for plan in same]
        shifts = np.cumsum([0, *(len(order.positions) for order in orders)])
        order = Schedule(
            np.concatenate([order.positions for order in orders]),
            np.concatenate([order.starts[:-1] + shift for order, shift in zip(orders, shifts, strict=False)]
                           + [shifts[-1:]]),
            np.concatenate([order.sizes for order in orders]),
            np.concatenate([order.num_steps for order in orders]),
            orders[0].batch_size,
        )  # fmt: skip
        plans.append(Plan(same[0].number, same[0].moving, order))
    return Laid(plans, torch.cat([laid.keys for laid in all_laid]))


def _joined(blocks: Sequence[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    first = blocks[0]
    return Block(
        torch.cat([block.square_norms for block in blocks]),
        torch.cat([block.weights for block in blocks]),
        torch.cat([block.num_steps for block in blocks]),
        {name: torch.cat([block.extras[name] for block in blocks]) for name in first.extras},
        torch.cat([block.buffers for block in blocks]),
        {name: torch.cat([block.state[name] for block in blocks]) for name in first.state},
    )


def _part(block: Block, low: int, high: int) -> Block:
    def cut(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[low:high] for name, value in values.items()}

    return Block(
        block.square_norms[low:high], block.weights[low:high], block.num_steps[low:high], cut(block.extras),
        block.buffers[low:high], cut(block.state),
    )  # fmt: skip


def why_apart(first: Task, other: Task) -> str | None:
    """Say what keeps the rows of two tasks from training as one program; None: nothing does."""
    if first.x.data_ptr() != other.x.data_ptr() or first.y.data_ptr() != other.y.data_ptr():
        return "their samples differ"
    if str(first.module) != str(other.module) or first.dtype != other.dtype or _layouts(first) != _layouts(other):
        return "their models differ"
    mine, theirs = dict(first.module.named_parameters()), dict(other.module.named_parameters())
    frozen = mine.keys() - {*first.shared.names, *first.local.names}
    if any(not torch.equal(mine[name], theirs[name]) for name in frozen):
        return "their frozen parameters differ"
    if not alike_modules(first.module, other.module, [*mine, *first.buffers.names]):
        return "their models differ in tensors or settings that are not parameters (drawn from the seed?)"
    if not _same(first.objective, other.objective) or not _same(first.augment, other.augment):
        return "their clients' objectives differ"
    kept = [field.name for field in fields(first.training) if field.name not in RATES]
    if any(getattr(first.training, name) != getattr(other.training, name) for name in kept):
        return "their clients' training differs"
    return None


def _layouts(task: Task) -> tuple[Any, ...]:
    return task.shared, task.local, task.buffers, task.store.layouts


def _same(a: Any, b: Any) -> bool:
    """Say whether two parts are equal by their own word; one that has none is equal to itself alone."""
    try:
        return a is b or (type(a) is type(b) and bool(a == b))
    except (RuntimeError, ValueError):  # arrays among their fields
        return False
