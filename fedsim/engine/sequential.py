"""Clients one after another through one module whose parameters are updated in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.contracts import Batch, Context, Phase
from fedsim.engine.model import Functional
from fedsim.engine.optimizer import Optimizer, clip
from fedsim.engine.task import Block, Job, Task
from fedsim.layout import Params
from fedsim.local import Schedule, moving, schedule
from fedsim.models.dropout import KeyedDropout, dropout_key
from fedsim.rng import fold_in, keyed_bits

LOCAL = "local/"  # prefix of personal parameters in a client's state
BUFFER = "buffer/"  # prefix of personal buffers


class Sequential:
    """The reference engine: any module, any objective; `print` and breakpoints work in a loss.

    The D shared parameters are views of one flat work vector, so a client costs one copy in and one subtraction
    out. Convolution weights are kept channels-last beside it, where CPU and GPU kernels want them.
    """

    def __init__(self, task: Task, *, channels_last: bool | None = None) -> None:
        self.task = task
        if channels_last is None:
            channels_last = any(isinstance(m, nn.Conv2d) for m in task.module.modules()) and task.x.dim() == 4
        self.plan: Mapping[str, Any] = {"engine": "sequential", "channels_last": channels_last}
        self._bind(channels_last)
        self._mean_weights: dict[int, Tensor] = {}
        self._dropout = any(isinstance(module, KeyedDropout) for module in task.module.modules())
        self._x = task.x.contiguous(memory_format=torch.channels_last) if channels_last else task.x

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
        self.buffers = [buffers[name] for name in task.buffers.names]

    def close(self) -> None:
        """Hold nothing beyond the module itself."""

    def train(self, job: Job, out: Tensor) -> Block:
        """Train the rows of a job and write their updates w_k − w_received into out (K, D)."""
        task, count = self.task, len(job)
        plans = [_Plan(task, job, number, phase) for number, phase in enumerate(task.phases)]
        bits = keyed_bits(task.seed, "client", job.key, job.clients) >> np.uint64(32)  # (K,)
        keys = torch.from_numpy(bits.astype(np.int64)).to(task.device)  # (K,)
        sizes = task.partition.sizes[job.clients]
        task.module.train()
        rows = [
            self._row(job, row, out[row], plans, keys[row], {name: value[row] for name, value in job.state.items()})
            for row in range(count)
        ]
        weights = [float(sizes[k]) if row[3] is None else row[3] for k, row in enumerate(rows)]
        return Block(
            square_norms=torch.stack([row[0] for row in rows]),
            weights=torch.stack([torch.as_tensor(w, dtype=torch.float64, device=task.device) for w in weights])
            if any(isinstance(w, Tensor) for w in weights)
            else torch.tensor(weights, dtype=torch.float64, device=task.device),
            num_steps=torch.from_numpy(np.sum([plan.schedule.num_steps for plan in plans], axis=0)),
            extras={name: torch.stack([row[2][name] for row in rows]) for name in rows[0][2]},
            buffers=torch.stack([row[4] for row in rows]),
            state={name: torch.stack([row[1][name] for row in rows]) for name in job.state},
        )

    def _row(
        self, job: Job, row: int, out: Tensor, plans: list[_Plan], key: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Any, Tensor]:
        """Train one row; return (‖Δ‖², client state, extras, weight or None, buffers)."""
        task, objective = self.task, self.task.objective
        version = int(job.received[row])
        start = job.models[version]  # (D,)
        self._load(start, state, job.buffers)
        received = task.shared.split(start)
        total, seen = torch.zeros((), dtype=task.dtype, device=task.device), 0
        context = None
        for plan in plans:
            context = Context(
                received=received, broadcast=job.broadcasts.get(version, {}),
                client_state={n: v for n, v in state.items() if not n.startswith((LOCAL, BUFFER))},
                step_state={}, step=0, num_steps=int(plan.schedule.num_steps[row]), lr=job.lr,
                num_samples=int(plan.schedule.sizes[row]), key=key, layout=task.shared, phase=plan.number,
            )  # fmt: skip
            seen += self._phase(plan, row, context, total)
        square_norm = self._write(start, out)
        kept = dict(state)
        kept.update({LOCAL + name: self.params[name].detach().clone() for name in task.local.names})
        kept.update({name: b.clone() for name, b in self._named_buffers() if name in state})
        extras: dict[str, Tensor] = {"train_loss": total / max(seen, 1)}
        weight = None
        finish = getattr(objective, "finish", None)
        if finish is not None:
            with torch.no_grad():
                mine, more, weight = finish({n: p.detach() for n, p in self.params.items()}, context)
            kept.update(mine)
            extras.update(more)
        buffers = [b.detach().flatten().to(task.dtype) for b in self.buffers]
        return square_norm, kept, extras, weight, torch.cat(buffers) if buffers else total.new_zeros(0)

    def _named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return ((BUFFER + name, b) for name, b in zip(self.task.buffers.names, self.buffers, strict=True))

    @torch.no_grad()
    def _load(self, start: Tensor, state: Mapping[str, Tensor], buffers: Tensor) -> None:
        self.flat.copy_(start)
        if self.apart:
            views = self.task.shared.split(start)
            for name, weight in self.apart:
                weight.copy_(views[name])
        for name in self.task.local.names:
            self.params[name].copy_(state[LOCAL + name])
        for (name, buffer), value in zip(
            self._named_buffers(), self.task.buffers.split(buffers).values(), strict=True
        ):
            buffer.copy_(state.get(name, value))

    @torch.no_grad()
    def _write(self, start: Tensor, out: Tensor) -> Tensor:
        """Write w_k − w_received into out (D,) and return its squared norm, while it is in cache."""
        torch.sub(self.flat, start, out=out)
        if self.apart:
            views, old = self.task.shared.split(out), self.task.shared.split(start)
            for name, weight in self.apart:
                torch.sub(weight, old[name], out=views[name])
        return torch.dot(out, out)

    def _phase(self, plan: _Plan, row: int, context: Context, total: Tensor) -> int:
        """Run the steps of a phase; add loss × samples to total (); return the samples seen."""
        objective, training = self.task.objective, self.task.training
        params = [self.params[name] for name in plan.moving]
        optimizer = Optimizer(training, params, context.lr)
        mu = float(context.broadcast.get("proximal_mu", getattr(objective, "proximal_mu", 0.0)))
        anchors = [context.received[name] for name in plan.moving if name in context.received] if mu else []
        pulled = [k for k, name in enumerate(plan.moving) if name in context.received] if mu else []
        direction = getattr(objective, "direction", None)
        simple = direction is None and not hasattr(objective, "loss")
        seen = 0
        for step, (x, y) in enumerate(self._batches(plan, row, context.key)):
            if not simple:
                context = _at(context, step)
            if self._dropout:
                with dropout_key(fold_in(fold_in(context.key, plan.number), step)):
                    loss = self._loss(x, y, context)
            else:
                loss = self._loss(x, y, context)
            grads = list(_gradient(loss, params))
            with torch.no_grad():
                total.add_(loss.detach(), alpha=len(y))
                seen += len(y)
                if pulled:
                    torch._foreach_add_([grads[k] for k in pulled], [params[k].detach() for k in pulled], alpha=mu)
                    torch._foreach_add_([grads[k] for k in pulled], anchors, alpha=-mu)
                if training.clip_norm is not None:
                    clip(grads, training.clip_norm)
                if direction is not None:
                    named = dict(zip(plan.moving, grads, strict=True))
                    turned, step_state = direction(named, {n: p.detach() for n, p in self.params.items()}, context)
                    grads = [turned[name].clone() for name in plan.moving]
                    context = _at(context, step, step_state)
                optimizer.step(grads)
        return seen

    def _loss(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        objective = self.task.objective
        if hasattr(objective, "loss"):
            value: Tensor = objective.loss(self.model, self.params, Batch(x, y), context)[0]
            return value
        size = len(y)
        if size not in self._mean_weights:
            self._mean_weights[size] = torch.full((size,), 1 / size, dtype=self.task.dtype, device=y.device)
        value = objective.criterion(self.task.module(x), y, self._mean_weights[size])
        return value

    def _batches(self, plan: _Plan, row: int, key: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a row's local round, gathered one pass at a time."""
        task, order = self.task, plan.schedule
        n, left = int(order.sizes[row]), int(order.num_steps[row])
        batch = order.batch_size or max(n, 1)
        for epoch, begin in enumerate(range(int(order.starts[row]), int(order.starts[row + 1]), max(n, 1))):
            taken = plan.positions[begin : begin + n]  # (n,)
            x, y = self._x.index_select(0, taken), task.y.index_select(0, taken)
            if task.augment is not None:
                counter = torch.arange(n, device=x.device) + epoch * n
                x = task.augment(x, fold_in(fold_in(key, plan.number + 1), counter))
            for pair in zip(x.split(batch), y.split(batch), strict=True):
                if left == 0:
                    return
                left -= 1
                yield pair


class _Plan:
    """One phase of a job: who moves, and the samples of every row on the device."""

    def __init__(self, task: Task, job: Job, number: int, phase: Phase | None) -> None:
        self.number = number
        self.moving = moving((*task.shared.names, *task.local.names), phase)
        self.schedule: Schedule = schedule(
            task.training, task.samples_of(phase), job.clients, seed=task.seed, round=job.key, phase=(number, phase)
        )
        self.positions = torch.from_numpy(self.schedule.positions).to(task.device)


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
