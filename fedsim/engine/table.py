"""The table that `engine=auto` decides by on a CPU: what a round costs each engine, counted from shapes.

A round's cost is that of its programs (a step of one client, or of all rows of a chunk that have one), of the
operations in them, and of the parameters and products of each client's step. A recurrent layer reads its weights again
for every token, in forward and backward, and autograd writes a gradient each time and adds it to the others: six passes
over the weights; kernels that move them in one product at the end do two. The unit costs were fitted to CPU
times of 104 drawn situations (seven kinds of model, cohorts of 2 to 300, plain SGD, momentum, clipping, AdamW) on one
core of an AMD EPYC, and are half of what it took while it was busy with other work; on another processor they scale
more or less together, and what matters here are their ratios. Nothing is timed in a run: equal shapes, equal choice.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.engine.fused import convert
from fedsim.engine.model import sibling
from fedsim.engine.record import Watch
from fedsim.engine.recurrent import Steps
from fedsim.engine.stepping import place
from fedsim.engine.task import Task
from fedsim.engine.unrolled import plain_recurrent, unrolled
from fedsim.layout import Params
from fedsim.local import LocalTraining


class Cost(NamedTuple):
    """Microseconds of an engine's units, forward and backward together."""

    client: float  # of one, beside its steps
    step: float  # of a program, whatever its rows
    operation: float  # in a program's forward; of a captured step, in forward and backward
    call: float  # of a float32 convolution in a program, however small: oneDNN's own, none where they are products
    parameter: float  # of one that a client's step reads and moves
    memory: float  # of one for each number that the optimiser keeps or makes beside its gradient
    again: float  # of a pass over one in a step that has read it before
    product: float  # of a multiplication of a client's step
    convolution: float  # of one in a convolution
    entry: float  # of one that an operation of a client's step writes, forward


COSTS = {
    "sequential": Cost(58.0, 98.0, 20.0, 140.0, 0.97e-3, 0.71e-3, 0.16e-3, 31e-6, 54e-6, 1.1e-3),
    "captured": Cost(36.0, 11.0, 0.83, 130.0, 0.47e-3, 0.51e-3, 0.15e-3, 26e-6, 48e-6, 1.0e-3),
    "fused": Cost(4.7, 350.0, 13.0, 0.0, 1.0e-3, 0.54e-3, 0.25e-3, 28e-6, 240e-6, 1.1e-3),
    "generic": Cost(2.5, 880.0, 44.0, 190.0, 1.3e-3, 0.50e-3, 0.29e-3, 28e-6, 90e-6, 1.2e-3),
}


PASSES = 6  # of autograd for a weight's every further use: two readings, a gradient written, and added (2 in, 1 out)
# Of an optimiser beside plain SGD: passes over the parameters, see `Cost.memory`, and operations on each tensor.
BESIDE = {"momentum": (1, 2), "clip_norm": (1, 3), "adamw": (4, 9)}


class Shapes(NamedTuple):
    """What the costs are counted from."""

    parameters: int
    operations: int  # of a forward
    products: float  # multiplications of a batch's forward in matrix products
    convolutions: float  # and in convolutions
    steps: np.ndarray[tuple[int], np.dtype[np.int64]]  # of the clients that can be sampled (P,)
    cohort: int
    threads: int
    recorded: int = 0  # operations of a forward, its backward and the optimiser's step, one tensor after another
    calls: int = 0  # convolutions of a forward that oneDNN does
    memories: int = 0  # passes of the optimiser over its parameters beside that of plain SGD
    entries: float = 0.0  # that a batch's forward writes
    again: int = 0  # parameters passed over, where a step uses them more than once
    fused: tuple[int, int] | None = None  # operations and `again`, where fused kernels have their own
    unrolled: int | None = None  # operations of a forward where `torch.func` needs recurrent layers' products


def shapes(task: Task, cohort: int, threads: int) -> Shapes:
    """Count a task's shapes; its module runs two samples forward."""
    sizes = task.partition.sizes[task.partition.sizes > 0]  # (P,)
    steps = task.training.num_steps(sizes) if len(sizes) else np.ones(1, dtype=np.int64)
    batch = min(task.training.batch_size or math.inf, float(sizes.mean()) if len(sizes) else 1.0)
    params = {name: p.detach() for name, p in task.module.named_parameters()}
    with _evaluating(task.module) as module:
        count, both = _Counter(params), _Counter(params)
        count.forward(module, task.x[:2])
        both.backward(module, task.x[:2])
    operations, unrolled_operations = max(1, count.operations), None
    if any(map(plain_recurrent, task.module.modules())):  # which torch runs as one operation
        with contextlib.suppress(Exception), _evaluating(unrolled(sibling(task.module))) as module:
            products = _Counter(dict(module.named_parameters()))
            products.forward(module, task.x[:2])  # a model that asks what its layers are: engines will say so
            count, unrolled_operations = products, products.operations
    memories, updates = _beside(task.training)
    num, calls = len(task.x[:2]), count.calls if task.dtype == torch.float32 else 0
    return Shapes(
        parameters=task.shared.size + task.local.size,
        operations=operations,
        products=count.products / num * batch,
        convolutions=count.convolutions / num * batch,
        steps=steps,
        cohort=cohort,
        threads=threads,
        recorded=both.operations + len(params) * (1 + updates),
        calls=calls,
        memories=memories,
        entries=count.entries / num * batch,
        again=PASSES * count.again(count.reads),
        fused=_fused(task),
        unrolled=unrolled_operations,
    )


