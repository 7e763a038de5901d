"""One local step of one client as a function of a list of tensors, which can be recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedsim.contracts import Batch, Context
from fedsim.engine.late import TURNS, Late
from fedsim.engine.optimizer import BETAS, EPS
from fedsim.engine.precision import functional
from fedsim.engine.stepping import kept, places
from fedsim.engine.task import BUFFER, LOCAL, Job, Task, mean_criterion
from fedsim.layout import Params
from fedsim.models.dropout import KeyedDropout, dropout_key

ALIKE = torch.contiguous_format


class Kind(NamedTuple):
    """What a step's operations hang on beside its inputs."""

    size: int  # samples of the batch
    padded: bool  # whether some of them are padding
    pulled: bool  # whether the rule or the objective pulls shared parameters towards what was received
    sent: tuple[str, ...]  # names of what the rule sends
    turn: int  # number of the step in its round, at most `TURNS`


class Step:
    """One local step of one client as a function of a list of tensors, of which it writes into some.

    The list: parameters; slots of the optimiser; what a version's clients share (received parameters where they are
    asked for; 1 − η(λ + μ) for shared parameters and 1 − ηλ for personal ones; ημ or μ; η; what the rule sent); where
    the objective has a context, the client's own (state, number of steps, samples, key); inputs, labels, weights of
    samples where some are padding, key of dropout and keys of augmentation where there is any; AdamW's two corrections;
    and the step state that the last step left. It returns the loss and the step state.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.training = task, task.training
        self.module = task.module
        self.model = functional(task, self.module)
        self.names = [*task.shared.names, *task.local.names]
        own = dict(self.module.named_parameters())
        convolves = any(isinstance(m, nn.Conv2d) for m in self.module.modules()) and task.x.dim() == 4
        self.x = task.x.contiguous(memory_format=torch.channels_last) if convolves else task.x
        shared = set(task.shared.names)
        self.apart = [n for n in self.names if convolves and n in shared and own[n].dim() == 4]
        self.start = [own[name].detach() for name in self.names]
        self.num_shared = len(task.shared.names)
        self.turns = hasattr(task.objective, "direction")
        self.of_batch = hasattr(task.objective, "loss")
        self.finishes = hasattr(task.objective, "finish")
        self.situated = self.turns or self.of_batch or self.finishes  # has a context
        self.state = [name for name in task.store.first if not name.startswith((LOCAL, BUFFER))]
        self.adaptive = self.training.optimizer == "adamw"
        self.plain = not (self.adaptive or self.training.momentum or self.training.clip_norm is not None or self.turns)
        self.num_slots = 2 if self.adaptive else 1 if self.training.momentum else 0
        self.mean = mean_criterion(task.objective)
        # A loss of its own may hold a dropout too.
        self.drops = self.of_batch or any(isinstance(module, KeyedDropout) for module in self.module.modules())
        self.carried: dict[Kind, tuple[str, ...]] = {}  # names of the step state that a kind of step leaves

    def start_from(self, weights: Tensor) -> None:
        """Let examples start from weights (D,) of a round: the module's own may be in training."""
        own = dict(self.module.named_parameters())
        local = [own[name].detach() for name in self.task.local.names]
        self.start = [*self.task.shared.split(weights).values(), *local]

    def pull(self, job: Job, version: int) -> float:
        """Return μ of a version's clients."""
        sent = job.broadcasts.get(version, {})
        return float(sent.get("proximal_mu", getattr(self.task.objective, "proximal_mu", 0.0)))

    def common(self, start: Tensor, mu: float, lr: float, sent: Mapping[str, Any], *, pulled: bool) -> list[Tensor]:
        """Return what clients of one version share."""
        decay, dtype = self.training.weight_decay, self.task.dtype
        numbers = (1 - lr * (decay + mu), 1 - lr * decay, lr * mu if self.plain else mu, lr)
        if self.adaptive:
            numbers = (1 - lr * decay, 1 - lr * decay, mu, lr)
        received = self.task.shared.split(start).values() if pulled or self.situated else ()
        told = [sent[name] for name in sorted(sent)] if self.situated else []
        values = [torch.as_tensor(v, dtype=dtype if isinstance(v, float) else None) for v in told]
        return [*received, *torch.tensor(numbers, dtype=dtype).unbind(), *values]

    def corrections(self, lr: float, num_steps: int) -> list[list[Tensor]]:
        """Return AdamW's corrections of each step: of the second moment's root, and of the rate."""
        if not self.adaptive:
            return []
        table = [[(1 - BETAS[1] ** s) ** 0.5, lr / (1 - BETAS[0] ** s)] for s in range(1, num_steps + 1)]  # (S, 2)
        return [list(row.unbind()) for row in torch.tensor(table, dtype=self.task.dtype)]

    def example(self, kind: Kind, sent: Mapping[str, Any], carried: list[Tensor], number: int = 0) -> list[Tensor]:
        """Return inputs of a step."""
        task, size = self.task, kind.size
        at = (torch.arange(size) + number * size) % len(task.x)
        params = [
            (1.0 + 0.5 * number) * p.contiguous(memory_format=torch.channels_last if name in self.apart else ALIKE)
            for name, p in zip(self.names, self.start, strict=True)
        ]
        slots = [torch.zeros_like(p) for _ in range(self.num_slots) for p in params]
        asked = params[: self.num_shared] if kind.pulled or self.situated else []
        flat = torch.cat([task.x.new_empty(0, dtype=task.dtype), *(p.flatten() for p in asked)])  # (D,) or (0,)
        inputs = [self.x.index_select(0, at), task.y.index_select(0, at)]
        inputs += [torch.full((size,), 1 / size, dtype=task.dtype)] if kind.padded else []
        inputs += [torch.full((), 7 + number, dtype=torch.int64)] if self.drops else []
        inputs += [at] if task.augment is not None else []
        inputs += [row for rows in self.corrections(0.1, 1) for row in rows]
        common = self.common(flat, 0.0, task.training.lr, sent, pulled=kind.pulled)
        told = len(common) - len(kind.sent) if self.situated else len(common)
        common = [*common[:told], *_moved(common[told:], number)]
        return [*params, *slots, *common, *self.mine(number), *inputs, *_moved(carried, number)]

    def num_inputs(self, kind: Kind) -> int:
        """Return how many inputs of a step the list holds, between what is a client's own and the step state."""
        return 2 + kind.padded + self.drops + (self.task.augment is not None) + 2 * self.adaptive

    def mine(self, number: int) -> list[Tensor]:
        """Return an example of what is a client's own."""
        if not self.situated:
            return []
        numbers = [torch.tensor(value + number, dtype=torch.int64) for value in (TURNS + 2, 10, 3)]
        return [*_moved([self.task.store.first[name] for name in self.state], number), *numbers]

    def _parse(self, given: Iterator[Tensor], kind: Kind) -> tuple[list[Tensor], list[Tensor], list[Tensor], Context]:
        """Return parameters, slots, rates and the context of a list's begin."""
        params = list(islice(given, len(self.names)))
        slots = list(islice(given, self.num_slots * len(self.names)))
        asked = kind.pulled or self.situated
        received = dict(zip(self.task.shared.names, islice(given, self.num_shared if asked else 0), strict=False))
        rates = list(islice(given, 4))
        sent: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        numbers: list[Tensor] = [torch.zeros((), dtype=torch.int64)] * 3
        if self.situated:
            sent = dict(zip(kind.sent, islice(given, len(kind.sent)), strict=True))
            state = dict(zip(self.state, islice(given, len(self.state)), strict=True))
            numbers = list(islice(given, 3))
        number = kind.turn if kind.turn < TURNS else Late(kind.turn)
        context = Context(
            received=received, broadcast=sent, client_state=state, step_state={}, step=number, num_steps=numbers[0],
            lr=rates[3], num_samples=numbers[1], key=numbers[2], layout=self.task.shared,  # type: ignore[arg-type]
        )  # fmt: skip
        return params, slots, rates, context

    def __call__(self, tensors: list[Tensor], kind: Kind, before: tuple[str, ...] = ()) -> list[Tensor]:
        """Take a step in place and return the loss, then the step state, whose names go to `carried`.

        Args:
            tensors: the list.
            kind: of the step.
            before: names of the step state that the last step left.

        """
        self.module.train()
        given = iter(tensors)
        params, slots, rates, context = self._parse(given, kind)
        x, y = next(given), next(given)
        weights = next(given) if kind.padded else None
        key = next(given) if self.drops else torch.zeros((), dtype=torch.int64)
        if self.task.augment is not None:
            x = self.task.augment(x, next(given))
        corrections = list(islice(given, 2 if self.adaptive else 0))
        context.__dict__["step_state"] = dict(zip(before, given, strict=True))
        loss, grads = self._gradient(params, (x, y, weights), key, context)
        received = list(context.received.values()) if kind.pulled else []
        if self.plain:
            self._descend(params, grads, received, rates)
            self.carried[kind] = ()
            return [loss]
        state = self._two_pass(params, grads, slots, received, rates, corrections, context)
        self.carried[kind] = tuple(sorted(state))  # sorted, for the order may change from step to step
        return [loss, *(state[name] for name in self.carried[kind])]

    def finish(self, tensors: list[Tensor], kind: Kind, before: tuple[str, ...]) -> tuple[list[str], list[Tensor]]:
        """End a client's round, from a list without inputs of a step; return names and values of what it leaves.

        Names are prefixed by what they are: "state/", "extra/", and "weight".
        """
        given = iter(tensors)
        params, _, _, context = self._parse(given, kind)
        context.__dict__["step_state"] = dict(zip(before, given, strict=True))
        own = {name: p.detach() for name, p in zip(self.names, params, strict=True)}
        state, extras, weight = self.task.objective.finish(own, context)
        # What is handed on from the old state must not be what the new state is written over.
        state = kept(state, places({**own, **context.client_state}))
        left = {f"state/{name}": value for name, value in state.items()}
        left |= {f"extra/{name}": value for name, value in extras.items()}
        if weight is not None:
            left["weight"] = torch.as_tensor(weight, dtype=torch.float64)
        return list(left), [value.to(torch.float64) if name == "weight" else value for name, value in left.items()]

    def _gradient(
        self, params: list[Tensor], batch: tuple[Tensor, Tensor, Tensor | None], key: Tensor, context: Context
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and its gradient; times the rate where that is all that a step does with it."""
        objective, (x, y, weights) = self.task.objective, batch
        moved = [p.detach().requires_grad_() for p in params]
        named = dict(zip(self.names, moved, strict=True))
        with torch.enable_grad(), dropout_key(key):
            if self.of_batch:
                loss = objective.loss(self.model, named, Batch(x, y), context)[0]
            elif weights is None and self.mean is not None:
                loss = self.mean(self.model(named, x), y)
            else:
                even = torch.full((len(y),), 1 / len(y), dtype=self.task.dtype) if weights is None else weights
                loss = objective.criterion(self.model(named, x), y, even)
            # Not as `grad_outputs`, whose check imports half a second's worth of symbolic algebra.
            grads = torch.autograd.grad(loss * context.lr if self.plain else loss, moved, allow_unused=True)
        return loss.detach(), [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]

    def _descend(self, params: list[Tensor], grads: list[Tensor], received: list[Tensor], rates: list[Tensor]) -> None:
        """Take a step of plain sgd: w ← (1 − η(λ + μ)) w + ημ w_received − ηg."""
        keep, keep_local, pull, _ = rates
        for k, (p, g) in enumerate(zip(params, grads, strict=True)):
            pulled = k < len(received)
            if self.training.weight_decay or pulled:
                p.mul_(keep if k < self.num_shared else keep_local)
            if pulled:
                p.addcmul_(received[k], pull)
            p.sub_(g)

    def _two_pass(  # noqa: PLR0913  as the step
        self, params: list[Tensor], grads: list[Tensor], slots: list[Tensor], received: list[Tensor],
        rates: list[Tensor], corrections: list[Tensor], context: Context,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Take a step that needs the whole gradient first: pull, clipping, direction and optimiser."""
        keep, _, mu, lr = rates
        training, count = self.training, len(params)
        for k in range(len(received)):
            grads[k] = grads[k] + (params[k] - received[k]) * mu
        if training.clip_norm is not None:
            squares = torch.stack([g.square().sum() for g in grads]).sum()
            factor = (training.clip_norm / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)
            grads = [g * factor for g in grads]
        grads, state = self._turned(params, grads, context)
        rate = lr * state["lr_scale"].to(lr.dtype) if "lr_scale" in state else lr
        if self.adaptive:
            root, corrected = corrections
            if "lr_scale" in state:
                keep, corrected = 1 - rate * training.weight_decay, corrected * state["lr_scale"].to(lr.dtype)
            for p, g, m, v in zip(params, grads, slots[:count], slots[count:], strict=True):
                if training.weight_decay:
                    p.mul_(keep)
                m.lerp_(g, 1 - BETAS[0])
                v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
                p.sub_(m * corrected / (v.sqrt().div_(root).add_(EPS)))
            return state
        for k, (p, g) in enumerate(zip(params, grads, strict=True)):
            step = g + training.weight_decay * p if training.weight_decay else g
            if training.momentum:
                slots[k].mul_(training.momentum)
                slots[k].add_(step)
                step = slots[k]
            p.addcmul_(step, rate, value=-1)
        return state

    def _turned(self, params: list[Tensor], grads: list[Tensor], context: Context) -> tuple[list[Tensor], Params]:
        """Let the objective turn a gradient; return it with the step state."""
        if not self.turns:
            return grads, {}
        now = dict(zip(self.names, params, strict=True))
        given, moving = dict(zip(self.names, grads, strict=True)), places(now)
        turned, state = self.task.objective.direction(given, now, context)
        turned, state = kept(turned, moving), kept(state, moving)
        return [turned[name] for name in self.names], dict(state)


def _moved(values: list[Tensor], number: int) -> list[Tensor]:
    """Return copies of values, other ones for another number."""
    return [v.clone() * (1 + 0.1 * number) + 0.01 * number if v.is_floating_point() else v.clone() for v in values]
