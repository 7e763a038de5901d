"""The local round of a chunk of rows, trained together in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fedsim.engine.batches import Step, steps
from fedsim.engine.gradients import Gradient
from fedsim.engine.laid import Laid, Plan
from fedsim.engine.optimizer import Optimizer
from fedsim.engine.situation import Situation
from fedsim.engine.task import BUFFER, LOCAL, Block, Job, Task
from fedsim.layout import Params
from fedsim.local import Int64
from fedsim.models.dropout import KeyedDropout
from fedsim.rng import fold_in


class Chunk:
    """Some rows of a job, longest first.

    Args:
        task: what all rounds share.
        job: the rows.
        laid: what they do.
        rows: (R,) positions in the job, in descending number of steps.
        gradient: what differentiates their loss.

    """

    def __init__(self, task: Task, job: Job, laid: Laid, rows: Int64, gradient: Gradient) -> None:
        self.task, self.job, self.plans, self.rows, self.gradient = task, job, laid.plans, rows, gradient
        self.where = torch.from_numpy(rows).to(task.device)  # (R,)
        self.keys = laid.keys[self.where]  # (R,)
        self.state = {name: value[self.where] for name, value in job.state.items()}
        # Sums of loss × samples and of samples, (R,) each.
        self.losses, self.seen = torch.zeros(2, len(rows), dtype=torch.float64, device=task.device)
        versions = job.received[rows].tolist()
        self.single = len(set(versions)) == 1
        self.start = job.models[versions[0]] if self.single else torch.stack([job.models[v] for v in versions])
        split = task.shared.split(self.start)
        self.received = {n: v.expand(len(rows), *v.shape) for n, v in split.items()} if self.single else split
        # An objective of its own may hold a dropout too.
        self.drops = not gradient.fused or any(isinstance(m, KeyedDropout) for m in task.module.modules())
        self.lent: list[tuple[str, Tensor]] = []  # gradients that the objective keeps, with the names of theirs
        self.sent = [job.broadcasts.get(version, {}) for version in versions]

    def train(self, out: Tensor, block: Block) -> None:
        """Train in place in out (R, D), which ends as the updates; the rest goes into the job's block."""
        out.copy_(self.start)
        params = self.task.shared.split(out)
        params |= {name: self.state[LOCAL + name] for name in self.task.local.names}
        situation = None
        for plan in self.plans:
            situation = self._situation(plan)
            self._phase(plan, params, situation)
        trained = {name: value.clone() for name, value in params.items()} if self._finishes else {}
        out.sub_(self.start)
        if out.device.type == "cpu":
            for row, delta in zip(self.rows.tolist(), out, strict=True):
                block.square_norms[row] = torch.dot(delta, delta)
        else:  # one operation: a launch a row would cost more than the sums
            block.square_norms[self.where] = torch.linalg.vecdot(out, out)  # (R,)
        block.extras["train_loss"][self.where] = (self.losses / self.seen.clamp(min=1)).to(self.task.dtype)
        if self._finishes and situation is not None:
            self._finish(trained, situation, block)
        for name, value in self.state.items():
            block.state[name][self.where] = value

    @property
    def _finishes(self) -> bool:
        return hasattr(self.task.objective, "finish")

    def _situation(self, plan: Plan) -> Situation:
        device = self.task.device
        stacked: dict[str, Any] = {
            "received": self.received,
            "client_state": {n: v for n, v in self.state.items() if not n.startswith((LOCAL, BUFFER))},
            "num_steps": torch.from_numpy(plan.schedule.num_steps[self.rows]).to(device),
            "num_samples": torch.from_numpy(plan.schedule.sizes[self.rows]).to(device),
            "key": self.keys,
        }
        if self.single:
            return Situation(self.task, plan.number, self.job.lr, stacked, self.sent[0])
        names = self.sent[0].keys()
        stacked["broadcast"] = {n: torch.stack([self._tensor(s[n]) for s in self.sent]) for n in names}
        return Situation(self.task, plan.number, self.job.lr, stacked)

    def _tensor(self, value: Any) -> Tensor:
        """Return what a rule sent as a tensor; a number in the run's precision."""
        dtype = self.task.dtype if isinstance(value, float) else None
        return torch.as_tensor(value, dtype=dtype).to(self.task.device)

    def _phase(self, plan: Plan, params: Params, situation: Situation) -> None:
        """Run the steps of a phase in place in params (R, *shape)."""
        task = self.task
        own = {name: params[name] for name in plan.moving}
        mu = float(self.sent[0].get("proximal_mu", getattr(task.objective, "proximal_mu", 0.0)))
        optimizer = Optimizer(task.training, list(own.values()), self.job.lr)
        at_once = self.gradient.begin(plan.moving, task.training, self.job.lr, mu)
        for step in steps(plan.schedule, self.rows, task.device, task.dtype):
            count = len(step.lengths)
            active = {name: value[:count] for name, value in params.items()}
            drop = self.keys[:count]  # (a,)
            if self.drops:
                drop = fold_in(fold_in(drop, plan.number), step.number)
            losses, grads = self.gradient(active, self._samples(plan, step), step, drop, situation)
            if at_once:
                if mu:  # what is left of w ← (1 − ημ) w + ημ w_received
                    for name in plan.moving:
                        if name in self.received:
                            active[name].add_(self.received[name][:count], alpha=self.job.lr * mu)
            else:
                self._descend(plan, active, grads, optimizer, situation, mu, step)
            self.losses[:count] += losses.double() * step.sizes
            self.seen[:count] += step.sizes

    def _samples(self, plan: Plan, step: Step) -> Tensor:
        """Gather the inputs of a step (a, b, …)."""
        task = self.task
        x = task.x.index_select(0, step.samples.flatten())  # (a·b, …)
        if task.augment is not None:
            keys = fold_in(fold_in(self.keys[: len(step.lengths)], plan.number + 1)[:, None], step.offsets)  # (a, b)
            x = task.augment(x, keys.flatten())
        return x.view(*step.samples.shape, *x.shape[1:])

    def _descend(  # noqa: PLR0913  what a step needs once gradients are known
        self, plan: Plan, active: Params, grads: Params, optimizer: Optimizer, situation: Situation, mu: float,
        step: Step,
    ) -> None:  # fmt: skip
        """Take one step of the rows that have one."""
        count = len(step.lengths)
        if mu:
            for name in plan.moving:
                if name in self.received:
                    grads[name].add_(active[name] - self.received[name][:count], alpha=mu)
        listed = [grads[name] for name in plan.moving]
        bound = self.task.training.clip_norm
        if bound is not None:
            _clip_rows(listed, bound)
        direction = getattr(self.task.objective, "direction", None)
        scale = None
        if direction is not None:

            def turn(g: Params, p: Params, mine: Mapping[str, Any]) -> Any:
                return direction(g, p, situation.context(mine, step.number))

            moving = dict(zip(plan.moving, listed, strict=True))
            turned, after = vmap(turn)(moving, active, situation.first(count))
            after = kept(after, active)
            self._lend(after, grads)
            turned = (
                {name: value.clone() for name, value in turned.items()} if optimizer.writes else kept(turned, active)
            )
            listed = [turned[name] for name in plan.moving]
            situation.keep(after, count)
            scale = after.get("lr_scale")  # (a,)
        optimizer.step(listed, count, scale=scale)

    def _lend(self, step_state: Mapping[str, Tensor], grads: Params) -> None:
        """Take from the kernels the gradients that the objective keeps, and give back those that it keeps no more."""
        places = {_place(value) for value in step_state.values()}
        before, self.lent = self.lent, [(name, grad) for name, grad in grads.items() if _place(grad) in places]
        for name, _ in self.lent:
            del grads[name]
        for name, grad in before:
            if _place(grad) in places:
                self.lent.append((name, grad))
            else:
                grads.setdefault(name, grad)

    def _finish(self, trained: Params, situation: Situation, block: Block) -> None:
        """Let the objective end the rows: what they keep, send beside the update, and weigh."""
        finish = self.task.objective.finish
        last = max(int(self.plans[situation.number].schedule.num_steps[self.rows].max()) - 1, 0)
        weighs = []

        def end(p: Params, mine: Mapping[str, Any]) -> Any:
            kept, extras, weight = finish(p, situation.context(mine, last))
            weighs.append(weight is not None)
            return kept, extras, torch.as_tensor(0.0 if weight is None else weight, dtype=torch.float64)

        kept, extras, weight = vmap(end)(trained, situation.first(len(self.rows)))
        self.state.update(kept)
        for name, value in extras.items():
            room = value.new_zeros(len(block.weights), *value.shape[1:])
            block.extras.setdefault(name, room)[self.where] = value  # at once: another thread's chunk does the same
        if weighs[-1]:
            block.weights[self.where] = weight.double()


def kept(values: Mapping[str, Tensor], params: Params) -> dict[str, Tensor]:
    """Return what an objective gave back, without views of parameters, which move in place."""
    moving = {_place(value) for value in params.values()}
    return {name: value.clone() if _place(value) in moving else value for name, value in values.items()}


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _clip_rows(grads: list[Tensor], bound: float) -> None:
    """Scale each row's gradient in place so that its norm over all tensors is at most `bound`."""
    squares = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0)  # (a,)
    factor = (bound / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)  # (a,)
    for grad in grads:
        grad.mul_(factor.view(-1, *(1,) * (grad.dim() - 1)))
