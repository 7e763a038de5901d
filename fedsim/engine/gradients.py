"""Gradients of many clients at once: by fused client kernels, or by `torch.func` over rows for any module."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from fedsim.contracts import Batch, Context
from fedsim.engine.batches import Step
from fedsim.engine.fused import Rows, Sink, convert
from fedsim.engine.model import Functional
from fedsim.engine.task import Task
from fedsim.layout import Params
from fedsim.local import LocalTraining
from fedsim.models.dropout import dropout_key

_INSIDE = re.compile(r"/(torch|fedsim/engine)/")  # files that are not the user's


class Situation:
    """What the rows of a chunk know beside their batches, stacked: the batched form of `contracts.Context`.

    Args:
        task: what all rounds share.
        number: of the phase.
        lr: this round's local rate.
        stacked: field of a context → (R, …), or names of them.
        broadcast: what the rule sent, where all rows got the same; else it is among what is stacked.

    """

    def __init__(
        self, task: Task, number: int, lr: float, stacked: Mapping[str, Any], broadcast: Mapping[str, Any] | None = None
    ) -> None:
        self.task, self.number, self.lr, self.stacked, self.broadcast = task, number, lr, stacked, broadcast
        self.step_state: dict[str, Tensor] = {}

    def first(self, count: int) -> Any:
        """Return what is stacked, of the first rows."""
        return _first({**self.stacked, "step_state": self.step_state}, count)

    def keep(self, step_state: Mapping[str, Tensor], count: int) -> None:
        """Take the new step state of the first rows; rows that are done keep theirs."""
        old = self.step_state
        self.step_state = {n: torch.cat([v, old[n][count:]]) if n in old else v for n, v in step_state.items()}

    def context(self, mine: Mapping[str, Any], step: int) -> Context:
        """Return the context of one row from its slice of what is stacked."""
        return Context(
            received=mine["received"], broadcast=mine["broadcast"] if self.broadcast is None else self.broadcast,
            client_state=mine["client_state"], step_state=mine["step_state"], step=step, num_steps=mine["num_steps"],
            lr=self.lr, num_samples=mine["num_samples"], key=mine["key"], layout=self.task.shared, phase=self.number,
        )  # fmt: skip


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
        keep = 1 - lr * (training.weight_decay + mu)
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

    def __init__(self, task: Task, module: nn.Module) -> None:
        self.task, self.model = task, Functional(module)
        # A loss of its own, or a model that looks at a whole batch, must get exactly a row's samples: no repeats.
        self.of_batch = hasattr(task.objective, "loss")
        self.whole = self.of_batch or _mixes_samples(task)
        self.moving: tuple[str, ...] = ()

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Run the model under `vmap`."""
        self.model.module.eval()
        try:
            logits: Tensor = vmap(self.model)(params, x)
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
        """Run `grad_and_value` under `vmap`; rows whose batches differ in size go in groups where that matters."""
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
                    value = objective.loss(self.model, params, Batch(x, y), situation.context(mine, step.number))[0]
                else:
                    value = objective.criterion(self.model(params, x), y, weights)
                return value

        grads, losses = vmap(grad_and_value(loss))(*operands)
        return grads, losses


def lanes(task: Task, kernels: str, count: int) -> list[Gradient]:
    """Return `count` gradients that can run side by side.

    Raises:
        ValueError: the task cannot be batched that way.

    """
    if task.buffers.size:
        raise ValueError("the model has running statistics (batch norm?), which batched clients would share")
    # A copy each: `functional_call` swaps parameters in the module it runs. First of all, for a merged forward would
    # pass over a branch on a tensor's value, which `vmap` refuses.
    generic = [GenericGradient(task, copy.deepcopy(task.module)) for _ in range(count)]
    _same_logits(task, generic[0])
    alone = not any(hasattr(task.objective, name) for name in ("loss", "direction", "finish"))
    if kernels != "generic" and alone and not generic[0].whole:
        fused = [
            FusedGradient(task, *pair) for pair in (convert(task.module) for _ in range(count)) if pair is not None
        ]
        if fused and _same_logits(task, fused[0]):
            return list(fused)
    if kernels == "fused":
        raise ValueError("kernels=fused: a layer has no fused kernel, or the objective is more than a criterion")
    return list(generic)


def _two_rows(task: Task) -> tuple[Params, Tensor]:
    """Return two rows of unlike weights and two samples for each: enough to tell whether rows stay apart."""
    own = dict(task.module.named_parameters())
    names = (*task.shared.names, *task.local.names)
    params = {name: torch.stack([own[name].detach(), 1.5 * own[name].detach() + 0.1]) for name in names}
    size = min(2, len(task.x) // 2)
    x = task.x[: 2 * size]
    return params, x.view(2, size, *x.shape[1:])


@torch.no_grad()
def _mixes_samples(task: Task) -> bool:
    """Say whether a sample's logits depend on who else is in its batch."""
    task.module.eval()
    alone, together = task.module(task.x[:1]), task.module(task.x[:2])[:1]
    task.module.train()
    return not torch.allclose(alone, together, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))


@torch.no_grad()
def _same_logits(task: Task, gradient: Gradient) -> bool:
    """Say whether rows trained together see what each would see alone.

    A forward that mixes samples, or reads weights behind the layers' backs, is no fused one.

    Raises:
        ValueError: rows cannot be batched at all; the message names the line of the model that is in the way.

    """
    params, x = _two_rows(task)
    task.module.eval()
    try:
        model = Functional(task.module)
        alone = torch.stack([model({n: p[k] for n, p in params.items()}, x[k]) for k in (0, 1)])
        try:
            together = gradient.logits(params, x)
        except Exception as error:
            if gradient.fused:
                return False
            raise ValueError(f"clients cannot be batched: {users_line(error)}") from error
    finally:
        task.module.train()
    return bool(torch.allclose(alone, together, rtol=1e-3, atol=1e-4 * float(alone.abs().max())))


def users_line(error: BaseException) -> str:
    """Return what went wrong and the last line of the user's own code on the way there."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if not _INSIDE.search(f.filename.replace("\\", "/"))]
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    where = f"{own[-1].filename}:{own[-1].lineno}, `{own[-1].line}`: " if own else ""
    return f"{where}{message}"


def _first(tree: Any, count: int) -> Any:
    if isinstance(tree, Tensor):
        return tree[:count]
    return {name: _first(value, count) for name, value in tree.items()}


def _take(tree: Any, chosen: Tensor) -> Any:
    if isinstance(tree, Tensor):
        return tree[chosen]
    if isinstance(tree, tuple):
        return tuple(_take(value, chosen) for value in tree)
    return {name: _take(value, chosen) for name, value in tree.items()}
