"""A step of the rows of a chunk: gradients, and what a client's optimiser makes of them, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fedsim.engine.batches import Step
from fedsim.engine.gradients import Gradient
from fedsim.engine.laid import Plan
from fedsim.engine.optimizer import Optimizer
from fedsim.engine.situation import Situation
from fedsim.engine.task import Task
from fedsim.layout import Params
from fedsim.models.dropout import KeyedDropout
from fedsim.rng import fold_in


class Stepping:
    """What the steps of some rows share, and what they add up.

    Args:
        task: what all rounds share.
        gradient: what differentiates the rows' loss.
        keys: (R,) of `row_keys`.
        received: the weights that each row is pulled to, name → (R, *shape).
        lr: this round's local rate.
        mu: strength ≥ 0 of the pull.

    """

    def __init__(self, task: Task, gradient: Gradient, keys: Tensor, received: Params, lr: float, mu: float) -> None:
        self.task, self.gradient, self.keys, self.received, self.lr, self.mu = task, gradient, keys, received, lr, mu
        # Sums of loss × samples and of samples, (R,) each.
        self.losses, self.seen = torch.zeros(2, len(keys), dtype=torch.float64, device=task.device)
        # An objective of its own may hold a dropout too.
        self.drops = not gradient.fused or any(isinstance(m, KeyedDropout) for m in task.module.modules())
        self.lent: list[tuple[str, Tensor]] = []  # gradients that the objective keeps, with the names of theirs

    def begin(
        self, plan: Plan, params: Params, situation: Situation, moments: list[Tensor] | None = None
    ) -> Callable[[Step], None]:
        """Begin a phase; return what takes a step of the first rows, in place in params (R, *shape).

        Args:
            plan: the phase.
            params: name → (R, *shape).
            situation: what else the rows know.
            moments: zeros where momentum is kept, one a name that moves; None: of its own.

        """
        own = {name: params[name] for name in plan.moving}
        optimizer = Optimizer(self.task.training, list(own.values()), self.lr)
        optimizer.first = moments or []
        at_once = self.gradient.begin(plan.moving, self.task.training, self.lr, self.mu)

        def take(step: Step) -> None:
            count = len(step.sizes)
            active = {name: value[:count] for name, value in params.items()}
            drop = self.keys[:count]  # (a,)
            if self.drops:
                drop = fold_in(fold_in(drop, plan.number), step.number)
            losses, grads = self.gradient(active, self._samples(plan, step), step, drop, situation)
            if at_once:
                if self.mu:  # what is left of w ← (1 − ημ) w + ημ w_received
                    for name in plan.moving:
                        if name in self.received:
                            active[name].add_(self.received[name][:count], alpha=self.lr * self.mu)
            else:
                self._descend(plan, active, grads, optimizer, situation, step)
            self.losses[:count] += losses.double() * step.sizes
            self.seen[:count] += step.sizes

        return take

    def _samples(self, plan: Plan, step: Step) -> Tensor:
        """Gather the inputs of a step (a, b, …)."""
        task = self.task
        x = task.x.index_select(0, step.samples.flatten())  # (a·b, …)
        if task.augment is not None:
            keys = fold_in(fold_in(self.keys[: len(step.sizes)], plan.number + 1)[:, None], step.offsets)  # (a, b)
            x = task.augment(x, keys.flatten())
        return x.view(*step.samples.shape, *x.shape[1:])

    def _descend(
        self, plan: Plan, active: Params, grads: Params, optimizer: Optimizer, situation: Situation, step: Step
    ) -> None:
        """Take one step of the rows that have one."""
        count = len(step.sizes)
        if self.mu:
            for name in plan.moving:
                if name in self.received:
                    grads[name].add_(active[name] - self.received[name][:count], alpha=self.mu)
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
            if missing := sorted(moving.keys() - turned.keys()):
                what = f"{type(self.task.objective).__name__}.direction"
                raise ValueError(
                    f"{what} must return a direction for every parameter that moves; {missing[0]} has none"
                )
            lying = places(active)
            after = kept(after, lying)
            self._lend(after, grads)
            turned = (
                {name: value.clone() for name, value in turned.items()} if optimizer.writes else kept(turned, lying)
            )
            listed = [turned[name] for name in plan.moving]
            situation.keep(after, count)
            scale = after.get("lr_scale")  # (a,)
        optimizer.step(listed, count, scale=scale)

    def _lend(self, step_state: Mapping[str, Tensor], grads: Params) -> None:
        """Take from the kernels the gradients that the objective keeps, and give back those that it keeps no more."""
        held = places(step_state)
        before, self.lent = self.lent, [(name, grad) for name, grad in grads.items() if place(grad) in held]
        for name, _ in self.lent:
            del grads[name]
        for name, grad in before:
            if place(grad) in held:
                self.lent.append((name, grad))
            else:
                grads.setdefault(name, grad)


def places(params: Mapping[str, Tensor]) -> set[int]:
    """Return where parameters lie."""
    return {place(value) for value in params.values()}


def kept(values: Mapping[str, Tensor], moving: set[int]) -> dict[str, Tensor]:
    """Return what an objective gave back, without views of what lies where parameters do, which move in place."""
    return {name: value.clone() if place(value) in moving else value for name, value in values.items()}


def place(tensor: Tensor) -> int:
    """Return where a tensor's storage lies."""
    return tensor.untyped_storage().data_ptr()


def _clip_rows(grads: list[Tensor], bound: float) -> None:
    """Scale each row's gradient in place so that its norm over all tensors is at most `bound`."""
    squares = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0)  # (a,)
    factor = (bound / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)  # (a,)
    for grad in grads:
        grad.mul_(factor.view(-1, *(1,) * (grad.dim() - 1)))