def microseconds(engine: str, given: Shapes, chunk: int = 1) -> float:
    """Return what a round costs.

    Args:
        engine: of `COSTS`.
        given: the round's shapes.
        chunk: rows of a program.

    """
    cost, cohort = COSTS[engine], given.cohort
    operations, again = given.operations, given.again
    if engine == "fused" and given.fused is not None:
        operations, again = given.fused
    elif engine == "generic" and given.unrolled is not None:
        operations = given.unrolled
    elif engine == "captured":
        operations = given.recorded
    rows = min(chunk, cohort)
    programs = math.ceil(cohort / rows)
    # Longest clients first: a chunk takes as many steps as its longest client, the first one as many as anybody.
    spread = given.steps.max() / given.steps.mean()
    longest = 1.0 if rows == 1 else 1 + (spread - 1) / programs
    own = (cost.parameter + cost.memory * given.memories) * given.parameters + cost.again * again
    own += cost.product * given.products + cost.convolution * given.convolutions + cost.entry * given.entries
    program = cost.step + cost.operation * operations + cost.call * given.calls
    total = given.steps.mean() * (programs * longest * program + cohort * own) + cohort * cost.client
    side_by_side = 1 if engine == "sequential" else min(given.threads, programs)
    return float(total / side_by_side)


def _beside(training: LocalTraining) -> tuple[int, int]:
    """Return what an optimiser does beside plain SGD: passes over its parameters, and operations on a tensor."""
    used = {
        "momentum": training.momentum > 0, "clip_norm": training.clip_norm is not None,
        "adamw": training.optimizer == "adamw",
    }  # fmt: skip
    counts = [BESIDE[name] for name, value in used.items() if value]
    return sum(passes for passes, _ in counts), sum(operations for _, operations in counts)


def _fused(task: Task) -> tuple[int, int] | None:
    """Count the fused program of one row; None where a layer has no kernel, or the merged forward does not run."""
    pair = convert(task.module)
    if pair is None or not any(isinstance(layer, Steps) for layer in pair[0].modules()):
        return None  # or counts as the module does
    module, rows = pair
    params = {name: p.detach() for name, p in task.module.named_parameters()}
    rows.count, rows.params = 1, {name: p.unsqueeze(0) for name, p in params.items()}
    try:
        with _evaluating(module):
            count = _Counter(params)
            count.forward(module, task.x[:2])
    except Exception:  # what a merged forward cannot do is refused, with the reason, where engines are made
        return None
    # A reading of the forward comes with one of the backward; each of a layer's calls adds to the gradient, in and out.
    calls = {place(rows.params[name]): number for name, number in rows.calls.items() if name in rows.params}
    return max(1, count.operations), 2 * count.again(count.reads) + 2 * count.again(calls)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[nn.Module]:
    training = module.training
    module.eval()
    try:
        yield module
    finally:
        module.train(training)


class _Counter(Watch):  # type: ignore[no-untyped-call]
    """Counts what a forward does, as torch's own kernels are called for it.

    Args:
        params: whose readings are counted.

    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.operations, self.calls, self.entries = 0, 0, 0
        self.products, self.convolutions = 0.0, 0.0
        self.sizes = {place(value): value.numel() for value in params.values()}
        self.reads: Counter[int] = Counter()  # by products and convolutions, of each place

    @torch.no_grad()
    def forward(self, module: nn.Module, x: Tensor) -> None:
        """Count a forward."""
        with self:
            module(x)

    @torch.enable_grad()
    def backward(self, module: nn.Module, x: Tensor) -> None:
        """Count a forward and the gradient of the sum of its logits."""
        with self:
            torch.autograd.grad(module(x).sum(), [p for p in module.parameters() if p.requires_grad], allow_unused=True)

    def again(self, times: Mapping[int, int]) -> int:
        """Return the entries of parameters times how often beyond once they are used."""
        return sum(self.sizes[place] * (count - 1) for place, count in times.items() if count > 1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        self.operations += 1
        self.entries += out.numel() if isinstance(out, Tensor) else 0
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            self.products += out.numel() * left.shape[-1]
            self._read(right)
        elif name == "convolution":
            self.calls += 1
            self.convolutions += out.numel() * args[1].numel() / args[1].shape[0]
            self._read(args[1])
        return out

    def _read(self, operand: Tensor) -> None:
        if (where := place(operand)) in self.sizes:
            self.reads[where] += 1
