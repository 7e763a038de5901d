"""The table that `engine=auto` decides by on a CPU: what a round costs each engine, counted from shapes.

A round's cost is that of its programs (a step of one client, or of all rows of a chunk that have one), of the
operations in them, and of the parameters and products of each client's step. The unit costs were fitted to what
`python -m benchmarks auto` measured on one core of an Intel Xeon with AVX-512; on another processor they scale more or
less together, and what matters here are their ratios. Nothing is timed in a run: equal shapes, equal choice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from fedsim.engine.record import Watch
from fedsim.engine.task import Task


class Cost(NamedTuple):
    """Microseconds of an engine's units, forward and backward together."""

    step: float  # of a program, whatever its rows
    operation: float  # in a program's forward
    parameter: float  # of one that a client's step reads and moves
    product: float  # of a multiplication of a client's step
    convolution: float  # of one in a convolution


COSTS = {
    "sequential": Cost(60.0, 20.0, 1.2e-3, 60e-6, 60e-6),
    "captured": Cost(32.0, 3.2, 0.5e-3, 40e-6, 50e-6),
    "fused": Cost(300.0, 17.0, 1.8e-3, 60e-6, 250e-6),
    "generic": Cost(450.0, 33.0, 2.5e-3, 80e-6, 120e-6),
}


class Shapes(NamedTuple):
    """What the costs are counted from."""

    parameters: int
    operations: int  # of a forward
    products: float  # multiplications of a batch's forward in matrix products
    convolutions: float  # and in convolutions
    steps: np.ndarray[tuple[int], np.dtype[np.int64]]  # of the clients that can be sampled (P,)
    cohort: int
    threads: int


def shapes(task: Task, cohort: int, threads: int) -> Shapes:
    """Count a task's shapes; its module runs two samples forward."""
    sizes = task.partition.sizes[task.partition.sizes > 0]  # (P,)
    steps = task.training.num_steps(sizes) if len(sizes) else np.ones(1, dtype=np.int64)
    batch = min(task.training.batch_size or math.inf, float(sizes.mean()) if len(sizes) else 1.0)
    operations, products, convolutions = _count(task)
    size = task.shared.size + task.local.size
    return Shapes(size, operations, products * batch, convolutions * batch, steps, cohort, threads)


def microseconds(engine: str, given: Shapes, chunk: int = 1) -> float:
    """Return what a round costs.

    Args:
        engine: of `COSTS`.
        given: the round's shapes.
        chunk: rows of a program.

    """
    cost, cohort = COSTS[engine], given.cohort
    rows = min(chunk, cohort)
    programs = math.ceil(cohort / rows)
    # Longest clients first: a chunk takes as many steps as its longest client, the first one as many as anybody.
    spread = given.steps.max() / given.steps.mean()
    longest = 1.0 if rows == 1 else 1 + (spread - 1) / programs
    own = cost.parameter * given.parameters + cost.product * given.products + cost.convolution * given.convolutions
    total = programs * longest * (cost.step + cost.operation * given.operations) + cohort * own
    side_by_side = 1 if engine == "sequential" else min(given.threads, programs)
    return float(given.steps.mean() * total / side_by_side)


class _Counter(Watch):  # type: ignore[no-untyped-call]
    """Counts what a forward does, as torch's own kernels are called for it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.products, self.convolutions = 0, 0.0, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        self.operations += 1
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left = args[1] if name in ("addmm", "baddbmm") else args[0]
            self.products += out.numel() * left.shape[-1]
        elif name == "convolution":
            self.convolutions += out.numel() * args[1].numel() / args[1].shape[0]
        return out


@torch.no_grad()
def _count(task: Task) -> tuple[int, float, float]:
    """Return the operations of a forward, and the multiplications of one sample in products and convolutions."""
    training, x = task.module.training, task.x[:2]
    task.module.eval()
    try:
        with _Counter() as counter:
            task.module(x)
    finally:
        task.module.train(training)
    return max(1, counter.operations), counter.products / len(x), counter.convolutions / len(x)
