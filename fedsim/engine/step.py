"""One local step of one client as a function of a list of tensors, which can be recorded."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from fedsim.engine.optimizer import BETAS, EPS
from fedsim.engine.precision import functional
from fedsim.engine.task import Job, Task, mean_criterion
from fedsim.models.dropout import KeyedDropout, dropout_key

ALIKE = torch.contiguous_format


class Step:
    """One local step of one client as a function of a list of tensors, of which it writes into some.

    The list: parameters, slots of the optimiser, what a version's clients share (received parameters where they are
    pulled there; 1 − η(λ + μ) for shared parameters and 1 − ηλ for personal ones; ημ or μ; η), inputs, labels, weights
    of the samples where some are padding, the key of dropout and keys of augmentation where there is any, and AdamW's
    two corrections.
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
        self.adaptive = self.training.optimizer == "adamw"
        self.plain = not (self.adaptive or self.training.momentum or self.training.clip_norm is not None)
        self.num_slots = 2 if self.adaptive else 1 if self.training.momentum else 0
        self.mean = mean_criterion(task.objective)
        self.drops = any(isinstance(module, KeyedDropout) for module in self.module.modules())

    def pull(self, job: Job, version: int) -> float:
        """Return μ of a version's clients."""
        sent = job.broadcasts.get(version, {})
        return float(sent.get("proximal_mu", getattr(self.task.objective, "proximal_mu", 0.0)))

    def common(self, start: Tensor, mu: float, lr: float, *, pulled: bool) -> list[Tensor]:
        """Return what clients of one version share."""
        decay = self.training.weight_decay
        numbers = (1 - lr * (decay + mu), 1 - lr * decay, lr * mu if self.plain else mu, lr)
        if self.adaptive:
            numbers = (1 - lr * decay, 1 - lr * decay, mu, lr)
        received = self.task.shared.split(start).values() if pulled else ()
        return [*received, *torch.tensor(numbers, dtype=self.task.dtype).unbind()]

    def corrections(self, lr: float, num_steps: int) -> list[list[Tensor]]:
        """Return AdamW's corrections of each step: of the second moment's root, and of the rate."""
        if not self.adaptive:
            return []
        table = [[(1 - BETAS[1] ** s) ** 0.5, lr / (1 - BETAS[0] ** s)] for s in range(1, num_steps + 1)]  # (S, 2)
        return [list(row.unbind()) for row in torch.tensor(table, dtype=self.task.dtype)]

    def example(self, size: int, *, padded: bool, pulled: bool, number: int = 0) -> list[Tensor]:
        """Return inputs of a step of that many samples."""
        task = self.task
        at = (torch.arange(size) + number * size) % len(task.x)
        params = [
            (1.0 + 0.5 * number) * p.contiguous(memory_format=torch.channels_last if name in self.apart else ALIKE)
            for name, p in zip(self.names, self.start, strict=True)
        ]
        slots = [torch.zeros_like(p) for _ in range(self.num_slots) for p in params]
        flat = torch.cat([task.x.new_empty(0, dtype=task.dtype), *(p.flatten() for p in params[: self.num_shared])])
        inputs = [self.x.index_select(0, at), task.y.index_select(0, at)]
        inputs += [torch.full((size,), 1 / size, dtype=task.dtype)] if padded else []
        inputs += [torch.full((), 7 + number, dtype=torch.int64)] if self.drops else []
        inputs += [at] if task.augment is not None else []
        common = self.common(flat, 0.0, task.training.lr, pulled=pulled)
        return [*params, *slots, *common, *inputs, *(row for rows in self.corrections(0.1, 1) for row in rows)]

    def __call__(self, tensors: list[Tensor], *, padded: bool, pulled: bool) -> Tensor:
        """Take a step in place and return the loss."""
        self.module.train()
        given = iter(tensors)
        params = list(islice(given, len(self.names)))
        slots = list(islice(given, self.num_slots * len(self.names)))
        received = list(islice(given, self.num_shared if pulled else 0))
        rates, x, y = list(islice(given, 4)), next(given), next(given)
        weights = next(given) if padded else None
        key = next(given) if self.drops else torch.zeros((), dtype=torch.int64)
        if self.task.augment is not None:
            x = self.task.augment(x, next(given))
        loss, grads = self._gradient(params, (x, y, weights), key, rates[3])
        if self.plain:
            self._descend(params, grads, received, rates, pulled=pulled)
        else:
            self._two_pass(params, grads, slots, received, rates, list(given), pulled=pulled)
        return loss

    def _gradient(
        self, params: list[Tensor], batch: tuple[Tensor, Tensor, Tensor | None], key: Tensor, lr: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and its gradient; times the rate where that is all that a step does with it."""
        task, (x, y, weights) = self.task, batch
        moved = [p.detach().requires_grad_() for p in params]
        with torch.enable_grad(), dropout_key(key):
            logits = self.model(dict(zip(self.names, moved, strict=True)), x)
            if weights is None and self.mean is not None:
                loss = self.mean(logits, y)
            else:
                even = torch.full((len(y),), 1 / len(y), dtype=task.dtype) if weights is None else weights
                loss = task.objective.criterion(logits, y, even)
            # Not as `grad_outputs`, whose check imports half a second's worth of symbolic algebra.
            grads = torch.autograd.grad(loss * lr if self.plain else loss, moved, allow_unused=True)
        return loss.detach(), [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]

    def _descend(
        self, params: list[Tensor], grads: list[Tensor], received: list[Tensor], rates: list[Tensor], *, pulled: bool
    ) -> None:
        """Take a step of plain sgd: w ← (1 − η(λ + μ)) w + ημ w_received − ηg."""
        keep, keep_local, pull, _ = rates
        for k, (p, g) in enumerate(zip(params, grads, strict=True)):
            shared = k < self.num_shared
            if self.training.weight_decay or (pulled and shared):
                p.mul_(keep if shared else keep_local)
            if pulled and shared:
                p.addcmul_(received[k], pull)
            p.sub_(g)

    def _two_pass(  # noqa: PLR0913  as the step
        self, params: list[Tensor], grads: list[Tensor], slots: list[Tensor], received: list[Tensor],
        rates: list[Tensor], corrections: list[Tensor], *, pulled: bool,
    ) -> None:  # fmt: skip
        """Take a step that needs the whole gradient first: clipping, momentum, AdamW; as `Optimizer` does."""
        keep, _, mu, lr = rates
        training = self.training
        grads = [g.clone() if g.is_contiguous() else g.contiguous() for g in grads] if pulled else grads
        if pulled:
            for k in range(self.num_shared):
                grads[k] = grads[k] + (params[k] - received[k]) * mu
        if training.clip_norm is not None:
            squares = torch.stack([g.square().sum() for g in grads]).sum()
            factor = (training.clip_norm / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)
            grads = [g * factor for g in grads]
        count = len(params)
        if self.adaptive:
            root, rate = corrections
            for p, g, m, v in zip(params, grads, slots[:count], slots[count:], strict=True):
                if training.weight_decay:
                    p.mul_(keep)
                m.lerp_(g, 1 - BETAS[0])
                v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
                p.sub_(m * rate / (v.sqrt().div_(root).add_(EPS)))
            return
        for k, (p, g) in enumerate(zip(params, grads, strict=True)):
            step = g + training.weight_decay * p if training.weight_decay else g
            if training.momentum:
                slots[k].mul_(training.momentum)
                slots[k].add_(step)
                step = slots[k]
            p.addcmul_(step, lr, value=-1)
