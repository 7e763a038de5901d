"""Gradients of many clients at once: by fused client kernels, or by `torch.func` over rows for any module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from fedsim.contracts import Batch
from fedsim.engine.batches import Step
from fedsim.engine.precision import functional
from fedsim.engine.rows import Rows, Sink
from fedsim.engine.situation import Situation
from fedsim.engine.task import Task
from fedsim.layout import Params
from fedsim.local import LocalTraining
from fedsim.models.dropout import dropout_key


class Gradient(Protocol):
    """Differentiates the loss of the first a rows of a chunk."""

    fused: bool

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Return logits (R, b, C) of rows' parameters and x (R, b, …), in eval mode."""
        ...

    def begin(self, moving: tuple[str, ...], training: LocalTraining, lr: float, mu: float) -> bool:
        """Begin a phase; return whether calls take the step themselves, but for the pull towards what was received."""
        ...

    def __call__(
        self, params: Params, x: Tensor, step: Step, keys: Tensor, situation: Situation
    ) -> tuple[Tensor, Params]:
        """Return losses (a,) and, unless the step is taken, name → gradient (a, *shape), to be written into.

        Args:
            params: name → (a, *shape).
            x: (a, b, …).
            step: labels' positions, weights, sizes.
            keys: (a,) of dropout.
            situation: what else the rows know.

        """
        ...


