"""Clients one after another through one module whose parameters are updated in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.contracts import Batch, Context, Phase
from fedsim.engine.client import Plan, Row, Start, Update, gather
from fedsim.engine.precision import forward, functional
from fedsim.engine.stepping import kept, places
from fedsim.engine.task import BUFFER, LOCAL, Block, Job, Task, Weighed, local_round, mean_criterion, row_keys
from fedsim.layout import Params
from fedsim.local import moving
from fedsim.models.dropout import KeyedDropout, dropout_key
from fedsim.rng import fold_in

GATHER_ENTRIES = 1 << 19  # input entries of a job that are gathered at once; more would leave the cache again


class Sequential:
    """The reference engine: any module, any objective; `print` and breakpoints work in a loss.

    The D shared parameters are views of one flat work vector, so a client costs one copy in and one subtraction
    out. Where convolution weights are kept channels-last, as CPU and GPU kernels want them, each stands alone.

    Args:
        task: what all rounds share. The module's own tensors become the engine's.
        channels_last: layout of images and convolution weights; None: where the model convolves images.

    """

    block_rows: int | None = None

    def __init__(self, task: Task, *, channels_last: bool | None = None) -> None:
        self.task = task
        if channels_last is None:
            channels_last = any(isinstance(m, nn.Conv2d) for m in task.module.modules()) and task.x.dim() == 4
        self.plan: Mapping[str, Any] = {"engine": "sequential", "channels_last": channels_last}
        self._bind(channels_last)
        self._x = task.x.contiguous(memory_format=torch.channels_last) if channels_last else task.x
        self._mean_weights: dict[int, Tensor] = {}  # size of a batch → its criterion weights
        self._criterion = mean_criterion(task.objective) or self._weighted
        self._dropout = any(isinstance(module, KeyedDropout) for module in task.module.modules())
        names = ("loss", "direction", "finish")
        self._of_batch = hasattr(task.objective, "loss")
        self._simple = not self._dropout and not any(hasattr(task.objective, name) for name in names)

    def _bind(self, channels_last: bool) -> None:
        """Make the module's shared parameters views of one flat vector, or apart if some are channels-last."""
        task = self.task
        own = dict(task.module.named_parameters())
        shared = [own[name] for name in task.shared.names]
        alone = channels_last and any(parameter.dim() == 4 for parameter in shared)
        self.flat = torch.empty(0 if alone else task.shared.size, dtype=task.dtype, device=task.device)
        self.apart: list[tuple[str, Tensor]] = []
        if alone:
            for name, parameter in zip(task.shared.names, shared, strict=True):
                kept = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
                parameter.data = torch.empty_like(parameter, memory_format=kept)
                self.apart.append((name, parameter.data))
        else:
            for name, view in task.shared.split(self.flat).items():
                own[name].data = view
        self.params: Params = {name: own[name] for name in (*task.shared.names, *task.local.names)}
        self.model = functional(task, task.module, self.params)
        self.forward = forward(task)
        buffers = dict(task.module.named_buffers())
        self.buffers = {BUFFER + name: buffers[name] for name in task.buffers.names}

    def close(self) -> None:
        """Hold nothing beyond the module itself."""

    def train(self, job: Job, out: Tensor) -> Block:
        """Train the rows of a job and write their updates w_k − w_received into out (K, D)."""

        def write(row: int, start: Start, _: Row) -> Tensor:
            self._write(start, out[row])
            norm: Tensor = torch.linalg.vector_norm(out[row]).square()  # while the row is in cache
            return norm

        return self._train(job, write)

    def train_sum(self, job: Job, coefficients: Tensor, total: Tensor) -> Block:
        """Train the rows of a job and add Σ c_k Δ_k over finite rows to total (D,), from the first row to the last.

        No row is ever held: an update is the work parameters themselves, from which the start has been subtracted.

        Args:
            job: the rows.
            coefficients: (K,) c_k.
            total: (D,), added to.

        Raises:
            Weighed: a client says what it weighs.

        """
        views = self.task.shared.split(total)
        shares = coefficients.tolist()

        def add(row: int, start: Start, left: Row) -> Tensor:
            if left.weight is not None:
                raise Weighed
            norm: Tensor = torch.zeros((), dtype=self.task.dtype, device=self.task.device)
            if len(self.flat):
                norm = torch.linalg.vector_norm(self.flat.sub_(start.flat)).square()
            for name, weight in self.apart:
                norm += torch.linalg.vector_norm(weight.sub_(start.params[name])).square()
            if bool(torch.isfinite(norm)):
                if len(self.flat):
                    total.add_(self.flat, alpha=shares[row])
                for name, weight in self.apart:
                    views[name].add_(weight, alpha=shares[row])
            return norm

        return self._train(job, add)

    def fold(self, total: Tensor, updates: Tensor, coefficients: Tensor) -> None:
        """Add Σ c_k Δ_k of updates (k, D) to total (D,), row after row, as `train_sum` does."""
        for update, share in zip(updates, coefficients.tolist(), strict=True):
            total.add_(update, alpha=share)

    def _train(self, job: Job, keep: Callable[[int, Start, Row], Tensor]) -> Block:
        """Train the rows of a job one after another; `keep` takes each one's parameters and returns ‖Δ_k‖²."""
        task = self.task
        plans = [self._plan(job, number, phase) for number, phase in enumerate(task.phases)]
        starts = {version: Start(task, self.params, job, version, plans) for version in set(job.received.tolist())}
        keys = row_keys(task, job)  # (K,)
        task.module.train()
        rows = []
        with torch.no_grad():
            for row, version in enumerate(job.received.tolist()):
                start = starts[version]
                state = {name: value[row] for name, value in job.state.items()}
                self._load(start, state, job.buffers)
                left = self._row(job, row, start, plans, keys, state)
                left.square_norm = keep(row, start, left)
                rows.append(left)
        return gather(task, job, plans, rows)

    def _row(self, job: Job, row: int, start: Start, plans: list[Plan], keys: Tensor, state: dict[str, Tensor]) -> Row:
        """Run one client's local round in the module's own parameters."""
        left = Row()
        if self._simple:
            for plan, update in zip(plans, start.updates, strict=True):
                self._simple_phase(plan, update, row, keys, left)
        else:
            context = self._general_phases(job, row, start, plans, keys, state, left)
            finish = getattr(self.task.objective, "finish", None)
            if finish is not None:
                now = {name: p.detach() for name, p in self.params.items()}
                own, extras, left.weight = finish(now, context)
                moving = places(now)
                left.extras = kept(extras, moving)
                left.state.update(kept(own, moving))
        if state:
            left.state = state | left.state
            left.state.update({LOCAL + n: self.params[n].detach().clone() for n in self.task.local.names})
            left.state.update({name: b.clone() for name, b in self.buffers.items() if name in state})
        flat = [b.detach().flatten().to(self.task.dtype) for b in self.buffers.values()]
        left.buffers = torch.cat(flat) if flat else self.flat[:0]
        return left

    def _load(self, start: Start, state: Mapping[str, Tensor], buffers: Tensor) -> None:
        if len(self.flat):
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

    def _write(self, start: Start, out: Tensor) -> None:
        if len(self.flat):
            torch.sub(self.flat, start.flat, out=out)
        if self.apart:
            views = self.task.shared.split(out)
            for name, weight in self.apart:
                torch.sub(weight, start.params[name], out=views[name])

    def _simple_phase(self, plan: Plan, update: Update, row: int, keys: Tensor, left: Row) -> None:
        """Run the steps of a phase whose loss is a criterion of the logits: the fast path."""
        forward, criterion, enable_grad = self.forward, self._criterion, torch.enable_grad
        params = update.optimizer.params
        update.optimizer.reset()
        step = update.optimizer.step if update.free else update
        for x, y in self._batches(plan, row, keys):
            size = y.shape[0]
            with enable_grad():
                loss = criterion(forward(x), y)
                grads = _gradient(loss, params)
            left.losses.append(loss.detach())
            left.counts.append(size)
            step(grads)

    def _general_phases(  # noqa: PLR0913  as `_row`
        self, job: Job, row: int, start: Start, plans: list[Plan], keys: Tensor, state: dict[str, Tensor], left: Row
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
        self, plan: Plan, update: Update, row: int, keys: Tensor, context: Context, left: Row
    ) -> Context:
        """Run the steps of a phase of any objective; return the context of its last step."""
        params = update.optimizer.params
        update.optimizer.reset()
        direction = getattr(self.task.objective, "direction", None)
        now = {name: p.detach() for name, p in self.params.items()}  # which move in place
        moving = places(now)
        draws = self._dropout or self._of_batch  # which may hold a dropout too
        writes, free, optimizer = update.optimizer.writes, update.free, update.optimizer
        state = context.step_state
        for step, (x, y) in enumerate(self._batches(plan, row, keys)):
            context = _at(context, step, state)
            if draws:
                with torch.enable_grad(), dropout_key(fold_in(fold_in(context.key, plan.number), step)):
                    loss = self._loss(x, y, context)
                    grads = _gradient(loss, params)
            else:
                with torch.enable_grad():
                    loss = self._loss(x, y, context)
                    grads = _gradient(loss, params)
            left.losses.append(loss.detach())
            left.counts.append(len(y))
            if not free:
                update.constrain(grads)
            if direction is not None:
                named = dict(zip(plan.moving, grads, strict=True))
                turned, state = direction(named, now, context)
                state = kept(state, moving)
                if turned is not named or writes:
                    turned = turned if writes else kept(turned, moving)
                    grads = [turned[n].clone() if writes else turned[n] for n in plan.moving]
            optimizer.step(grads, scale=state.get("lr_scale"))
        return _at(context, context.step, state)

    def _loss(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        if self._of_batch:
            value: Tensor = self.task.objective.loss(self.model, self.params, Batch(x, y), context)[0]
        else:
            value = self._criterion(self.forward(x), y)
        return value

    def _weighted(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the criterion of a batch whose samples weigh 1/B each."""
        size = len(y)
        if size not in self._mean_weights:
            self._mean_weights[size] = torch.full((size,), 1 / size, dtype=self.task.dtype, device=self.task.device)
        loss: Tensor = self.task.objective.criterion(logits, y, self._mean_weights[size])
        return loss

    def _plan(self, job: Job, number: int, phase: Phase | None) -> Plan:
        """Lay out a phase; small cohorts' samples are gathered here at once, others' pass by pass."""
        task = self.task
        order = local_round(task, job, number, phase)
        positions = torch.from_numpy(order.positions).to(task.device)  # (M,)
        names = moving((*task.shared.names, *task.local.names), phase)
        x = self._x.index_select(0, positions) if len(positions) * self._x[0].numel() <= GATHER_ENTRIES else None
        return Plan(number, names, order, positions, x, task.y.index_select(0, positions))

    def _batches(self, plan: Plan, row: int, keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
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


def _at(context: Context, step: int, step_state: Mapping[str, Tensor]) -> Context:
    """Return the context of a step (`dataclasses.replace` costs five times as much)."""
    new = object.__new__(Context)
    new.__dict__.update(context.__dict__, step=step, step_state=step_state)
    return new


def _gradient(loss: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Return the gradient, zero where the loss does not depend on a parameter."""
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
