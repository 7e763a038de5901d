"""Clients one after another through one module whose parameters are updated in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.contracts import Batch, Context, Phase
from fedsim.engine.model import Functional
from fedsim.engine.optimizer import Optimizer, clip
from fedsim.engine.task import BUFFER, LOCAL, Block, Job, Task, local_round, row_keys
from fedsim.layout import Params
from fedsim.local import Schedule, moving
from fedsim.metrics.classification import segment_sums
from fedsim.models.dropout import KeyedDropout, dropout_key
from fedsim.rng import fold_in

GATHER_ENTRIES = 1 << 19  # input entries of a job that are gathered at once; more would leave the cache again


class Sequential:
    """The reference engine: any module, any objective; `print` and breakpoints work in a loss.

    The D shared parameters are views of one flat work vector, so a client costs one copy in and one subtraction
    out. Convolution weights are kept channels-last beside it, where CPU and GPU kernels want them.

    Args:
        task: what all rounds share. The module's own tensors become the engine's.
        channels_last: layout of images and convolution weights; None: where the model convolves images.

    """

    def __init__(self, task: Task, *, channels_last: bool | None = None) -> None:
        self.task = task
        if channels_last is None:
            channels_last = any(isinstance(m, nn.Conv2d) for m in task.module.modules()) and task.x.dim() == 4
        self.plan: Mapping[str, Any] = {"engine": "sequential", "channels_last": channels_last}
        self._bind(channels_last)
        self._x = task.x.contiguous(memory_format=torch.channels_last) if channels_last else task.x
        self._mean_weights: dict[int, Tensor] = {}  # size of a batch → its criterion weights
        self._dropout = any(isinstance(module, KeyedDropout) for module in task.module.modules())
        names = ("loss", "direction", "finish")
        self._simple = not self._dropout and not any(hasattr(task.objective, name) for name in names)

    def _bind(self, channels_last: bool) -> None:
        """Make the module's shared parameters views of one flat vector, channels-last ones apart."""
        task = self.task
        own = dict(task.module.named_parameters())
        self.flat = torch.empty(task.shared.size, dtype=task.dtype, device=task.device)
        self.apart: list[tuple[str, Tensor]] = []
        for name, view in task.shared.split(self.flat).items():
            if channels_last and view.dim() == 4:
                own[name].data = torch.empty_like(view, memory_format=torch.channels_last)
                self.apart.append((name, own[name].data))
            else:
                own[name].data = view
        self.params: Params = {name: own[name] for name in (*task.shared.names, *task.local.names)}
        self.model = Functional(task.module, self.params)
        buffers = dict(task.module.named_buffers())
        self.buffers = {BUFFER + name: buffers[name] for name in task.buffers.names}

    def close(self) -> None:
        """Hold nothing beyond the module itself."""

    def train(self, job: Job, out: Tensor) -> Block:
        """Train the rows of a job and write their updates w_k − w_received into out (K, D)."""
        task = self.task
        plans = [self._plan(job, number, phase) for number, phase in enumerate(task.phases)]
        starts = {version: _Start(self, job, version, plans) for version in set(job.received.tolist())}
        keys = row_keys(task, job)  # (K,)
        task.module.train()
        rows = []
        with torch.no_grad():
            for row, version in enumerate(job.received.tolist()):
                start, delta = starts[version], out[row]
                state = {name: value[row] for name, value in job.state.items()}
                self._load(start, state, job.buffers)
                left = self._row(job, row, start, plans, keys, state)
                self._write(start, delta)
                left.square_norm = torch.dot(delta, delta)  # while the row is in cache
                rows.append(left)
        return self._block(job, plans, rows)

    def _row(
        self, job: Job, row: int, start: _Start, plans: list[_Plan], keys: Tensor, state: dict[str, Tensor]
    ) -> _Row:
        """Run one client's local round in the module's own parameters."""
        left = _Row()
        if self._simple:
            for plan, update in zip(plans, start.updates, strict=True):
                self._simple_phase(plan, update, row, keys, left)
        else:
            context = self._general_phases(job, row, start, plans, keys, state, left)
            finish = getattr(self.task.objective, "finish", None)
            if finish is not None:
                own, left.extras, left.weight = finish({n: p.detach() for n, p in self.params.items()}, context)
                left.state.update(own)
        if state:
            left.state = state | left.state
            left.state.update({LOCAL + n: self.params[n].detach().clone() for n in self.task.local.names})
            left.state.update({name: b.clone() for name, b in self.buffers.items() if name in state})
        if self.buffers:
            left.buffers = torch.cat([b.detach().flatten().to(self.task.dtype) for b in self.buffers.values()])
        return left

    def _load(self, start: _Start, state: Mapping[str, Tensor], buffers: Tensor) -> None:
        self.flat.copy_(start.flat)
        for name, weight in self.apart:
            weight.copy_(start.params[name])
        for name in self.task.local.names:
            self.params[name].copy_(state[LOCAL + name])
        if self.buffers:
            for (name, buffer), value in zip(
                self.buffers.items(), self.task.buffers.split(buffers).values(), strict=True
            ):
                buffer.copy_(state.get(name, value))

    def _write(self, start: _Start, out: Tensor) -> None:
        torch.sub(self.flat, start.flat, out=out)
        if self.apart:
            views = self.task.shared.split(out)
            for name, weight in self.apart:
                torch.sub(weight, start.params[name], out=views[name])

    def _simple_phase(self, plan: _Plan, update: _Update, row: int, keys: Tensor, left: _Row) -> None:
        """Run the steps of a phase whose loss is a criterion of the logits: the fast path."""
        module, criterion, enable_grad = self.task.module, self.task.objective.criterion, torch.enable_grad
        params = update.optimizer.params
        update.optimizer.reset()
        step = update.optimizer.step if update.free else update
        for x, y in self._batches(plan, row, keys):
            size = y.shape[0]
            with enable_grad():
                loss = criterion(module(x), y, self._weights(size))
                grads = _gradient(loss, params)
            left.losses.append(loss.detach())
            left.counts.append(size)
            step(grads)

    def _general_phases(  # noqa: PLR0913  as `_row`
        self, job: Job, row: int, start: _Start, plans: list[_Plan], keys: Tensor, state: dict[str, Tensor], left: _Row
    ) -> Context:
        """Run all phases of a row; return the context of the last step."""
        own = {name: value for name, value in state.items() if not name.startswith((LOCAL, BUFFER))}
        context = None
        for plan, update in zip(plans, start.updates, strict=True):
            context = Context(
                received=start.params, broadcast=start.broadcast, client_state=own, step_state={}, step=0,
                num_steps=int(plan.schedule.num_steps[row]), lr=job.lr, num_samples=int(plan.schedule.sizes[row]),
                key=keys[row], layout=self.task.shared, phase=plan.number,
            )  # fmt: skip
            context = self._general_phase(plan, update, row, keys, context, left)
        assert context is not None  # a task has at least one phase
        return context

    def _general_phase(
        self, plan: _Plan, update: _Update, row: int, keys: Tensor, context: Context, left: _Row
    ) -> Context:
        """Run the steps of a phase of any objective; return the context of its last step."""
        params = update.optimizer.params
        update.optimizer.reset()
        direction = getattr(self.task.objective, "direction", None)
        for step, (x, y) in enumerate(self._batches(plan, row, keys)):
            context = _at(context, step)
            with torch.enable_grad(), dropout_key(fold_in(fold_in(context.key, plan.number), step)):
                loss = self._loss(x, y, context)
                grads = _gradient(loss, params)
            left.losses.append(loss.detach())
            left.counts.append(len(y))
            update.constrain(grads)
            if direction is not None:
                named = dict(zip(plan.moving, grads, strict=True))
                turned, step_state = direction(named, {n: p.detach() for n, p in self.params.items()}, context)
                grads = [turned[name].clone() for name in plan.moving]
                context = _at(context, step, step_state)
            update.optimizer.step(grads, scale=context.step_state.get("lr_scale"))
        return context

    def _loss(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        objective = self.task.objective
        if hasattr(objective, "loss"):
            value: Tensor = objective.loss(self.model, self.params, Batch(x, y), context)[0]
        else:
            value = objective.criterion(self.task.module(x), y, self._weights(len(y)))
        return value

    def _weights(self, size: int) -> Tensor:
        """Return the criterion weights (size,) of a mean."""
        if size not in self._mean_weights:
            self._mean_weights[size] = torch.full((size,), 1 / size, dtype=self.task.dtype, device=self.task.device)
        return self._mean_weights[size]

    def _plan(self, job: Job, number: int, phase: Phase | None) -> _Plan:
        """Lay out a phase; small cohorts' samples are gathered here at once, others' pass by pass."""
        task = self.task
        order = local_round(task, job, number, phase)
        positions = torch.from_numpy(order.positions).to(task.device)  # (M,)
        names = moving((*task.shared.names, *task.local.names), phase)
        x = self._x.index_select(0, positions) if len(positions) * self._x[0].numel() <= GATHER_ENTRIES else None
        return _Plan(number, names, order, positions, x, task.y.index_select(0, positions))

    def _batches(self, plan: _Plan, row: int, keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a row's local round."""
        task, order = self.task, plan.schedule
        n, left = int(order.sizes[row]), int(order.num_steps[row])
        batch = order.batch_size or max(n, 1)
        for epoch, begin in enumerate(range(int(order.starts[row]), int(order.starts[row + 1]), max(n, 1))):
            end = begin + n
            x = self._x.index_select(0, plan.positions[begin:end]) if plan.x is None else plan.x[begin:end]
            y = plan.y[begin:end]  # (n,)
            if task.augment is not None:
                counter = torch.arange(n, device=x.device) + epoch * n
                x = task.augment(x, fold_in(fold_in(keys[row], plan.number + 1), counter))
            if n <= batch:
                pairs: Any = ((x, y),)
            else:
                pairs = zip(torch.split(x, batch), torch.split(y, batch), strict=True)
            for pair in pairs:
                if left == 0:
                    return
                left -= 1
                yield pair

    def _block(self, job: Job, plans: list[_Plan], rows: list[_Row]) -> Block:
        task = self.task
        sizes = task.partition.sizes[job.clients]
        weights = [float(sizes[k]) if row.weight is None else row.weight for k, row in enumerate(rows)]
        extras = {name: torch.stack([row.extras[name] for row in rows]) for name in rows[0].extras}
        return Block(
            square_norms=torch.stack([row.square_norm for row in rows]),
            weights=_column(weights, task.device),
            num_steps=torch.from_numpy(np.sum([plan.schedule.num_steps for plan in plans], axis=0)),
            extras={"train_loss": _mean_losses(rows, task), **extras},
            buffers=torch.stack([row.buffers for row in rows]) if self.buffers else self.flat.new_zeros(len(rows), 0),
            state={name: torch.stack([row.state[name] for row in rows]) for name in job.state},
        )


class _Row:
    """What a row leaves beside its update."""

    square_norm: Tensor
    buffers: Tensor

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.counts: list[int] = []
        self.extras: Mapping[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        self.weight: Any = None  # None: the client's samples


class _Plan(NamedTuple):
    """One phase of a job: who moves, and the samples of every row on the device."""

    number: int
    moving: tuple[str, ...]
    schedule: Schedule
    positions: Tensor  # (M,)
    x: Tensor | None  # (M, …), where they are few
    y: Tensor  # (M,)


class _Start:
    """What rows that start from the same version share."""

    def __init__(self, engine: Sequential, job: Job, version: int, plans: list[_Plan]) -> None:
        self.flat = job.models[version]  # (D,)
        self.params = engine.task.shared.split(self.flat)
        self.broadcast = job.broadcasts.get(version, {})
        self.updates = [
            _Update(engine.task, plan, [engine.params[n] for n in plan.moving], self, job.lr) for plan in plans
        ]


class _Update:
    """From a gradient to a step: proximal pull, clipping, optimiser."""

    def __init__(self, task: Task, plan: _Plan, params: list[Tensor], start: _Start, lr: float) -> None:
        self.optimizer = Optimizer(task.training, params, lr)
        self.clip_norm = task.training.clip_norm
        self.mu = float(start.broadcast.get("proximal_mu", getattr(task.objective, "proximal_mu", 0.0)))
        self.pulled = [k for k, name in enumerate(plan.moving) if name in start.params] if self.mu else []
        self.anchors = [start.params[plan.moving[k]] for k in self.pulled]
        self.free = not self.pulled and self.clip_norm is None  # nothing to do before the optimiser

    def constrain(self, grads: list[Tensor]) -> None:
        """Add the proximal pull and clip, in place."""
        if self.pulled:
            pulled = [grads[k] for k in self.pulled]
            torch._foreach_add_(pulled, [self.optimizer.params[k] for k in self.pulled], alpha=self.mu)
            torch._foreach_add_(pulled, self.anchors, alpha=-self.mu)
        if self.clip_norm is not None:
            clip(grads, self.clip_norm)

    def __call__(self, grads: list[Tensor]) -> None:
        """Take one step."""
        self.constrain(grads)
        self.optimizer.step(grads)


def _at(context: Context, step: int, step_state: Mapping[str, Tensor] | None = None) -> Context:
    """Return the context of a step (`dataclasses.replace` costs five times as much)."""
    new = object.__new__(Context)
    new.__dict__.update(context.__dict__)
    new.__dict__["step"] = step
    if step_state is not None:
        new.__dict__["step_state"] = step_state
    return new


def _gradient(loss: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Return the gradient, zero where the loss does not depend on a parameter."""
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]


def _column(values: list[Any], device: torch.device) -> Tensor:
    """Return numbers and 0-d tensors as (K,) float64."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    return torch.tensor(values, dtype=torch.float64, device=device)


def _mean_losses(rows: list[_Row], task: Task) -> Tensor:
    """Return each row's mean training loss over the samples of its steps (K,)."""
    steps = [len(row.losses) for row in rows]
    if not sum(steps):
        return torch.zeros(len(rows), dtype=task.dtype, device=task.device)
    losses = torch.stack([loss for row in rows for loss in row.losses]).double()  # (S,)
    counts = torch.tensor([count for row in rows for count in row.counts], dtype=torch.float64, device=task.device)
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(steps)]), device=task.device)  # (K+1,)
    # Segment by segment, not as differences of one running sum: there one row's NaN would reach all rows after it.
    means = segment_sums(losses * counts, offsets) / segment_sums(counts, offsets).clamp(min=1)  # (K,)
    return means.to(task.dtype)