class FusedGradient:
    """Of a criterion, through fused layers; plain SGD takes its step in the backward itself."""

    fused = True

    def __init__(self, task: Task, module: nn.Module, rows: Rows) -> None:
        self.task, self.module, self.rows = task, module, rows
        own, trained = dict(task.module.named_parameters()), {*task.shared.names, *task.local.names}
        rows.fixed = {name: p.detach() for name, p in own.items() if name not in trained}
        self.late = self._probe()  # weights that one forward reads more than once

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Run the merged forward."""
        self.rows.count, self.rows.params = len(x), params
        self.module.eval()
        try:
            logits: Tensor = self.module(x.flatten(0, 1))
        finally:
            self.module.train()
        return logits.view(*x.shape[:2], -1)

    def _probe(self) -> frozenset[str]:
        """Run one sample and count who reads which weight."""
        own = dict(self.task.module.named_parameters())
        names = (*self.task.shared.names, *self.task.local.names)
        self.rows.count, self.rows.params = 1, {name: own[name].detach().unsqueeze(0) for name in names}
        self.rows.calls.clear()
        with torch.no_grad(), dropout_key(torch.zeros(1, dtype=torch.int64, device=self.task.device)):
            self.module(self.task.x[:1])
        return frozenset(name for name, count in self.rows.calls.items() if count > 1)

    def begin(self, moving: tuple[str, ...], training: LocalTraining, lr: float, mu: float) -> bool:
        """Begin a phase."""
        plain = training.optimizer == "sgd" and not training.momentum and training.clip_norm is None
        plain &= not hasattr(self.task.objective, "direction")  # which wants the gradient itself
        pulled = self.task.shared.names  # personal parameters have nothing to be pulled to
        keep = {name: 1 - lr * (training.weight_decay + (mu if name in pulled else 0.0)) for name in moving}
        self.rows.moves = frozenset(moving)
        self.rows.sink = Sink(lr, keep, self.late) if plain else Sink(None)
        return plain

    def __call__(
        self, params: Params, x: Tensor, step: Step, keys: Tensor, situation: Situation
    ) -> tuple[Tensor, Params]:
        """Run forward and backward."""
        rows = self.rows
        rows.count, rows.params = len(x), params
        rows.sink.begin(params)
        y = self.task.y[step.samples]  # (a, b)
        with torch.enable_grad(), dropout_key(keys):
            logits = self.module(x.flatten(0, 1))  # (a·b, C)
            losses: Tensor = self.task.objective.criterion(logits.view(*y.shape, -1), y, step.weights)  # (a,)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        rows.sink.settle(rows.moves)
        return losses.detach(), rows.sink.grads


class GenericGradient:
    """Of any objective, through any module that `torch.func` can batch."""

    fused = False

    def __init__(self, task: Task, module: nn.Module, *, mixes_samples: bool, alone: bool) -> None:
        self.task, self.model, self.alone = task, functional(task, module), alone
        # A loss of its own, or a model that looks at a whole batch, must get exactly a row's samples: no repeats.
        self.of_batch = hasattr(task.objective, "loss")
        self.whole = self.of_batch or mixes_samples
        self.moving: tuple[str, ...] = ()

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Run the model under `vmap`, or a row alone as it is."""
        self.model.module.eval()
        try:
            logits: Tensor = self.model(*_take((params, x), 0))[None] if self.alone else vmap(self.model)(params, x)
        finally:
            self.model.module.train()
        return logits

    def begin(self, moving: tuple[str, ...], training: LocalTraining, lr: float, mu: float) -> bool:
        """Begin a phase."""
        self.moving = moving
        return False

    def __call__(
        self, params: Params, x: Tensor, step: Step, keys: Tensor, situation: Situation
    ) -> tuple[Tensor, Params]:
        """Run `grad_and_value` under `vmap`; rows whose batches differ in size go in groups where that matters.

        Where rows are always alone each is differentiated as it is: that loads nothing of torch's compiler, which takes
        seconds and 90 MB.
        """
        own = {name: params[name] for name in self.moving}
        still = {name: value for name, value in params.items() if name not in own}
        y = self.task.y[step.samples]  # (a, b)
        operands = (own, still, x, y, step.weights, keys, situation.first(len(y)))
        sizes = sorted(set(step.lengths.tolist())) if self.whole else []
        if len(sizes) <= 1:
            grads, losses = self._batched(operands, step, situation)
            return losses, grads
        grads = {name: torch.empty_like(value) for name, value in own.items()}
        losses = torch.empty(len(y), dtype=self.task.dtype, device=y.device)
        for size in sizes:
            chosen = torch.from_numpy((step.lengths == size).nonzero()[0]).to(y.device)
            some = _take(operands, chosen)
            cut = (*some[:2], *(part[:, :size] for part in some[2:5]), *some[5:])
            part, losses[chosen] = self._batched(cut, step, situation)
            for name, value in part.items():
                grads[name][chosen] = value
        return losses, grads

    def _batched(self, operands: tuple[Any, ...], step: Step, situation: Situation) -> tuple[Params, Tensor]:
        objective = self.task.objective

        def loss(  # noqa: PLR0913  what one row's loss reads
            own: Params, still: Params, x: Tensor, y: Tensor, weights: Tensor, key: Tensor, mine: Mapping[str, Any]
        ) -> Tensor:
            params = own | still
            with dropout_key(key):
                value: Tensor
                if self.of_batch:
                    result = objective.loss(self.model, params, Batch(x, y), situation.context(mine, step.number))
                    if not isinstance(result, tuple):
                        what = f"{type(objective).__name__}.loss"
                        raise TypeError(f"{what} must return (loss, extras), got {type(result).__name__}")
                    value = result[0]
                else:
                    value = objective.criterion(self.model(params, x), y, weights)
                return value

        if not self.alone:
            grads, losses = vmap(grad_and_value(loss))(*operands)
            return grads, losses
        own, *rest = _take(operands, 0)
        # `data`, not `detach`: other threads write to other rows of this memory, and autograd counts writes by memory.
        moved = {name: value.data.requires_grad_() for name, value in own.items()}
        with torch.enable_grad():
            value = loss(moved, *rest)
        if not value.requires_grad:  # it depends on nothing that moves
            return {name: torch.zeros_like(p)[None] for name, p in own.items()}, value[None]
        found = torch.autograd.grad(value, list(moved.values()), allow_unused=True, materialize_grads=True)
        return {name: grad[None] for name, grad in zip(moved, found, strict=True)}, value.detach()[None]


def _take(tree: Any, chosen: Tensor | int) -> Any:
    """Return some rows of everything in a tree."""
    if isinstance(tree, Tensor):
        return tree[chosen]
    if isinstance(tree, tuple):
        return tuple(_take(value, chosen) for value in tree)
    return {name: _take(value, chosen) for name, value in tree.items()}
